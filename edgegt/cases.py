"""The cases of a problem, one per way to train, and what is known of them: solved as few as possible."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

from edgegt.case import Case
from edgegt.integers import Parts, case_of
from edgegt.problem import Problem, Way
from edgegt.solver import EXACT_BELOW, RELATIVE_GAP, Choice, joint, relaxed_bound

Strategy = Callable[[Case, int, float], Choice]
EXACT_GAP = 1e-6


@dataclass
class Cases:
    """The cases of a problem and what is known of them; each is made, bounded or solved when it is first asked for.

    beyond: layers whose choices, where they are the lowest, are left to the boundaries there (see `by_boundary`).
    """

    problem: Problem
    solve: Strategy = joint
    seed: int = 0
    tolerance: float = 0.0
    beyond: frozenset[int] = frozenset()
    parts: dict[Way, Parts] = field(default_factory=dict)
    made: dict[Way, Case] = field(default_factory=dict)
    afforded: dict[Way, Case] = field(default_factory=dict)
    bounds: dict[Way, float] = field(default_factory=dict)
    solved: dict[Way, Choice] = field(default_factory=dict)

    @property
    def gap(self) -> float:
        """Ways whose worth differs by a smaller share count as equally good: no more than the solver leaves open."""
        candidates = sum(value > 0 for value in self.problem.values.values())
        return max(self.tolerance, EXACT_GAP if candidates < EXACT_BELOW else RELATIVE_GAP)

    def of(self, way: Way) -> Case:
        """The case of a way, made when it is first asked for."""
        if way not in self.made:
            case = case_of(self.problem, way, self.parts)
            floor = sum(1 << bit for bit in case.candidates if case.blocks[bit] not in self.beyond)
            self.made[way] = replace(case, floor=floor if self.beyond else 0)
        return self.made[way]

    def affordable(self, way: Way) -> Case:
        """The case of a way with the candidates that the budgets allow alone."""
        if way not in self.afforded:
            self.afforded[way] = self.of(way).affordable()
        return self.afforded[way]

    def worth(self, way: Way, at_least: float = 0.0) -> float:
        """What the choice of this way is worth; 0 when that is known to be less than `at_least`."""
        known = self.solved.get(way)
        if known is None or (not known.mask and way.worth * known.bound > at_least):
            others = (other for other in self.solved if self._dominates(other, way))
            best = next((self.solved[other] for other in others if self._fits(other, way)), None)
            self.solved[way] = best or self.solve(self.affordable(way), self.seed, at_least / way.worth)
        return way.worth * self.solved[way].value

    def _fits(self, other: Way, way: Way) -> bool:
        """Whether the choice of another way is one of this way too: its best, if the other dominates it."""
        choice = self.solved[other]
        allowed = choice.mask and other.head_rows == way.head_rows and (way.recompute or not choice.recompute)
        return bool(allowed) and self.affordable(way).fits(choice.mask, choice.recompute)

    def reaches(self, way: Way, target: float) -> bool:
        """Whether this way has a choice that is worth `target`, asking first the ways that dominate it."""
        for frugal in self.frugal:
            if not self._dominates(frugal, replace(way, recompute=True)) or frugal.formats != way.formats:
                continue
            enough = target / way.worth * frugal.worth
            if self.ceiling(frugal, enough) < enough or self.worth(frugal, enough) < enough:
                return False
        if self.ceiling(way, target) < target:
            return False
        worthy = [one for one, choice in self.solved.items() if way.worth * choice.value >= target]
        if way not in self.solved and (found := next((one for one in worthy if self._fits(one, way)), None)):
            self.solved[way] = replace(self.solved[found], bound=self.ceiling(way) / way.worth)
        return self.worth(way, target) >= target

    def ceiling(self, way: Way, enough: float = 0.0) -> float:
        """No choice of this way is worth more: by its own bound, or one of a way that needs no more of anything.

        enough: where what is known already lies below this, the way's own bound is not computed.
        """
        others = [other for other in {*self.solved, *self.bounds} if self._dominates(other, way)]
        known = min((self._bound(other) for other in others), default=float("inf"))
        if way not in self.solved and way not in self.bounds and way.worth * known >= enough:
            self.bounds[way] = relaxed_bound(self.affordable(way))
            known = min(known, self.bounds[way])
        return way.worth * known

    def highest(self) -> float:
        """No choice of any way is worth more."""
        return max(self.ceiling(way) / way.worth * self.standing[way] for way in self.frugal)

    def exceeds(self, target: float) -> bool:
        """Whether a choice of any way may be worth more than `target`; what says so is solved once for all ways."""
        if self.solve is not joint:  # what a simpler strategy takes in one way says nothing of another
            return self.highest() > target
        for way in self.frugal:
            enough = target / self.standing[way] * way.worth  # so much, of this way: no way that it stands for has more
            if self.ceiling(way, enough) > enough and self.worth(way, enough) > enough:
                return True
        return False

    @cached_property
    def standing(self) -> dict[Way, float]:
        """Of each frugal way, the highest worth of those that it dominates: what its bound is worth for all of them."""
        ways = self.problem.ways()
        return {one: max(way.worth for way in ways if self._dominates(one, way)) for one in self.frugal}

    @cached_property
    def frugal(self) -> list[Way]:
        """The ways that no other dominates: their bounds, each at what it stands for, hold for all."""
        ways = self.problem.ways()
        return [way for way in ways if not any(other != way and self._dominates(other, way) for other in ways)]

    def _bound(self, way: Way) -> float:
        known = self.solved[way].bound if way in self.solved else float("inf")
        return min(known, self.bounds.get(way, known))

    def _dominates(self, other: Way, way: Way) -> bool:
        """Whether every choice that fits `way` fits `other`. Less memory may take more time, where that is limited."""
        formats, whole, timed = self.problem.formats, self.problem.batch_size, self.problem.seconds is not None
        head = self.problem.table.head_size
        fewer = other.head_rows is not None and 3 * other.head_rows <= (way.head_rows or head)
        return (
            (other.head_rows == way.head_rows or (fewer and not timed))
            and formats.index(other.formats) >= formats.index(way.formats)
            and (other.formats.states == way.formats.states or not timed)
            and other.recompute >= way.recompute
            and (other.micro_batch == way.micro_batch or (other.micro_batch < way.micro_batch < whole and not timed))
        )


def by_boundary(problem: Problem, solve: Strategy = joint, seed: int = 0, tolerance: float = 0.0) -> dict[int, Cases]:
    """The cases with states kept below each boundary; what costs the same below all of them is computed once.

    A choice whose lowest layer is a higher boundary that saves as much is not looked for below this one: there it
    needs no more of anything. Baselines choose in ways of their own, and time depends on more, so that both look
    everywhere.
    """
    parts: dict[Way, Parts] = {}
    at = {boundary: problem.at(boundary) for boundary in problem.boundaries}
    apart = solve is joint and problem.seconds is None
    return {
        low: Cases(
            here, solve, seed, tolerance,
            frozenset(b for b in at if b > low and at[b].saved_flops >= here.saved_flops) if apart else frozenset(),
            parts,
        )
        for low, here in at.items()
    }  # fmt: skip
