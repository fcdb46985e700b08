"""The training loop of one round: batches in, optimizer steps out, one line of metrics per step.

Without accumulation each gradient is applied and freed inside backward, tensor by tensor, so that only one exists at a
time; with accumulation all are kept until the step. The loss of a step is normalised by all its supervised tokens,
however it is cut into micro-batches.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from edgegt.cost import BatchShape
from edgegt.data import Batch, split_micro
from edgegt.errors import EdgegtError
from edgegt.flops import FlopMeter
from edgegt.loss import supervised_loss
from edgegt.optimizer import clip, clip_together
from edgegt.process import trim
from edgegt.watch import MemoryWatch

TRIM_EVERY = 16


@dataclass(frozen=True)
class Recipe:
    """How a run steps. lr: learning rate of step 0, 1, ...; max_grad_norm: per tensor when applied within backward.

    flops: what the whole run may spend; cost: FLOPs of a step on a batch of some shape. kept: bytes that a micro-batch
    of some shape keeps for backward. deadline: by time.perf_counter, no step begins that would likely end later.
    """

    lr: Callable[[int], float]
    max_grad_norm: float
    steps: int
    flops: int
    cost: Callable[[BatchShape], int]
    kept: Callable[[BatchShape], int] = lambda shape: 0
    deadline: float | None = None


@dataclass
class Progress:
    """Where a run is. train_s: seconds of training alone; stop: the signal that asked to stop, if any.

    late: the deadline was reached. kept_bytes: measured bytes that autograd kept for the largest micro-batch so far.
    """

    step: int = 0
    train_s: float = 0.0
    stop: int | None = None
    late: bool = False
    kept_bytes: int = 0
    kept_predicted: int = 0


@dataclass(frozen=True)
class Parts:
    """What the loop works with: the model, its trained parameters by name, and what to do with a gradient."""

    module: Any
    device: torch.device
    parameters: dict[str, torch.nn.Parameter]
    update: Callable[[str, torch.Tensor, float], None]
    after_step: Callable[[], None]
    meter: FlopMeter
    watch: MemoryWatch


def train_round(
    parts: Parts, recipe: Recipe, batches: Sequence[tuple[float, Batch]], micro_batch: int, round_index: int,
    progress: Progress, metrics: Path, report: Callable[[dict[str, Any]], None],
) -> None:  # fmt: skip
    """Train on these (epoch, batch) pairs, one optimizer step each, until they end or `progress.stop` is set.

    Raises: EdgegtError when the loss is not a number, before anything is updated by it.
    """
    fused = all(batch.shape.rows <= micro_batch for _, batch in batches)
    with metrics.open("a", encoding="utf-8") as file, _applied_in_backward(parts, recipe, progress, fused):
        for epoch, batch in batches:
            if progress.stop is not None:
                return
            typical = progress.train_s / progress.step if progress.step else 0.0
            if recipe.deadline is not None and time.perf_counter() + typical > recipe.deadline:
                progress.late = True
                return
            if parts.meter.total + recipe.cost(batch.shape) > recipe.flops:
                raise EdgegtError(
                    f"step {progress.step + 1} of {recipe.steps} would go over the FLOPs budget: more were counted "
                    "than planned, which is a fault of edgegt; what was trained is saved"
                )
            started = time.perf_counter()
            loss = _step(parts, recipe, batch, micro_batch, progress, fused)
            seconds = time.perf_counter() - started
            progress.step += 1
            progress.train_s += seconds
            tokens = batch.shape.rows * batch.shape.tokens
            entry = {
                "step": progress.step, "round": round_index, "epoch": round(epoch, 4), "loss": loss,
                "lr": recipe.lr(progress.step - 1), "tokens_per_s": tokens / seconds, "step_s": seconds,
                "bytes": parts.watch.now(), "peak_bytes": parts.watch.peak(), "flops": parts.meter.total,
                "elapsed_s": progress.train_s,
                "remaining_s": progress.train_s / progress.step * (recipe.steps - progress.step),
            }  # fmt: skip
            if progress.step % TRIM_EVERY == 0:
                trim()
            file.write(json.dumps(entry) + "\n")
            file.flush()
            report(entry)


def _step(parts: Parts, recipe: Recipe, batch: Batch, micro_batch: int, progress: Progress, fused: bool) -> float:
    total = 0.0
    for part in split_micro(batch, micro_batch):
        with _kept_measured(parts, recipe, part.shape, progress):
            loss = supervised_loss(parts.module, part, parts.device, 1 / batch.supervised)
        total += float(loss.detach())
        if not math.isfinite(total):
            raise EdgegtError(
                f"the loss of step {progress.step + 1} is {total}: nothing was updated by it; lower --lr "
                f"({recipe.lr(progress.step):g}) and run again"
            )
        loss.backward()
    if not fused:
        gradients = {name: p.grad for name, p in parts.parameters.items() if p.grad is not None}
        clip_together(list(gradients.values()), recipe.max_grad_norm)
        for name, gradient in gradients.items():
            parts.update(name, gradient, recipe.lr(progress.step))
            parts.parameters[name].grad = None
    parts.after_step()
    return total


@contextmanager
def _kept_measured(parts: Parts, recipe: Recipe, shape: BatchShape, progress: Progress) -> Iterator[None]:
    """Measure what autograd keeps, where more is predicted than for any micro-batch before."""
    predicted = recipe.kept(shape)
    if predicted <= progress.kept_predicted:
        yield
        return
    progress.kept_predicted = predicted
    stay = {tensor.untyped_storage().data_ptr() for tensor in parts.module.parameters()}
    found: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in stay:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        yield
    progress.kept_bytes = sum(found.values())


@contextmanager
def _applied_in_backward(parts: Parts, recipe: Recipe, progress: Progress, fused: bool) -> Iterator[None]:
    handles = []

    def hook(name: str) -> Callable[[torch.Tensor], None]:
        def apply(parameter: torch.Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            clip(gradient, recipe.max_grad_norm, name)
            parts.update(name, gradient, recipe.lr(progress.step))

        return apply

    try:
        if fused:
            for name, parameter in parts.parameters.items():
                handles.append(parameter.register_post_accumulate_grad_hook(hook(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()
