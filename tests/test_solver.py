"""The exact planner: its bound, its cutoff, what it does when it stops early or rounds, and a quiet stdout."""

from __future__ import annotations

import os
import random
from dataclasses import replace

import pytest

from edgegt import solver
from edgegt.case import Case, Kept, Layer, bits
from edgegt.integers import case_of
from edgegt.solver import RELATIVE_GAP, Choice, drop, fill, joint, quiet_stdout, relaxed_bound, share
from test_case import feasible, random_cases
from test_planner import llama_table, problem_of, tightened

SLIGHTLY = 1e-6  # what the solver's tolerances leave open


def best_value(case: Case) -> float:
    return max((case.value(mask) for mask, _ in feasible(case)), default=0.0)


def large_case(layers: int, seed: int, rho: float = 0.5, share_of_memory: float = 0.05) -> Case:
    """A Llama with layers that may be recomputed, both budgets tight."""
    problem = tightened(problem_of(llama_table(layers), random.Random(seed), 4), rho, share_of_memory)
    way = next(way for way in problem.ways() if way.recompute and way.micro_batch == 1)
    return case_of(problem, way).affordable()


def hard_case(count: int = 42, budgets: int = 3) -> Case:
    """A knapsack in several dimensions whose values follow the costs: not solved where its search begins."""
    draw = random.Random(0)
    costs = tuple(tuple(draw.randint(100, 1000) for _ in range(budgets)) for _ in range(count))
    values = tuple(sum(cost) / budgets + draw.uniform(0, 50) for cost in costs)
    left = tuple(sum(cost[row] for cost in costs) // 4 for row in range(budgets))
    return Case(values, tuple(range(count)), costs, (), left)


def assert_valid(case: Case, choice: Choice) -> None:
    assert choice.mask
    assert set(bits(choice.mask)) <= set(case.candidates)
    assert case.fits(choice.mask, choice.recompute)
    assert choice.recompute == case.taking_part(choice.mask, choice.recompute)
    assert choice.value == pytest.approx(case.value(choice.mask))
    assert choice.value <= choice.bound


def test_the_choice_is_the_best_of_all_and_no_bound_lies_below_it() -> None:
    recomputing = 0
    for case in (case.affordable() for case in random_cases(60)):
        best, found = best_value(case), joint(case)
        assert found.value == pytest.approx(best, rel=SLIGHTLY)
        assert found.bound >= best * (1 - SLIGHTLY)
        assert relaxed_bound(case) >= best * (1 - SLIGHTLY)
        recomputing += bool(found.recompute)
        if case.candidates:
            assert_valid(case, found)
    assert recomputing >= 5


@pytest.mark.parametrize(("layers", "seed"), [(6, 0), (12, 1)])
def test_a_large_choice_comes_within_the_gap_of_its_bound(layers: int, seed: int) -> None:
    case = large_case(layers, seed)
    found = joint(case)
    assert_valid(case, found)
    assert found.notes == ()
    assert found.value >= (1 - 2 * RELATIVE_GAP) * found.bound
    assert found.value <= relaxed_bound(case) * (1 + SLIGHTLY)
    assert fill(case, found.mask, case.candidates, found.recompute) == found.mask
    assert joint(case) == found


def test_nothing_to_choose_from_is_worth_nothing() -> None:
    case = Case((1.0,), (0,), ((5, 5),), (), (4, 9)).affordable()
    assert joint(case) == joint(case, at_least=3.0) == Choice(0, 0.0, 0.0)
    assert relaxed_bound(case) == 0.0


def test_a_cutoff_gives_nothing_or_something_at_least_that_good() -> None:
    """The same as without the cutoff: found if and only if the best reaches it."""
    draw, found_some, found_none = random.Random(0), 0, 0
    for case in random_cases(100):
        whole = joint(case.affordable())
        if not whole.mask:
            continue
        at_least = whole.value * draw.choice((0.3, 0.9, 0.999, 1.0, 1.001, 1.1, 2.0))
        found = joint(case.affordable(), at_least=at_least)
        if at_least <= whole.value:
            assert_valid(case, found)
            assert at_least * (1 - SLIGHTLY) <= found.value <= whole.value * (1 + SLIGHTLY)
            found_some += 1
        else:
            assert (found.mask, found.value, found.recompute) == (0, 0.0, ())
            assert found.bound >= at_least > whole.value
            found_none += 1
    assert min(found_some, found_none) >= 25


def test_a_cutoff_of_a_large_case_is_met_or_out_of_reach() -> None:
    case = large_case(6, 2)
    whole = joint(case)
    enough = joint(case, at_least=0.99 * whole.value)
    assert_valid(case, enough)
    assert enough.value >= 0.99 * whole.value * (1 - SLIGHTLY)
    assert joint(case, at_least=1.01 * whole.bound).mask == 0


@pytest.mark.parametrize("limit", [0, 1])
def test_a_solver_that_stops_early_still_gives_a_choice_and_says_so(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = hard_case()
    whole = joint(case)
    monkeypatch.setattr(solver, "NODE_LIMIT", limit)
    hurried = joint(case)
    assert_valid(case, hurried)
    assert 0.5 * whole.value < hurried.value <= whole.bound
    assert hurried.bound >= whole.value
    gap = (hurried.bound - hurried.value) / hurried.bound
    assert gap > 2 * RELATIVE_GAP
    assert hurried.notes == (f"the planner stopped {gap:.1%} below its bound after {limit} nodes",)
    assert joint(case) == hurried


def test_what_rounding_puts_over_a_budget_is_taken_back_and_said() -> None:
    """One unit in 10**15 is below the solver's tolerance, and still too much."""
    half = 10**15 // 2
    case = Case((2.0, 1.0), (0, 1), ((half, 1), (half + 1, 1)), (), (2 * half, 9))
    found = joint(case)
    assert (found.mask, found.value) == (0b01, 2.0)
    assert found.bound == pytest.approx(3.0)
    assert "the solver's rounding exceeded a budget" in found.notes[0]


def test_a_layer_is_recomputed_when_that_pays_and_not_when_its_size_does_not_fit() -> None:
    kept, layer = Kept(0b11, 0, (0, 80)), Layer(0b11, (5, 10), (0, 30))
    case = Case((4.0, 3.0), (0, 1), ((1, 20), (1, 20)), (), (10, 100), (kept,), (layer,))
    assert joint(case) == Choice(0b11, 7.0, pytest.approx(7.0), (0,))  # 40 + 10 + 30 bytes, 7 FLOPs
    bigger = replace(case, layers=(replace(layer, peak=(0, 60)),))
    assert joint(bigger) == Choice(0b01, 4.0, pytest.approx(4.0))  # 20 + 80 bytes as kept
    slower = replace(case, layers=(replace(layer, costs=(9, 10)),))
    assert (joint(slower).mask, joint(slower).recompute) == (0b01, ())


def test_dropping_stops_as_soon_as_the_budgets_hold() -> None:
    case = Case((5.0, 1.0, 3.0), (0, 1, 2), ((4, 2),) * 3, ((0b110, (1, 1)),), (9, 99))
    assert not case.fits(0b111)
    assert drop(case, 0b111) == 0b101
    assert drop(replace(case, left=(0, 0)), 0b111) == 0


def test_filling_goes_by_the_order_and_passes_over_what_does_not_fit() -> None:
    case = Case((1.0,) * 3, (0, 1, 2), ((3,), (5,), (1,)), (), (6,))
    assert fill(case, 0, (0, 1, 2)) == 0b101
    assert fill(case, 0, (1, 0, 2)) == 0b110
    assert fill(case, 0b001, (0, 2)) == 0b101


def test_a_share_is_of_every_budget_even_of_an_empty_one() -> None:
    assert share(Case((), (), (), (), (4, 0)), (1, 2)) == pytest.approx(0.25 + 2.0)


def test_what_c_code_prints_is_discarded_and_the_rest_is_not(capfd: pytest.CaptureFixture[str]) -> None:
    with quiet_stdout():
        os.write(1, b"from C")
    os.write(1, b"after")
    with pytest.raises(ZeroDivisionError), quiet_stdout():
        raise ZeroDivisionError
    os.write(1, b" an error")
    assert capfd.readouterr() == ("after an error", "")


def test_solving_writes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    for seed in range(3):
        joint(large_case(6, seed))
    assert capfd.readouterr() == ("", "")
