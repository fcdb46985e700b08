"""What the planner is compared with: strategies that know less, cut down to the budgets that they do not know.

`greentrainer-dp` is the selection of arXiv 2309.13192 as published (section 3.3, a dynamic program over a grid of 1000
time steps): tensors form a chain, FLOPs are the only budget, and a state that does not improve on skipping its tensor
is lost, so that it is not optimal. What it chose is then cut down to the memory budget.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache

from edgegt.case import Case, bits
from edgegt.solver import Choice, fill, relaxed_bound, share

GRID_STEPS = 1000


def last_layers(case: Case, seed: int = 0) -> Choice:
    """From the loss downward until the next weight no longer fits; weights that do not fit alone are passed over."""
    mask = 0
    for bit in from_the_loss(case):
        if not case.fits(mask | 1 << bit):
            break
        mask |= 1 << bit
    return Choice(mask, case.value(mask), relaxed_bound(case))


def random_order(case: Case, seed: int = 0) -> Choice:
    """The head, then in an order drawn from `seed` every weight that still fits."""
    order = sorted(case.candidates)
    random.Random(seed).shuffle(order)
    mask = fill(case, 0, [*_head(case), *order])
    return Choice(mask, case.value(mask), relaxed_bound(case))


def vectors_only(case: Case, seed: int = 0) -> Choice:
    """Biases and norms only (BitFit, arXiv 2106.10199), the most valuable first, every one that still fits."""
    vectors = [bit for bit in case.candidates if bit in case.vectors]
    mask = fill(case, 0, sorted(vectors, key=lambda bit: -case.values[bit]))
    return Choice(mask, case.value(mask), relaxed_bound(case))


def published(case: Case, seed: int = 0) -> Choice:
    """The published selection by FLOPs alone, then cut down, least value per cost first, until every budget holds."""
    order = from_the_loss(case)
    dw, values = tuple(case.costs[bit][0] for bit in order), tuple(case.values[bit] for bit in order)
    first, dy = _chain(case, order)
    mask = sum(1 << order[position] for position in published_selection(dw, dy, values, case.left[0] - first))
    cut = cut_down(case, mask)
    notes = ("the published selection was cut down to the budgets",) if cut != mask else ()
    if not cut:  # its grid rounds costs, or nothing of it fits
        cut = fill(case, 0, sorted(case.candidates, key=lambda bit: -case.values[bit]))
        notes = ("nothing of the published selection fits: the most valuable weights that do were taken",)
    return Choice(cut, case.value(cut), relaxed_bound(case), (), notes)


def random_layers(case: Case, seed: int = 0) -> Choice:
    """Whole layers drawn from `seed`, after the head (as LISA, arXiv 2403.17919), as long as the next one fits."""
    above = max(case.blocks)
    layers = sorted({case.blocks[bit] for bit in case.candidates} - {above})
    random.Random(seed).shuffle(layers)
    mask = fill(case, 0, [bit for bit in case.candidates if case.blocks[bit] == above])
    for layer in layers:
        whole = mask | sum(1 << bit for bit in case.candidates if case.blocks[bit] == layer)
        if case.fits(whole):
            mask = whole
    return Choice(mask, case.value(mask), relaxed_bound(case))


def _head(case: Case) -> list[int]:
    """The matrices above all layers, if they are candidates."""
    above = max(case.blocks, default=0)
    return [bit for bit in case.candidates if case.blocks and case.blocks[bit] == above and bit not in case.vectors]


def cut_down(case: Case, mask: int) -> int:
    """Drop weights, the least valuable per share of the budgets freed first, until every budget holds.

    As `solver.drop`, for cases where nothing is left to recompute: hundreds of weights in a tenth of a second.
    """
    while mask and not case.fits(mask):
        freed = {bit: list(case.costs[bit]) for bit in bits(mask)}
        for weights, costs in case.paths:
            using = weights & mask
            if using.bit_count() == 1:
                bit = using.bit_length() - 1
                freed[bit] = [own + cost for own, cost in zip(freed[bit], costs, strict=True)]
        worth = {bit: case.values[bit] / max(share(case, tuple(costs)), 1e-12) for bit, costs in freed.items()}
        mask ^= 1 << min(worth, key=lambda bit: worth[bit])
    return mask


def from_the_loss(case: Case) -> list[int]:
    """The candidates in the order in which backward reaches them, by the FLOPs of the way to each."""
    depth = {bit: sum(costs[0] for mask, costs in case.paths if mask >> bit & 1) for bit in case.candidates}
    return sorted(case.candidates, key=lambda bit: (depth[bit], -bit))


def _chain(case: Case, order: Sequence[int]) -> tuple[int, tuple[int, ...]]:
    """FLOPs of the way to the first tensor, and dy FLOPs per tensor as the chain model has them.

    dy of a tensor: what the way to the next one costs more than the way to it.
    """
    depth = [sum(costs[0] for mask, costs in case.paths if mask >> bit & 1) for bit in order]
    return depth[0], tuple(after - before for before, after in zip(depth, [*depth[1:], depth[-1]], strict=True))


@lru_cache(maxsize=64)
def published_selection(
    dw: tuple[int, ...], dy: tuple[int, ...], values: tuple[float, ...], budget: int
) -> tuple[int, ...]:
    """Positions that the published dynamic program selects; all from the loss downward, costs and budget in FLOPs.

    Its table has a row per tensor and a column per step of the grid; each entry tries every tensor above as the one
    selected before. It takes seconds, and knows nothing of most ways to train: so it is remembered.
    """
    whole = max(1, sum(dw) + sum(dy))
    dw = tuple(cost * GRID_STEPS // whole for cost in dw)
    dy = tuple(cost * GRID_STEPS // whole for cost in dy)
    steps = max(0, min(GRID_STEPS, budget * (sum(dw) + sum(dy)) // whole))
    count, passed = 0, 0
    while count < len(dy) and passed + dy[count] <= steps:
        passed += dy[count]
        count += 1
    best = [[0.0] * (steps + 1) for _ in range(count + 1)]
    chosen: list[list[tuple[int, ...]]] = [[()] * (steps + 1) for _ in range(count + 1)]
    usable = [[True] + [row == 0] * steps for row in range(count + 1)]
    top = 0.0
    selection: tuple[int, ...] = ()
    for k in range(1, count + 1):
        for t in range(steps + 1):
            most, origin = best[k - 1][t], None
            left = t - dw[k - 1]
            for before in range(k - 1, -1, -1):
                left -= dy[before]
                if left >= 0 and usable[before][left] and best[before][left] + values[k - 1] > most:
                    most, origin = best[before][left] + values[k - 1], (before, left)
            best[k][t] = most
            usable[k][t] = origin is not None
            chosen[k][t] = (*chosen[origin[0]][origin[1]], k - 1) if origin else chosen[k - 1][t]
            if most > top:
                top, selection = most, chosen[k][t]
    return selection
