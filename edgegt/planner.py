"""The joint planner: which weights to train, which layers to recompute, and in which way, so that every budget holds.

Each way to train (micro-batch, number formats, rows of the head, recomputation) is one integer case. Ways are tried
from the preferred one on; bounds tell which need no solving; the most preferred of the best ways wins (what the solver
leaves open counts as equal), and is checked against the cost table before it is handed over. Pure Python and SciPy: a
saved costs.json is enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from edgegt.baselines import last_layers, published, random_layers, random_order, vectors_only
from edgegt.case import Case, bits
from edgegt.errors import BudgetError, EdgegtError, InputError, nearest
from edgegt.memory import LIBRARY_BYTES, Formats
from edgegt.problem import FORMATS, Problem, Way, cached_facts, case_of, given_up
from edgegt.solver import EXACT_BELOW, RELATIVE_GAP, Choice, joint, relaxed_bound
from edgegt.units import GIB, MIB, format_duration

__all__ = ["FORMATS", "STRATEGIES", "Formats", "Plan", "Problem", "Smallest", "Way", "plan", "smallest"]

Strategy = Callable[[Case, int, float], Choice]
EXACT_GAP = 1e-6
# What two random draws may differ by, of their worth, without one being a better way to train: recomputing layers only
# to have drawn more weights would waste FLOPs.
BY_CHANCE = 0.1
MEMORY = (1, 2, 3)  # the budgets of a case that are bytes

_SIMPLER: dict[str, Callable[[Case, int], Choice]] = {
    "greentrainer-dp": published,
    "last-layers": last_layers,
    "bias": vectors_only,
    "random": random_order,
    "lisa": random_layers,
}
STRATEGIES = ("greentrainer", *_SIMPLER)


@dataclass(frozen=True)
class Plan:
    """What is trained (in table order) and how, and the predicted cost over the problem's batches.

    recompute: layers whose forward runs again in backward. head_rows: rows of the head that are trained if it is
    selected, None for all. optimality_gap: at most this share of the bound is missing. flops_ratio: to full fine-tuning
    on the same batches. seconds: None without rates. memory: the named terms of peak_bytes.
    boundary: the layer below which hidden states are kept, 0 for none; cache_first: from which step on their rows were
    counted. cached: see `cached_facts`.
    """

    strategy: str
    selected: tuple[str, ...]
    recompute: tuple[int, ...]
    micro_batch: int
    accumulation: int
    formats: Formats
    head_rows: int | None
    value: float
    optimality_gap: float
    flops: int
    flops_ratio: float
    seconds: float | None
    peak_bytes: int
    memory: dict[str, int]
    notes: tuple[str, ...]
    boundary: int = 0
    cache_first: int = 0
    cached: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """A plain dict."""
        return asdict(self)

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Plan:
        """The plan that `to_json` gave, after JSON too."""
        lists = {name: tuple(tree[name]) for name in ("selected", "recompute", "notes")}
        return cls(**{**tree, **lists, "formats": Formats(**tree["formats"])})


@dataclass(frozen=True)
class Smallest:
    """The least budgets that train anything: bytes (among weights that FLOPs and time allow, if any), FLOPs, seconds.

    seconds: 0 without a time budget.
    """

    memory_bytes: int
    rho_flops: int
    memory_weight: str
    flops_weight: str
    seconds: float = 0.0


def plan(problem: Problem, strategy: str = "greentrainer", seed: int = 0) -> Plan:
    """The most valuable choice within every budget.

    Raises: BudgetError when not even one weight fits, with the smallest budget that would do; InputError for an
    unknown strategy, no batches, or no weight with an importance above 0.
    """
    if strategy not in STRATEGIES:
        known = ", ".join(STRATEGIES)
        raise InputError(f"unknown strategy '{strategy}'{nearest(strategy, STRATEGIES)}: choose one of {known}")
    solve = joint if strategy == "greentrainer" else _cut_down(_SIMPLER[strategy])
    chance = BY_CHANCE if strategy in ("random", "lisa") else 0.0
    found, ceiling = _over_boundaries({b: _Cases(problem.at(b), solve, seed, chance) for b in problem.boundaries})
    if found is None:
        raise _refusal(problem, strategy)
    boundary, way, choice = found
    choice = replace(choice, bound=max(choice.bound, ceiling / way.worth))
    return _checked(problem.at(_lowered(problem, boundary, way, choice)), strategy, way, choice)


def smallest(problem: Problem) -> Smallest:
    """The least memory, the least FLOPs and the least time with which one weight can be trained on these batches.

    Raises: InputError when there are no batches or no weight has an importance above 0.
    """
    plain, *others = (_smallest(_Cases(problem.at(boundary))) for boundary in problem.boundaries)
    for other in others:
        if problem.streams and other.memory_bytes < plain.memory_bytes:
            plain = replace(plain, memory_bytes=other.memory_bytes, memory_weight=other.memory_weight)
        if other.rho_flops < plain.rho_flops:
            plain = replace(plain, rho_flops=other.rho_flops, flops_weight=other.flops_weight)
        plain = replace(plain, seconds=min(plain.seconds, other.seconds))
    return plain


def _over_boundaries(cases: Mapping[int, _Cases]) -> tuple[tuple[int, Way, Choice] | None, float]:
    """The boundary, way and choice worth most, None where nothing fits; and what no boundary left out exceeds.

    Only boundaries whose ceiling lies above the best known are solved. Where a cache is wanted, none comes last.
    """
    problem = cases[0].problem
    if len(cases) == 1:
        way, choice = _best(cases[0])
        return ((0, way, choice) if choice.mask else None), 0.0
    ceilings = {b: max(map(one.ceiling, one.frugal())) for b, one in cases.items()}
    wanted = problem.caching is not None and problem.caching.wanted
    found: tuple[int, Way, Choice] | None = None
    best, left = 0.0, 0.0
    for boundary in sorted(ceilings, key=lambda b: (wanted and b == 0, -ceilings[b], b)):
        if ceilings[boundary] <= best * (1 + cases[boundary].gap) or (wanted and not boundary and found):
            left = max(left, 0.0 if wanted and not boundary else ceilings[boundary])
            continue
        way, choice = _best(cases[boundary])
        worth = way.worth * choice.value
        if choice.mask and worth > best * (1 + cases[boundary].gap):
            found, best = (boundary, way, choice), worth
        left = max(left, way.worth * choice.bound)
    return found, left


def _lowered(problem: Problem, boundary: int, way: Way, choice: Choice) -> int:
    """Of the boundaries that the choice allows, the one that costs least FLOPs: it may train nothing deep down."""
    if problem.seconds is not None:
        return boundary
    # What lies below all layers (a norm of the embedding, say) allows no more than boundary 0.
    lowest = max(0, min(problem.table.weights[bit].block for bit in bits(choice.mask)))
    least = boundary if problem.streams else min(boundary, 1)  # below it more of a streamed base is in memory
    allowed = [b for b in problem.boundaries if least <= b <= lowest]
    return max(allowed, key=lambda b: (problem.at(b).saved_flops, b))


@dataclass
class _Cases:
    """The cases of a problem and what is known of them; each is made, bounded or solved when it is first asked for."""

    problem: Problem
    solve: Strategy = joint
    seed: int = 0
    tolerance: float = 0.0
    made: dict[Way, Case] = field(default_factory=dict)
    bounds: dict[Way, float] = field(default_factory=dict)
    solved: dict[Way, Choice] = field(default_factory=dict)

    @property
    def gap(self) -> float:
        """Ways whose worth differs by a smaller share count as equally good: no more than the solver leaves open."""
        candidates = sum(value > 0 for value in self.problem.values.values())
        return max(self.tolerance, EXACT_GAP if candidates < EXACT_BELOW else RELATIVE_GAP)

    def of(self, way: Way) -> Case:
        if way not in self.made:
            self.made[way] = case_of(self.problem, way)
        return self.made[way]

    def worth(self, way: Way, at_least: float = 0.0) -> float:
        """What the choice of this way is worth; 0 when that is known to be less than `at_least`."""
        known = self.solved.get(way)
        if known is None or (not known.mask and way.worth * known.bound > at_least):
            found = self._already(way, at_least) if at_least else None
            self.solved[way] = found or self.solve(self.of(way).affordable(), self.seed, at_least / way.worth)
        return way.worth * self.solved[way].value

    def _already(self, way: Way, at_least: float) -> Choice | None:
        """The choice of another way that fits this one too and is worth enough."""
        for other, choice in self.solved.items():
            enough = choice.mask and other.head_rows == way.head_rows and way.worth * choice.value >= at_least
            allowed = enough and (way.recompute or not choice.recompute)
            if allowed and self.of(way).affordable().fits(choice.mask, choice.recompute):
                return replace(choice, bound=self.ceiling(way) / way.worth)
        return None

    def reaches(self, way: Way, target: float) -> bool:
        """Whether this way has a choice that is worth `target`, asking first the ways that dominate it."""
        for frugal in self.frugal():
            if not self._dominates(frugal, replace(way, recompute=True)) or frugal.formats != way.formats:
                continue
            if self.ceiling(frugal, target) < target or self.worth(frugal, target) < target:
                return False
        return self.ceiling(way, target) >= target and self.worth(way, target) >= target

    def ceiling(self, way: Way, enough: float = 0.0) -> float:
        """No choice of this way is worth more: by its own bound, or one of a way that needs no more of anything.

        enough: where what is known already lies below this, the way's own bound is not computed.
        """
        others = [other for other in {*self.solved, *self.bounds} if self._dominates(other, way)]
        known = min((self._bound(other) for other in others), default=float("inf"))
        if way not in self.solved and way not in self.bounds and way.worth * known >= enough:
            self.bounds[way] = relaxed_bound(self.of(way).affordable())
            known = min(known, self.bounds[way])
        return way.worth * known

    def frugal(self) -> list[Way]:
        """The ways that no other dominates: their bounds, together, hold for all."""
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


def _cut_down(strategy: Callable[[Case, int], Choice]) -> Strategy:
    """A strategy that knows no recomputation, as one that recomputes all layers in the ways that allow it."""

    def solve(case: Case, seed: int, at_least: float) -> Choice:
        plain = case.recomputing(case.every_layer).affordable()
        if not plain.candidates:
            return Choice(0, 0.0, 0.0)
        found = strategy(plain, seed)
        return replace(found, recompute=case.taking_part(found.mask, case.every_layer))

    return solve


def _best(cases: _Cases) -> tuple[Way, Choice]:
    """The most preferred way whose choice is as good as the best (see _Cases.gap), by worth, and that choice.

    Most ways are never solved: where the first reaches the ceiling nothing else is; otherwise those whose ceiling lies
    above the best known, and then those preferred to it whose ceiling comes near it. The choice's bound covers all.
    """
    ways = cases.problem.ways()
    chosen = ways[0]
    frugal, gap = cases.frugal(), cases.gap
    if not cases.worth(chosen) or cases.worth(chosen) < (1 - gap) * max(map(cases.ceiling, frugal)):
        for way in sorted(frugal, key=cases.ceiling, reverse=True) + [way for way in ways if way not in frugal]:
            target = cases.worth(chosen) * (1 + gap)
            if cases.ceiling(way, target) > target and cases.worth(way, target) > target:
                chosen = way
        best = cases.worth(chosen)
        target = (1 - gap) * best
        for way in ways[: ways.index(chosen)] if best else []:
            if cases.reaches(way, target):
                chosen = way
                break
    choice = cases.solved[chosen]
    bound = max(choice.value, *(cases.ceiling(way) / chosen.worth for way in {*cases.solved, *cases.bounds}))
    return chosen, replace(choice, bound=bound)


def _smallest(cases: _Cases) -> Smallest:
    problem = cases.problem
    names = [weight.name for weight in problem.table.weights]
    peaks: dict[bool, list[tuple[int, str]]] = {True: [], False: []}
    cheapest: list[tuple[int, float, str]] = []
    for way in cases.frugal():
        case = cases.of(way)
        for recompute in (range(0), case.every_layer):
            alone = case.alone(recompute)
            affordable = [bit for bit in alone if _affordable(alone[bit], case.left)]
            for candidates, by_others in ((affordable, True), (list(alone), False)):
                if candidates:
                    lightest = min(candidates, key=lambda bit: max(alone[bit][row] - case.left[row] for row in MEMORY))
                    again = case.taking_part(1 << lightest, recompute)
                    peak = sum(problem.memory(way, 1 << lightest, again).values())
                    peaks[by_others].append((peak, names[lightest]))
        alone = case.alone()
        least = min(alone, key=lambda bit: alone[bit][0])
        forward = problem.flops - case.left[0]
        seconds = 0.0
        if problem.seconds is not None:
            seconds = problem.seconds - (case.left[4] - min(costs[4] for costs in alone.values())) / 1e9
        cheapest.append((forward + alone[least][0], seconds, names[least]))
    flops, _, flops_weight = min(cheapest)
    seconds = min(seconds for _, seconds, _ in cheapest)
    memory, memory_weight = min(peaks[True] or peaks[False])
    return Smallest(memory, flops, memory_weight, flops_weight, seconds)


def _affordable(costs: tuple[int, ...], left: tuple[int, ...]) -> bool:
    """Whether the budgets other than memory allow it."""
    return all(cost <= room for row, (cost, room) in enumerate(zip(costs, left, strict=True)) if row not in MEMORY)


def _refusal(problem: Problem, strategy: str) -> InputError:
    """A BudgetError for the first budget that is too small; an InputError when the strategy has no candidate."""
    least = smallest(problem)
    if least.rho_flops > problem.flops:
        rho = _ratio_covering(least.rho_flops, problem.full_flops)
        return BudgetError(
            f"rho {problem.flops / problem.full_flops:.3g} is below the smallest reachable {rho:.3f} (the forward "
            f"pass, and backward to {least.flops_weight}); give --rho {math.ceil(rho * 100) / 100:.2f} or more",
            smallest_rho=rho,
        )
    if problem.seconds is not None and least.seconds > problem.seconds:
        needed = math.ceil(least.seconds)
        return BudgetError(
            f"no weight can be trained within {format_duration(problem.seconds)}: the cheapest needs "
            f"{format_duration(needed)}; give --time {needed}s or more, or fewer --steps or --epochs",
            smallest_s=needed,
        )
    if least.memory_bytes > problem.memory_bytes:
        return BudgetError(_memory_message(problem, least), smallest_bytes=least.memory_bytes)
    return InputError(f"--strategy {strategy} finds nothing to train within the budgets: take greentrainer")


def _ratio_covering(flops: int, full: int) -> float:
    """The least ratio, to six places, with which int(ratio * full) is no less than `flops`."""
    millionths = flops * 10**6 // full
    while int(millionths / 10**6 * full) < flops:
        millionths += 1
    return millionths / 10**6


def _memory_message(problem: Problem, least: Smallest) -> str:
    model = problem.around.floor_bytes + LIBRARY_BYTES + problem.at(max(problem.boundaries)).base_bytes
    needed = _rounded(least.memory_bytes, math.ceil)
    longest = max(shape.tokens for shape in problem.shapes)
    shorter = f"lower --max-length (rows have up to {longest} tokens)"
    remedy = "take a smaller model" if model >= problem.memory_bytes else shorter
    return (
        f"no weight can be trained within {_rounded(problem.memory_bytes, math.floor)}: the cheapest, "
        f"{least.memory_weight}, needs {needed}; {remedy}, or give --memory {needed.replace(' ', '')}"
    )


def _rounded(count: int, direction: Callable[[float], int]) -> str:
    """Bytes as text that `units.parse_bytes` reads back to no less (ceil) or no more (floor)."""
    return f"{direction(count / GIB * 100) / 100:.2f} GiB" if count >= GIB else f"{direction(count / MIB)} MiB"


def _checked(problem: Problem, strategy: str, way: Way, choice: Choice) -> Plan:
    """The plan with its costs from the table itself. Raises EdgegtError should it break a budget."""
    selected = tuple(problem.table.weights[bit].name for bit in bits(choice.mask))
    memory = problem.memory(way, choice.mask, choice.recompute)
    flops = problem.spent_flops(way, choice.mask, choice.recompute)
    seconds, peak_bytes = problem.spent_s(way, choice.mask, choice.recompute), sum(memory.values())
    late = problem.seconds is not None and seconds is not None and seconds > problem.seconds * (1 + 1e-6)
    if flops > problem.flops or peak_bytes > problem.memory_bytes or late or not selected:
        raise EdgegtError(
            f"the {strategy} plan costs {flops} FLOPs of {problem.flops}, {peak_bytes} bytes of {problem.memory_bytes} "
            f"and {seconds} s of {problem.seconds}: this is a fault of the planner; please report it with costs.json"
        )
    notes = [*choice.notes, *given_up(problem, way, choice.recompute)]
    return Plan(
        strategy=strategy, selected=selected, recompute=choice.recompute, micro_batch=way.micro_batch,
        accumulation=-(-problem.batch_size // way.micro_batch), formats=way.formats, head_rows=way.head_rows,
        value=choice.value, optimality_gap=_gap(choice), flops=flops, flops_ratio=flops / problem.full_flops,
        seconds=seconds, peak_bytes=peak_bytes, memory=memory, notes=tuple(notes), boundary=problem.boundary,
        cache_first=problem.footing.first if problem.footing else 0, cached=cached_facts(problem),
    )  # fmt: skip


def _gap(choice: Choice) -> float:
    """The share of the bound that is missing; 0 for what is only a rounding error."""
    gap = 1 - choice.value / choice.bound
    return gap if gap > 1e-9 else 0.0
