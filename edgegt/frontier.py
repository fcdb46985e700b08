"""How much importance every pair of budgets can reach: plans on a grid of rho and peak memory.

A point's plan is the planner's own, in the leanest number formats that are allowed. A plan that keeps within smaller
budgets is the plan of those too, and budgets below infeasible ones are infeasible, so only some points are solved.
Every point shows the best plan found that keeps within its budgets: a larger budget never shows less.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from edgegt.errors import InputError
from edgegt.planner import Plan, Problem, plan, smallest
from edgegt.problem import unlimited

POINTS = (8, 5)
FEWER_POINTS = (5, 3)


@dataclass(frozen=True)
class Point:
    """The plan of one pair of budgets. share: of the value of all tensors. ratio, peak_bytes: what it uses of them."""

    share: float
    ratio: float
    peak_bytes: int
    tensors: int


@dataclass(frozen=True)
class Frontier:
    """Points by memory budget (ascending), then by rho (ascending); None where nothing can be trained.

    rho counts the run's importance probes. chosen: the plan that was made, of budgets rho and memory_bytes. solved:
    how many of the points needed a plan of their own.
    """

    rhos: tuple[float, ...]
    memories: tuple[int, ...]
    points: tuple[tuple[Point | None, ...], ...]
    rho: float
    memory_bytes: int
    chosen: Point | None
    solved: int

    def to_json(self) -> dict[str, Any]:
        """A plain tree for frontier.json."""
        return asdict(self) | {"points": [[point and asdict(point) for point in row] for row in self.points]}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Frontier:
        """The frontier that `to_json` wrote. Raises: KeyError or TypeError for another tree."""
        return cls(
            rhos=tuple(float(rho) for rho in tree["rhos"]),
            memories=tuple(int(size) for size in tree["memories"]),
            points=tuple(tuple(point and Point(**point) for point in row) for row in tree["points"]),
            rho=float(tree["rho"]),
            memory_bytes=int(tree["memory_bytes"]),
            chosen=tree["chosen"] and Point(**tree["chosen"]),
            solved=int(tree["solved"]),
        )


def frontier_of(
    problem: Problem,
    probe_flops: int,
    chosen: Plan | None = None,
    counts: tuple[int, int] = POINTS,
    say: Callable[[str], None] | None = None,
) -> Frontier:
    """The frontier around a problem's own budgets, from the least that trains anything to what trains everything.

    probe_flops: of the run's importance probes, which rho counts and the problem's FLOPs do not. counts: of rhos and
    memories. say: takes a line when a row is done.
    """
    rhos, memories = axes(problem, probe_flops, counts)
    return frontier(problem, rhos, memories, probe_flops, chosen, say)


def axes(problem: Problem, probe_flops: int, counts: tuple[int, int]) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Rhos, evenly spaced, and memory budgets, by equal factors; the problem's own budgets among them where inside."""
    free = unlimited(_lean(problem))
    least, most = smallest(free), plan(replace(free, seconds=None))
    full = problem.full_flops
    rho = (problem.flops + probe_flops) / full
    low = math.ceil((least.rho_flops + probe_flops) / full * 1000) / 1000
    high = max(low, min(1.0, math.ceil((most.flops + probe_flops) / full * 1000) / 1000))
    step = (high - low) / max(1, counts[0] - 1)
    rhos = _with(rho, [low + step * index for index in range(counts[0])])
    factor = max(1.0, most.peak_bytes / least.memory_bytes) ** (1 / max(1, counts[1] - 1))
    sizes = [least.memory_bytes * factor**index for index in range(counts[1])]
    sizes[-1] = max(sizes[-1], most.peak_bytes)
    memories = [math.ceil(size) for size in _with(problem.memory_bytes, sizes)]
    return tuple(dict.fromkeys(rhos)), tuple(dict.fromkeys(memories))


def _with(own: float, spread: list[float]) -> list[float]:
    """The values, the inner one that is nearest to `own` replaced by it; unchanged where `own` lies outside."""
    if len(spread) > 2 and spread[0] < own < spread[-1]:
        nearest = min(range(1, len(spread) - 1), key=lambda index: abs(spread[index] - own))
        spread[nearest] = own
    return sorted(spread)


def frontier(
    problem: Problem,
    rhos: Sequence[float],
    memories: Sequence[int],
    probe_flops: int = 0,
    chosen: Plan | None = None,
    say: Callable[[str], None] | None = None,
) -> Frontier:
    """The frontier on these rhos and memory budgets, both ascending; the problem's time budget holds throughout."""
    full, solver = problem.full_flops, _Solver(_lean(problem))
    for done, memory_bytes in enumerate(reversed(memories), 1):
        for rho in reversed(rhos):
            solver.solve(int(rho * full) - probe_flops, memory_bytes)
        if say is not None:
            say(f"frontier: {done * len(rhos)} of {len(memories) * len(rhos)} points, {solver.solved} of them solved")
    everything = sum(value for value in problem.values.values() if value > 0) or 1.0

    def point(found: Plan | None) -> Point | None:
        if found is None:
            return None
        ratio = (found.flops + probe_flops) / full
        return Point(found.value / everything, ratio, found.peak_bytes, len(found.selected))

    plans = solver.plans if chosen is None else [*solver.plans, chosen]
    return Frontier(
        rhos=tuple(rhos),
        memories=tuple(memories),
        points=tuple(
            tuple(point(_best(plans, int(rho * full) - probe_flops, memory_bytes)) for rho in rhos)
            for memory_bytes in memories
        ),
        rho=(problem.flops + probe_flops) / full,
        memory_bytes=problem.memory_bytes,
        chosen=point(chosen),
        solved=solver.solved,
    )


class _Solver:
    """Plans found so far, with the budgets they were found for; asks the planner only where those say nothing."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.found: list[tuple[int, int, Plan | None]] = []

    @property
    def plans(self) -> list[Plan]:
        return [found for _, _, found in self.found if found is not None]

    @property
    def solved(self) -> int:
        return len(self.found)

    def solve(self, flops: int, memory_bytes: int) -> None:
        for more_flops, more_bytes, found in self.found:
            known = more_flops >= flops and more_bytes >= memory_bytes
            if known and (found is None or (found.flops <= flops and found.peak_bytes <= memory_bytes)):
                return
        try:
            solution: Plan | None = plan(replace(self.problem, flops=flops, memory_bytes=memory_bytes))
        except InputError:  # nothing fits; a budget at the very edge of what does is refused without a smallest one
            solution = None
        self.found.append((flops, memory_bytes, solution))


def _best(plans: Iterable[Plan], flops: int, memory_bytes: int) -> Plan | None:
    """The most valuable of the plans that keep within both budgets."""
    fitting = [found for found in plans if found.flops <= flops and found.peak_bytes <= memory_bytes]
    return max(fitting, key=lambda found: found.value, default=None)


def _lean(problem: Problem) -> Problem:
    """The problem in its leanest number formats: what fits in others fits in these."""
    return problem if problem.seconds is not None else replace(problem, formats=problem.formats[-1:])
