"""The peers in training: PEFT's adapters over the float32 model, and GreenTrainer as it was published.

They train on the batches that full fine-tuning has, with its loss (logits of every position, as Trainer computes them),
its AdamW and its clipping, through edgegt's own loop, which counts their FLOPs as it counts everyone's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from edgegt.architecture import is_encoder_decoder, is_head_tied
from edgegt.comparison.adapters import PEERS
from edgegt.comparison.published import chain_of, chosen, select
from edgegt.cost import BatchShape
from edgegt.data import Batch, collate
from edgegt.errors import BudgetError, EdgegtError, InputError
from edgegt.flops import FlopMeter, attach
from edgegt.full import everywhere, load_float
from edgegt.keeper import Keeper
from edgegt.log import Log
from edgegt.loss import supervised_loss
from edgegt.optimizer import AdamW, clip, schedule
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
        self.module: Any = self._model(load_float(setup)).eval()
        self.meter = FlopMeter()
        attach(self.module, self.meter)
        self.optimizer = AdamW(False, setup.options.weight_decay)
        self.progress = Progress()

    def _model(self, model: Any) -> Any:
        return PEERS[self.name](model)

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """What is trained now."""
        return {key: value for key, value in self.module.named_parameters() if value.requires_grad}

    @property
    def rounds(self) -> Sequence[int]:
        """Steps between two choices of what is trained."""
        return (self.setup.schedule.steps,)

    def choose(self, index: int) -> None:
        """Choose what is trained from step `index` on: adapters are chosen for good."""

    def train(self) -> None:
        """All batches. Raises: Interrupted after the step in which a signal came; EdgegtError when it cannot go on."""
        with stopped_by_signals(self.progress):
            first = 0
            for number, steps in enumerate(self.rounds):
                self.choose(first)
                self._train_round(number, first, steps)
                first += steps
                if self.progress.stop is not None:
                    raise interrupted(self.progress, self.setup.schedule.steps, self.keeper)

    def _train_round(self, number: int, first: int, steps: int) -> None:
        setup, options = self.setup, self.setup.options
        recipe = Recipe(self._lr, options.max_grad_norm, setup.schedule.steps, 2 * setup.full_flops, lambda shape: 0)
        parts = Parts(
            self.module, setup.device, self.parameters, self._update, lambda: None, self.meter, setup.watch,
        )  # fmt: skip
        planned = setup.schedule.batches[first : first + steps]
        batches = ((epoch, self._batch(indices)) for epoch, indices in planned)
        try:
            train_round(
                parts, recipe, batches, options.batch_size, number, self.progress, self.keeper.metrics, self.log.step,
                fused=True,
            )  # fmt: skip
        except (Dropped, NoRoom) as error:
            raise EdgegtError(f"{self.name} cannot go on after step {self.progress.step}: {error}") from error

    def _lr(self, done: int) -> float:
        options = self.setup.options
        return schedule(options.schedule, self.setup.lr, done, self.setup.schedule.steps, options.warmup)

    def save(self) -> None:
        """Nothing: what was trained is compared and thrown away."""

    def cost(self) -> dict[str, float]:
        """FLOPs: of full fine-tuning's on the same steps (`ratio`), and beside all steps (`once`). Nothing is trained
        by it but what `choose` does.
        """
        self.choose(0)
        once = float(self.meter.total * len(self.rounds))
        return {"ratio": sum(self.flops_of(self.setup.schedule.shapes)) / self.setup.full_flops, "once": once}

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


class PublishedTrainee(PeerTrainee):
    """GreenTrainer as published, in float32: a choice for every round, by FLOPs alone."""

    def _model(self, model: Any) -> Any:
        return model

    @property
    def rounds(self) -> Sequence[int]:
        """As many as a run of edgegt has."""
        return self.setup.schedule.rounds

    def choose(self, index: int) -> None:
        """Measure importance on the round's first batch, which is trained by it once more. Raises: BudgetError."""
        setup, batch = self.setup, self._batch(self.setup.schedule.batches[index][1])
        shapes = sorted(setup.schedule.shapes, key=lambda shape: shape.tokens)
        tied, rho = is_head_tied(self.module), setup.options.rho or setup.rho
        chain = chain_of(setup.need.table, shapes[len(shapes) // 2], tied, rho)

        def update() -> None:
            for name, parameter in self.parameters.items():
                gradient, parameter.grad = parameter.grad, None
                if gradient is not None:
                    clip(gradient, setup.options.max_grad_norm, name)
                    self._update(name, gradient, self._lr(index))

        names = chosen(
            self.module, lambda: supervised_loss(self.module, batch, setup.device, 1 / batch.supervised), update, chain
        )
        if not names:
            raise BudgetError(f"{self.name} finds nothing to train within rho {rho:g}: give --rho a larger one")
        select(self.module, names)


def trainee_of_peer(setup: Setup, log: Log, keeper: Keeper, name: str) -> PeerTrainee:
    """What trains as the peer of this name does."""
    return (PeerTrainee if name in PEERS else PublishedTrainee)(setup, log, keeper, name)


def _through(at: Sequence[int], values: Sequence[float], x: int) -> float:
    """The polynomial through up to three points, at x (Lagrange)."""
    total = 0.0
    for one, value in zip(at, values, strict=True):
        for other in at:
            value *= (x - other) / (one - other) if other != one else 1.0
        total += value
    return total
