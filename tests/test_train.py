"""The loop: one loss however a step is cut into micro-batches, NaN refused in time, FLOPs counted, runs repeatable."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from edgegt.attention import _additive_mask, _capped_attention, register_attention
from edgegt.data import Batch
from edgegt.disk import Lines
from edgegt.flops import FlopMeter, attach
from edgegt.loss import supervised_loss
from edgegt.model import Int8Model
from edgegt.optimizer import AdamW
from edgegt.quant import Backend, ReferenceBackend
from edgegt.selection import Trainables
from edgegt.trace import trace
from edgegt.train import Dropped, NoRoom, Parts, Progress, Recipe, train_round
from edgegt.watch import MemoryWatch
from tiny_models import (
    CPU,
    EVERY,
    FAMILIES,
    SHARED,
    batch_of,
    float_model,
    load,
    save_model,
    some_selections,
    start_of,
)

UP, NORM, HEAD = "model.layers.1.mlp.up_proj.weight", "model.layers.2.input_layernorm.weight", "lm_head.weight"
METRIC_KEYS = {
    "step", "round", "epoch", "loss", "lr", "tokens_per_s", "bytes", "peak_bytes", "flops", "elapsed_s", "remaining_s",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", FAMILIES["llama"]())
    return tmp_path / "model"


class Run:
    """A model with these tensors selected, and what a round left behind."""

    def __init__(self, folder: Path, names: list[str], name: str = "run", backend: Backend | None = None) -> None:
        self.path = folder.parent / name
        self.path.mkdir()
        self.model: Int8Model = load(folder, folder.parent / "cache", backend)
        self.trainables = Trainables(self.model, AdamW(False), self.path / "parked")
        self.trainables.select(names)
        self.progress = Progress()
        self.losses: list[float] = []

    def train(
        self,
        batches: list[Batch],
        micro_batch: int,
        clip_to: float = 1e9,
        lr: float = 1e-3,
        deadline: float | None = None,
    ) -> dict[str, Any]:
        model, trainables = self.model, self.trainables
        parts = Parts(model.module, CPU, trainables.live, trainables.step, model.inputs.clear, model.meter,
                      MemoryWatch(False))  # fmt: skip
        recipe = Recipe(lambda step: lr, clip_to, len(batches), 1 << 62, lambda shape: 0, deadline=deadline)
        pairs = [(0.0, batch) for batch in batches]
        train_round(
            parts,
            recipe,
            pairs,
            micro_batch,
            0,
            self.progress,
            Lines(self.path / "metrics.jsonl"),
            lambda entry: self.losses.append(entry["loss"]),
            fused=all(batch.shape.rows <= micro_batch for batch in batches),
        )
        return {name: parameter.detach().clone() for name, parameter in trainables.live.items()}


class ByEachRow(ReferenceBackend):
    """Rounds a row as it would alone: integer dw goes by the largest of a column, even rounding by a row's place."""

    def quantize_tokens(
        self, x: torch.Tensor, columns: torch.Tensor | None = None, evenly: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return super().quantize_tokens(x, columns)


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_micro_batches_give_what_one_batch_gives(micro_batch: int, folder: Path) -> None:
    whole, parts = (Run(folder, [UP, NORM, HEAD], name, ByEachRow()) for name in ("whole", "parts"))
    batch = batch_of(8)
    start = {name: parameter.detach().clone() for name, parameter in whole.trainables.live.items()}
    expected, found = whole.train([batch], 8), parts.train([batch], micro_batch)
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)
    for name in expected:
        # AdamW's first step is lr * sign(g): the gradients are compared by the moments, which are linear in them
        ours, theirs = (run.trainables.optimizer.states[name].first for run in (parts, whole))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
        assert float((found[name] - expected[name]).norm() / (expected[name] - start[name]).norm()) < 0.02


def test_a_gradient_applied_in_backward_is_the_accumulated_one(folder: Path) -> None:
    fused, kept = (Run(folder, [UP], name, ByEachRow()) for name in ("fused", "kept"))
    batches = [batch_of(6, seed) for seed in range(3)]
    # clipping acts per tensor in both ways when there is one tensor
    expected = fused.train(batches, 6, clip_to=0.01)
    # a batch of 6 in micro-batches of 5 and 1 is accumulated; of 6 it would be fused
    found = kept.train(batches, 5, clip_to=0.01)
    assert fused.losses == pytest.approx(kept.losses, rel=1e-4)
    start = load(folder, folder.parent / "cache").original(UP)
    assert float((found[UP] - expected[UP]).norm() / (expected[UP] - start).norm()) < 0.05


def test_the_clip_bounds_what_the_optimizer_sees(folder: Path) -> None:
    run = Run(folder, [UP, HEAD])
    run.train([batch_of(4)], 4, clip_to=1e-3)
    for name in (UP, HEAD):
        assert float(run.trainables.optimizer.states[name].first.norm()) <= 0.1 * 1e-3 * 1.001
    together = Run(folder, [UP, HEAD], "together")
    together.train([batch_of(4)], 2, clip_to=1e-3)
    norms = [float(together.trainables.optimizer.states[name].first.norm()) for name in (UP, HEAD)]
    assert sum(norm**2 for norm in norms) ** 0.5 == pytest.approx(1e-4, rel=1e-3)


class LateNan(torch.nn.Module):
    """A model of one weight whose logits are NaN from the second call on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.calls = torch.nn.Parameter(torch.ones(300)), 0

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, input_ids: torch.Tensor, logits_to_keep: int, **_: Any) -> Any:
        self.calls += 1
        self.logits = self.weight.expand(input_ids.shape[0], logits_to_keep, 300) * (1 if self.calls < 2 else torch.nan)
        return self


@pytest.mark.parametrize(("rows", "micro_batch"), [(4, 4), (4, 2)], ids=["fused", "accumulated"])
def test_a_loss_that_is_not_a_number_updates_nothing(rows: int, micro_batch: int, tmp_path: Path) -> None:
    model = LateNan()
    seen: list[str] = []
    parts = Parts(model, CPU, {"weight": model.weight}, lambda name, gradient, lr: seen.append(name), lambda: None,
                  FlopMeter(), MemoryWatch(False))  # fmt: skip
    recipe, progress = Recipe(lambda step: 0.5, 1.0, 3, 1 << 62, lambda shape: 0), Progress()
    batches = [(0.0, batch_of(rows, seed, vocabulary=300)) for seed in range(3)]
    lines, fused = Lines(tmp_path / "m.jsonl"), micro_batch == rows
    with pytest.raises(Dropped, match="the loss is nan") as dropped:
        train_round(parts, recipe, batches, micro_batch, 0, progress, lines, lambda entry: None, fused)
    assert len(seen) == progress.step == (1 if fused else 0)
    assert not dropped.value.torn and model.weight.grad is None


def test_a_dropped_step_is_passed_over_and_the_others_are_made(folder: Path) -> None:
    run = Run(folder, [UP])
    run.progress.dropped = {1}
    run.train([batch_of(4, seed) for seed in range(3)], 4)
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 3]
    assert run.trainables.optimizer.states[UP].step == 2


@pytest.mark.parametrize("updated", [0, 1])
def test_a_step_without_memory_is_not_made_and_says_whether_it_is_torn(
    updated: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(folder, [UP, HEAD])
    step, seen = run.trainables.step, []

    def failing(name: str, gradient: torch.Tensor, lr: float) -> None:
        if len(seen) == updated:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")
        seen.append(name)
        step(name, gradient, lr)

    monkeypatch.setattr(run.trainables, "step", failing)
    with pytest.raises(NoRoom, match="can't allocate memory: you tried") as failed:
        run.train([batch_of(4)], 4)
    assert (failed.value.torn, run.progress.step, len(seen)) == (True, 0, updated)
    assert all(parameter.grad is None for parameter in run.trainables.live.values())


def test_the_rate_is_scaled_and_recorded_so(folder: Path) -> None:
    whole, half = Run(folder, [UP], "whole"), Run(folder, [UP], "half")
    half.progress.lr_scale = 0.5
    start = whole.trainables.live[UP].detach().clone()
    moved = [run.train([batch_of(4)], 4)[UP] - start for run in (whole, half)]
    assert float(moved[1].norm() / moved[0].norm()) == pytest.approx(0.5, rel=1e-3)
    lines = [json.loads((run.path / "metrics.jsonl").read_text()) for run in (whole, half)]
    assert lines[1]["lr"] == lines[0]["lr"] / 2


def test_a_stop_ends_the_round_after_the_step_in_hand(folder: Path) -> None:
    run = Run(folder, [UP])
    run.progress.stop = 2
    before = run.trainables.live[UP].detach().clone()
    assert torch.equal(run.train([batch_of(4)], 4)[UP], before)
    assert run.progress.step == 0


def test_every_step_leaves_one_line_of_metrics(folder: Path) -> None:
    run = Run(folder, [UP, HEAD])
    run.train([batch_of(4, seed) for seed in range(3)], 4)
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line.keys() >= METRIC_KEYS for line in lines)
    assert lines[-1]["flops"] == run.model.meter.total > lines[0]["flops"] > 0
    assert lines[-1]["remaining_s"] == 0
    assert lines[0]["peak_bytes"] >= lines[0]["bytes"] > 10**7


def test_the_same_steps_give_the_same_bits_and_the_loss_falls(folder: Path) -> None:
    batches = [batch_of(4, seed % 2) for seed in range(12)]
    first, second = Run(folder, [UP, NORM, HEAD], "first"), Run(folder, [UP, NORM, HEAD], "second")
    one, other = first.train(batches, 4), second.train(batches, 4)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert first.losses == second.losses
    assert sum(first.losses[-2:]) < sum(first.losses[:2])


def counted_by_torch(model: Any, batches: list[Batch], selected: set[str]) -> int:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in selected)
    with FlopCounterMode(display=False) as counter:
        for batch in batches:
            supervised_loss(model, batch, CPU).backward()
    return int(counter.get_total_flops())


def all_labelled(batch: Batch) -> Batch:
    """The batch with a label on every kept position, since torch's float model computes all their logits."""
    count = batch.labels.numel()
    shape = replace(batch.shape, labelled=count)
    return replace(batch, labels=batch.labels.clamp(min=0), shape=shape, supervised=count)


@pytest.mark.parametrize("family", EVERY)
def test_flops_counted_while_running_are_the_tables_and_torchs(family: str, tmp_path: Path) -> None:
    save_model(tmp_path / "model", EVERY[family]())
    table, twin = trace(EVERY[family]()), float_model(EVERY[family](), untied=True)
    batches = [all_labelled(batch_of(4, seed, start=start_of(family))) for seed in range(2)]
    run = Run(tmp_path / "model", [])
    for selected in some_selections([weight.name for weight in table.weights], 4):
        run.trainables.select(selected)
        before = run.model.meter.total
        run.train(batches, 2)
        counted = run.model.meter.total - before
        shapes = [batch.shape for batch in batches]
        assert counted == pytest.approx(table.train_work(table.mask(selected)).total(shapes), rel=1e-3), selected
        assert counted == pytest.approx(counted_by_torch(twin, batches, selected), rel=0.02), selected


def test_the_float_models_flops_are_counted_too() -> None:
    model = float_model(FAMILIES["gpt2"](), attention=register_attention())
    meter = FlopMeter()
    attach(model, meter)
    batch = batch_of(4)
    supervised_loss(model, batch, CPU).backward()
    twin = float_model(FAMILIES["gpt2"]())
    expected = counted_by_torch(twin, [batch], {name for name, _ in twin.named_parameters()})
    assert meter.total == pytest.approx(expected, rel=0.02)
    with meter.off():
        supervised_loss(model, batch, CPU)
    assert meter.total == pytest.approx(expected, rel=0.02)


def test_stories_counts_what_torch_counts(tmp_path: Path) -> None:
    path = SHARED / "data" / "models" / "stories260K"
    if not path.is_dir():
        pytest.skip("no stories260K under shared/data")
    from edgegt.source import read_config

    config = read_config(str(path))
    table, twin = trace(config), float_model(config, untied=True)
    model = load(path, tmp_path / "cache")
    trainables = Trainables(model, AdamW(False), tmp_path / "parked")
    for selected in some_selections([weight.name for weight in table.weights], 4):
        trainables.select(selected)
        batch, before = batch_of(8, vocabulary=512), model.meter.total
        supervised_loss(model.module, batch, CPU).backward()
        assert model.meter.total - before == pytest.approx(counted_by_torch(twin, [batch], selected), rel=0.02)


def test_capped_attention_is_that_of_transformers() -> None:
    """Gemma 2 caps its attention scores, which torch's kernel cannot: the counted attention computes them itself."""
    config = FAMILIES["gemma2"]()
    eager, ours = float_model(config), float_model(config, attention=register_attention())
    batch = batch_of(4)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
    ours.load_state_dict(eager.state_dict())
    with torch.no_grad():
        expected, found = (model(**inputs, use_cache=False).logits for model in (eager, ours))
    seen = batch.attention_mask.bool()
    torch.testing.assert_close(found[seen], expected[seen], rtol=1e-5, atol=1e-6)


def test_no_step_begins_that_would_end_after_the_deadline(tmp_path: Path) -> None:
    save_model(tmp_path / "model", FAMILIES["llama"]())
    run = Run(tmp_path / "model", [UP])
    run.train([batch_of(4, seed) for seed in range(4)], 4, deadline=time.perf_counter() - 1)
    assert run.progress.late
    assert run.progress.step == 0


def test_capped_attention_of_one_query_sees_every_key_before_it() -> None:
    """In decoding with a cache there is one query, many keys, and no mask."""
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 5, 8, generator=draw) for _ in range(3))
    whole = _capped_attention(query, key, value, None, 5.0, None)
    last = _capped_attention(query[:, :, -1:], key, value, None, 5.0, None)
    torch.testing.assert_close(last, whole[:, -1:])


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2", "gemma3", "gpt2"])
def test_the_additive_mask_is_the_boolean_one(family: str) -> None:
    """Left padding leaves rows that attend to nothing: their numbers mean nothing, but they are numbers."""
    ours, theirs = float_model(FAMILIES[family](), register_attention()), float_model(FAMILIES[family](), None)
    if family == "gemma2":  # capped scores, which transformers' SDPA leaves out
        theirs = float_model(FAMILIES[family]())
    ours.load_state_dict(theirs.state_dict())
    batch = batch_of(5)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
    with torch.no_grad():
        found, expected = (model(**inputs, use_cache=False).logits for model in (ours, theirs))
    seen = batch.attention_mask.bool()
    assert not bool(seen.all()), "the batch has padding"
    torch.testing.assert_close(found[seen], expected[seen], rtol=1e-5, atol=1e-6)
    assert bool(torch.isfinite(found).all())


def test_the_additive_mask_is_zero_where_attention_goes() -> None:
    from transformers.masking_utils import sdpa_mask

    options = {"batch_size": 2, "q_length": 5, "kv_length": 5, "device": CPU, "allow_is_causal_skip": False}
    boolean, mask = sdpa_mask(**options), _additive_mask(**options)
    assert boolean is not None and boolean.dtype == torch.bool
    assert mask is not None and mask.dtype == torch.float32 and bool(torch.isfinite(mask).all())
    assert torch.equal(mask == 0, boolean) and bool((mask[~boolean] == torch.finfo(torch.float32).min).all())
