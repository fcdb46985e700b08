"""The least budgets with which anything can be trained, and what is said where they are smaller."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from edgegt.cases import Cases, by_boundary
from edgegt.errors import BudgetError, InputError
from edgegt.memory import LIBRARY_BYTES
from edgegt.problem import Problem
from edgegt.units import GIB, MIB, format_duration

MEMORY = (1, 2, 3)  # the budgets of a case that are bytes


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


def smallest(problem: Problem) -> Smallest:
    """The least memory, the least FLOPs and the least time with which one weight can be trained on these batches.

    Raises: InputError when there are no batches or no weight has an importance above 0.
    """
    plain, *others = map(_smallest, by_boundary(problem).values())
    for other in others:
        if problem.streams and other.memory_bytes < plain.memory_bytes:
            plain = replace(plain, memory_bytes=other.memory_bytes, memory_weight=other.memory_weight)
        if other.rho_flops < plain.rho_flops:
            plain = replace(plain, rho_flops=other.rho_flops, flops_weight=other.flops_weight)
        plain = replace(plain, seconds=min(plain.seconds, other.seconds))
    return plain


def refusal_of(problem: Problem, strategy: str) -> InputError:
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


def _smallest(cases: Cases) -> Smallest:
    problem = cases.problem
    names = [weight.name for weight in problem.table.weights]
    peaks: dict[bool, list[tuple[int, str]]] = {True: [], False: []}
    cheapest: list[tuple[int, float, str]] = []
    for way in cases.frugal:
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
