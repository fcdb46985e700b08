"""What is planned: costs, importance, batches and budgets; and every way to train within them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any

from edgegt.case import bits
from edgegt.cost import BatchShape, CostTable, Totals
from edgegt.errors import InputError
from edgegt.memory import Formats, Setting, Surroundings, peak_terms
from edgegt.prefix import Caching, Footing, fill_group_bytes
from edgegt.rates import Rates
from edgegt.units import format_bytes

FORMATS = (Formats("float32", "float32"), Formats("float32", "8-bit"), Formats("bfloat16", "8-bit"))
FORMAT_WORTH = {"float32": 1.0, "bfloat16": 0.99}
ROWS_WORTH = 0.97
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
