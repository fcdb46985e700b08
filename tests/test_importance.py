"""Importance: it leaves everything as found, and equals the same statistic of a float model's gradients."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

import edgegt.chunks
import edgegt.importance
from edgegt.architecture import all_layers
from edgegt.cost import BatchShape
from edgegt.data import Batch, collate, split_micro
from edgegt.head import logit_map
from edgegt.importance import importance
from edgegt.loss import kept_hidden, supervised_loss
from edgegt.memory import Surroundings
from edgegt.model import Int8Model
from edgegt.optimizer import AdamW
from edgegt.planner import Problem, plan
from edgegt.quant import dequantize
from edgegt.selection import Trainables
from edgegt.trace import trace
from tiny_models import EVERY, FAMILIES, VOCABULARY, batch_of, examples, float_model, load, save_model, start_of

COMPARED = ("llama", "gpt2", "opt", "mixtral", "qwen2-moe", "flan-t5")


def model_of(family: str, folder: Path) -> Int8Model:
    if not (folder / "model").exists():
        save_model(folder / "model", EVERY[family]())
    return load(folder / "model", folder / "cache")


def measure(model: Int8Model, batches: list[Batch], head_rows: torch.Tensor | None = None) -> dict[str, float]:
    return importance(model, batches, all_layers(model.module), head_rows)


def batches_of(
    seed: int = 0, rows: int = 8, count: int = 2, vocabulary: int = VOCABULARY, start: int | None = None
) -> list[Batch]:
    rows_of_one_length = [replace(one, start=start) for one in examples(rows * count, seed, vocabulary)]
    return [collate(rows_of_one_length[first : first + rows], 0) for first in range(0, rows * count, rows)]


def float_twin(model: Int8Model, family: str) -> Any:
    """transformers' float model, untied, holding the int8 model's dequantised weights."""
    twin = float_model(EVERY[family](), untied=True)
    parameters = dict(twin.named_parameters())
    with torch.no_grad():
        for name, linear in model.linears.items():
            value, place = dequantize(linear.weight), parameters[name]
            place.copy_(value.t() if place.shape == value.shape[::-1] != value.shape else value.reshape(place.shape))
        for name, vector in model.vectors.items():
            parameters[name].copy_(vector)
        for name, module in model.module.named_modules():
            if type(module).__name__ == "Int8Embedding":
                parameters[f"{name}.weight"].copy_(dequantize(module.weight))
            elif "Positional" in type(module).__name__ or name.endswith(("wpe", "relative_attention_bias")):
                parameters[f"{name}.weight"].copy_(module.weight)
    return twin


def float_gradients(twin: Any, batch: Batch, supervised: int) -> dict[str, torch.Tensor]:
    twin.zero_grad(set_to_none=True)
    (supervised_loss(twin, batch, torch.device("cpu")) / supervised).backward()
    return {name: p.grad.clone() for name, p in twin.named_parameters() if p.grad is not None}


def cross(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a * b.sign()).sum() + (b * a.sign()).sum())


def reference(twin: Any, batches: list[Batch], model: Int8Model) -> dict[str, float]:
    """The documented statistic, from two separate passes per batch (linears), or one per batch (vectors)."""
    values = dict.fromkeys([*model.linears, *model.vectors], 0.0)  # of experts too: their gradients are one stack
    whole: list[dict[str, torch.Tensor]] = []
    for batch in batches:
        halves = split_micro(batch, batch.shape.rows // 2)
        first, second = (float_gradients(twin, half, batch.supervised) for half in halves)
        for name in model.linears:
            values[name] += cross(first[name], second[name]) / len(batches)
        whole.append({name: first[name] + second[name] for name in model.vectors})
    for even, odd in zip(whole[::2], whole[1::2], strict=True):
        for name in model.vectors:
            values[name] += cross(even[name], odd[name]) / len(batches)
    return {name: max(0.0, value) for name, value in values.items()}


def correlation(left: list[float], right: list[float]) -> float:
    return float(torch.corrcoef(torch.tensor([left, right], dtype=torch.float64))[0, 1])


@pytest.mark.parametrize("family", COMPARED)
def test_importance_is_that_of_a_float_model_with_the_same_weights(family: str, tmp_path: Path) -> None:
    """Few different tokens, so that the halves agree; to random ids a random model's gradients are little but noise.

    The ratio is off by as much as the noise of int8 activations turns signs.
    """
    model = model_of(family, tmp_path)
    batches = batches_of(rows=16, count=4, vocabulary=12, start=start_of(family))
    found, expected = measure(model, batches), reference(float_twin(model, family), batches, model)
    assert found.keys() == expected.keys()
    for kind in (model.linears, model.vectors):
        assert correlation([found[name] for name in kind], [expected[name] for name in kind]) > 0.99
        ratio = sum(found[name] for name in kind) / sum(expected[name] for name in kind)
        assert 0.92 < ratio < 1.08


def test_everything_is_left_as_found(tmp_path: Path) -> None:
    model = model_of("llama", tmp_path)
    trainables = Trainables(model, AdamW(False), tmp_path / "parked")
    up, norm = "model.layers.1.mlp.up_proj.weight", "model.layers.2.input_layernorm.weight"
    trainables.select([up, norm, model.head])
    trainables.step(up, torch.randn(96, 64), 1e-3)
    trainables.step(norm, torch.randn(64), 1e-3)
    tensors = {f"{name}.{part}": getattr(linear.weight, part) for name, linear in model.linears.items()
               for part in ("q", "scale", "low") if getattr(linear.weight, part) is not None}  # fmt: skip
    tensors |= {f"parameter {name}": parameter.data for name, parameter in model.module.named_parameters()}
    tensors |= {f"state {name} {key}": value for name, moments in trainables.optimizer.states.items()
                for key, value in moments.tensors().items()}  # fmt: skip
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    flags = {name: parameter.requires_grad for name, parameter in model.module.named_parameters()}
    forwards = [vars(layer).get("forward") for layer in model.module.model.layers]
    random_state = torch.get_rng_state()
    measure(model, batches_of())
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())
    assert {name: parameter.requires_grad for name, parameter in model.module.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in model.module.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [vars(layer).get("forward") for layer in model.module.model.layers] == forwards
    assert all(linear.probe is None for linear in model.linears.values())
    assert not model.module.training


def test_it_leaves_everything_as_found_when_it_fails(tmp_path: Path) -> None:
    model = model_of("llama", tmp_path)
    broken = replace(batch_of(4), labels=torch.full((4, 2), VOCABULARY + 5))
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        measure(model, [broken, broken])
    assert all(linear.probe is None for linear in model.linears.values())
    assert not any(parameter.requires_grad for parameter in model.module.parameters())


def test_it_is_the_same_twice_and_while_tensors_are_trained(tmp_path: Path) -> None:
    model = model_of("llama", tmp_path)
    first = measure(model, batches_of())
    assert measure(model, batches_of()) == first
    trainables = Trainables(model, AdamW(False), tmp_path / "parked")
    trainables.select(["model.layers.1.mlp.up_proj.weight"])
    again = measure(model, batches_of())
    # the promoted weight now acts in 16 bits instead of 8
    assert correlation(list(again.values()), list(first.values())) > 0.999


@pytest.mark.parametrize("family", EVERY)
def test_its_flops_are_the_cost_tables(family: str, tmp_path: Path) -> None:
    model = model_of(family, tmp_path)
    batches, table = batches_of(start=start_of(family)), trace(EVERY[family]())
    expected = table.probe_work().total([batch.shape for batch in batches])
    measure(model, batches)
    assert model.meter.total == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("trained_now", [False, True])
def test_of_a_head_in_few_rows_they_alone_are_paid_for(trained_now: bool, tmp_path: Path) -> None:
    model = model_of("llama", tmp_path)
    rows, batches = torch.arange(0, VOCABULARY, 5), batches_of()
    if trained_now:
        model.linears[model.head].promote_rows(torch.randn(len(rows), 64), rows)
    table = trace(FAMILIES["llama"]()).with_head_rows(len(rows))
    measure(model, batches, rows)
    labelled = sum(batch.supervised for batch in batches)
    expected = table.probe_work().total([batch.shape for batch in batches])
    part = 2 * len(rows) * 64
    skipped = 0 if trained_now else labelled * 2 * part
    assert model.meter.total + skipped == pytest.approx(expected, rel=0.001)
    assert model.meter.by_kind["probe_dw"] > 0 and model.meter.by_kind["dw"] == 0


def head_by_its_probe(model: Int8Model, batches: list[Batch], rows: torch.Tensor) -> float:
    """The head's statistic over some rows from the gradient of whole logits, as any other linear's probe gets it."""
    total = 0.0

    def probe(name: str, dy: torch.Tensor, q: torch.Tensor, scale: torch.Tensor) -> None:
        nonlocal total
        x, half = q.to(torch.float32) * scale[:, None], dy.shape[0] // 2
        total += cross(dy[:half, rows].t() @ x[:half], dy[half:, rows].t() @ x[half:])

    head = model.linears[model.head]
    head.probe = probe
    for batch in batches:
        hidden = kept_hidden(model.module, batch, model.device).detach()
        logits = logit_map(model.module).apply(head(hidden).clone())[0].flatten(0, 1)
        cross_entropy(logits, batch.labels.flatten(), reduction="sum").div(batch.supervised).backward()
    head.probe = None
    return total / len(batches)


@pytest.mark.parametrize("some", [False, True], ids=["all rows", "some rows"])
@pytest.mark.parametrize("form", ["one plane", "two planes", "rows apart", "bias", "soft cap"])
def test_the_head_in_chunks_has_the_statistic_of_whole_logits(
    form: str, some: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edgegt.importance, "_CHUNK_ELEMENTS", 64 * 7)
    model = model_of("llama", tmp_path)
    head = model.linears[model.head]
    values = model.original(model.head)
    apart = torch.tensor([0, 3, 4, 17, 200, VOCABULARY - 1])
    if form == "two planes":
        head.promote(values)
        head.demote()
    elif form == "rows apart":
        head.promote_rows(values[apart] + 0.1, apart)
    elif form == "bias":
        head.bias = torch.nn.Parameter(torch.randn(VOCABULARY), requires_grad=False)
    elif form == "soft cap":
        model.module.config.final_logit_softcapping = 0.2
    batches = batches_of(rows=16, vocabulary=12)
    # 17 and the last row stand for both kinds where rows are apart
    rows = torch.tensor([2, 3, 5, 17, 100, VOCABULARY - 1]) if some else None
    expected = head_by_its_probe(model, batches, torch.arange(VOCABULARY) if rows is None else rows)
    assert expected > 0
    assert measure(model, batches, rows)[model.head] == pytest.approx(expected, rel=1e-5)


class Shapes(TorchDispatchMode):
    """Every shape that an operation returns, int8 aside."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for part in out if isinstance(out, tuple) else [out]:
            if isinstance(part, torch.Tensor) and part.dtype != torch.int8:
                self.seen.add(tuple(part.shape))
        return out


def test_logits_of_all_positions_never_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edgegt.importance, "_CHUNK_ELEMENTS", 64 * 7)
    monkeypatch.setattr(edgegt.chunks, "HEAD_CHUNK_ELEMENTS", 16 * VOCABULARY)
    model = model_of("llama", tmp_path)
    with Shapes() as shapes:
        measure(model, batches_of())
    assert max(shape[0] for shape in shapes.seen if len(shape) > 1 and shape[-1] == VOCABULARY) == 16
    labelled = {batch.supervised for batch in batches_of()}
    assert {shape[1] for shape in shapes.seen if len(shape) == 2 and shape[0] in labelled} <= {1, 5, 7, 64}


def test_other_data_give_other_importances_and_permuting_them_changes_the_plan(tmp_path: Path) -> None:
    model, table = model_of("llama", tmp_path), trace(FAMILIES["llama"]())
    values = measure(model, batches_of(seed=0))
    others = measure(model, batches_of(seed=77, vocabulary=40))
    assert correlation(list(values.values()), list(others.values())) < 0.9999
    shapes = (BatchShape(8, 24, 8),) * 10
    budget = int(0.5 * table.full_work().total(shapes))

    def chosen(values: dict[str, float]) -> tuple[str, ...]:
        problem = Problem(table, values, shapes, budget, 2**30, Surroundings(2**20), VOCABULARY, 8)
        return plan(problem).selected

    names = [weight.name for weight in table.weights]
    reverse = dict(zip(names, [values[name] for name in reversed(names)], strict=True))
    assert chosen(values) != chosen(reverse)
    assert chosen(values) == chosen(dict(values))


def test_no_gradient_of_a_weights_size_is_kept(tmp_path: Path) -> None:
    model = model_of("llama", tmp_path)
    gc.collect()
    older = {id(found) for found in gc.get_objects() if issubclass(type(found), torch.Tensor)}
    measure(model, batches_of())
    sizes = {linear.weight.q.numel() for linear in model.linears.values()}
    gc.collect()
    kept = [
        tuple(found.shape)
        for found in gc.get_objects()
        if issubclass(type(found), torch.Tensor) and id(found) not in older and found.is_floating_point()
    ]
    assert not [shape for shape in kept if torch.Size(shape).numel() in sizes]


def test_importance_is_never_negative_and_the_upper_layers_matter(tmp_path: Path) -> None:
    values = measure(model_of("llama", tmp_path), batches_of())
    assert all(value >= 0 for value in values.values())
    assert values["lm_head.weight"] > 0
