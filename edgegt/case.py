"""The choice that a planner makes, as integers: what each weight is worth, costs, and shares with others.

A case is one way to train (one micro-batch, one set of number formats) under several budgets at once. Its arithmetic
is the whole truth for strategies and solvers; `planner` checks the winner against the cost table.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

Costs = tuple[int, ...]


@dataclass(frozen=True)
class Kept:
    """Bytes kept for backward as soon as any weight of `mask` is chosen, unless layer `layer` is recomputed."""

    mask: int
    layer: int
    costs: Costs


@dataclass(frozen=True)
class Layer:
    """What recomputing one layer costs if any weight of `mask` is chosen.

    peak: costs of which only the largest among the recomputed layers counts (its activations, once more).
    """

    mask: int
    costs: Costs
    peak: Costs


@dataclass(frozen=True)
class Case:
    """Weights, their values and costs, and the budgets. Bit k of a mask stands for weight k.

    candidates: the bits that may be chosen. costs: per weight, its own, one entry per budget. paths: (mask, costs),
    paid once any weight of the mask is chosen. left: what a choice may cost, per budget; FLOPs are the first budget.
    blocks, vectors: layer of each weight, and the bits of norms and biases, for strategies that go by them.
    floor: a mask of which at least one weight must be chosen; 0 where any choice will do.
    """

    values: tuple[float, ...]
    candidates: tuple[int, ...]
    costs: tuple[Costs, ...]
    paths: tuple[tuple[int, Costs], ...]
    left: Costs
    kept: tuple[Kept, ...] = ()
    layers: tuple[Layer, ...] = ()
    blocks: tuple[int, ...] = ()
    vectors: frozenset[int] = frozenset()
    floor: int = 0

    def cost(self, mask: int, recompute: Iterable[int] = ()) -> Costs:
        """The cost of choosing the weights in `mask` and recomputing these layers, per budget."""
        again = set(recompute)
        total = [0] * len(self.left)
        peak = [0] * len(self.left)
        for bit in bits(mask):
            _add(total, self.costs[bit])
        for weights, costs in self.paths:
            if weights & mask:
                _add(total, costs)
        for kept in self.kept:
            if kept.mask & mask and kept.layer not in again:
                _add(total, kept.costs)
        for index in again:
            layer = self.layers[index]
            if layer.mask & mask:
                _add(total, layer.costs)
                peak = [max(pair) for pair in zip(peak, layer.peak, strict=True)]
        _add(total, tuple(peak))
        return tuple(total)

    def fits(self, mask: int, recompute: Iterable[int] = ()) -> bool:
        """Whether every budget holds, and the layers recomputed are the lowest of those that take part in backward."""
        again = set(self.taking_part(mask, recompute))
        lowest = [index for index in self.every_layer if self.layers[index].mask & mask][: len(again)]
        return again == set(lowest) and self._within(self.cost(mask, again))

    def value(self, mask: int) -> float:
        """What the weights in `mask` are worth together."""
        return sum(self.values[bit] for bit in bits(mask))

    def alone(self, recompute: Iterable[int] = ()) -> dict[int, Costs]:
        """The cost of each candidate when nothing else is chosen."""
        again = set(recompute)
        totals = {bit: self.costs[bit] for bit in self.candidates}
        peaks = dict.fromkeys(self.candidates, (0,) * len(self.left))
        shared = [*self.paths, *((kept.mask, kept.costs) for kept in self.kept if kept.layer not in again)]
        shared += [(self.layers[index].mask, self.layers[index].costs) for index in again]
        self._over_masks(shared, totals, operator.add)
        self._over_masks(((self.layers[index].mask, self.layers[index].peak) for index in again), peaks, max)
        return {bit: tuple(map(operator.add, totals[bit], peaks[bit])) for bit in totals}

    def affordable(self) -> Case:
        """This case without the candidates that the budgets do not allow even alone, whatever is recomputed.

        None is left where one of `floor` must be chosen and none of it is affordable.
        """
        least = replace(self, kept=(), layers=()) if self.layers else self
        fitting = tuple(bit for bit, costs in least.alone().items() if self._within(costs))
        floor = sum(1 << bit for bit in fitting if self.floor >> bit & 1)
        return replace(self, candidates=fitting if floor or not self.floor else (), floor=floor)

    def without_recomputation(self) -> Case:
        """The same choice where no layer may be recomputed."""
        paths = (*self.paths, *((kept.mask, kept.costs) for kept in self.kept))
        return replace(self, paths=tuple(paths), kept=(), layers=())

    def recomputing(self, recompute: Iterable[int]) -> Case:
        """The same choice where exactly these layers are recomputed (those of them that take part in backward)."""
        again = sorted(set(recompute))
        paths = [*self.paths, *((kept.mask, kept.costs) for kept in self.kept if kept.layer not in again)]
        paths += [(self.layers[index].mask, self.layers[index].costs) for index in again]
        # The largest of the recomputed layers counts: a size step is paid once any layer at least that large is hit.
        for budget in range(len(self.left)):
            below = 0
            for size in sorted({self.layers[index].peak[budget] for index in again}):
                hit = 0
                for index in again:
                    hit |= self.layers[index].mask if self.layers[index].peak[budget] >= size else 0
                step = tuple(size - below if row == budget else 0 for row in range(len(self.left)))
                paths.append((hit, step))
                below = size
        return replace(self, paths=tuple(paths), kept=(), layers=())

    def taking_part(self, mask: int, recompute: Iterable[int]) -> tuple[int, ...]:
        """Those of the layers that the choice of weights makes take part in backward, ascending."""
        return tuple(index for index in sorted(set(recompute)) if self.layers[index].mask & mask)

    @property
    def every_layer(self) -> range:
        """The indices of all layers."""
        return range(len(self.layers))

    def _over_masks(
        self, shared: Iterable[tuple[int, Costs]], found: dict[int, Costs], combine: Callable[[int, int], int]
    ) -> None:
        """Combine into what is found for each candidate the costs of all masks that have it.

        Masks mostly lie within one another, and what the larger ones of a chain come to is known from the one above.
        """
        for chain in _chains((mask & self._allowed, costs) for mask, costs in shared):
            whole: Costs = (0,) * len(self.left)
            for (mask, costs), (below, _) in zip(chain[::-1], [*chain[-2::-1], (0, ())], strict=True):
                whole = tuple(map(combine, whole, costs))
                for bit in bits(mask & ~below):
                    found[bit] = tuple(map(combine, found[bit], whole))

    @cached_property
    def _allowed(self) -> int:
        return sum(1 << bit for bit in self.candidates)

    def _within(self, costs: Costs) -> bool:
        return all(cost <= left for cost, left in zip(costs, self.left, strict=True))


def bits(mask: int) -> Iterator[int]:
    """The positions of the ones in `mask`, ascending."""
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest


def _chains(shared: Iterable[tuple[int, Costs]]) -> list[list[tuple[int, Costs]]]:
    """The masks in chains, as few as the order of their sizes gives; each lies within the next of its chain."""
    chains: list[list[tuple[int, Costs]]] = []
    for mask, costs in sorted(shared, key=lambda item: item[0].bit_count()):
        chain = next((chain for chain in chains if chain[-1][0] & ~mask == 0), None)
        if chain is None:
            chains.append([(mask, costs)])
        else:
            chain.append((mask, costs))
    return chains


def _add(total: list[int], costs: Costs) -> None:
    for row, cost in enumerate(costs):
        total[row] += cost
