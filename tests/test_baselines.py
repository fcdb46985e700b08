"""The baselines: each keeps to the budgets and to what it stands for, and the port of the published selection."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

import pytest

from edgegt import baselines
from edgegt.baselines import (
    cut_down,
    from_the_loss,
    last_layers,
    published,
    published_selection,
    random_layers,
    random_order,
    vectors_only,
)
from edgegt.case import Case, bits
from edgegt.integers import case_of
from edgegt.solver import Choice, drop, joint
from test_case import random_cases
from test_planner import llama_table, problem_of, tightened

Strategy = Callable[[Case, int], Choice]
STRATEGIES: dict[str, Strategy] = {
    found.__name__: found for found in (last_layers, published, random_layers, random_order, vectors_only)
}


def llama_case(seed: int, rho: float = 0.45, share: float = 0.4, layers: int = 6) -> Case:
    """A Llama whose layers are all recomputed, as a strategy that knows no recomputation sees it."""
    problem = tightened(problem_of(llama_table(layers), random.Random(seed), 1), rho, share)
    case = case_of(problem, next(way for way in problem.ways() if way.recompute))
    return case.recomputing(case.every_layer).affordable()


def chain(seed: int, most: int = 9) -> tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...], int]:
    """dw, dy, values and a budget, from the loss downward."""
    draw = random.Random(seed)
    count = draw.randint(3, most)
    dw, dy = (tuple(draw.randint(0, 12) for _ in range(count)) for _ in range(2))
    values = tuple(draw.lognormvariate(0, 1) for _ in range(count))
    return dw, dy, values, int(draw.uniform(0.2, 0.8) * (sum(dw) + sum(dy)))


def without_grid(monkeypatch: pytest.MonkeyPatch, dw: tuple[int, ...], dy: tuple[int, ...]) -> None:
    """A grid of one step per FLOP, so that no cost is rounded."""
    monkeypatch.setattr(baselines, "GRID_STEPS", sum(dw) + sum(dy))
    published_selection.cache_clear()


def recurrence(dw: tuple[int, ...], dy: tuple[int, ...], values: tuple[float, ...], budget: int) -> tuple[int, ...]:
    """The published recurrence as a recursion from the other end: what the top k tensors are worth in t steps."""

    @cache
    def state(k: int, t: int) -> tuple[float, bool, tuple[int, ...]]:
        """Value; whether tensor k was taken; which were."""
        if k == 0:
            return 0.0, True, ()
        value, _, selected = state(k - 1, t)
        taken = False
        for above in range(k):
            left = t - dw[k - 1] - sum(dy[above:k])
            if left >= 0 and state(above, left)[1] and state(above, left)[0] + values[k - 1] > value:
                value, taken = state(above, left)[0] + values[k - 1], True
                selected = (*state(above, left)[2], k - 1)
        return value, taken, selected

    reached = [k for k in range(len(dw) + 1) if sum(dy[:k]) <= budget]
    return max((state(k, t) for k in reached for t in range(budget + 1)), key=lambda found: found[0])[2]


def chain_cost(dw: tuple[int, ...], dy: tuple[int, ...], selected: tuple[int, ...]) -> int:
    return sum(dw[position] for position in selected) + sum(dy[: max(selected, default=-1) + 1])


def optimum(dw: tuple[int, ...], dy: tuple[int, ...], values: tuple[float, ...], budget: int) -> float:
    choices = (tuple(bits(mask)) for mask in range(1 << len(dw)))
    return max(sum(values[k] for k in chosen) for chosen in choices if chain_cost(dw, dy, chosen) <= budget)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """Selections are remembered by their costs, which does not hold across grids."""
    yield
    published_selection.cache_clear()


@pytest.mark.parametrize("seed", range(60))
def test_the_published_selection_is_its_recurrence(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dw, dy, values, budget = chain(seed)
    without_grid(monkeypatch, dw, dy)
    found = published_selection(dw, dy, values, budget)
    assert sum(values[k] for k in found) == pytest.approx(sum(values[k] for k in recurrence(dw, dy, values, budget)))
    assert chain_cost(dw, dy, found) <= budget
    assert list(found) == sorted(set(found))


def test_the_published_selection_is_often_but_not_always_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    below = 0
    for seed in range(200):
        dw, dy, values, budget = chain(seed)
        without_grid(monkeypatch, dw, dy)
        worth = sum(values[k] for k in published_selection(dw, dy, values, budget))
        best = optimum(dw, dy, values, budget)
        assert worth <= best * (1 + 1e-9)
        below += worth < best * (1 - 1e-9)
    assert 10 <= below <= 100


def test_a_state_that_does_not_improve_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step for tensor 0 or for the way past tensor 1: the first is worth more, so the second is forgotten."""
    dw, dy, values = (1, 0, 0), (0, 1, 0), (2.0, 1.0, 3.0)
    without_grid(monkeypatch, dw, dy)
    assert published_selection(dw, dy, values, 1) == (2,)
    assert optimum(dw, dy, values, 1) == 4.0


def test_the_grid_rounds_costs_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifteen tensors that cost less than a step each are taken together, at any budget: what follows must cut down."""
    monkeypatch.setattr(baselines, "GRID_STEPS", 10)
    published_selection.cache_clear()
    assert len(published_selection((7,) * 15, (0,) * 15, (1.0,) * 15, 7)) == 15


def test_a_budget_of_nothing_selects_nothing_that_costs() -> None:
    assert published_selection((5, 5), (1, 1), (1.0, 2.0), 0) == ()
    assert published_selection((5, 5), (1, 1), (1.0, 2.0), -(10**9)) == ()
    assert published_selection((), (), (), 10) == ()


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_baseline_keeps_to_the_case_and_its_bound(name: str) -> None:
    cases = [case.recomputing(case.every_layer).affordable() for case in random_cases(40)]
    for seed, case in enumerate([*(case for case in cases if case.candidates), llama_case(0), llama_case(1, 0.6)]):
        choice = STRATEGIES[name](case, seed)
        assert case.fits(choice.mask)
        assert set(bits(choice.mask)) <= set(case.candidates)
        assert choice.mask or name in ("vectors_only", "random_layers")
        assert choice.value == pytest.approx(case.value(choice.mask))
        assert choice.value <= choice.bound * (1 + 1e-6)
        assert choice.value <= joint(case).bound * (1 + 1e-6)
        assert choice.recompute == ()


def test_what_the_published_selection_takes_too_much_is_cut_down_and_said() -> None:
    roomy, tight = llama_case(2, share=5.0), llama_case(2, share=0.05)
    whole, cut = published(roomy), published(tight)
    assert whole.notes == ()
    assert cut.notes == ("the published selection was cut down to the budgets",)
    assert cut.value < whole.value
    nothing = replace(roomy, left=tuple(2 * cost for cost in roomy.alone()[roomy.candidates[0]])).affordable()
    assert published(nothing).mask


def test_the_way_to_the_first_tensor_is_paid_from_the_budget() -> None:
    """50 to the first and 10 to the next: 90 allow one of two tensors that cost 20, and nothing has to be cut."""
    case = Case((3.0, 2.0), (0, 1), ((20,), (20,)), ((0b11, (50,)), (0b01, (10,))), (90,))
    found = published(case)
    assert (found.mask, found.notes) == (0b01, ())


def test_cutting_down_is_dropping() -> None:
    for seed in range(4):
        case = llama_case(seed, layers=3)
        mask = sum(1 << bit for bit in case.candidates)
        assert not case.fits(mask)
        assert cut_down(case, mask) == drop(case, mask)


def test_the_published_selection_sees_flops_only() -> None:
    """Values, FLOPs and the order are all it reads: with memory to spare its choice is that of the recurrence."""
    case = llama_case(3, share=5.0)
    other = replace(case, left=(case.left[0], *(2 * left for left in case.left[1:])))
    assert published(case).mask == published(other).mask


def test_last_layers_is_a_run_of_weights_from_the_loss() -> None:
    for seed in range(6):
        case = llama_case(seed)
        order, chosen = from_the_loss(case), set(bits(last_layers(case).mask))
        assert chosen == set(order[: len(chosen)])
        assert 0 < len(chosen) < len(order)
        assert not case.fits(sum(1 << bit for bit in order[: len(chosen) + 1]))


def test_last_layers_stop_where_the_next_does_not_fit() -> None:
    case = Case((1.0,) * 3, (0, 1, 2), ((1,), (10,), (1,)), (), (10,))
    assert last_layers(case).mask == 0b100


def test_the_order_from_the_loss_goes_down_the_layers() -> None:
    case = llama_case(0, rho=1.0, share=5.0)
    blocks = [case.blocks[bit] for bit in from_the_loss(case)]
    assert blocks == sorted(blocks, reverse=True)
    assert set(from_the_loss(case)) == set(case.candidates)


@pytest.mark.parametrize("strategy", [random_order, random_layers], ids=lambda found: found.__name__)
def test_a_seed_decides_what_is_random(strategy: Strategy) -> None:
    case = llama_case(4, rho=0.8, share=0.6)
    masks = [strategy(case, seed).mask for seed in range(6)]
    assert masks == [strategy(case, seed).mask for seed in range(6)]
    assert len(set(masks)) >= 3


def test_a_random_order_leaves_nothing_that_would_fit() -> None:
    case = llama_case(5)
    mask = random_order(case, 0).mask
    assert not any(case.fits(mask | 1 << bit) for bit in set(case.candidates) - set(bits(mask)))


def test_vectors_are_norms_and_biases_the_most_valuable_first() -> None:
    case = llama_case(6, rho=0.4)
    chosen = set(bits(vectors_only(case).mask))
    assert chosen <= case.vectors
    best = max(case.vectors & set(case.candidates), key=lambda bit: case.values[bit])
    assert best in chosen
    assert vectors_only(replace(case, vectors=frozenset())).mask == 0


def test_random_layers_are_whole() -> None:
    below = 0
    for seed in range(8):
        case = llama_case(seed, rho=0.6, share=0.6)
        chosen = set(bits(random_layers(case, seed).mask))
        above = max(case.blocks)
        for layer in set(case.blocks) - {above}:
            members = {bit for bit in case.candidates if case.blocks[bit] == layer}
            assert members <= chosen or not members & chosen
            below += bool(members & chosen)
        assert any(case.blocks[bit] == above for bit in chosen)
    assert below >= 8


def test_random_layers_without_a_head_are_whole_too() -> None:
    case = llama_case(1, rho=0.6, share=0.6)
    above = max(case.blocks)
    headless = replace(case, candidates=tuple(bit for bit in case.candidates if case.blocks[bit] != above))
    for seed in range(4):
        chosen = set(bits(random_layers(headless, seed).mask))
        for layer in {headless.blocks[bit] for bit in chosen}:
            assert {bit for bit in headless.candidates if headless.blocks[bit] == layer} <= chosen
