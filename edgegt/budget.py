"""Both budgets of a run against what it needs at least: probes, evaluation and training, before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from edgegt.cost import BatchShape, CostTable, Totals, Work
from edgegt.errors import BudgetError
from edgegt.job import Schedule
from edgegt.memory import Formats, Surroundings, always_bytes, fixed_terms, slack_bytes
from edgegt.options import RunOptions
from edgegt.planner import FORMATS, Problem, Smallest, smallest
from edgegt.prefix import Rows
from edgegt.problem import unlimited
from edgegt.rates import Rates
from edgegt.units import format_bytes, format_duration


@dataclass(frozen=True)
class Probes:
    """How importance is measured in a round: rows per batch (even) and number of batches (even)."""

    rows: int
    count: int

    def shapes(self, schedule: Schedule) -> list[BatchShape]:
        """Shapes of one round's probe batches, at least as large as they will be."""
        worst = max(shape.tokens for shape in schedule.shapes)
        kept = max(shape.kept for shape in schedule.shapes)
        return [BatchShape(self.rows, worst, kept)] * self.count


PROBE_SHARE = 0.02
PROBE_ROWS = (4, 64)
# Evaluation and the report take time too, and predicted seconds may be short.
TIME_MARGIN = 1.6
ANSWER_TOKENS = 96


@dataclass(frozen=True)
class Need:
    """What a run needs whatever is selected. held_out: the longest held-out row, as a shape of one row.

    formats, head_rows: the number formats and parts of the head that may be trained, the preferred first.
    prepared_bytes: the peak of what was done so far, below which no budget can be kept.
    rows: those of which hidden states may be kept, None where none are; spare: those of which they could be.
    streams: whether the base's layers are in memory one at a time but where they are trained.
    """

    table: CostTable
    floor_bytes: int
    vocabulary: int
    held_out: BatchShape
    formats: tuple[Formats, ...] = FORMATS
    head_rows: tuple[int | None, ...] = (None,)
    rates: Rates | None = None
    copy_bytes: int = 0
    prepared_bytes: int = 0
    rows: Rows | None = None
    spare: Callable[[], Rows | None] = lambda: None
    streams: bool = False
    _known: dict[Any, tuple[Schedule, Smallest]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def around(self) -> Surroundings:
        """The surroundings of a first round."""
        return Surroundings(self.floor_bytes, (), self.copy_bytes)

    def problem(
        self, options: RunOptions, shapes: tuple[BatchShape, ...], values: Mapping[str, float], flops: int,
        memory_bytes: int, seconds: float | None = None,
    ) -> Problem:  # fmt: skip
        """The problem of a first round on these batches."""
        return Problem(
            self.table, values, shapes, flops, memory_bytes, self.around, self.vocabulary, options.batch_size,
            self.formats, self.head_rows, seconds, self.rates, self.rows.caching(0) if self.rows else None,
            streams=self.streams,
        )  # fmt: skip

    def evaluation_bytes(self, rows: int, held_bytes: int = 0) -> int:
        """Peak of the held-out loss with this many rows at a time, beside `held_bytes` of trained tensors."""
        return self._peak(replace(self.held_out, rows=rows), held_bytes)

    def answer_bytes(self, rows: int, held_bytes: int = 0) -> int:
        """Peak of generating for this many prompts: only the last position reaches the head, keys and values stay.

        A classifier writes nothing: it says a class as it does in evaluation.
        """
        if not self.table.head_size:
            return self.evaluation_bytes(rows, held_bytes)
        shape = replace(self.held_out, rows=rows, kept=1)
        cached = 2 * 4 * self.table.width * self.table.blocks * rows * (shape.tokens + ANSWER_TOKENS)
        return self._peak(shape, held_bytes + cached)

    def probe_bytes(self, shape: BatchShape, held_bytes: int = 0) -> int:
        """Peak of the importance pass: every block's input, and one block whole."""
        state = 4 * self.table.width * shape.rows
        inputs = state * shape.tokens * (self.table.blocks + 1)
        if self.table.encoder_decoder:  # beside the layers' inputs what both stacks give
            inputs = sum((layer.input_bytes for layer in self.table.layers), Work()).at(shape)
            inputs += state * (shape.tokens + shape.kept)
        return self._peak(shape, held_bytes + inputs)

    def _peak(self, shape: BatchShape, kept: int) -> int:
        everything = (1 << len(self.table.weights)) - 1
        around = replace(self.around, streamed=self.table.blocks if self.streams else 0)
        terms = fixed_terms(self.table, around, shape, self.vocabulary)
        terms["masters"] = always_bytes(self.table, False, Formats(states="float32"))
        mean = self.table.saved_work(everything).at(shape) // max(1, self.table.blocks)
        terms["block"] = max((self.table.layer_bytes(index).at(shape) for index in range(self.table.blocks)), default=0)
        terms["block"] = max(terms["block"], mean)
        terms["kept"] = kept
        return sum(terms.values()) + slack_bytes(terms)


def rows_that_fit(peak: Callable[[int], int], most: int, memory_bytes: int) -> int:
    """The largest of `most`, half of it, ... 1 whose peak fits; 1 when none does (which was refused before)."""
    rows = most
    while rows > 1 and peak(rows) > memory_bytes:
        rows //= 2
    return rows


def plan_probes(options: RunOptions, schedule: Schedule, rho: float, need: Need, memory_bytes: int) -> Probes:
    """As many rows as 2 % of the FLOPs budget pays for, between 4 and 64, in batches that fit into memory.

    A batch has half of the rows of a step, at most: what it needs above the model is activations.
    """
    total = sum(shape.rows for shape in schedule.shapes)
    worst = largest(schedule, 1)
    dear = need.table.probe_work().at(worst) / (need.table.full_work().total(schedule.shapes) / total)
    rows = PROBE_SHARE * rho * total / dear / len(schedule.rounds)
    rows = int(min(max(rows, PROBE_ROWS[0]), PROBE_ROWS[1]))
    per_batch = fitting_probe_rows(max(2, min(options.batch_size // 2, rows // 2)), need, schedule, memory_bytes, 0)
    return Probes(per_batch, max(2, rows // per_batch // 2 * 2))


def fitting_probe_rows(most: int, need: Need, schedule: Schedule, memory_bytes: int, held_bytes: int) -> int:
    """Rows of a probe batch: even, at most `most`, and as many as fit beside `held_bytes`; 2 when nothing does."""
    rows = most // 2 * 2
    while rows > 2 and need.probe_bytes(largest(schedule, rows), held_bytes) > memory_bytes:
        rows = max(2, rows // 4 * 2)
    return rows


def largest(schedule: Schedule, rows: int) -> BatchShape:
    """A shape of this many rows that is at least as large as any batch of the run, in every term."""
    return BatchShape(rows, max(s.tokens for s in schedule.shapes), max(s.kept for s in schedule.shapes))


def flops_budget(rho: float, options: RunOptions, need: Need, schedule: Schedule, probes: Probes) -> int:
    """FLOPs that the run may spend. Raises: BudgetError when they do not pay for the probes and one trained tensor."""
    table = need.table
    full = table.full_work().total(schedule.shapes)
    probing = len(schedule.rounds) * table.probe_work().total(probes.shapes(schedule))
    least = _smallest(options, need, schedule).rho_flops + probing
    if least > int(rho * full):
        smallest_rho = math.ceil(least / full * 100) / 100
        other = _least_otherwise(options, need, schedule, full, probing)
        remedy = f"give --rho {smallest_rho:.2f} or more" if smallest_rho <= 1 else "give more --steps or --epochs"
        raise BudgetError(
            f"--rho {rho:g} is below the smallest reachable {least / full:.3f} on {schedule.steps} steps "
            f"(of it {probing / full:.3f} to measure importance{other}): {remedy}",
            smallest_rho=smallest_rho,
        )
    return int(rho * full)


def _least_otherwise(options: RunOptions, need: Need, schedule: Schedule, full: int, probing: int) -> str:
    """What would be reachable without kept hidden states, or with them where none are kept."""
    rows = need.spare() if need.rows is None else None
    if rows is None and need.rows is None:
        return ""
    least = _smallest(options, replace(need, rows=rows), schedule).rho_flops + probing
    return f"; {least / full:.3f} with --cache {'off' if rows is None else 'auto'}"


def smallest_bytes(options: RunOptions, need: Need, schedule: Schedule) -> int:
    """The least peak with which the run can be done: its preparation, smallest evaluation, probe and training."""
    probing = options.measures_importance
    return max(
        _smallest(options, need, schedule).memory_bytes,
        need.probe_bytes(largest(schedule, 2)) if probing else 0,
        need.evaluation_bytes(1),
        need.answer_bytes(1),
        need.prepared_bytes,
    )


def within_memory(options: RunOptions, need: Need, schedule: Schedule, memory_bytes: int) -> Need:
    """The need, with its base streamed where that is what it takes to train anything, and hidden states may be kept."""
    if need.rows is None or (least := smallest_bytes(options, need, schedule)) <= memory_bytes:
        return need
    streamed = replace(need, streams=True)
    return streamed if smallest_bytes(options, streamed, schedule) < least else need


def check_time(
    seconds: float | None, spent_s: float, options: RunOptions, need: Need, schedule: Schedule, probes: Probes
) -> None:
    """Hold the time budget of the whole run, of which `spent_s` are gone, against the cheapest training.

    Raises: BudgetError, with the least that would do.
    """
    if seconds is None:
        return
    probing = probe_seconds(need, schedule, probes)
    least = _smallest(options, need, schedule, seconds).seconds + probing
    if least + spent_s > seconds:
        needed = math.ceil(TIME_MARGIN * (least + spent_s))
        before = f" after {format_duration(spent_s)} of preparation" if spent_s >= 1 else ""
        raise BudgetError(
            f"the cheapest training takes about {format_duration(least)}{before}, and the run may take "
            f"{format_duration(seconds)}: give --time {needed}s or more (or --energy to match), or fewer --steps or "
            "--epochs",
            smallest_s=needed,
        )


def probe_seconds(need: Need, schedule: Schedule, probes: Probes) -> float:
    """Predicted seconds of measuring importance in every round, 0 without rates."""
    if need.rates is None or not probes.count:
        return 0.0
    seconds = need.rates.probe_s(need.table, Totals.of(probes.shapes(schedule)))
    if need.streams and need.rows is not None:  # forward, and again in backward
        seconds += 2 * probes.count * sum(need.table.layer_bytes_int8) / need.rows.bytes_per_s
    return len(schedule.rounds) * seconds


def _smallest(options: RunOptions, need: Need, schedule: Schedule, seconds: float | None = None) -> Smallest:
    """The least budgets of the run as a problem in which every weight is worth the same and nothing is too much.

    Several checks ask for them: what was found for a schedule is remembered with the need.
    """
    known = need._known.get((options, seconds))
    if known is not None and known[0] is schedule:
        return known[1]
    values = {weight.name: 1.0 for weight in need.table.weights}
    found = smallest(unlimited(need.problem(options, schedule.shapes, values, 0, 0, seconds)))
    need._known[options, seconds] = schedule, found
    return found


def check_memory(memory_bytes: int, options: RunOptions, need: Need, schedule: Schedule) -> None:
    """Raises: BudgetError, with the smallest budget that would do, when `memory_bytes` is too little to train in."""
    least = smallest_bytes(options, need, schedule)
    if least > memory_bytes:
        model = need.table.resident_bytes(need.table.blocks if need.streams else 0)
        remedy = "lower --max-length" if model < memory_bytes / 2 else "take a smaller model"
        shown, part = math.ceil(least / 2**20), "what stays of the streamed" if need.streams else "the"
        raise BudgetError(
            f"no weight can be trained within {format_bytes(memory_bytes)}: the smallest budget that would do is "
            f"{shown} MiB ({format_bytes(need.floor_bytes)} for the program, {format_bytes(model)} for {part} int8 "
            f"model); {remedy} or give --memory {shown}MiB{_least_streamed(options, need, schedule, least)}",
            smallest_bytes=shown * 2**20,
        )


def _least_streamed(options: RunOptions, need: Need, schedule: Schedule, least: int) -> str:
    """What would do where hidden states are kept and the base is streamed, where they are not kept."""
    rows = need.spare() if need.rows is None else None
    if rows is None:
        return ""
    streamed = smallest_bytes(options, replace(need, rows=rows, streams=True), schedule)
    return f"; with --cache auto {math.ceil(streamed / 2**20)}MiB would do" if streamed < least else ""
