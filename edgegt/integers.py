"""The integer case of each way to train: what its choices cost under every budget, from the cost table."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from edgegt.case import Case, Costs, Kept, Layer
from edgegt.errors import InputError
from edgegt.memory import (
    always_bytes,
    fragment_bytes,
    gradient_bytes,
    kept_bytes,
    library_bytes,
    loss_bytes,
    passing_bytes,
    plane_bytes,
    saved_by,
    slack_bytes,
    state_bytes,
)
from edgegt.problem import Problem, Way

NANO = 10**9


@dataclass(frozen=True)
class Parts:
    """What the costs of a way are made of, wherever hidden states are kept and whether layers may be recomputed.

    own: of each weight by itself. paths: weights (bit mask), the layer that keeps the bytes (-1: none), FLOPs and
    seconds as costs, and the bytes kept for backward. layers: as recomputing sees them.
    """

    own: tuple[Costs, ...]
    paths: tuple[tuple[int, int, Costs, int], ...]
    layers: tuple[Layer, ...]


def case_of(problem: Problem, way: Way, known: dict[Way, Parts] | None = None) -> Case:
    """The integer case of one way to train. Budgets: FLOPs; bytes at the loss, when backward begins and when a layer is
    recomputed; nanoseconds where seconds are limited.

    known: parts that this problem was made of before, kept below whichever boundary. Raises: InputError when no weight
    has an importance above 0.
    """
    builder, known = _Builder(problem, way), {} if known is None else known
    plain = replace(way, recompute=False)
    if plain not in known:
        known[plain] = builder.parts()
    return builder.case(known[plain])


class _Builder:
    def __init__(self, problem: Problem, way: Way) -> None:
        self.problem, self.way = problem, way
        self.table, self.setting = problem.table_of(way), problem.setting(way)
        limited = problem.rates is not None and problem.seconds is not None
        self.rates = problem.rates.of_states(way.formats.states) if limited and problem.rates else None
        self.values = tuple(float(problem.values.get(weight.name, 0.0)) for weight in self.table.weights)
        self.candidates = tuple(
            bit for bit, value in enumerate(self.values)
            if value > 0 and math.isfinite(value)
            and (self.table.weights[bit].block >= problem.boundary or not problem.boundary)
        )  # fmt: skip
        if not self.candidates:
            raise InputError("no weight has an importance above 0, so none is worth training: check the data and --lr")

    def parts(self) -> Parts:
        """What this way costs below no boundary in particular."""
        table, setting, totals = self.table, self.setting, self.problem.totals
        paths, layers = [], []
        for path in table.paths:
            seconds = self.rates.path_s(path, totals) if self.rates else 0.0
            held = sum(kept_bytes([path.saved_bytes], setting))
            paths.append((path.weights, path.block, self._costs(path.flops.over(totals), 0, 0, 0, seconds), held))
        for index, layer in enumerate(table.layers):
            flops, held = layer.forward.over(totals), sum(kept_bytes([layer.input_bytes], setting))
            seconds = self.rates.layer_s(layer, totals) if self.rates else 0.0
            peak = self._costs(0, 0, 0, sum(kept_bytes(saved_by(table, index), setting)))
            layers.append(Layer(layer.weights, self._costs(flops, held, held, held, seconds), peak))
        return Parts(self._own(), tuple(paths), tuple(layers))

    def case(self, parts: Parts) -> Case:
        """The case of the candidates that the boundary leaves."""
        paths, kept = self._shared(parts)
        case = Case(
            values=self.values,
            candidates=self.candidates,
            costs=parts.own,
            paths=paths,
            left=self._left(),
            kept=kept,
            layers=parts.layers,
            blocks=tuple(weight.block for weight in self.table.weights),
            vectors=frozenset(bit for bit, weight in enumerate(self.table.weights) if len(weight.shape) == 1),
        )
        return case if self.way.recompute else case.without_recomputation()

    def _costs(self, flops: int, loss: int, backward: int, again: int, seconds: float = 0.0) -> Costs:
        budgets = (flops, loss, backward, again)
        return (*budgets, math.ceil(seconds * NANO)) if self.rates else budgets

    def _own(self) -> tuple[Costs, ...]:
        """What each weight adds by itself; the head's gradient exists at the loss."""
        problem, resting = self.problem, set(self.problem.around.demoted)
        own = []
        for weight in self.table.weights:
            held = state_bytes(weight, self.setting.accumulate, self.setting.formats)
            held += fragment_bytes(weight, self.setting.accumulate, self.setting.formats)
            held -= plane_bytes(weight) if weight.name in resting else 0
            head = loss_bytes(weight) if weight.kind == "head" else 0
            seconds = self.rates.trained_s(weight, problem.totals, problem.steps) if self.rates else 0.0
            own.append(self._costs(weight.dw.over(problem.totals), held + head, held, held, seconds))
        return tuple(own)

    def _shared(self, parts: Parts) -> tuple[tuple[tuple[int, Costs], ...], tuple[Kept, ...]]:
        """Shared costs, with those of candidates only: paths, and bytes that recomputing a layer frees."""
        allowed = sum(1 << bit for bit in self.candidates)
        shared: dict[int, Costs] = {}
        kept: dict[tuple[int, int], Costs] = {}
        steps = [(mask, self._costs(0, 0, size, size)) for mask, size in self._gradient_steps()]
        for weights, block, costs, held in parts.paths:
            if block < 0:
                steps.append((weights, _sum(costs, self._costs(0, held, held, held))))
                continue
            steps.append((weights, costs))
            if held and weights & allowed:
                kept[weights & allowed, block] = _sum(
                    kept.get((weights & allowed, block)), self._costs(0, held, held, 0)
                )
        for mask, costs in steps:
            if mask & allowed and any(costs):
                shared[mask & allowed] = _sum(shared.get(mask & allowed), costs)
        return tuple(shared.items()), tuple(Kept(mask, layer, costs) for (mask, layer), costs in kept.items())

    def _gradient_steps(self) -> list[tuple[int, int]]:
        """The largest gradient but the head's: each size step is paid once any weight at least that large is chosen."""
        sizes = {
            bit: gradient_bytes(self.table.weights[bit])
            for bit in self.candidates
            if self.table.weights[bit].kind != "head"
        }
        # One that is always trained has its gradient whatever is chosen.
        least = max(map(gradient_bytes, self.table.always), default=0)
        steps, below = [], 0
        for size in sorted({max(least, size) for size in sizes.values()}):
            mask = sum(1 << bit for bit in sizes if max(least, sizes[bit]) >= size)
            steps.append((mask, size - below))
            below = size
        return steps

    def _left(self) -> Costs:
        problem, table = self.problem, self.table
        resting = set(problem.around.demoted)
        room = problem.memory_bytes - problem.around.floor_bytes - problem.base_bytes
        room -= library_bytes(self.setting.accumulate)
        room -= always_bytes(table, self.setting.accumulate, self.setting.formats)
        room = _without_slack(room) - sum(plane_bytes(weight) for weight in table.weights if weight.name in resting)
        logits, transient = passing_bytes(table, problem.around, self.setting)
        flops = problem.flops - table.forward.over(problem.totals) + problem.saved_flops
        if self.rates is None or problem.seconds is None:
            return flops, room - logits, room - transient, room - transient
        fixed = self.rates.fixed_s(table, problem.totals, problem.steps, problem.micro_batches(self.way))
        seconds = math.floor((problem.seconds - fixed + problem.saved_s(self.way)) * NANO)
        return flops, room - logits, room - transient, room - transient, seconds


def _sum(before: Costs | None, costs: Costs) -> Costs:
    return costs if before is None else tuple(a + b for a, b in zip(before, costs, strict=True))


def _without_slack(room_bytes: int) -> int:
    """The most bytes that, together with their slack, fit into `room_bytes`."""

    def need(named: int) -> int:
        return named + slack_bytes({"named": named})

    low, high = -1, max(room_bytes, 0)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if need(middle) <= room_bytes else (low, middle - 1)
    return low
