"""Ideas that no option or constant of the program holds, for bench_ablation.py: each changes one function of a process.

They were tried against the defaults and did not win (docs/benchmarks.md, "What each default is worth"), so that they
live here and not in the program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from edgegt import rounds
from edgegt.cost import CostTable
from edgegt.optimizer import AdamW
from edgegt.planner import Problem
from edgegt.rounds import Rounds, Standing
from edgegt.trainee import Int8Trainee
from edgegt.value import values_of as plain_values


def first_round(factor: float) -> None:
    """Every round but the last may spend `factor` of the FLOPs per step that are left; the last gets the rest."""
    _planned(lambda problem, at: replace(problem, flops=int(problem.flops * factor)) if at.later else problem)


def again(factor: float) -> None:
    """What was trained before is worth `factor` of its value in later rounds: others are explored."""

    def discounted(problem: Problem, at: Standing) -> Problem:
        blocks = {weight.name for weight in problem.table.weights if weight.kind != "head"}
        seen = blocks & set(at.trained)
        values = {name: value * factor if name in seen else value for name, value in problem.values.items()}
        return replace(problem, values=values)

    _planned(discounted)


def concave(factor: float) -> None:
    """The second most valuable tensor of a layer is worth `factor` of its value, the third its square, and so on."""

    def values_of(importance: Mapping[str, float], table: CostTable) -> dict[str, float]:
        values = plain_values(importance, table)
        layers: dict[int, list[str]] = {}
        for weight in table.weights:
            if weight.kind != "head":
                layers.setdefault(weight.block, []).append(weight.name)
        for names in layers.values():
            for place, name in enumerate(sorted(names, key=lambda name: -values[name])):
                values[name] *= factor**place
        return values

    _replaced(rounds, "values_of", values_of)


def power(exponent: float) -> None:
    """Importance to this power: below 1 small tensors, as those of attention are, are worth more for their FLOPs."""

    def values_of(importance: Mapping[str, float], table: CostTable) -> dict[str, float]:
        return plain_values({name: value**exponent for name, value in importance.items()}, table)

    _replaced(rounds, "values_of", values_of)


def statistics(share: float) -> None:
    """What is trained is worth what its AdamW states say, sum m^2 / sqrt(v), by `share`; together what was measured."""
    original = Int8Trainee._measure_importance

    def said_by(self: Int8Trainee, name: str) -> float:
        optimizer, state = self.trainables.optimizer, self.trainables.optimizer.states[name]
        mean = state.first / (1 - optimizer.betas[0] ** state.step)
        square = state.second / (1 - optimizer.betas[1] ** state.step)
        return float((mean.square() / (square.sqrt() + optimizer.eps)).sum())

    def measure(self: Int8Trainee) -> None:
        original(self)
        states = self.trainables.optimizer.states
        said = {name: said_by(self, name) for name in self.trainables.live if name in states}
        if said:
            scale = sum(self._values[name] for name in said) / sum(said.values())
            for name, value in said.items():
                self._values[name] += share * (scale * value - self._values[name])

    _replaced(Int8Trainee, "_measure_importance", measure)


def decay_to_start(value: float) -> None:
    """Weights are drawn back to where they began, as decoupled weight decay draws them to 0."""
    original = AdamW.update
    began: dict[str, torch.Tensor] = {}

    def update(self: AdamW, name: str, parameter: torch.Tensor, gradient: torch.Tensor, lr: float) -> None:
        if "." in name:  # else its speed is measured
            parameter.lerp_(began.setdefault(name, parameter.detach().clone()), lr * value)
        original(self, name, parameter, gradient, lr)

    _replaced(AdamW, "update", torch.no_grad()(update))


def head_rate(factor: float) -> None:
    """The head learns at `factor` of the learning rate."""
    _rated(lambda name, parameter: factor if name == "lm_head.weight" else 1.0)


def vector_rate(factor: float) -> None:
    """Norms and biases learn at `factor` times the learning rate."""
    _rated(lambda name, parameter: factor if parameter.dim() == 1 else 1.0)


def beta2(value: float) -> None:
    """AdamW forgets squared gradients as fast as this says."""
    original = AdamW.__init__

    def init(self: AdamW, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        self.betas = (self.betas[0], value)

    _replaced(AdamW, "__init__", init)


IDEAS: dict[str, Callable[[float], None]] = {
    "first round": first_round,
    "again": again,
    "concave": concave,
    "power": power,
    "statistics": statistics,
    "decay to start": decay_to_start,
    "head rate": head_rate,
    "vector rate": vector_rate,
    "beta2": beta2,
}


def _replaced(place: Any, name: str, function: Any) -> None:
    setattr(place, name, function)


def _planned(change: Callable[[Problem, Standing], Problem]) -> None:
    original = Rounds._problem

    def problem(self: Rounds, at: Standing, values: Mapping[str, float]) -> Problem:
        return change(original(self, at, values), at)

    _replaced(Rounds, "_problem", problem)


def _rated(factor: Callable[[str, torch.Tensor], float]) -> None:
    original = AdamW.update

    def update(self: AdamW, name: str, parameter: torch.Tensor, gradient: torch.Tensor, lr: float) -> None:
        original(self, name, parameter, gradient, lr * factor(name, parameter))

    _replaced(AdamW, "update", update)
