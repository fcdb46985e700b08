"""The joint planner: which weights to train, and in which micro-batch, so that FLOPs and memory both hold.

It turns a cost table, importances and two budgets into one integer case per micro-batch, lets a strategy choose, and
checks the winner against the cost table before handing it over. Pure Python and SciPy: a saved costs.json is enough.
One row of memory is exact here: with gradients fused into backward the peak is at the loss, and the largest single
gradient is a sum of size steps, each paid once any weight at least as large is trained, which is what a path is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from edgegt.cost import BatchShape, CostTable, Work
from edgegt.errors import BudgetError, EdgegtError, InputError, nearest
from edgegt.memory import (
    LIBRARY_BYTES,
    Surroundings,
    fixed_terms,
    freed_logit_bytes,
    fused_gradient_bytes,
    peak_terms,
    plane_bytes,
    slack_bytes,
    state_bytes,
    worst_shape,
)
from edgegt.strategies import STRATEGIES, Case, Choice, Strategy, bits, relaxed_bound
from edgegt.units import GIB, MIB

__all__ = ["STRATEGIES", "Plan", "Problem", "Smallest", "plan", "smallest"]

WORTH_A_SMALLER_BATCH = 0.98


@dataclass(frozen=True)
class Problem:
    """What to plan: costs, importance per weight name (not above 0: never chosen), batches, and the two budgets.

    shapes: every batch the plan will train on. flops: what these may cost. memory_bytes: peak of the whole process.
    batch_size: rows of an optimizer step.
    """

    table: CostTable
    values: Mapping[str, float]
    shapes: tuple[BatchShape, ...]
    flops: int
    memory_bytes: int
    around: Surroundings
    vocabulary: int
    batch_size: int


@dataclass(frozen=True)
class Plan:
    """The weights to train (in table order), the micro-batch, and the predicted cost over the problem's batches.

    optimality_gap: at most this share of the bound is missing. flops_ratio: to full fine-tuning on the same batches.
    memory: the named terms of peak_bytes.
    """

    strategy: str
    selected: tuple[str, ...]
    micro_batch: int
    accumulation: int
    value: float
    optimality_gap: float
    flops: int
    flops_ratio: float
    peak_bytes: int
    memory: dict[str, int]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Smallest:
    """The least budgets that train anything: peak bytes (among weights that the FLOPs allow, if any), and FLOPs."""

    memory_bytes: int
    rho_flops: int
    memory_weight: str
    flops_weight: str


def plan(problem: Problem, strategy: str = "greentrainer", seed: int = 0) -> Plan:
    """The most valuable choice within both budgets; a smaller micro-batch only where it is worth 2 % or more.

    Raises: BudgetError when not even one weight fits, with the smallest budget that would do; InputError for an
    unknown strategy, no batches, or no weight with an importance above 0.
    """
    if strategy not in STRATEGIES:
        known = ", ".join(STRATEGIES)
        raise InputError(f"unknown strategy '{strategy}'{nearest(strategy, STRATEGIES)}: choose one of {known}")
    cases = {micro_batch: _case(problem, micro_batch) for micro_batch in _micro_batches(problem.batch_size)}
    _refuse_infeasible(problem, cases)
    affordable = {micro_batch: case.affordable() for micro_batch, case in cases.items()}
    micro_batch, choice = _choose(affordable, STRATEGIES[strategy], seed)
    return _checked(problem, strategy, micro_batch, choice)


def smallest(problem: Problem) -> Smallest:
    """The least memory and the least FLOPs with which one weight can be trained on these batches.

    Raises: InputError when there are no batches or no weight has an importance above 0.
    """
    return _smallest(problem, {size: _case(problem, size) for size in _micro_batches(problem.batch_size)})


def _micro_batches(batch_size: int) -> list[int]:
    sizes = [batch_size]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    return sizes


def _totaller(shapes: tuple[BatchShape, ...]) -> Callable[[Work], int]:
    """A function that sums a quantity over all batches, with four products however many batches there are."""
    rows = sum(shape.rows for shape in shapes)
    tokens = sum(shape.rows * shape.tokens for shape in shapes)
    pairs = sum(shape.rows * shape.tokens**2 for shape in shapes)
    kept = sum(shape.rows * shape.kept for shape in shapes)
    return lambda work: work.row * rows + work.token * tokens + work.pair * pairs + work.kept * kept


def _case(problem: Problem, micro_batch: int) -> Case:
    """The integer case of one micro-batch, with every weight of positive importance as a candidate."""
    if not problem.shapes:
        raise InputError("there is no batch to plan for: the data has no rows left; give more data or fewer --epochs")
    table, accumulate = problem.table, micro_batch < problem.batch_size
    values = tuple(float(problem.values.get(weight.name, 0.0)) for weight in table.weights)
    candidates = tuple(bit for bit, value in enumerate(values) if value > 0 and math.isfinite(value))
    if not candidates:
        raise InputError("no weight has an importance above 0, so none is worth training: check the data and --lr")
    total, worst = _totaller(problem.shapes), worst_shape(table, problem.shapes, micro_batch, problem.vocabulary)
    demoted = set(problem.around.demoted)
    resting = {weight.name: plane_bytes(weight) for weight in table.weights if weight.name in demoted}
    flops = [total(weight.dw) for weight in table.weights]
    eight_bit = problem.around.eight_bit
    memory = [state_bytes(weight, accumulate, eight_bit) - resting.get(weight.name, 0) for weight in table.weights]
    paths: dict[int, tuple[int, int]] = {}
    shared = [(path.weights, total(path.flops), path.saved_bytes.at(worst)) for path in table.paths]
    allowed = sum(1 << bit for bit in candidates)
    freed = freed_logit_bytes(table, worst, problem.vocabulary)
    for mask, path_flops, path_bytes in shared + ([] if accumulate else _gradient_steps(table, allowed, freed)):
        mask &= allowed
        if mask.bit_count() == 1:
            flops[mask.bit_length() - 1] += path_flops
            memory[mask.bit_length() - 1] += path_bytes
        elif mask and (path_flops or path_bytes):
            before = paths.get(mask, (0, 0))
            paths[mask] = (before[0] + path_flops, before[1] + path_bytes)
    fixed = fixed_terms(table, problem.around, worst, problem.vocabulary)
    room = problem.memory_bytes - sum(fixed.pop(name) for name in ("floor", "libraries", "base"))
    return Case(
        values=values,
        candidates=candidates,
        flops=tuple(flops),
        bytes=tuple(memory),
        paths=tuple((mask, *cost) for mask, cost in paths.items()),
        flops_left=problem.flops - total(table.forward),
        bytes_left=_without_slack(room) - sum(fixed.values()) - sum(resting.values()),
    )


def _gradient_steps(table: CostTable, allowed: int, freed_bytes: int) -> list[tuple[int, int, int]]:
    """The largest fused gradient as paths: each size step is paid once any weight at least that large is chosen."""
    sizes = {bit: fused_gradient_bytes(table.weights[bit], freed_bytes) for bit in bits(allowed)}
    steps, below = [], 0
    for size in sorted(set(sizes.values())):
        steps.append((sum(1 << bit for bit in sizes if sizes[bit] >= size), 0, size - below))
        below = size
    return steps


def _without_slack(room_bytes: int) -> int:
    """The most bytes that, together with their slack, fit into `room_bytes`."""

    def need(named: int) -> int:
        return named + slack_bytes({"named": named})

    low, high = -1, max(room_bytes, 0)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if need(middle) <= room_bytes else (low, middle - 1)
    return low


def _choose(cases: dict[int, Case], strategy: Strategy, seed: int) -> tuple[int, Choice]:
    """The largest micro-batch that reaches 98 % of the best value, and its choice.

    Among micro-batches that accumulate, a smaller one only frees memory: so the least one is the best of them, a
    larger one that holds its choice needs no solving, and one whose bound is too low is passed over.
    """
    (whole, first), *others = [(size, case) for size, case in cases.items() if case.candidates]
    found = strategy(first, seed)
    if not others or found.value >= WORTH_A_SMALLER_BATCH * relaxed_bound(others[-1][1]):
        return whole, found
    best = strategy(others[-1][1], seed)
    enough = WORTH_A_SMALLER_BATCH * max(best.value, found.value)
    if found.value >= enough:
        return whole, found
    for micro_batch, case in others[:-1]:
        if case.fits(best.mask):
            return micro_batch, best
        if relaxed_bound(case) >= enough:
            choice = strategy(case, seed)
            if choice.value >= enough:
                return micro_batch, choice
    return others[-1][0], best


def _smallest(problem: Problem, cases: dict[int, Case]) -> Smallest:
    names = [weight.name for weight in problem.table.weights]
    peaks, first = [], next(iter(cases.values()))
    for micro_batch, case in cases.items():
        alone = case.alone()
        within = [bit for bit in alone if alone[bit][0] <= case.flops_left] or list(alone)
        lightest = min(within, key=lambda bit: alone[bit][1])
        peaks.append((sum(_terms(problem, [names[lightest]], micro_batch).values()), names[lightest]))
    alone = first.alone()
    cheapest = min(alone, key=lambda bit: alone[bit][0])
    forward = problem.flops - first.flops_left
    return Smallest(min(peaks)[0], forward + alone[cheapest][0], min(peaks)[1], names[cheapest])


def _terms(problem: Problem, selected: Sequence[str], micro_batch: int) -> dict[str, int]:
    table, accumulate = problem.table, micro_batch < problem.batch_size
    worst = worst_shape(table, problem.shapes, micro_batch, problem.vocabulary)
    return peak_terms(table, selected, problem.around, worst, problem.vocabulary, accumulate)


def _refuse_infeasible(problem: Problem, cases: dict[int, Case]) -> None:
    least = _smallest(problem, cases)
    if least.rho_flops > problem.flops:
        full = problem.table.full_work().total(problem.shapes)
        rho = _ratio_covering(least.rho_flops, full)
        raise BudgetError(
            f"rho {problem.flops / full:.3g} is below the smallest reachable {rho:.3f} (the forward pass, and backward "
            f"to {least.flops_weight}); give --rho {math.ceil(rho * 100) / 100:.2f} or more",
            smallest_rho=rho,
        )
    if least.memory_bytes > problem.memory_bytes:
        raise BudgetError(_memory_message(problem, least), smallest_bytes=least.memory_bytes)


def _ratio_covering(flops: int, full: int) -> float:
    """The least ratio, to six places, with which int(ratio * full) is no less than `flops`."""
    millionths = flops * 10**6 // full
    while int(millionths / 10**6 * full) < flops:
        millionths += 1
    return millionths / 10**6


def _memory_message(problem: Problem, least: Smallest) -> str:
    model = problem.around.floor_bytes + LIBRARY_BYTES + problem.table.base_bytes
    needed = _rounded(least.memory_bytes, math.ceil)
    longest = max(shape.tokens for shape in problem.shapes)
    shorter = f"lower --max-length (rows have up to {longest} tokens)"
    remedy = "take a smaller model" if model >= problem.memory_bytes else shorter
    return (
        f"no weight can be trained within {_rounded(problem.memory_bytes, math.floor)}: the cheapest, "
        f"{least.memory_weight}, needs {needed} at micro-batch 1; {remedy}, or give --memory {needed.replace(' ', '')}"
    )


def _rounded(count: int, direction: Callable[[float], int]) -> str:
    """Bytes as text that `units.parse_bytes` reads back to no less (ceil) or no more (floor)."""
    return f"{direction(count / GIB * 100) / 100:.2f} GiB" if count >= GIB else f"{direction(count / MIB)} MiB"


def _checked(problem: Problem, strategy: str, micro_batch: int, choice: Choice) -> Plan:
    """The plan with its costs from the table itself. Raises EdgegtError should it break a budget."""
    table = problem.table
    selected = tuple(table.weights[bit].name for bit in bits(choice.mask))
    memory = _terms(problem, selected, micro_batch)
    flops, peak_bytes = table.train_work(choice.mask).total(problem.shapes), sum(memory.values())
    if flops > problem.flops or peak_bytes > problem.memory_bytes or not selected:
        raise EdgegtError(
            f"the {strategy} plan costs {flops} FLOPs of {problem.flops} and {peak_bytes} bytes of "
            f"{problem.memory_bytes}: this is a fault of the planner; please report it with costs.json"
        )
    notes = list(choice.notes)
    if micro_batch < problem.batch_size:
        notes.append(f"micro-batches of {micro_batch} rows instead of {problem.batch_size}, to fit more into memory")
    return Plan(
        strategy=strategy,
        selected=selected,
        micro_batch=micro_batch,
        accumulation=-(-problem.batch_size // micro_batch),
        value=choice.value,
        optimality_gap=max(0.0, 1 - choice.value / choice.bound),
        flops=flops,
        flops_ratio=flops / table.full_work().total(problem.shapes),
        peak_bytes=peak_bytes,
        memory=memory,
        notes=tuple(notes),
    )
