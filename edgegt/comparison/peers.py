"""LoRA and prefix tuning in training: PEFT's adapters over the float32 model.

They train on the batches that full fine-tuning has, with its loss (logits of every position, as Trainer computes them),
its AdamW and its clipping, through edgegt's own loop, which counts their FLOPs as it counts everyone's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from edgegt.architecture import is_encoder_decoder
from edgegt.comparison.adapters import PEERS
from edgegt.cost import BatchShape
from edgegt.data import Batch, collate
from edgegt.errors import EdgegtError, InputError
from edgegt.flops import FlopMeter, attach
from edgegt.full import everywhere, load_float
from edgegt.keeper import Keeper
from edgegt.log import Log
from edgegt.loss import supervised_loss
from edgegt.optimizer import AdamW, schedule
from edgegt.prepare import Setup
from edgegt.signals import interrupted, stopped_by_signals
from edgegt.train import Dropped, NoRoom, Parts, Progress, Recipe, train_round


class PeerTrainee:
    """The float model of one peer and what it trains."""

    held_bytes = 0

    def __init__(self, setup: Setup, log: Log, keeper: Keeper, name: str) -> None:
        if is_encoder_decoder(setup.config):
            raise InputError(f"{name} is compared on decoder-only models, and this is an encoder-decoder: leave it out")
        torch.manual_seed(setup.options.seed)  # adapters start at random
        self.setup, self.log, self.keeper, self.name = setup, log, keeper, name
        self.module: Any = PEERS[name](load_float(setup)).eval()
        self.meter = FlopMeter()
        attach(self.module, self.meter)
        self.parameters = {key: value for key, value in self.module.named_parameters() if value.requires_grad}
        self.optimizer = AdamW(False, setup.options.weight_decay)
        self.progress = Progress()

    def train(self) -> None:
        """All batches. Raises: Interrupted after the step in which a signal came; EdgegtError when it cannot go on."""
        setup, options, total = self.setup, self.setup.options, self.setup.schedule.steps
        recipe = Recipe(
            lambda done: schedule(options.schedule, setup.lr, done, total, options.warmup),
            options.max_grad_norm, total, 2 * setup.full_flops, lambda shape: 0,
        )  # fmt: skip
        parts = Parts(
            self.module, setup.device, self.parameters, self._update, lambda: None, self.meter, setup.watch,
        )  # fmt: skip
        batches = ((epoch, self._batch(indices)) for epoch, indices in setup.schedule.batches)
        with stopped_by_signals(self.progress):
            try:
                train_round(
                    parts, recipe, batches, options.batch_size, 0, self.progress, self.keeper.metrics, self.log.step,
                    fused=True,
                )  # fmt: skip
            except (Dropped, NoRoom) as error:
                raise EdgegtError(f"{self.name} cannot go on after step {self.progress.step}: {error}") from error
        if self.progress.stop is not None:
            raise interrupted(self.progress, total, self.keeper)

    def save(self) -> None:
        """Nothing: the adapters are compared and thrown away."""

    def flops_of(self, shapes: Sequence[BatchShape]) -> list[int]:
        """FLOPs of a step on batches of these shapes, found on a few of them; nothing is trained.

        Of a decoder they are rows (a + b tokens + c tokens^2), which three lengths determine.
        """
        lengths = {shape.tokens: index for index, shape in enumerate(shapes)}
        ordered = sorted(lengths)
        tried = sorted({ordered[0], ordered[len(ordered) // 2], ordered[-1]})
        found = [self._counted(lengths[tokens]) / shapes[lengths[tokens]].rows for tokens in tried]
        return [round(shape.rows * _through(tried, found, shape.tokens)) for shape in shapes]

    def _counted(self, index: int) -> int:
        """FLOPs of a step on one batch of the schedule."""
        batch, before = self._batch(self.setup.schedule.batches[index][1]), self.meter.total
        supervised_loss(self.module, batch, self.setup.device).backward()
        for parameter in self.parameters.values():
            parameter.grad = None
        counted = self.meter.total - before
        self.meter.by_kind.clear()
        return counted

    def _batch(self, indices: Sequence[int]) -> Batch:
        rows = [self.setup.corpus.train[index] for index in indices]
        return everywhere(collate(rows, self.setup.pad_id))

    def _update(self, name: str, gradient: torch.Tensor, lr: float) -> None:
        self.optimizer.update(name, self.parameters[name].data, gradient, lr)


def _through(at: Sequence[int], values: Sequence[float], x: int) -> float:
    """The polynomial through up to three points, at x (Lagrange)."""
    total = 0.0
    for one, value in zip(at, values, strict=True):
        for other in at:
            value *= (x - other) / (one - other) if other != one else 1.0
        total += value
    return total
