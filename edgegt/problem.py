"""What is planned: costs, importance, batches and budgets; and the integer case that each way to train makes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

from edgegt.case import Case, Costs, Kept, Layer, bits
from edgegt.cost import BatchShape, CostTable, Totals
from edgegt.errors import InputError
from edgegt.memory import (
    Formats,
    Setting,
    Surroundings,
    always_bytes,
    fragment_bytes,
    gradient_bytes,
    kept_bytes,
    library_bytes,
    loss_bytes,
    passing_bytes,
    peak_terms,
    plane_bytes,
    saved_by,
    slack_bytes,
    state_bytes,
)
from edgegt.prefix import Caching, Footing, fill_group_bytes
from edgegt.rates import Rates
from edgegt.units import format_bytes

FORMATS = (Formats("float32", "float32"), Formats("float32", "8-bit"), Formats("bfloat16", "8-bit"))
FORMAT_WORTH = {"float32": 1.0, "bfloat16": 0.99}
ROWS_WORTH = 0.97
NANO = 10**9
UNLIMITED_S = 10**9


@dataclass(frozen=True)
class Way:
    """One way to train: rows of a micro-batch, number formats, how many rows of the head are trained (None: all), and
    whether layers may be recomputed.
    """

    micro_batch: int
    formats: Formats
    head_rows: int | None
    recompute: bool = False

    @property
    def worth(self) -> float:
        """What a choice trained this way is worth, as a share of the same choice in float32 with the whole head."""
        return (1.0 if self.head_rows is None else ROWS_WORTH) * FORMAT_WORTH[self.formats.master]


@dataclass(frozen=True)
class Problem:
    """What to plan: costs, importance per weight name (not above 0: never chosen), batches, and the budgets.

    shapes: every batch the plan will train on. flops, seconds: what these may cost (seconds by `rates`; None: any).
    memory_bytes: peak of the whole process. batch_size: rows of an optimizer step. formats, head_rows: the choices
    that are allowed, the preferred first; head_rows are numbers of rows of the head, None for all of them.
    caching: what hidden states could be kept, below any boundary; boundary: below which layer they are, 0 for none.
    streams: whether the base's layers below it are in memory one at a time.
    """

    table: CostTable
    values: Mapping[str, float]
    shapes: tuple[BatchShape, ...]
    flops: int
    memory_bytes: int
    around: Surroundings
    vocabulary: int
    batch_size: int
    formats: tuple[Formats, ...] = FORMATS
    head_rows: tuple[int | None, ...] = (None,)
    seconds: float | None = None
    rates: Rates | None = None
    caching: Caching | None = None
    boundary: int = 0
    streams: bool = False

    def __post_init__(self) -> None:
        if not self.shapes:
            raise InputError(
                "there is no batch to plan for: the data has no rows left; give more data or fewer --epochs"
            )
        if self.seconds is not None and self.rates is None:
            raise ValueError("a time budget needs rates")

    @property
    def steps(self) -> int:
        """Optimizer steps, one per batch."""
        return len(self.shapes)

    @cached_property
    def totals(self) -> Totals:
        """Sums over all batches."""
        return Totals.of(self.shapes)

    @property
    def footing(self) -> Footing | None:
        """What is kept below the boundary; None for nothing."""
        return self.caching.footing(self.boundary) if self.caching and self.boundary else None

    def at(self, boundary: int) -> Problem:
        """The same problem with states kept below another boundary."""
        around = replace(self.around, streamed=boundary if self.streams else 0)
        other = replace(self, boundary=boundary, around=around)
        shared = ("totals", "full_flops", "_tables", "_settings")
        other.__dict__.update({name: getattr(self, name) for name in shared})
        return other

    @property
    def boundaries(self) -> list[int]:
        """The boundaries to choose from, 0 for none: those that save FLOPs; all where a cache is wanted or needed."""
        caching = self.caching
        if caching is None:
            return [0]
        valued = [weight.block for weight in self.table.weights if self.values.get(weight.name, 0.0) > 0]
        useful = [b for b in range(1, max(valued, default=0) + 1) if b >= min(valued) or b == caching.boundary]
        return [0, *(b for b in useful if caching.wanted or self.streams or self.at(b).saved_flops > 0)]

    @cached_property
    def fill_flops(self) -> int:
        """FLOPs of making the states that are kept."""
        return self.table.below(self.boundary).over(self.footing.fill) if self.footing else 0

    @cached_property
    def saved_flops(self) -> int:
        """FLOPs that kept states save in the forward pass, less those of making them; may be below 0."""
        if self.footing is None:
            return 0
        return self.table.below(self.boundary).over(self.footing.skipped) - self.fill_flops

    def saved_s(self, way: Way) -> float:
        """Predicted seconds that kept states save, less those of making and reading them; 0 without rates."""
        if self.rates is None or self.caching is None or self.footing is None:
            return 0.0
        footing, count = self.footing, self.micro_batches(way)
        saved, made = (
            self.rates.skipped_s(self.table, self.boundary, totals) for totals in (footing.skipped, footing.fill)
        )
        moved = footing.read_bytes + (footing.nbytes if footing.fill.row else 0) + self.streamed_bytes
        whole = self.rates.fixed_s(self.table, self.totals, self.steps, count)
        return min(saved + self.saved_dispatch_s(way) - made - moved / self.caching.bytes_per_s, whole)

    @property
    def base_bytes(self) -> int:
        """Bytes of the base that are in memory in training."""
        return self.table.resident_bytes(self.around.streamed)

    @property
    def streamed_bytes(self) -> int:
        """Bytes of the base that are read again as they were let go: to make states, and for rows that are not kept."""
        if not self.streams or self.footing is None:
            return 0
        states = 4 * self.table.width * self.footing.fill.token
        passes = -(-states // fill_group_bytes(self.table, self.boundary)) + self.footing.misses
        return passes * sum(self.table.layer_bytes_int8[: self.boundary])

    def saved_dispatch_s(self, way: Way) -> float:
        """The part of `saved_s` that is dispatch."""
        if self.rates is None or self.footing is None:
            return 0.0
        count = self.micro_batches(way)
        return self.rates.skipped_dispatch_s(self.boundary, self.footing.skipped, self.totals, count)

    @cached_property
    def full_flops(self) -> int:
        """FLOPs of full fine-tuning on these batches."""
        return self.table.full_work().over(self.totals)

    @cached_property
    def _tables(self) -> dict[int | None, CostTable]:
        tables: dict[int | None, CostTable] = {None: self.table}
        for rows in self.head_rows:
            tables[rows] = self.table if rows is None else self.table.with_head_rows(rows)
        return tables

    @cached_property
    def _settings(self) -> dict[int, Setting]:
        return {}

    def ways(self) -> list[Way]:
        """Every way to train, the preferred first: whole head, nothing recomputed, large batches, rich formats.

        Formats come last because they cost least: 8-bit states 6 ms per 4 M elements of a step more than float32 ones.
        """
        sizes = [self.batch_size]
        while sizes[-1] > 1:
            sizes.append(sizes[-1] // 2)
        choices = product(self.head_rows, (False, True), sizes, self.formats)
        return [Way(size, formats, rows, recompute) for rows, recompute, size, formats in choices]

    def table_of(self, way: Way) -> CostTable:
        """The cost table with as many rows of the head as this way trains."""
        return self._tables[way.head_rows]

    def setting(self, way: Way) -> Setting:
        """The batches and formats that a peak is predicted for."""
        if way.micro_batch not in self._settings:
            rows, size = way.micro_batch, self.batch_size
            self._settings[rows] = Setting.of(self.table, self.shapes, self.vocabulary, rows, size, way.formats)
        return replace(self._settings[way.micro_batch], formats=way.formats)

    def micro_batches(self, way: Way) -> int:
        """Micro-batches of the whole run."""
        return sum(-(-shape.rows // way.micro_batch) for shape in self.shapes)

    def memory(self, way: Way, mask: int, recompute: tuple[int, ...]) -> dict[str, int]:
        """The named terms of the peak of a choice."""
        table = self.table_of(way)
        names = [table.weights[bit].name for bit in bits(mask)]
        return peak_terms(table, names, recompute, self.around, self.setting(way))

    def spent_flops(self, way: Way, mask: int, recompute: tuple[int, ...]) -> int:
        """The FLOPs of a choice over all batches."""
        return self.table_of(way).train_work(mask, recompute).over(self.totals) - self.saved_flops

    def spent_s(self, way: Way, mask: int, recompute: tuple[int, ...]) -> float | None:
        """The predicted seconds of a choice over all batches, None without rates."""
        if self.rates is None:
            return None
        table, count, rates = self.table_of(way), self.micro_batches(way), self.rates.of_states(way.formats.states)
        return rates.run_s(table, mask, self.totals, self.steps, count, recompute) - self.saved_s(way)


def case_of(problem: Problem, way: Way) -> Case:
    """The integer case of one way to train. Budgets: FLOPs; bytes at the loss, when backward begins and when a layer is
    recomputed; nanoseconds where seconds are limited.

    Raises: InputError when no weight has an importance above 0.
    """
    return _Builder(problem, way).case()


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

    def case(self) -> Case:
        table, setting = self.table, self.setting
        paths, kept = self._paths()
        layers: list[Layer] = []
        for index, layer in enumerate(table.layers):
            flops, held = layer.forward.over(self.problem.totals), sum(kept_bytes([layer.input_bytes], setting))
            seconds = self.rates.layer_s(layer, self.problem.totals) if self.rates else 0.0
            peak = self._costs(0, 0, 0, sum(kept_bytes(saved_by(table, index), setting)))
            layers.append(Layer(layer.weights, self._costs(flops, held, held, held, seconds), peak))
        case = Case(
            values=self.values,
            candidates=self.candidates,
            costs=self._own(),
            paths=paths,
            left=self._left(),
            kept=kept,
            layers=tuple(layers),
            blocks=tuple(weight.block for weight in table.weights),
            vectors=frozenset(bit for bit, weight in enumerate(table.weights) if len(weight.shape) == 1),
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

    def _paths(self) -> tuple[tuple[tuple[int, Costs], ...], tuple[Kept, ...]]:
        """Shared costs, with those of candidates only: paths, and bytes that recomputing a layer frees."""
        problem, allowed = self.problem, sum(1 << bit for bit in self.candidates)
        shared: dict[int, Costs] = {}
        kept: dict[tuple[int, int], Costs] = {}
        steps = [(mask, self._costs(0, 0, size, size)) for mask, size in self._gradient_steps()]
        for path in self.table.paths:
            flops, held = path.flops.over(problem.totals), sum(kept_bytes([path.saved_bytes], self.setting))
            seconds = self.rates.path_s(path, problem.totals) if self.rates else 0.0
            if path.block < 0:
                steps.append((path.weights, self._costs(flops, held, held, held, seconds)))
                continue
            steps.append((path.weights, self._costs(flops, 0, 0, 0, seconds)))
            if held and path.weights & allowed:
                key = path.weights & allowed, path.block
                kept[key] = _sum(kept.get(key), self._costs(0, held, held, 0))
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


def cached_facts(problem: Problem) -> dict[str, Any]:
    """What keeping states comes to, for the record: FLOPs of making them, which a boundary that is there already does
    not pay, and those saved after that; for the chosen boundary and for all others.
    """
    if problem.caching is None:
        return {}
    every = [problem.at(boundary) for boundary in range(1, problem.table.blocks + 1)]
    footing = problem.footing or problem.caching.fresh
    return {
        "boundary": problem.boundary, "kept": problem.caching.boundary, "rows": footing.rows if problem.boundary else 0,
        "bytes": footing.nbytes if problem.boundary else 0, "read_bytes": footing.read_bytes if problem.boundary else 0,
        "fill_flops": problem.fill_flops, "saved_flops": problem.saved_flops,
        "streamed_bytes": problem.streamed_bytes,
        "boundaries": [{"boundary": one.boundary, "fill_flops": one.fill_flops, "saved_flops": one.saved_flops}
                       for one in every],
    }  # fmt: skip


def given_up(problem: Problem, way: Way, recompute: tuple[int, ...]) -> list[str]:
    """What a plan does only to fit into memory, a line each."""
    stays, whole = format_bytes(problem.base_bytes), format_bytes(problem.table.base_bytes)
    size = problem.batch_size
    lines = {
        f"micro-batches of {way.micro_batch} rows instead of {size}": way.micro_batch < size,
        f"{len(recompute)} layers are recomputed in backward": bool(recompute),
        f"masters are {way.formats.master} with stochastic rounding": way.formats.master != "float32",
        f"the int8 base is streamed ({stays} of its {whole} stay in memory)": problem.streams,
    }
    return [f"{line}, to fit into memory" for line, there in lines.items() if there]


def unlimited(problem: Problem) -> Problem:
    """The same problem with no limits."""
    seconds = None if problem.seconds is None else float(UNLIMITED_S)
    return replace(problem, flops=2 * problem.full_flops, memory_bytes=1 << 62, seconds=seconds)


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
