"""The exact planner: one mixed-integer program over weights and recomputed layers, solved by HiGHS.

A binary y per weight, and per distinct path mask a z with z >= y for its weights, because a gradient to an input is
paid once, by whichever weight first needs it. Masks are mostly nested, so z of a mask is tied to z of its largest
expressed part and to the weights beyond it: about one row per weight, and a relaxation as tight as with all rows. z
would be integer of itself; declared so, the solver branches on depth first, which makes the hard cases two to six times
faster.

A binary r per layer says that it is recomputed: a share u of its bytes is kept, u >= (share hit) - r. Layers are
recomputed from the lowest that takes part in backward upwards: their backward comes last, when what the layers above
kept is gone, so that this order needs the least memory; and equal layers are not tried in every combination.

The solver stops by its gap or by a number of nodes, never by time: a plan is the same on every machine.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from edgegt.case import Case, Costs, bits

RELATIVE_GAP = 1e-3
EXACT_BELOW = 40
NODE_LIMIT = 1000
ROW_SCALE = 1e4
_stdout_lock = threading.Lock()


@dataclass(frozen=True)
class Choice:
    """A choice that fits its case, its value, an upper bound on any choice's value, and what the user should know.

    recompute: indices of the layers to recompute, ascending, each taking part in backward.
    """

    mask: int
    value: float
    bound: float
    recompute: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


def joint(case: Case, seed: int = 0, at_least: float = 0.0) -> Choice:
    """The best choice to within RELATIVE_GAP; unused budget is filled up.

    at_least: a choice worth less is of no use; when there is none worth more, nothing is chosen and this is the bound.
    """
    if not case.candidates:
        return Choice(0, 0.0, 0.0)
    lowest = [bit for bit in case.candidates if not case.floor or case.floor >> bit & 1]
    depths = sorted({case.blocks[bit] for bit in lowest}) if case.blocks else []
    if len(case.candidates) < EXACT_BELOW or len(depths) < 2:
        return _solved(case, at_least, case.floor)
    return _by_depth(case, depths, at_least)


def _by_depth(case: Case, depths: list[int], at_least: float) -> Choice:
    """The best choice over all lowest layers: with it fixed, what the way there costs is fixed, and bounds are tight.

    Depths are solved from the one with the highest bound on, until no bound is RELATIVE_GAP above the best choice.
    """
    parts = []
    for depth in depths:
        above = replace(case, candidates=tuple(bit for bit in case.candidates if case.blocks[bit] >= depth))
        floor = sum(1 << bit for bit in case.candidates if case.blocks[bit] == depth)
        parts.append((_Program(above, floor=floor).solve(integral=False).bound, depth, above, floor))
    best, ceiling = Choice(0, 0.0, 0.0), 0.0
    for bound, _, above, floor in sorted(parts, key=lambda part: (-part[0], -part[1])):
        target = max(at_least, best.value * (1 + RELATIVE_GAP))
        if bound <= target:
            ceiling = max(ceiling, bound)
            break
        found = _solved(above, target, floor)
        ceiling = max(ceiling, min(bound, found.bound))
        if found.value > best.value:
            best = found
    if not best.mask:
        return Choice(0, 0.0, max(at_least, ceiling))
    order = _by_cost(case, best.recompute)
    mask = fill(case, best.mask, order, best.recompute)  # what lies deeper than its depth may be free
    return replace(best, mask=mask, value=case.value(mask), bound=max(case.value(mask), ceiling))


def _solved(case: Case, at_least: float, floor: int = 0) -> Choice:
    """The best choice of one program (see _Program for `floor`)."""
    solution = _Program(case, at_least, floor).solve(integral=True)
    mask, recompute = solution.mask, solution.recompute
    if at_least and not mask:
        return Choice(0, 0.0, max(at_least, solution.bound))
    notes: list[str] = []
    if not case.fits(mask, recompute):
        mask = drop(case, mask, recompute)
        notes.append("the solver's rounding exceeded a budget: the least valuable weights for their cost were dropped")
    mask = fill(case, mask, _by_cost(case, recompute), recompute)
    value = case.value(mask)
    bound = solution.bound
    if bound > (1 + RELATIVE_GAP) * value:
        bound = min(bound, relaxed_bound(case))
    bound = max(value, bound)
    if bound - value > 2 * RELATIVE_GAP * bound:
        notes.append(f"the planner stopped {(bound - value) / bound:.1%} below its bound after {NODE_LIMIT} nodes")
    return Choice(mask, value, bound, case.taking_part(mask, recompute), tuple(notes))


def _by_cost(case: Case, recompute: Iterable[int]) -> list[int]:
    """The candidates, the most valuable for what they cost alone first."""
    alone = {bit: share(case, costs) for bit, costs in case.alone(recompute).items()}
    return sorted(alone, key=lambda bit: alone[bit] / case.values[bit])


def relaxed_bound(case: Case) -> float:
    """No choice is worth more: the optimum when weights may be trained and layers recomputed in part."""
    return _Program(case, floor=case.floor).solve(integral=False).bound if case.candidates else 0.0


def fill(case: Case, mask: int, order: Iterable[int], recompute: Iterable[int] = ()) -> int:
    """`mask` with every further weight, in this order, that still fits."""
    again = tuple(recompute)
    for bit in order:
        if not mask >> bit & 1 and case.fits(mask | 1 << bit, again):
            mask |= 1 << bit
    return mask


def drop(case: Case, mask: int, recompute: Iterable[int] = ()) -> int:
    """Drop weights, the least valuable per share of the budgets freed first, until every budget holds."""
    again = tuple(recompute)
    while mask and not case.fits(mask, again):
        whole = share(case, case.cost(mask, again))
        freed = {bit: max(whole - share(case, case.cost(mask ^ 1 << bit, again)), 1e-12) for bit in bits(mask)}
        mask ^= 1 << min(freed, key=lambda bit: case.values[bit] / freed[bit])
    return mask


def share(case: Case, costs: Costs) -> float:
    """A cost as the sum of its shares of the budgets."""
    return sum(cost / max(left, 1) for cost, left in zip(costs, case.left, strict=True))


@dataclass(frozen=True)
class _Solution:
    mask: int
    recompute: tuple[int, ...]
    bound: float


@dataclass
class _Rows:
    """A sparse matrix while it grows: entries by row and column, and the lower bound of each row."""

    rows: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    entries: list[float] = field(default_factory=list)
    lower: list[float] = field(default_factory=list)

    def put(self, row: int, column: int, entry: float) -> None:
        if entry:
            self.rows.append(row)
            self.columns.append(column)
            self.entries.append(entry)

    def at_least(self, lower: float, *terms: tuple[int, float]) -> None:
        """Add the row sum(entry * variable) >= lower."""
        for column, entry in terms:
            self.put(len(self.lower), column, entry)
        self.lower.append(lower)


class _Program:
    """The variables y (candidates), z (masks), r, u (layers) and peaks (one per budget), and their rows.

    floor: a mask of which at least one weight must be chosen, so that every mask around it is hit.
    """

    def __init__(self, case: Case, at_least: float = 0.0, floor: int = 0) -> None:
        self.case, self.floor = case, floor
        self.scale = max(case.values[bit] for bit in case.candidates)
        self.allowed = allowed = sum(1 << bit for bit in case.candidates)
        self.y = {bit: index for index, bit in enumerate(case.candidates)}
        found = [*(mask for mask, _ in case.paths), *(kept.mask for kept in case.kept)]
        found += [layer.mask for layer in case.layers]
        masks = sorted({mask & allowed for mask in found if mask & allowed}, key=int.bit_count)
        self.z = {mask: len(self.y) + index for index, mask in enumerate(masks)}
        first = len(self.y) + len(self.z)
        self.r = {index: first + position for position, index in enumerate(case.every_layer)}
        first += len(self.r)
        self.kept = _by_layer(case, allowed)
        self.u = {key: first + position for position, key in enumerate(self.kept)}
        first += len(self.u)
        self.peak = {row: first + row for row in range(len(case.left))} if case.layers else {}
        self.integral = first
        self.count = first + len(self.peak)
        self.rows = _Rows()
        self._budgets(allowed)
        self._links(masks)
        self._recomputation(allowed)
        if floor:
            self.rows.at_least(1.0, *((self.y[bit], 1.0) for bit in bits(floor)))
        if at_least:
            worth = [(column, case.values[bit] / self.scale) for bit, column in self.y.items()]
            self.rows.at_least(at_least / self.scale, *worth)

    def _budgets(self, allowed: int) -> None:
        case = self.case
        for row, left in enumerate(case.left):
            unit = -ROW_SCALE / max(left, 1)
            terms: dict[int, float] = {}
            for bit, column in self.y.items():
                terms[column] = unit * case.costs[bit][row]
            for mask, costs in case.paths:
                if mask & allowed:
                    column = self.z[mask & allowed]
                    terms[column] = terms.get(column, 0.0) + unit * costs[row]
            for key, column in self.u.items():
                terms[column] = unit * sum(costs[row] for costs in self.kept[key].values())
            for index, column in self.r.items():
                terms[column] = unit * case.layers[index].costs[row]
            if self.peak:
                terms[self.peak[row]] = -ROW_SCALE
            self.rows.at_least(-ROW_SCALE, *terms.items())

    def _links(self, masks: list[int]) -> None:
        """z of a mask is at least z of the largest mask within it, and y of the weights beyond that."""
        for position, mask in enumerate(masks):
            if self._hit(mask):
                continue
            rest, parts = mask, []
            for earlier in reversed(masks[:position]):
                if earlier | mask == mask:
                    parts, rest = [self.z[earlier]], mask & ~earlier
                    break
            for other in parts + [self.y[bit] for bit in bits(rest)]:
                self.rows.at_least(0.0, (self.z[mask], 1.0), (other, -1.0))

    def _hit(self, mask: int) -> bool:
        return bool(self.floor) and self.floor & ~mask == 0

    def _recomputation(self, allowed: int) -> None:
        """u >= share - r; a layer only if the one below is recomputed too, or takes no part; the largest of them."""
        case = self.case
        for layer, column in self.u.items():
            sizes = {mask: max(costs) for mask, costs in self.kept[layer].items()}
            parts = [(self.z[mask], -size / sum(sizes.values())) for mask, size in sizes.items()]
            self.rows.at_least(0.0, (column, 1.0), (self.r[layer], 1.0), *parts)
        for index, column in self.r.items():
            below = case.layers[index - 1].mask & allowed if index else 0
            if below:
                self.rows.at_least(-1.0, (self.r[index - 1], 1.0), (column, -1.0), (self.z[below], -1.0))
            for row, high in self.peak.items():
                if case.layers[index].peak[row]:
                    size = case.layers[index].peak[row] / max(case.left[row], 1)
                    self.rows.at_least(0.0, (high, 1.0), (column, -size))

    def solve(self, integral: bool) -> _Solution:
        """The choice (empty when the solver found none within its nodes) and an upper bound on any choice's value."""
        import numpy
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array

        case, rows = self.case, self.rows
        matrix = csr_array((rows.entries, (rows.rows, rows.columns)), shape=(len(rows.lower), self.count))
        objective = numpy.zeros(self.count)
        objective[: len(self.y)] = [-case.values[bit] / self.scale for bit in case.candidates]
        integrality = numpy.zeros(self.count)
        integrality[: len(self.y) + len(self.z) + len(self.r)] = int(integral)
        if self.r:  # only z of whole layers, which say how deep backward goes: half the time, measured
            integrality[len(self.y) : len(self.y) + len(self.z)] = 0
            integrality[[self.z[layer.mask & self.allowed] for layer in case.layers if layer.mask & self.allowed]] = (
                int(integral)
            )
        lower, upper = numpy.zeros(self.count), numpy.ones(self.count)
        lower[[column for mask, column in self.z.items() if self._hit(mask)]] = 1.0
        upper[self.integral :] = numpy.inf
        gap = RELATIVE_GAP if len(self.y) >= EXACT_BELOW else 1e-7
        with quiet_stdout():
            result: Any = milp(
                objective,
                constraints=LinearConstraint(matrix, numpy.array(rows.lower), numpy.inf),
                bounds=Bounds(lower, upper),
                integrality=integrality,
                options={"node_limit": NODE_LIMIT, "mip_rel_gap": gap},
            )
        everything = sum(case.values[bit] for bit in case.candidates)
        bound = getattr(result, "mip_dual_bound", None) if integral else result.fun
        mask, recompute = 0, []
        if result.x is not None:
            for bit, column in self.y.items():
                mask |= int(result.x[column] > 0.5) << bit
            recompute = [index for index, column in self.r.items() if result.x[column] > 0.5]
        infeasible = result.status == 2
        ceiling = 0.0 if infeasible else everything if bound is None else min(everything, -self.scale * float(bound))
        return _Solution(mask, tuple(recompute), ceiling)


def _by_layer(case: Case, allowed: int) -> dict[int, dict[int, Costs]]:
    """Of each layer, the costs of what it keeps by mask; in every budget that has them they are the same bytes."""
    found: dict[int, dict[int, Costs]] = {}
    for item in case.kept:
        mask = item.mask & allowed
        if mask:
            costs = found.setdefault(item.layer, {})
            before = costs.get(mask, (0,) * len(item.costs))
            costs[mask] = tuple(a + b for a, b in zip(before, item.costs, strict=True))
    return found


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
