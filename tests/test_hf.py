"""SelectionCallback in transformers' own Trainer: what it spends is what torch's counter finds, and what it trains."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, Trainer, TrainingArguments

from edgegt import BudgetError, InputError, SelectionCallback
from edgegt.floats import costs_of, importance_of, let_backward_end, prepare_model, train_only
from edgegt.hf import _check
from tiny_classifiers import config_of, float_classifier
from tiny_models import EVERY, VOCABULARY, float_model

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))

from bench_callback import Counting

KINDS = {"llama": "causal", "gpt2": "causal", "mixtral": "causal", "t5": "pair", "bart": "pair", "bert": "class"}


def model_of(family: str, attention: str = "eager") -> Any:
    if KINDS[family] == "class":
        return float_classifier(config_of(family), attention)
    return float_model(EVERY[family](), attention)


def rows_of(kind: str, count: int = 60) -> list[dict[str, Any]]:
    """Random ids; what is learned is the row itself, its beginning, or a class that its first id says."""
    draw = random.Random(0)
    rows: list[dict[str, Any]] = []
    for _ in range(count):
        ids = [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(6, 20))]
        labels = {"causal": ids, "pair": [*ids[: draw.randint(3, 6)], 2], "class": ids[0] % 3}[kind]
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    def filled(name: str, value: int) -> torch.Tensor:
        width = max(len(row[name]) for row in rows)
        return torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])

    ids = filled("input_ids", 0)
    classes = isinstance(rows[0]["labels"], int)
    labels = torch.tensor([row["labels"] for row in rows]) if classes else filled("labels", -100)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


def trainer_of(folder: Path, family: str, callbacks: list[Any], steps: int = 12, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=2e-3, report_to=[], logging_steps=4,
        use_cpu=True, disable_tqdm=True, **{"save_strategy": "no", **options},
    )  # fmt: skip
    rows = rows_of(KINDS[family])
    return Trainer(model_of(family), arguments, train_dataset=rows, data_collator=collate, callbacks=callbacks)


def counted(folder: Path, family: str, selection: SelectionCallback | None, **options: Any) -> tuple[int, Trainer]:
    counting = Counting()
    trainer = trainer_of(folder, family, [counting] if selection is None else [selection, counting], **options)
    trainer.train()
    return counting.counter.get_total_flops(), trainer


@pytest.mark.parametrize(
    ("family", "checkpointing"), [*((family, False) for family in KINDS), ("llama", True), ("t5", True)],
)  # fmt: skip
def test_costs_are_those_of_torchs_counter(family: str, checkpointing: bool) -> None:
    model, batch = model_of(family).train(), collate(rows_of(KINDS[family], 4))
    with FlopCounterMode(display=False) as full:
        model(**batch).loss.backward()
    prepare_model(model)
    if checkpointing:
        model.activation_checkpointing_enable()
        let_backward_end(model)
    costs = costs_of(model)
    assert costs.full().at(costs.shape(batch)) == full.get_total_flops()
    names = [weight.name for weight in costs.table.weights]
    for chosen in (names[-1:], names[-len(names) // 3 :], names[: len(names) // 3]):
        train_only(model, {*chosen, *costs.always})
        with FlopCounterMode(display=False) as counter:
            model(**batch).loss.backward()
        spent = costs.of(chosen).at(costs.shape(batch))
        # Recomputation stops once everything is there that was asked for; the table has the whole layer.
        assert (0.9 if checkpointing else 1) * spent <= counter.get_total_flops() <= spent


def test_half_of_the_flops_of_the_same_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full, _ = counted(tmp_path, "llama", None, steps=40)
    selection = SelectionCallback(rho=0.5)
    spent, trainer = counted(tmp_path, "llama", selection, steps=40)
    # The same batches: measuring has drawn nothing from the Trainer's generators.
    assert selection.record["full"] == full
    assert selection.record["spent"] == spent
    assert 0.4 * full < spent <= 0.5 * full
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["edgegt/round"] for entry in logged] == [1] * 5 + [2] * 5
    assert logged[-1]["edgegt/flops_share"] == round(spent / full, 4)
    said = capsys.readouterr().err
    assert "has one of its own now" in said and f"{spent / full:.2%} of the FLOPs of full training" in said


@pytest.mark.parametrize(
    ("family", "options"),
    [("t5", {}), ("bert", {}), ("llama", {"gradient_accumulation_steps": 2, "bf16": True})],
    ids=["t5", "bert", "accumulated-bf16"],
)
def test_other_models_and_settings(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    selection = SelectionCallback(rho=0.5, rounds=2)
    spent, _ = counted(tmp_path, family, selection, steps=24, **options)
    assert selection.record["spent"] == spent
    assert selection.record["round"] == 2
    assert 0.3 < selection.share <= 0.5


class InOrder(Trainer):
    """Rows in the order that they have."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


@pytest.mark.parametrize("longest_first", [False, True])
def test_batches_that_are_not_as_the_first_ones(tmp_path: Path, longest_first: bool) -> None:
    """Rows that grow from 4 to 44 tokens, or shrink: what is left for the rest is foreseen and corrected."""
    draw, selection = random.Random(0), SelectionCallback(rho=0.7)
    rows = [{"input_ids": [draw.randrange(3, VOCABULARY) for _ in range(4 + number // 4)]} for number in range(160)]
    rows = [row | {"labels": row["input_ids"]} for row in (reversed(rows) if longest_first else rows)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=40, per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    InOrder(model_of("llama"), arguments, train_dataset=rows, data_collator=collate, callbacks=[selection]).train()
    assert 0.6 < selection.share < 0.72


def test_what_is_not_chosen_does_not_move(tmp_path: Path) -> None:
    selection = SelectionCallback(rho=0.5, rounds=1)
    trainer = trainer_of(tmp_path, "gpt2", [selection], weight_decay=0.1)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    moved = {name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == set(selection.selected)
    assert all(parameter.requires_grad for parameter in trainer.model.parameters())  # as it was found


@pytest.mark.parametrize("restored", [False, True], ids=["ours", "transformers"])
def test_resumed_as_if_never_stopped(tmp_path: Path, restored: bool) -> None:
    """With the callback's state taken from the checkpoint by itself, or by the Trainer, which makes a new callback."""
    whole = trainer_of(tmp_path, "llama", [SelectionCallback(rounds=2)], 24, save_strategy="steps", save_steps=8)
    whole.train()
    again = SelectionCallback(rounds=2)
    resumed = trainer_of(tmp_path, "llama", [again], 24, restore_callback_states_from_checkpoint=restored)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    first, second = (
        next(one for one in trainer.callback_handler.callbacks if isinstance(one, SelectionCallback))
        for trainer in (whole, resumed)
    )
    assert (second is again) is not restored
    assert first.record == second.record
    for (name, one), (_, other) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_a_checkpoint_without_a_selection_is_refused(tmp_path: Path) -> None:
    plain = trainer_of(tmp_path, "gpt2", [], steps=2, save_strategy="steps", save_steps=1)
    prepare_model(plain.model)
    plain.train()
    with pytest.raises(InputError, match="training without SelectionCallback"):
        trainer_of(tmp_path, "gpt2", [SelectionCallback()]).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize(("family", "auto"), [("llama", AutoModelForCausalLM), ("t5", AutoModelForSeq2SeqLM)])
def test_a_saved_model_has_its_own_head(tmp_path: Path, family: str, auto: Any) -> None:
    model, batch = model_of(family), collate(rows_of(KINDS[family], 4))
    attention = model.config._attn_implementation
    prepare_model(model)
    assert model.config._attn_implementation == attention
    with torch.no_grad():
        model.get_output_embeddings().weight.add_(1)
        expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    loaded = auto.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, expected)


def test_importance_is_the_signed_statistic_and_draws_nothing() -> None:
    model = model_of("llama").train()
    prepare_model(model)
    rows = rows_of("causal", 8)
    pair = collate(rows[:4]), collate(rows[4:])
    gradients = []
    for batch in pair:
        model.zero_grad()
        model(**batch).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    model.zero_grad()
    names = {"lm_head.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"}
    state = torch.get_rng_state()
    found = importance_of(model, [pair], names)
    assert torch.equal(torch.get_rng_state(), state)
    assert set(found) == names
    for name in names:
        a, b = (half[name] for half in gradients)
        assert found[name] == pytest.approx(max(0.0, float((a * b.sign() + b * a.sign()).sum())), rel=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_attention_kernel_is_counted_as_one() -> None:
    """Of the lowest layer only the values' matrix: a kernel forms the gradients of queries and keys as well."""
    lowest = "model.layers.0.self_attn.v_proj.weight"
    spent = {}
    for attention in ("eager", "sdpa"):
        model = model_of("llama", attention)
        prepare_model(model)
        costs = costs_of(model)
        spent[attention] = costs.of([lowest]).at(costs.shape(collate(rows_of("causal", 4))))
    rows, tokens, width = 4, collate(rows_of("causal", 4))["input_ids"].shape[1], 64
    assert spent["sdpa"] - spent["eager"] == 3 * 2 * rows * tokens**2 * width  # softmax's, the queries' and the keys'


def test_what_cannot_work_is_refused_at_once() -> None:
    arguments = SimpleNamespace(deepspeed="zero.json", fsdp="", world_size=2, n_gpu=1, fp16=True)
    model = model_of("gpt2")
    model.peft_config = {}
    with pytest.raises(InputError, match=r"DeepSpeed, several processes or GPUs, fp16 \(take bf16\), PEFT adapters: "):
        _check(arguments, model)


@pytest.mark.parametrize(("given", "said"), [({"rho": 0}, "rho 0 is out of range"), ({"rounds": 0}, "rounds 0 is out")])
def test_numbers_out_of_range(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        SelectionCallback(**given)


def test_too_small_a_rho_and_a_late_callback_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="below the smallest reachable 0"):
        trainer_of(tmp_path, "llama", [SelectionCallback(rho=0.2)]).train()
    late = trainer_of(tmp_path, "llama", [])
    late.add_callback(SelectionCallback())
    with pytest.raises(InputError, match=r"give SelectionCallback to Trainer\(callbacks"):
        late.train()


def test_models_of_another_kind_are_refused() -> None:
    from transformers import BertConfig, BertForMaskedLM

    masked = BertForMaskedLM(BertConfig(**{**config_of("bert").to_dict(), "id2label": None}))
    with pytest.raises(InputError, match="BertForMaskedLM is neither"):
        costs_of(masked)
