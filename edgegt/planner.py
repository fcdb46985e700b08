"""The joint planner: which weights to train, which layers to recompute, and in which way, so that every budget holds.

Each way to train (micro-batch, number formats, rows of the head, recomputation) is one integer case. Ways are tried
from the preferred one on; bounds tell which need no solving; the most preferred of the best ways wins (what the solver
leaves open counts as equal), and is checked against the cost table before it is handed over. Pure Python and SciPy: a
saved costs.json is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from edgegt.baselines import last_layers, published, random_layers, random_order, vectors_only
from edgegt.case import Case, bits
from edgegt.cases import Cases, Strategy, by_boundary
from edgegt.errors import EdgegtError, InputError, nearest
from edgegt.least import Smallest, refusal_of, smallest
from edgegt.memory import Formats
from edgegt.problem import FORMATS, Problem, Way, cached_facts, given_up
from edgegt.solver import Choice, joint

__all__ = ["FORMATS", "STRATEGIES", "Formats", "Plan", "Problem", "Smallest", "Way", "plan", "smallest"]

# What two random draws may differ by, of their worth, without one being a better way to train: recomputing layers only
# to have drawn more weights would waste FLOPs.
BY_CHANCE = 0.1

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
    found, ceiling = _over_boundaries(by_boundary(problem, solve, seed, chance))
    if found is None:
        raise refusal_of(problem, strategy)
    boundary, way, choice = found
    choice = replace(choice, bound=max(choice.bound, ceiling / way.worth))
    return _checked(problem.at(_lowered(problem, boundary, way, choice)), strategy, way, choice)


def _over_boundaries(cases: Mapping[int, Cases]) -> tuple[tuple[int, Way, Choice] | None, float]:
    """The boundary, way and choice worth most, None where nothing fits; and what no boundary left out exceeds.

    Only boundaries whose ceiling lies above the best known are solved. Where a cache is wanted, none comes last.
    """
    problem = cases[0].problem
    if len(cases) == 1:
        way, choice = _best(cases[0])
        return ((0, way, choice) if choice.mask else None), 0.0
    ceilings = {b: one.highest() for b, one in cases.items()}
    wanted = problem.caching is not None and problem.caching.wanted
    found: tuple[int, Way, Choice] | None = None
    best, left = 0.0, 0.0
    for boundary in sorted(ceilings, key=lambda b: (wanted and b == 0, -ceilings[b], b)):
        target = best * (1 + cases[boundary].gap)
        if wanted and not boundary and found:
            continue
        if ceilings[boundary] <= target or (found and not cases[boundary].exceeds(target)):
            left = max(left, cases[boundary].highest())  # lower than its ceiling, where asking has shown it
            continue
        way, choice = _best(cases[boundary])
        worth = way.worth * choice.value
        if choice.mask and worth > target:
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


def _cut_down(strategy: Callable[[Case, int], Choice]) -> Strategy:
    """A strategy that knows no recomputation, as one that recomputes all layers in the ways that allow it."""

    def solve(case: Case, seed: int, at_least: float) -> Choice:
        plain = case.recomputing(case.every_layer).affordable()
        if not plain.candidates:
            return Choice(0, 0.0, 0.0)
        found = strategy(plain, seed)
        return replace(found, recompute=case.taking_part(found.mask, case.every_layer))

    return solve


def _best(cases: Cases) -> tuple[Way, Choice]:
    """The most preferred way whose choice is as good as the best (see Cases.gap), by worth, and that choice.

    Most ways are never solved: where the first reaches the ceiling nothing else is; otherwise those whose ceiling lies
    above the best known, and then those preferred to it whose ceiling comes near it. The choice's bound covers all.
    """
    ways = cases.problem.ways()
    chosen = ways[0]
    frugal, gap = cases.frugal, cases.gap
    if not cases.worth(chosen) or cases.worth(chosen) < (1 - gap) * cases.highest():
        for way in sorted(frugal, key=cases.ceiling, reverse=True) + [way for way in ways if way not in frugal]:
            target = cases.worth(chosen) * (1 + gap)
            if not cases.exceeds(target):
                break
            if cases.ceiling(way, target) > target and cases.worth(way, target) > target:
                chosen = way
        best = cases.worth(chosen)
        target = (1 - gap) * best
        for way in ways[: ways.index(chosen)] if best else []:
            if cases.reaches(way, target):
                chosen = way
                break
    choice = cases.solved[chosen]
    bound = max(choice.value, *(cases.ceiling(way, float("inf")) / chosen.worth for way in ways))
    return chosen, replace(choice, bound=bound)


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
