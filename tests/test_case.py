"""The integer case: its costs by hand, and that each of its shorter forms says the same as `cost` and `fits`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from edgegt.case import Case, Kept, Layer, bits
from edgegt.integers import case_of
from test_planner import random_problem

# Three weights, the lower two in layers 0 and 1; budgets of FLOPs and of bytes.
HAND = Case(
    values=(5.0, 3.0, 2.0),
    candidates=(0, 1, 2),
    costs=((100, 10), (200, 20), (400, 40)),
    paths=((0b001, (1, 0)), (0b011, (2, 0)), (0b111, (4, 1000))),
    left=(10_000, 10_000),
    kept=(Kept(0b001, 0, (0, 3)), Kept(0b011, 1, (0, 5)), Kept(0b010, 1, (0, 7))),
    layers=(Layer(0b001, (50, 1), (0, 9)), Layer(0b011, (60, 2), (0, 12))),
    blocks=(0, 1, 2),
)


def random_cases(count: int) -> Iterator[Case]:
    """Cases of small random problems, most of them with layers that may be recomputed."""
    for seed in range(count):
        problem = random_problem(seed)
        ways = problem.ways()
        yield case_of(problem, random.Random(seed).choice([*ways, *(way for way in ways if way.recompute)]))


def depths(case: Case, mask: int) -> list[tuple[int, ...]]:
    """Every set of layers that `fits` allows to be recomputed with this choice of weights."""
    active = case.taking_part(mask, case.every_layer)
    return [active[:count] for count in range(len(active) + 1)]


def feasible(case: Case) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Every choice of candidates and recomputed layers that fits."""
    allowed = sum(1 << bit for bit in case.candidates)
    mask = allowed
    while mask:
        for again in depths(case, mask):
            if case.fits(mask, again):
                yield mask, again
        mask = (mask - 1) & allowed


def test_the_cost_of_a_choice_by_hand() -> None:
    assert HAND.cost(0) == (0, 0)
    assert HAND.cost(0b100) == (404, 1040)
    assert HAND.cost(0b001) == (100 + 1 + 2 + 4, 10 + 1000 + 3 + 5)
    assert HAND.cost(0b110) == (200 + 400 + 2 + 4, 60 + 1000 + 5 + 7)
    assert HAND.value(0b101) == 7.0


def test_a_recomputed_layer_keeps_its_input_and_only_the_largest_of_them_counts_once_more() -> None:
    assert HAND.cost(0b001, [0]) == (107 + 50, 1018 - 3 + 1 + 9)
    assert HAND.cost(0b001, [0, 1]) == (107 + 50 + 60, 1018 - 3 - 5 + 1 + 2 + 12)
    assert HAND.cost(0b001, [1, 0, 1]) == HAND.cost(0b001, [0, 1])


def test_a_layer_that_takes_no_part_in_backward_is_not_recomputed() -> None:
    assert HAND.cost(0b100, [0, 1]) == HAND.cost(0b100)
    assert HAND.cost(0b010, [0, 1]) == HAND.cost(0b010, [1])
    assert HAND.taking_part(0b010, (1, 0, 1)) == (1,)
    assert HAND.taking_part(0b001, (1, 0)) == (0, 1)
    assert HAND.fits(0b100, [0])


def test_only_the_lowest_layers_may_be_recomputed() -> None:
    assert HAND.fits(0b001)
    assert HAND.fits(0b001, [0])
    assert HAND.fits(0b001, [0, 1])
    assert not HAND.fits(0b001, [1])
    assert HAND.fits(0b010, [1])  # layer 0 takes no part, so layer 1 is the lowest


@pytest.mark.parametrize("budget", [0, 1])
def test_a_choice_fits_up_to_the_last_unit_of_every_budget(budget: int) -> None:
    cost = HAND.cost(0b011, [0])
    assert replace(HAND, left=cost).fits(0b011, [0])
    short = tuple(left - (row == budget) for row, left in enumerate(cost))
    assert not replace(HAND, left=short).fits(0b011, [0])


def test_alone_is_the_cost_of_one() -> None:
    for case in random_cases(40):
        for recompute in (range(0), case.every_layer, case.every_layer[:1]):
            assert case.alone(recompute) == {bit: case.cost(1 << bit, recompute) for bit in case.candidates}


def test_choosing_more_never_costs_less() -> None:
    for case in random_cases(30):
        for mask, again in feasible(case):
            for bit in set(case.candidates) - set(bits(mask)):
                more = case.cost(mask | 1 << bit, again)
                assert all(after >= before for after, before in zip(more, case.cost(mask, again), strict=True))


def test_a_weight_of_any_choice_that_fits_is_affordable() -> None:
    dropped = 0
    for case in random_cases(60):
        kept = sum(1 << bit for bit in case.affordable().candidates)
        dropped += len(case.candidates) - kept.bit_count()
        needed = 0
        for mask, _ in feasible(case):
            needed |= mask
        assert needed & ~kept == 0
    assert dropped >= 20


def test_affordable_changes_nothing_but_the_candidates() -> None:
    for case in random_cases(10):
        assert replace(case.affordable(), candidates=case.candidates) == case
        assert case.affordable().affordable() == case.affordable()


def test_the_forms_with_recomputation_decided_cost_the_same() -> None:
    recomputed = 0
    for seed, case in enumerate(random_cases(60)):
        draw = random.Random(seed)
        plain = case.without_recomputation()
        assert not plain.layers
        for _ in range(10):
            mask = draw.randrange(1 << len(case.values))
            again = tuple(draw.sample(case.every_layer, draw.randint(0, len(case.layers))))
            recomputed += bool(case.taking_part(mask, again))
            assert plain.cost(mask) == case.cost(mask)
            assert case.recomputing(again).cost(mask) == case.cost(mask, again)
    assert recomputed >= 100


def test_recomputing_layers_of_equal_and_of_no_size_counts_the_largest_once() -> None:
    sizes = (9, 9, 0, 4)
    layers = tuple(Layer(0b1 << index, (1, 0), (0, size)) for index, size in enumerate(sizes))
    case = Case((1.0,) * 4, (0, 1, 2, 3), ((0, 0),) * 4, (), (9, 99), layers=layers)
    for mask in range(16):
        largest = max((size for index, size in enumerate(sizes) if mask >> index & 1), default=0)
        assert case.recomputing(case.every_layer).cost(mask) == (mask.bit_count(), largest)


def test_bits_are_the_positions_of_the_ones() -> None:
    assert list(bits(0)) == []
    assert list(bits(1 << 700 | 0b1010)) == [1, 3, 700]
