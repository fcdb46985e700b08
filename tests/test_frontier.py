"""The frontier: more budget never shows less, infeasible is shown as such, and its picture is a picture."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
from matplotlib.image import imread

from edgegt.cost import BatchShape
from edgegt.errors import EdgegtError, InputError
from edgegt.frontier import Frontier, Point, axes, frontier, frontier_of
from edgegt.memory import Surroundings
from edgegt.planner import Plan, Problem, plan
from edgegt.report.charts import canvas, save_png
from edgegt.report.frontier import LABEL_GAP, _apart, check_png, frontier_svg, write_png
from edgegt.units import MIB
from fake_run import fake_importance, fake_table

SHAPES = (BatchShape(8, 96, 24), BatchShape(8, 64, 16))


@pytest.fixture(scope="module")
def problem() -> Problem:
    table = fake_table(3)
    full = table.full_work().total(SHAPES)
    return Problem(
        table, fake_importance(table), SHAPES, full * 45 // 100, 140 * MIB, Surroundings(60 * MIB), 4096, 8,
        head_rows=(None, 700),
    )  # fmt: skip


@pytest.fixture(scope="module")
def chosen(problem: Problem) -> Plan:
    return plan(problem)


@pytest.fixture(scope="module")
def found(problem: Problem, chosen: Plan) -> Frontier:
    said: list[str] = []
    result = frontier_of(problem, problem.full_flops // 20, chosen, (5, 4), said.append)
    assert said[-1].startswith("frontier: 20 of 20 points") and len(said) == 4
    return result


def shares(found: Frontier) -> list[list[float]]:
    return [[-1.0 if point is None else point.share for point in row] for row in found.points]


def test_more_of_a_budget_never_shows_less(found: Frontier) -> None:
    grid = numpy.array(shares(found))
    assert (numpy.diff(grid, axis=0) >= 0).all() and (numpy.diff(grid, axis=1) >= 0).all()
    assert grid.max() <= 1 + 1e-9 and len({*grid.ravel()}) > 5
    assert 0 < found.solved <= grid.size


def test_every_point_keeps_within_its_budgets_and_the_largest_trains_everything(found: Frontier) -> None:
    for size, row in zip(found.memories, found.points, strict=True):
        for rho, point in zip(found.rhos, row, strict=True):
            if point is not None:
                assert point.ratio <= rho + 1e-9 and point.peak_bytes <= size
    largest = found.points[-1][-1]
    assert largest is not None and largest.share == pytest.approx(1, abs=2e-3)


def test_the_runs_own_budgets_are_among_the_points_and_its_plan_is_not_above_them(
    problem: Problem, chosen: Plan, found: Frontier
) -> None:
    probe_flops = problem.full_flops // 20
    assert found.memory_bytes == problem.memory_bytes and found.memory_bytes in found.memories
    assert found.rho == pytest.approx((problem.flops + probe_flops) / problem.full_flops)
    own = found.points[found.memories.index(found.memory_bytes)][found.rhos.index(found.rho)]
    assert own is not None and found.chosen is not None
    assert own.share >= found.chosen.share > 0
    assert found.chosen.ratio == pytest.approx((chosen.flops + probe_flops) / problem.full_flops)


def test_a_point_is_what_the_planner_says_of_its_budgets(problem: Problem) -> None:
    found = frontier(problem, (0.42, 0.6), (110 * MIB, 160 * MIB))
    lean = replace(problem, formats=problem.formats[-1:])
    for size, row in zip(found.memories, found.points, strict=True):
        for rho, point in zip(found.rhos, row, strict=True):
            alone = plan(replace(lean, flops=int(rho * problem.full_flops), memory_bytes=size))
            everything = sum(problem.values.values())
            assert point is not None
            assert point.share == pytest.approx(alone.value / everything, rel=5e-3)


def test_what_cannot_be_trained_is_no_point(problem: Problem) -> None:
    found = frontier(problem, (0.2, 0.5), (60 * MIB, 140 * MIB))
    assert [[point is None for point in row] for row in found.points] == [[True, True], [True, False]]
    assert found.chosen is None
    drawn = frontier_svg(found)
    assert "nothing can be trained" in drawn and "this plan" not in drawn


def test_plans_that_are_known_are_not_made_again(problem: Problem) -> None:
    generous = (1 << 40, 1 << 41, 1 << 42)
    assert frontier(problem, (1.0,), generous).solved == 1
    assert frontier(problem, (0.01, 0.02, 0.03), generous).solved == 1


def test_the_axes_go_from_the_least_to_everything(problem: Problem) -> None:
    rhos, memories = axes(problem, 0, (6, 5))
    assert list(rhos) == sorted(set(rhos)) and list(memories) == sorted(set(memories))
    assert len(rhos) == 6 and len(memories) == 5
    assert problem.memory_bytes in memories
    outside = replace(problem, memory_bytes=1 << 40, flops=2 * problem.full_flops)
    assert outside.memory_bytes not in axes(outside, 0, (6, 5))[1]


def test_it_survives_json(found: Frontier) -> None:
    assert Frontier.from_json(json.loads(json.dumps(found.to_json()))) == found
    with pytest.raises(KeyError):
        Frontier.from_json({})


def test_the_picture_is_a_png_of_several_colours(found: Frontier, tmp_path: Path) -> None:
    path = write_png(found, tmp_path / "frontier.png", "a <model> & $a_device$")
    pixels = imread(path)
    assert pixels.shape[0] > 600 and pixels.shape[1] == 2000
    colours = {tuple(pixel) for pixel in (pixels[::3, ::3, :3].reshape(-1, 3) * 255).round().astype(int)}
    for wanted in ((0x13, 0x79, 0x5B), (0xC2, 0x41, 0x0C), (0x1B, 0x1F, 0x23), (0xFF, 0xFF, 0xFF)):
        assert any(sum(abs(a - b) for a, b in zip(colour, wanted, strict=True)) < 12 for colour in colours), wanted
    assert [item.name for item in tmp_path.iterdir()] == ["frontier.png"]


def test_a_picture_that_cannot_be_written_is_refused_before_and_said_after(found: Frontier, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is no PNG file: give a name that ends in \.png"):
        check_png(tmp_path / "frontier.svg")
    with pytest.raises(InputError, match=r"the folder '.*nowhere' does not exist: make it first"):
        write_png(found, tmp_path / "nowhere" / "frontier.png", "")
    (tmp_path / "frontier.png").mkdir()
    with pytest.raises(InputError, match=r"frontier\.png' is a folder: give the name of a file in it"):
        write_png(found, tmp_path / "frontier.png", "")
    with pytest.raises(EdgegtError, match=r"cannot write '.*frontier\.png': .*; free space or make"):
        save_png(canvas(40, 30, 1, 1, 1, 1)[0], tmp_path / "frontier.png")
    assert [item.name for item in tmp_path.iterdir()] == ["frontier.png"]


def test_a_frontier_of_one_point_is_drawn(tmp_path: Path) -> None:
    one = Frontier((0.5,), (100,), ((Point(0.2, 0.4, 90, 3),),), 0.5, 100, Point(0.2, 0.4, 90, 3), 1)
    assert "this plan: 20 %" in frontier_svg(one)
    write_png(one, tmp_path / "one.png", "one")


def test_labels_of_lines_that_meet_are_moved_apart() -> None:
    placed = _apart([0.1, 0.9, 0.9, 0.5, 0.9], LABEL_GAP)
    assert placed[4] == 0.9 and placed[0] == 0.1 and placed[3] == 0.5
    ordered = sorted(placed)
    assert all(high - low >= LABEL_GAP - 1e-9 for low, high in itertools.pairwise(ordered))
    assert _apart([], 0.1) == []
