"""How the weights to train are chosen within both budgets: each strategy is one function of the same integer case.

The default is a mixed-integer program, solved by HiGHS: a binary y per weight, and per distinct path mask a z with
z >= y for its weights, because a gradient to an input is paid once, by whichever weight first needs it. Masks are
mostly nested, so z of a mask is tied to z of its largest expressed part and to the weights beyond it: about one row
per weight, and a relaxation as tight as with all rows. z would be integer of itself; declared so, the solver branches
on depth first, which makes the hard cases two to six times faster. Baselines fill in an order that knows less.

Why no grid dynamic program (it returned 0.62 to 0.98 of the optimum): docs/decisions.md, "The planner".
"""

from __future__ import annotations

import ctypes
import os
import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

RELATIVE_GAP = 1e-3
TIME_LIMIT_S = 5.0
ROW_SCALE = 1e4
_stdout_lock = threading.Lock()


@dataclass(frozen=True)
class Case:
    """The choice for one micro-batch, in integers; bit k of a mask stands for weight k.

    values, flops, bytes: per weight, its worth and its own costs. candidates: the bits that may be chosen, each
    affordable alone. paths: (mask, FLOPs, bytes), paid once any weight of the mask is chosen.
    flops_left, bytes_left: what a choice may cost.
    """

    values: tuple[float, ...]
    candidates: tuple[int, ...]
    flops: tuple[int, ...]
    bytes: tuple[int, ...]
    paths: tuple[tuple[int, int, int], ...]
    flops_left: int
    bytes_left: int

    def cost(self, mask: int) -> tuple[int, int]:
        """FLOPs and bytes of choosing the weights in `mask`."""
        flops = memory = 0
        for bit in bits(mask):
            flops += self.flops[bit]
            memory += self.bytes[bit]
        for weights, path_flops, path_bytes in self.paths:
            if weights & mask:
                flops += path_flops
                memory += path_bytes
        return flops, memory

    def alone(self) -> dict[int, tuple[int, int]]:
        """FLOPs and bytes of each candidate when nothing else is chosen."""
        flops, memory = list(self.flops), list(self.bytes)
        for weights, path_flops, path_bytes in self.paths:
            for bit in bits(weights):
                flops[bit] += path_flops
                memory[bit] += path_bytes
        return {bit: (flops[bit], memory[bit]) for bit in self.candidates}

    def affordable(self) -> Case:
        """This case without the candidates that the budgets do not allow even alone."""
        candidates = tuple(
            bit for bit, cost in self.alone().items() if cost[0] <= self.flops_left and cost[1] <= self.bytes_left
        )
        return replace(self, candidates=candidates)

    def fits(self, mask: int) -> bool:
        """Whether both budgets hold for the weights in `mask`."""
        flops, memory = self.cost(mask)
        return flops <= self.flops_left and memory <= self.bytes_left

    def value(self, mask: int) -> float:
        """What the weights in `mask` are worth together."""
        return sum(self.values[bit] for bit in bits(mask))


@dataclass(frozen=True)
class Choice:
    """A choice that fits its case, its value, an upper bound on any choice's value, and what the user should know."""

    mask: int
    value: float
    bound: float
    notes: tuple[str, ...] = ()


def bits(mask: int) -> Iterator[int]:
    """The positions of the ones in `mask`, ascending."""
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest


def relaxed_bound(case: Case) -> float:
    """No choice is worth more: the optimum when weights may be trained in part."""
    if not case.candidates:
        return 0.0
    return _solve(case, integral=False)[1]


def joint(case: Case, seed: int = 0) -> Choice:
    """The best choice to within RELATIVE_GAP, by one mixed-integer program; unused budget is filled up."""
    mask, bound = _solve(case, integral=True)
    notes: list[str] = []
    if not case.fits(mask):
        mask = _drop(case, mask)
        notes.append("the solver's rounding exceeded a budget: the least valuable weights for their cost were dropped")
    alone = {bit: _share(case, *cost) for bit, cost in case.alone().items()}
    mask = _fill(case, mask, sorted(alone, key=lambda bit: alone[bit] / case.values[bit]))
    value = case.value(mask)
    bound = max(value, bound)
    if bound - value > 2 * RELATIVE_GAP * bound:
        notes.append(f"the planner stopped {(bound - value) / bound:.1%} below its bound after {TIME_LIMIT_S:.0f} s")
    return Choice(mask, value, bound, tuple(notes))


def last_layers(case: Case, seed: int = 0) -> Choice:
    """From the loss downward until the next weight no longer fits; weights that do not fit alone are passed over."""
    depth = {bit: sum(flops for mask, flops, _ in case.paths if mask >> bit & 1) for bit in case.candidates}
    mask = 0
    for bit in sorted(case.candidates, key=lambda bit: (depth[bit], -bit)):
        if not case.fits(mask | 1 << bit):
            break
        mask |= 1 << bit
    return Choice(mask, case.value(mask), relaxed_bound(case))


def random_order(case: Case, seed: int = 0) -> Choice:
    """In an order drawn from `seed`, every weight that still fits."""
    order = sorted(case.candidates)
    random.Random(seed).shuffle(order)
    mask = _fill(case, 0, order)
    return Choice(mask, case.value(mask), relaxed_bound(case))


Strategy = Callable[[Case, int], Choice]

STRATEGIES: dict[str, Strategy] = {
    "greentrainer": joint,
    "last-layers": last_layers,
    "random": random_order,
}


def _fill(case: Case, mask: int, order: Iterable[int]) -> int:
    for bit in order:
        if not mask >> bit & 1 and case.fits(mask | 1 << bit):
            mask |= 1 << bit
    return mask


def _share(case: Case, flops: int, memory: int) -> float:
    """A cost as the sum of its shares of both budgets."""
    return flops / max(case.flops_left, 1) + memory / max(case.bytes_left, 1)


def _drop(case: Case, mask: int) -> int:
    """Drop weights, the least valuable per share of the budgets freed first, until both budgets hold."""
    while not case.fits(mask):
        whole = _share(case, *case.cost(mask))
        freed = {bit: max(whole - _share(case, *case.cost(mask ^ 1 << bit)), 1e-12) for bit in bits(mask)}
        mask ^= 1 << min(freed, key=lambda bit: case.values[bit] / freed[bit])
    return mask


def _links(case: Case) -> list[tuple[int, list[int], list[int]]]:
    """Per path (by index in case.paths): the indices of paths, and the weights, that it must be at least."""
    allowed = sum(1 << bit for bit in case.candidates)
    masks = [mask & allowed for mask, _, _ in case.paths]
    order = sorted((index for index, mask in enumerate(masks) if mask), key=lambda index: masks[index].bit_count())
    links: list[tuple[int, list[int], list[int]]] = []
    for position, index in enumerate(order):
        rest = mask = masks[index]
        parts: list[int] = []
        for earlier in reversed(order[:position]):
            part = masks[earlier]
            if part | mask == mask:
                parts, rest = [earlier], mask & ~part
                break
        links.append((index, parts, list(bits(rest))))
    return links


def _constraints(case: Case) -> tuple[Any, Any]:
    """Rows (sparse) and their lower bounds over the variables (y of the candidates, then z of the paths)."""
    import numpy
    from scipy.sparse import csr_array

    column = {bit: index for index, bit in enumerate(case.candidates)}
    first_path = len(case.candidates)
    rows: list[int] = []
    columns: list[int] = []
    entries: list[float] = []

    def put(row: int, at: int, entry: float) -> None:
        rows.append(row)
        columns.append(at)
        entries.append(entry)

    for row, own, which, left in ((0, case.flops, 1, case.flops_left), (1, case.bytes, 2, case.bytes_left)):
        unit = -ROW_SCALE / max(left, 1)
        for bit in case.candidates:
            put(row, column[bit], unit * own[bit])
        for index, path in enumerate(case.paths):
            put(row, first_path + index, unit * path[which])
    lower = [-ROW_SCALE, -ROW_SCALE]
    for index, parts, rest in _links(case):
        for other in [first_path + part for part in parts] + [column[bit] for bit in rest]:
            put(len(lower), first_path + index, 1.0)
            put(len(lower), other, -1.0)
            lower.append(0.0)
    matrix = csr_array((entries, (rows, columns)), shape=(len(lower), first_path + len(case.paths)))
    return matrix, numpy.array(lower)


def _solve(case: Case, integral: bool) -> tuple[int, float]:
    """The chosen mask (0 when the solver found none in time) and an upper bound on the value."""
    import numpy
    from scipy.optimize import Bounds, LinearConstraint, milp

    count = len(case.candidates)
    matrix, lower = _constraints(case)
    scale = max(case.values[bit] for bit in case.candidates)
    objective = numpy.zeros(matrix.shape[1])
    objective[:count] = [-case.values[bit] / scale for bit in case.candidates]
    integrality = numpy.full(matrix.shape[1], int(integral))
    with quiet_stdout():
        result = milp(
            objective,
            constraints=LinearConstraint(matrix, lower, numpy.inf),
            bounds=Bounds(0, 1),
            integrality=integrality,
            options={"time_limit": TIME_LIMIT_S, "mip_rel_gap": RELATIVE_GAP},
        )
    everything = sum(case.values[bit] for bit in case.candidates)
    bound = getattr(result, "mip_dual_bound", None) if integral else result.fun
    mask = 0
    if result.x is not None:
        for bit, share in zip(case.candidates, result.x, strict=False):
            mask |= int(share > 0.5) << bit
    return mask, everything if bound is None else min(everything, -scale * float(bound))


@contextmanager
def quiet_stdout() -> Iterator[None]:
    """Discard what C code writes to file descriptor 1 (HiGHS prints lines that no option silences)."""
    with _stdout_lock:
        try:
            sys.stdout.flush()
            kept = os.dup(1)
        except (OSError, ValueError, AttributeError):
            yield
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, 1)
            yield
        finally:
            if os.name == "posix":
                ctypes.CDLL(None).fflush(None)
            os.dup2(kept, 1)
            os.close(kept)
            os.close(nowhere)
