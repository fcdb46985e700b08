"""What is known of the ways of a problem: bounds that hold for all of them, whatever the best of them is worth."""

from __future__ import annotations

import dataclasses

import pytest

from edgegt.case import bits
from edgegt.cases import Cases, by_boundary
from edgegt.planner import Problem
from test_planner import brute_force, random_problem
from test_prefix import RATES, problem, rows


@pytest.mark.parametrize("roomy", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_no_way_is_worth_more_than_the_highest(seed: int, roomy: bool) -> None:
    found = random_problem(seed, most=6)
    if roomy:  # where all fits a bound is what all is worth, and formats of less worth must not lower it
        found = dataclasses.replace(found, flops=2 * found.full_flops, memory_bytes=1 << 50)
    best = max(way.worth * brute_force(found, way) for way in found.ways())
    cases = Cases(found)
    assert cases.highest() >= best * (1 - 1e-9)
    assert cases.exceeds(0.99 * best) == (best > 0)
    assert not cases.exceeds(1.001 * best) or cases.highest() > 1.001 * best
    if roomy:
        assert cases.highest() == pytest.approx(best)
        assert not cases.exceeds(1.001 * best)


def spread(of: Problem, low: int) -> frozenset[int]:
    """Layers that may be the lowest of a choice that is looked for below this boundary."""
    case = by_boundary(of)[low].of(of.ways()[0])
    floor = case.floor or sum(1 << bit for bit in case.candidates)
    return frozenset(case.blocks[bit] for bit in bits(floor))


def test_each_choice_is_looked_for_where_its_way_down_costs_least() -> None:
    assert [sorted(spread(problem(rows(5), 0.5), low)) for low in range(4)] == [[0], [1], [2], [3]]
    # Below layer 2 states are there already, so that those of layer 3, which are not, need not be cheaper.
    there = problem(rows(4), 0.5, 6, (2, 0))
    assert there.at(3).saved_flops < there.at(2).saved_flops
    assert sorted(spread(there, 2)) == [2, 3]
    assert sorted(spread(there, 3)) == [3]
    # Nothing is kept, or time is limited, which depends on more: everywhere.
    for other in ({"caching": None}, {"rates": RATES, "seconds": 1e9}):
        assert sorted(spread(dataclasses.replace(problem(rows(5), 0.5), **other), 0)) == [0, 1, 2, 3]
