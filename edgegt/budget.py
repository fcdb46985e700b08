"""Both budgets of a run against what it needs at least: probes, evaluation and training, before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edgegt.cost import BatchShape, CostTable
from edgegt.errors import BudgetError
from edgegt.job import Schedule
from edgegt.memory import Surroundings, fixed_terms, slack_bytes
from edgegt.options import RunOptions
from edgegt.planner import Problem, smallest
from edgegt.units import format_bytes


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


PROBE_SHARE = 0.05
PROBE_ROWS = (4, 64)
EVALUATION_ROWS = 32


@dataclass(frozen=True)
class Need:
    """What a run needs whatever is selected: bytes before training, and the table it is planned with."""

    table: CostTable
    floor_bytes: int
    vocabulary: int

    def forward_bytes(self, shape: BatchShape) -> int:
        """Peak of a pass that keeps one block at a time: evaluation."""
        return self._peak(shape, 0)

    def probe_bytes(self, shape: BatchShape) -> int:
        """Peak of the importance pass: every block's input, and one block whole."""
        width = max(weight.shape[1] for weight in self.table.weights if weight.kind == "head")
        return self._peak(shape, 4 * width * shape.rows * shape.tokens * (self.table.blocks + 1))

    def _peak(self, shape: BatchShape, kept: int) -> int:
        everything = (1 << len(self.table.weights)) - 1
        block = self.table.saved_work(everything).at(shape) // max(1, self.table.blocks)
        terms = {**fixed_terms(self.table, Surroundings(self.floor_bytes), shape, self.vocabulary)}
        terms |= {"kept": kept, "block": block}
        return sum(terms.values()) + slack_bytes(terms)


def evaluation_rows(need: Need, longest: BatchShape, most: int, memory_bytes: int) -> int:
    """Rows of an evaluation batch: as many as fit, `most` and 32 at most."""
    rows = min(EVALUATION_ROWS, most)
    while rows > 1 and need.forward_bytes(BatchShape(rows, longest.tokens, longest.kept)) > memory_bytes:
        rows //= 2
    return rows


def plan_probes(options: RunOptions, schedule: Schedule, rho: float, need: Need, memory_bytes: int) -> Probes:
    """As many rows as 5 % of the FLOPs budget pays for, between 4 and 64, in batches that fit into memory."""
    total = sum(shape.rows for shape in schedule.shapes)
    worst = largest(schedule, 1)
    dear = need.table.probe_work().at(worst) / (need.table.full_work().total(schedule.shapes) / total)
    rows = PROBE_SHARE * rho * total / dear / len(schedule.rounds)
    rows = int(min(max(rows, PROBE_ROWS[0]), PROBE_ROWS[1]))
    per_batch = max(2, min(options.batch_size, rows // 2) // 2 * 2)
    while per_batch > 2 and need.probe_bytes(largest(schedule, per_batch)) > memory_bytes:
        per_batch = max(2, per_batch // 4 * 2)
    return Probes(per_batch, max(2, rows // per_batch // 2 * 2))


def largest(schedule: Schedule, rows: int) -> BatchShape:
    """A shape of this many rows that is at least as large as any batch of the run, in every term."""
    return BatchShape(rows, max(s.tokens for s in schedule.shapes), max(s.kept for s in schedule.shapes))


def flops_budget(rho: float, table: CostTable, schedule: Schedule, probes: Probes) -> int:
    """FLOPs that the run may spend. Raises: BudgetError when not even the forward passes and the probes fit."""
    full = table.full_work().total(schedule.shapes)
    probing = len(schedule.rounds) * table.probe_work().total(probes.shapes(schedule))
    least = table.forward.total(schedule.shapes) + probing
    if least >= rho * full:
        smallest_rho = math.ceil(least / full * 100 + 1) / 100
        remedy = f"give --rho {smallest_rho:.2f} or more" if smallest_rho <= 1 else "give more --steps or --epochs"
        raise BudgetError(
            f"rho {rho:g} is below the smallest reachable {least / full:.3f} on {schedule.steps} steps "
            f"(forward passes, and measuring importance {probing / full:.3f}): {remedy}",
            smallest_rho=smallest_rho,
        )
    return int(rho * full)


def smallest_bytes(options: RunOptions, need: Need, schedule: Schedule) -> int:
    """The least peak with which the run can be done: its smallest evaluation, probe and training."""
    problem = Problem(
        table=need.table,
        values={weight.name: 1.0 for weight in need.table.weights},
        shapes=schedule.shapes,
        flops=need.table.full_work().total(schedule.shapes),
        memory_bytes=1 << 62,
        around=Surroundings(need.floor_bytes),
        vocabulary=need.vocabulary,
        batch_size=options.batch_size,
    )
    probe = 0 if options.strategy in ("last-layers", "random") else need.probe_bytes(largest(schedule, 2))
    return max(smallest(problem).memory_bytes, probe, need.forward_bytes(largest(schedule, 1)))


def check_memory(memory_bytes: int, options: RunOptions, need: Need, schedule: Schedule) -> None:
    """Raises: BudgetError, with the smallest budget that would do, when `memory_bytes` is too little to train in."""
    least = smallest_bytes(options, need, schedule)
    if least > memory_bytes:
        remedy = "lower --max-length" if need.table.base_bytes < memory_bytes / 2 else "take a smaller model"
        shown = math.ceil(least / 2**20)
        raise BudgetError(
            f"no weight can be trained within {format_bytes(memory_bytes)}: the smallest budget that would do is "
            f"{shown} MiB ({format_bytes(need.floor_bytes)} for the program, {format_bytes(need.table.base_bytes)} for "
            f"the int8 model); {remedy} or give --memory {shown}MiB",
            smallest_bytes=shown * 2**20,
        )
