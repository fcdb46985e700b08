"""The solver's corners on hand-made cases: out of time, over budget by rounding, noisy, and many nested paths."""

from __future__ import annotations

import os
import random

import pytest

from edgegt import strategies
from edgegt.strategies import STRATEGIES, Case, _drop, bits, joint, quiet_stdout, relaxed_bound


def chain(count: int, seed: int = 0) -> Case:
    """Weights along a chain: choosing one pays for the path from it to the loss; both budgets bind."""
    draw = random.Random(seed)
    every = tuple(range(count))
    values = tuple(draw.lognormvariate(0, 1) for _ in every)
    costs = [tuple(draw.randint(1, 10**9) for _ in every) for _ in range(2)]
    paths = tuple(((1 << bit + 1) - 1, draw.randint(1, 10**9), draw.randint(1, 10**8)) for bit in every)
    return Case(values, every, costs[0], costs[1], paths, sum(costs[0]) // 2, sum(costs[1]) // 4).affordable()


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_keeps_to_the_case_and_its_bound(name: str) -> None:
    for seed in range(10):
        case = chain(30, seed)
        choice = STRATEGIES[name](case, seed)
        assert choice.mask
        assert case.fits(choice.mask)
        assert set(bits(choice.mask)) <= set(case.candidates)
        assert choice.value == pytest.approx(case.value(choice.mask))
        assert choice.value <= choice.bound <= relaxed_bound(case) * (1 + 1e-6)


def test_alone_is_the_cost_of_one() -> None:
    case = chain(20)
    assert case.alone() == {bit: case.cost(1 << bit) for bit in case.candidates}
    assert all(case.fits(1 << bit) for bit in case.candidates)


def test_a_solver_that_runs_out_of_time_still_gives_a_choice_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    case = chain(120)
    best = joint(case)
    assert best.notes == ()
    monkeypatch.setattr(strategies, "TIME_LIMIT_S", 0.0)
    hurried = joint(case)
    assert case.fits(hurried.mask)
    assert 0.5 * best.value < hurried.value <= best.bound * (1 + 1e-9)
    assert hurried.bound >= best.value
    assert "below its bound after 0 s" in hurried.notes[0]


def test_dropping_stops_as_soon_as_the_budgets_hold() -> None:
    case = Case((5.0, 1.0, 3.0), (0, 1, 2), (4, 4, 4), (2, 2, 2), ((0b110, 1, 1),), flops_left=9, bytes_left=99)
    assert not case.fits(0b111)
    assert _drop(case, 0b111) == 0b101


def test_what_c_code_prints_is_discarded_and_the_rest_is_not(capfd: pytest.CaptureFixture[str]) -> None:
    with quiet_stdout():
        os.write(1, b"from C")
    os.write(1, b"after")
    with pytest.raises(ZeroDivisionError), quiet_stdout():
        raise ZeroDivisionError
    os.write(1, b" an error")
    assert capfd.readouterr() == ("after an error", "")


def test_bits_are_the_positions_of_the_ones() -> None:
    assert list(bits(0)) == []
    assert list(bits(1 << 700 | 0b1010)) == [1, 3, 700]
