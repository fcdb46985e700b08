"""The training loop of one round: batches in, optimizer steps out, one line of metrics per step.

Without accumulation each gradient is applied and freed inside backward, tensor by tensor, so that only one exists at a
time; with accumulation all are kept until the step. The loss of a step is normalised by all its supervised tokens,
however it is cut into micro-batches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from edgegt.cost import BatchShape
from edgegt.data import Batch, split_micro
from edgegt.disk import Lines
from edgegt.errors import EdgegtError, NotFinite, is_out_of_memory
from edgegt.flops import FlopMeter
from edgegt.loss import supervised_loss
from edgegt.optimizer import clip, clip_together
from edgegt.process import trim
from edgegt.watch import MemoryWatch

TRIM_EVERY = 16


@dataclass(frozen=True)
class Recipe:
    """How a run steps. lr: learning rate of step 0, 1, ...; max_grad_norm: per tensor when applied within backward.

    flops: what the whole run may spend; cost: FLOPs of a step on a batch. kept: bytes that a micro-batch
    of some shape keeps for backward. deadline: by time.perf_counter, no step begins that would likely end later.
    """

    lr: Callable[[int], float]
    max_grad_norm: float
    steps: int
    flops: int
    cost: Callable[[Batch], int]
    kept: Callable[[BatchShape], int] = lambda shape: 0
    deadline: float | None = None


@dataclass
class Progress:
    """Where a run is. train_s: seconds of training alone; stop: the signal that asked to stop, if any.

    late: the deadline was reached; enough: more steps would not help.
    kept_bytes: measured bytes that autograd kept for the largest micro-batch so far.
    dropped: steps (from 0) that were left out because something was not finite; lr_scale: what rates are multiplied by.
    torn: the step at hand has changed some tensors.
    """

    step: int = 0
    train_s: float = 0.0
    stop: int | None = None
    late: bool = False
    enough: bool = False
    kept_bytes: int = 0
    kept_predicted: int = 0
    dropped: set[int] = field(default_factory=set)
    lr_scale: float = 1.0
    torn: bool = False

    @property
    def dropped_in_a_row(self) -> int:
        """How many of the last steps were dropped."""
        count = 0
        while self.step - 1 - count in self.dropped:
            count += 1
        return count

    def to_json(self) -> dict[str, Any]:
        """What a resumed run needs of it."""
        return {
            "step": self.step, "train_s": self.train_s, "kept_bytes": self.kept_bytes,
            "kept_predicted": self.kept_predicted, "dropped": sorted(self.dropped), "lr_scale": self.lr_scale,
            "enough": self.enough,
        }  # fmt: skip

    def restore(self, tree: Mapping[str, Any]) -> None:
        """Be where `to_json` was."""
        for name, value in tree.items():
            setattr(self, name, set(value) if name == "dropped" else value)


class Dropped(Exception):
    """A step met something that is not finite. torn: after it had changed some tensors, which must be taken back."""

    def __init__(self, reason: str, torn: bool) -> None:
        super().__init__(reason)
        self.reason, self.torn = reason, torn


class NoRoom(Exception):
    """A step could not have the memory it needs. cause: what was raised; torn: as for Dropped."""

    def __init__(self, reason: str, torn: bool) -> None:
        super().__init__(reason)
        self.reason, self.torn = reason, torn


@dataclass(frozen=True)
class Parts:
    """What the loop works with: the model, its trained parameters by name, and what to do with a gradient.

    facts: more numbers for a line of metrics.
    """

    module: Any
    device: torch.device
    parameters: dict[str, torch.nn.Parameter]
    update: Callable[[str, torch.Tensor, float], None]
    after_step: Callable[[], None]
    meter: FlopMeter
    watch: MemoryWatch
    facts: Callable[[], dict[str, float]] = dict


def train_round(
    parts: Parts, recipe: Recipe, batches: Iterable[tuple[float, Batch]], micro_batch: int, round_index: int,
    progress: Progress, metrics: Lines, report: Callable[[dict[str, Any]], None], fused: bool,
) -> None:  # fmt: skip
    """Train on these (epoch, batch) pairs, one optimizer step each, until they end or are enough.

    A signal in `progress.stop` ends them too.

    fused: no batch is cut into micro-batches, so that gradients are applied within backward.
    Raises: Dropped when something is not finite and NoRoom without memory, with the step not made (see `torn`);
    whatever `report`, which is called after each step, raises; EdgegtError when FLOPs are used up; DiskError.
    """
    with _applied_in_backward(parts, recipe, progress, fused):
        for epoch, batch in batches:
            if progress.stop is not None or progress.enough:
                return
            typical = progress.train_s / progress.step if progress.step else 0.0
            if recipe.deadline is not None and time.perf_counter() + typical > recipe.deadline:
                progress.late = True
                return
            if progress.step in progress.dropped:
                progress.step += 1
                continue
            if parts.meter.total + recipe.cost(batch) > recipe.flops:
                raise EdgegtError(
                    f"step {progress.step + 1} of {recipe.steps} would go over the FLOPs budget: more were counted "
                    "than planned, which is a fault of edgegt; what was trained is saved"
                )
            started = time.perf_counter()
            loss = _whole_step(parts, recipe, batch, micro_batch, progress, fused)
            seconds = time.perf_counter() - started
            progress.step += 1
            progress.train_s += seconds
            tokens = batch.shape.rows * batch.shape.tokens
            entry = {
                "step": progress.step, "round": round_index, "epoch": round(epoch, 4), "loss": loss,
                "lr": recipe.lr(progress.step - 1) * progress.lr_scale, "tokens_per_s": tokens / seconds,
                "step_s": seconds, "bytes": parts.watch.now(), "peak_bytes": parts.watch.peak_ever(),
                "flops": parts.meter.total, "elapsed_s": progress.train_s,
                "remaining_s": progress.train_s / progress.step * (recipe.steps - progress.step), **parts.facts(),
            }  # fmt: skip
            if progress.step % TRIM_EVERY == 0:
                trim()
            metrics.add(entry)
            report(entry)


def _whole_step(parts: Parts, recipe: Recipe, batch: Batch, micro_batch: int, progress: Progress, fused: bool) -> float:
    """One step, or none of it: returns the loss. Raises: Dropped, NoRoom."""
    progress.torn = False
    counted = dict(parts.meter.by_kind)
    try:
        return _step(parts, recipe, batch, micro_batch, progress, fused)
    except NotFinite as error:
        problem: Exception = Dropped(str(error), progress.torn)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        parts.meter.by_kind.clear()  # the step will be made again, and counts once
        parts.meter.by_kind.update(counted)
        problem = NoRoom((str(error).splitlines() or [type(error).__name__])[0][:120], progress.torn)
    for parameter in parts.parameters.values():
        parameter.grad = None
    parts.after_step()
    trim()
    raise problem


def _step(parts: Parts, recipe: Recipe, batch: Batch, micro_batch: int, progress: Progress, fused: bool) -> float:
    total = 0.0
    for part in split_micro(batch, micro_batch):
        with _kept_measured(parts, recipe, part.shape, progress):
            loss = supervised_loss(parts.module, part, parts.device, 1 / batch.supervised)
        total += float(loss.detach())
        if not math.isfinite(total):
            raise NotFinite(f"the loss is {total}")
        loss.backward()
    if not fused:
        gradients = {name: p.grad for name, p in parts.parameters.items() if p.grad is not None}
        clip_together(list(gradients.values()), recipe.max_grad_norm)
        for name, gradient in gradients.items():
            progress.torn = True
            parts.update(name, gradient, recipe.lr(progress.step) * progress.lr_scale)
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
            progress.torn = True
            parts.update(name, gradient, recipe.lr(progress.step) * progress.lr_scale)

        return apply

    try:
        if fused:
            for name, parameter in parts.parameters.items():
                handles.append(parameter.register_post_accumulate_grad_hook(hook(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()
