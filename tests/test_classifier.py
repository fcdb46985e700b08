"""Classifiers: costs as executed, int8 logits near float ones, a head from the seed that is always trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertForMaskedLM

from edgegt.architecture import all_layers, outputs_of
from edgegt.budget import Need
from edgegt.classifier import (
    as_classifier,
    classifier_positions,
    fresh_numel,
    fresh_of,
    known_labels,
    reading_of,
    reads_both_ways,
)
from edgegt.cost import BatchShape, CostTable
from edgegt.data import collate, split_micro
from edgegt.disk import Lines
from edgegt.errors import InputError
from edgegt.held import held_terms
from edgegt.importance import importance
from edgegt.loss import class_logits, supervised_loss
from edgegt.memory import Formats, Setting, Surroundings, peak_terms
from edgegt.optimizer import AdamW
from edgegt.patch import apply_patch, save_patch
from edgegt.quant import ReferenceBackend
from edgegt.selection import Trainables
from edgegt.trace import trace
from edgegt.train import Parts, Progress, Recipe, train_round
from edgegt.watch import MemoryWatch
from tiny_classifiers import (
    CLASSIFIERS,
    ENCODERS,
    LABELS,
    classes_batch,
    config_of,
    float_classifier,
    load_classifier,
    rows_of_ids,
    save_classifier,
)
from tiny_models import CPU, EVERY, load, save_model, some_selections

QUICK = ("bert", "roberta", "llama", "gpt2")
FAMILIES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CLASSIFIERS]
_tables: dict[tuple[str, bool], CostTable] = {}


def table_of(family: str, fresh: bool = True) -> CostTable:
    if (family, fresh) not in _tables:
        _tables[family, fresh] = trace(config_of(family, fresh))
    return _tables[family, fresh]


def selections(table: CostTable, count: int) -> list[set[str]]:
    return some_selections([weight.name for weight in table.weights], count)


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "trained"])
@pytest.mark.parametrize("family", FAMILIES)
def test_flops_of_a_selection_are_those_that_the_float_model_executes(family: str, fresh: bool) -> None:
    table, config = table_of(family, fresh), config_of(family, fresh)
    model, shape = float_classifier(config), BatchShape(3, 20, 1)
    parameters = dict(model.named_parameters())
    ids = torch.randint(3, 300, (shape.rows, shape.tokens))
    for selected in selections(table, 8):
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in selected or name in fresh_of(config))
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sum().backward()
        found = table.train_work(table.mask(selected)).at(shape)
        assert found == pytest.approx(counter.get_total_flops(), rel=1e-3), selected


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "trained"])
@pytest.mark.parametrize("family", FAMILIES)
def test_int8_logits_are_close_to_float_logits(family: str, fresh: bool, tmp_path: Path) -> None:
    reference = save_classifier(tmp_path / "model", family, fresh)
    model = load_classifier(tmp_path / "model", tmp_path / "cache")
    assert bool(model.fresh) == fresh
    assert model.labels == LABELS and model.head == ""
    batch = classes_batch(family)
    with torch.no_grad():
        expected, found = class_logits(reference, batch, CPU), class_logits(model.module, batch, CPU)
    assert found.shape == (6, len(LABELS))
    assert float((found - expected).norm() / expected.norm()) < 0.06


@pytest.mark.parametrize("family", FAMILIES)
def test_its_weights_are_those_of_the_cost_table(family: str, tmp_path: Path) -> None:
    save_classifier(tmp_path / "model", family, True)
    model, table = load_classifier(tmp_path / "model", tmp_path / "cache"), table_of(family)
    assert {weight.name for weight in table.weights} == {*model.linears, *model.vectors}
    assert {weight.name: weight.shape for weight in table.always} == {n: tuple(p.shape) for n, p in model.fresh.items()}
    assert len(all_layers(model.module)) == table.blocks
    assert sum(weight.numel for weight in table.always) == fresh_numel(model.module.config)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family: str, tmp_path: Path) -> None:
    save_classifier(tmp_path / "model", family, False)
    model, batch = load_classifier(tmp_path / "model", tmp_path / "cache", ReferenceBackend()), classes_batch(family)
    assert not bool(batch.attention_mask.all())
    assert bool(batch.attention_mask[:, 0].all()) == (family in ENCODERS)
    with torch.no_grad():
        whole = class_logits(model.module, batch, CPU)
        for row, found in enumerate(whole):
            length = int(batch.attention_mask[row].sum())
            ids = batch.input_ids[row][batch.attention_mask[row].bool()].unsqueeze(0)
            alone = model.module(input_ids=ids, attention_mask=torch.ones(1, length, dtype=torch.int64)).logits
            torch.testing.assert_close(alone[0], found, rtol=0.02, atol=0.02 * float(whole.abs().max()))


class Run:
    """A classifier in int8 with tensors selected."""

    def __init__(self, folder: Path, names: set[str], name: str = "run") -> None:
        self.path = folder.parent / name
        self.path.mkdir()
        self.model = load_classifier(folder, folder.parent / "cache")
        self.trainables = Trainables(self.model, AdamW(False), self.path / "parked")
        self.trainables.select(names)
        self.losses: list[float] = []

    def train(self, batches: list[Any], micro_batch: int, lr: float = 1e-3) -> None:
        live, model = self.trainables.live, self.model
        parts = Parts(
            model.module, CPU, live, self.trainables.step, model.inputs.clear, model.meter, MemoryWatch(False)
        )
        recipe = Recipe(lambda step: lr, 1e9, len(batches), 1 << 62, lambda shape: 0)
        train_round(
            parts, recipe, [(0.0, batch) for batch in batches], micro_batch, 0, Progress(),
            Lines(self.path / "metrics.jsonl"), lambda entry: self.losses.append(entry["loss"]),
            fused=all(batch.shape.rows <= micro_batch for batch in batches),
        )  # fmt: skip


@pytest.mark.parametrize("fresh", [True, False], ids=["fresh", "trained"])
@pytest.mark.parametrize("family", FAMILIES)
def test_flops_counted_while_running_are_the_tables(family: str, fresh: bool, tmp_path: Path) -> None:
    save_classifier(tmp_path / "model", family, fresh)
    table, run = table_of(family, fresh), Run(tmp_path / "model", set())
    batches = [classes_batch(family, 4, seed) for seed in range(2)]
    for selected in selections(table, 3):
        run.trainables.select(selected)
        before = run.model.meter.total
        run.train(batches, 2)
        counted = run.model.meter.total - before
        expected = table.train_work(table.mask(selected)).total(batch.shape for batch in batches)
        assert counted == pytest.approx(expected, rel=1e-3), selected


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_of_importance_are_the_tables(family: str, tmp_path: Path) -> None:
    save_classifier(tmp_path / "model", family, True)
    model, table = load_classifier(tmp_path / "model", tmp_path / "cache"), table_of(family)
    before = {name: value.detach().clone() for name, value in model.fresh.items()}
    batches = [classes_batch(family, 4, seed) for seed in range(2)]
    values = importance(model, batches, all_layers(model.module))
    assert model.meter.total == pytest.approx(table.probe_work().total(b.shape for b in batches), rel=1e-3)
    assert set(values) == {weight.name for weight in table.weights}
    assert sum(value > 0 for value in values.values()) >= 5  # labels are drawn: most halves disagree
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.fresh.items())


def test_importance_is_the_statistic_of_a_float_models_gradients(tmp_path: Path) -> None:
    """Of matrices by halves of a batch, of vectors by batches, as of a language model."""
    reference = save_classifier(tmp_path / "model", "bert", False)
    model = load_classifier(tmp_path / "model", tmp_path / "cache")
    batches = [classes_batch("bert", 8, seed) for seed in range(2)]
    found = importance(model, batches, all_layers(model.module))
    parameters = dict(reference.named_parameters())

    def gradients(part: Any, count: int) -> dict[str, torch.Tensor]:
        reference.zero_grad(set_to_none=True)
        (supervised_loss(reference, part, CPU) / count).backward()
        return {name: parameters[name].grad.clone() for name in found}

    def agreement(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a * b.sign()).sum() + (b * a.sign()).sum())

    expected = dict.fromkeys(found, 0.0)
    wholes = [gradients(batch, 8) for batch in batches]
    halves = [[gradients(half, 8) for half in split_micro(batch, 4)] for batch in batches]
    for name in found:
        if name in model.linears:
            expected[name] = sum(agreement(a[name], b[name]) for a, b in halves) / 2
        else:
            expected[name] = agreement(wholes[0][name], wholes[1][name]) / 2
    pairs = torch.tensor([[found[name], max(0.0, expected[name])] for name in found]).T
    assert float(torch.corrcoef(pairs)[0, 1]) > 0.95
    assert found["classifier.weight"] == pytest.approx(expected["classifier.weight"], rel=0.25)


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_micro_batches_give_what_one_batch_gives(micro_batch: int, tmp_path: Path) -> None:
    save_classifier(tmp_path / "model", "bert", True)
    names = {"bert.encoder.layer.1.output.dense.weight", "bert.pooler.dense.bias"}
    whole, parts = (Run(tmp_path / "model", names, name) for name in ("whole", "parts"))
    batch = classes_batch("bert", 6)
    whole.train([batch], 6)
    parts.train([batch], micro_batch)
    assert parts.losses == pytest.approx(whole.losses, rel=1e-3)
    for name in whole.model.fresh:
        ours, theirs = (run.trainables.optimizer.states[name].first for run in (parts, whole))
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02 * float(theirs.abs().max()))


def test_the_loss_is_the_cross_entropy_of_the_rows() -> None:
    model, batch = float_classifier(config_of("bert")), classes_batch("bert")
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    expected = cross_entropy(logits, batch.labels[:, 0], reduction="sum")
    torch.testing.assert_close(supervised_loss(model, batch, CPU), expected)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_fresh_head_is_always_trained_and_drawn_from_the_seed(family: str, tmp_path: Path) -> None:
    save_classifier(tmp_path / "model", family, True)
    some = next(
        name for name in (w.name for w in table_of(family).weights) if name.endswith("norm.weight") or "Norm" in name
    )
    run = Run(tmp_path / "model", {some})
    begun = {name: value.detach().clone() for name, value in run.model.fresh.items()}
    again = load_classifier(tmp_path / "model", tmp_path / "cache")
    assert all(torch.equal(value, again.fresh[name]) for name, value in begun.items())
    source_names = set(run.model.source.files)
    other = as_classifier(CLASSIFIERS[family](), LABELS, 1, source_names)
    assert fresh_of(other) == tuple(begun)
    run.train([classes_batch(family)] * 2, 6)
    assert set(run.trainables.live) == {some, *begun}
    assert all(not torch.equal(value, begun[name]) for name, value in run.model.fresh.items())
    run.trainables.select(())
    assert set(run.trainables.live) == set(begun)
    assert set(run.trainables.resting) == {some}


def test_memory_of_a_fresh_head_is_planned_as_it_is_held(tmp_path: Path) -> None:
    save_classifier(tmp_path / "model", "roberta", True)
    table, run = table_of("roberta"), Run(tmp_path / "model", set())
    names = [weight.name for weight in table.weights if "layer.2" in weight.name]
    run.trainables.select(names)
    run.train([classes_batch("roberta")], 6)
    formats = Formats("float32", "float32")
    setting = Setting(BatchShape(6, 32, 1), outputs_of(run.model.module.config), False, formats)
    terms = peak_terms(table, names, (), Surroundings(0), setting)
    held = held_terms(run.trainables)
    for name in ("masters", "planes", "optimizer"):  # a tensor's states count their steps beside their moments
        assert held[name] == pytest.approx(terms[name], abs=8 * len(run.trainables.live)), name


def test_bytes_that_backward_keeps_are_those_of_the_table(tmp_path: Path) -> None:
    save_classifier(tmp_path / "model", "bert", True)
    table, run = table_of("bert"), Run(tmp_path / "model", set())
    batch = classes_batch("bert", 8)
    for selected in selections(table, 3):
        run.trainables.select(selected)
        stay = {p.untyped_storage().data_ptr() for p in run.model.module.parameters()}
        seen: dict[int, int] = {}

        def note(tensor: torch.Tensor, stay: set[int] = stay, seen: dict[int, int] = seen) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in stay:
                seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = supervised_loss(run.model.module, batch, CPU)
        kept = table.saved_work(table.mask(selected)).at(batch.shape)
        assert sum(seen.values()) == pytest.approx(kept, rel=0.1, abs=4096), selected
        del loss
        run.model.inputs.clear()


def test_a_table_with_a_fresh_head_survives_json() -> None:
    table = table_of("bert")
    assert CostTable.from_json(table.to_json()) == table
    assert [weight.name for weight in table.always] == ["classifier.weight", "classifier.bias"]


def test_a_patch_of_one_task_is_refused_on_the_other(tmp_path: Path) -> None:
    save_model(tmp_path / "llama", EVERY["llama"]())
    language = load(tmp_path / "llama", tmp_path / "cache")
    classes = load_classifier(tmp_path / "llama", tmp_path / "cache")
    assert language.fingerprint == classes.fingerprint
    norm = {"model.norm.weight": torch.ones(64)}
    save_patch(tmp_path / "words", norm, language.fingerprint, "m", "0")
    save_patch(tmp_path / "classes", norm, language.fingerprint, "m", "0", labels=LABELS)
    save_patch(tmp_path / "others", norm, language.fingerprint, "m", "0", labels=("a", "b", "c"))
    with pytest.raises(InputError, match="was trained to answer in words"):
        apply_patch(classes, tmp_path / "words")
    with pytest.raises(InputError, match="was trained with --task classification"):
        apply_patch(language, tmp_path / "classes")
    with pytest.raises(InputError, match="tells the classes a, b, c apart"):
        apply_patch(classes, tmp_path / "others")
    assert apply_patch(classes, tmp_path / "classes")["labels"] == '["circle", "line", "point"]'


def test_a_head_in_the_files_is_used_for_its_own_classes_only(tmp_path: Path) -> None:
    config = config_of("roberta", fresh=False)
    assert known_labels(config) == LABELS and fresh_of(config) == ()
    stored = {name for name, _ in float_classifier(config).named_parameters()}
    assert fresh_of(as_classifier(config, LABELS, 0, stored)) == ()
    other = as_classifier(config, ("yes", "no", "perhaps"), 0, stored)
    assert all(name.startswith("classifier.") for name in fresh_of(other)) and len(fresh_of(other)) == 4


def test_what_is_no_classifier_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"'t5' is an encoder-decoder.*answer with the label's word"):
        reading_of(EVERY["t5"]())
    config = EVERY["llama"]()
    config.__class__ = type("Unknown", (type(config),), {"model_type": "unknown"})
    with pytest.raises(InputError, match="'unknown' has no classification in transformers"):
        reads_both_ways(config)


def test_positions_that_are_numbered_behind_the_paddings_id_are_fewer() -> None:
    found = {name: classifier_positions(CLASSIFIERS[name]()) for name in ("bert", "roberta", "gpt2")}
    assert found == {"bert": 64, "roberta": 64, "gpt2": 128}


def test_a_masked_language_model_has_no_pooler_either(tmp_path: Path) -> None:
    masked = BertForMaskedLM(CLASSIFIERS["bert"]()).eval()
    masked.save_pretrained(tmp_path / "model")
    model = load_classifier(tmp_path / "model", tmp_path / "cache")
    expected = ["bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"]
    assert list(model.fresh) == expected
    config = CLASSIFIERS["bert"]()
    config.architectures = ["BertForMaskedLM"]
    assert list(fresh_of(as_classifier(config, LABELS, 0, None))) == expected
    batch, trainables = classes_batch("bert"), Trainables(model, AdamW(False), tmp_path / "parked")
    table = trace(model.module.config)
    name = "bert.encoder.layer.0.output.dense.weight"
    trainables.select({name})
    supervised_loss(model.module, batch, CPU).backward()
    assert model.meter.total == table.train_work(table.mask([name])).at(batch.shape)


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2"])
def test_rows_as_long_as_the_model_has_positions_run(family: str, tmp_path: Path) -> None:
    save_classifier(tmp_path / "model", family, True)
    model, config = load_classifier(tmp_path / "model", tmp_path / "cache"), CLASSIFIERS[family]()
    length = classifier_positions(config)
    assert length is not None
    rows = [replace(one, prompt=tuple(range(3, 3 + length))) for one in rows_of_ids(family, 2)]
    batch = collate(rows, config.pad_token_id)
    assert batch.shape.tokens == length
    assert bool(torch.isfinite(class_logits(model.module, batch, CPU)).all())


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_no_room_is_kept_for_answers_that_a_classifier_does_not_write(family: str) -> None:
    need = Need(trace(config_of(family)), 0, len(LABELS), BatchShape(1, 64, 1))
    assert need.answer_bytes(4, 1000) == need.evaluation_bytes(4, 1000)
