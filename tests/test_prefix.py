"""Which rows' hidden states are kept, what that saves, and that the planner counts it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from edgegt.case import bits
from edgegt.cost import BatchShape, Block, CostTable, Path, Totals, Weight, Work
from edgegt.errors import BudgetError
from edgegt.integers import case_of
from edgegt.memory import Surroundings
from edgegt.planner import Problem, plan, smallest
from edgegt.prefix import Caching, Rows
from edgegt.rates import Rates

LAYERS, WIDTH = 3, 16


def table() -> CostTable:
    """Two linears per layer and a head; what is trained pays the way down to it."""
    weights = [Weight(f"w{k}", "linear", k // 2, (200, 100), k, Work(token=40_000)) for k in range(2 * LAYERS)]
    weights.append(Weight("head", "head", LAYERS, (300, WIDTH), 9, Work(kept=9_600)))
    below = [(1 << 2 * layer + 2) - 1 for layer in range(LAYERS)]
    paths = [Path(mask >> 2, Work(token=80_000), Work(token=900), layer) for layer, mask in enumerate(below) if layer]
    paths.append(Path(below[-1], Work(kept=9_600), Work()))
    layers = tuple(Block(Work(token=80_000, pair=30), Work(token=64), mask) for mask in below)
    forward = Work(token=80_000 * LAYERS, pair=30 * LAYERS, kept=9_600)
    return CostTable(LAYERS, tuple(weights), tuple(paths), layers, forward, Work(kept=9_600), 10**6, 10**6, 0)


def rows(epochs: int = 3, count: int = 10, limit: int = 1 << 40, wanted: bool = False, batch: int = 4) -> Rows:
    """Rows of different lengths in batches of their own order per epoch; the last row has the tokens of the first."""
    draw = random.Random(epochs)
    inputs = [tuple(draw.randrange(90) for _ in range(draw.randint(3, 9))) for _ in range(count - 1)]
    inputs.append(inputs[0])
    batches, shapes = [], []
    for epoch in range(epochs):
        order = list(range(count))
        draw.shuffle(order)
        for start in range(0, count, batch):
            part = tuple(order[start : start + batch])
            batches.append((float(epoch), part))
            shapes.append(BatchShape(len(part), max(len(inputs[row]) for row in part), 2))
    return Rows(inputs, batches, shapes, WIDTH, batch, limit, 1e9, wanted)


def problem(of: Rows, rho: float, start: int = 0, kept: tuple[int, int] | None = None, seed: int = 0) -> Problem:
    draw, shapes = random.Random(seed), tuple(of.shapes[start:])
    values = {weight.name: draw.uniform(1, 9) for weight in table().weights}
    full = table().full_work().total(shapes)
    return Problem(
        table(), values, shapes, int(rho * full), 1 << 40, Surroundings(0), 300, 4,
        caching=of.caching(start, None, kept),
    )  # fmt: skip


def test_rows_that_come_again_are_kept_once_and_sorted_by_length() -> None:
    found = rows()
    layout = found.layout(0)
    order = [row for file in layout.files for batch in file for row in batch]
    assert sorted(order) == list(range(9))  # the tenth has the tokens of the first
    assert [found.lengths[row] for row in order] == sorted(found.lengths[row] for row in order)
    assert rows(epochs=1).layout(0).rows == {0}  # visited twice in one epoch, under two numbers
    assert rows(epochs=1, wanted=True).layout(0).rows == set(range(9))


@pytest.mark.parametrize("limit", [0, 4000, 6000, 7000, 9000])
def test_the_limit_holds_and_the_rows_that_fit_are_kept(limit: int) -> None:
    found = rows(limit=limit)
    layout = found.layout(0)
    assert layout.nbytes <= limit
    assert 0 < len(layout.rows) < 9 or limit in (0, 4000, 9000)
    assert bool(layout.rows) == (limit > 5000)


@pytest.mark.parametrize("limit", [6000, 1 << 40])
def test_a_footing_counts_what_is_skipped_read_and_made(limit: int) -> None:
    found = rows(limit=limit)
    layout, footing = found.layout(2), found.footing(2)
    skipped = Totals.of(
        BatchShape(hits, shape.tokens, shape.kept)
        for step, shape in enumerate(found.shapes)
        if step >= 2 and (hits := shape.rows - found.missing(layout, step))
    )
    assert footing.skipped == skipped
    assert footing.rows == len(layout.rows)
    per_token = 2 * WIDTH + 4
    visits = [found.same[row] for _, part in found.batches[2:] for row in part]
    assert footing.read_bytes == sum(found.lengths[row] * per_token for row in visits if row in layout.rows)
    assert footing.fill.row == len(layout.rows)
    assert found.footing(4, None, 2).fill == Totals.of(())


@pytest.mark.parametrize("rho", [0.2, 0.27, 0.33, 0.4, 0.5, 0.8])
@pytest.mark.parametrize("seed", range(2))
def test_the_plan_is_the_best_over_all_boundaries(rho: float, seed: int) -> None:
    found, best = problem(rows(5), rho, seed=seed), 0.0
    for boundary in found.boundaries:
        here = found.at(boundary)
        for way in here.ways():
            case = case_of(here, way)
            allowed = sum(1 << bit for bit in case.candidates)
            fitting = [mask for mask in range(1, 1 << len(case.values)) if mask & allowed == mask and case.fits(mask)]
            best = max(best, *(way.worth * case.value(mask) for mask in fitting), 0.0)
    if not best:
        with pytest.raises(BudgetError):
            plan(found)
        return
    chosen = plan(found)
    assert chosen.value == pytest.approx(best, rel=2e-6)
    mask = found.table.mask(chosen.selected)
    assert min(found.table.weights[bit].block for bit in bits(mask)) >= chosen.boundary
    footing = found.at(chosen.boundary).footing
    without = found.table.train_work(mask, chosen.recompute).over(found.totals)
    below = found.table.below(chosen.boundary)
    saved = below.over(footing.skipped) - below.over(footing.fill) if footing else 0
    assert chosen.flops == without - saved <= found.flops


def test_kept_states_reach_below_the_forward_pass() -> None:
    with_cache = smallest(problem(rows(5), 0.5))
    without = smallest(replace(problem(rows(5), 0.5), caching=None))
    assert with_cache.rho_flops < 0.7 * without.rho_flops
    assert with_cache.memory_bytes == without.memory_bytes
    tight = problem(rows(5), 0.5)
    tight = replace(tight, flops=(with_cache.rho_flops + without.rho_flops) // 2)
    assert plan(tight).boundary > 0
    with pytest.raises(BudgetError):
        plan(replace(tight, caching=None))


def test_a_boundary_that_is_there_is_kept_because_it_is_not_made_again() -> None:
    of = rows(4)
    fresh, again = problem(of, 0.32, 6), problem(of, 0.32, 6, (2, 0))
    facts = plan(again).cached
    terms = {one["boundary"]: one for one in facts["boundaries"]}
    assert facts["kept"] == 2
    assert terms[2]["fill_flops"] == 0 < terms[1]["fill_flops"] < terms[3]["fill_flops"]
    assert plan(again).boundary == 2
    assert plan(again).cached["fill_flops"] == 0 < fresh.at(2).fill_flops
    much = replace(again, values={**again.values, "w2": 0.0, "w3": 0.0, "w4": 0.0, "w5": 0.0, "w0": 99.0, "w1": 99.0})
    assert plan(replace(much, flops=much.full_flops)).boundary == 0


def test_rows_that_come_once_are_kept_only_where_that_is_asked_for() -> None:
    assert rows(1, count=4).footing(0).rows == 1  # the row that is there twice
    assert rows(1, count=4).caching(1) is None
    found = problem(rows(1, wanted=True), 0.6)
    assert found.caching is not None
    assert found.caching.fresh.rows == 9
    assert plan(found).boundary > 0
    least = replace(found, caching=replace(found.caching, wanted=False), flops=found.full_flops)
    assert 0 in least.boundaries and plan(least).value == plan(replace(least, caching=None)).value


RATES = Rates(
    int8=2e8, int8_back=2e8, dw=2e8, attention=1e8, float32=1e8, forward_bytes=1e8, backward_bytes=1e8, logits=1e6,
    optimizer=1e7, dispatch_s=1e-4,
)  # fmt: skip


@pytest.mark.parametrize("bytes_per_s", [1e9, 1e3])
def test_time_counts_reading_and_what_does_not_run(bytes_per_s: float) -> None:
    found = replace(problem(rows(6), 0.9), rates=RATES, seconds=1e9)
    assert found.caching is not None
    found = replace(found, caching=replace(found.caching, bytes_per_s=bytes_per_s))
    fast, slow = smallest(found).seconds, smallest(replace(found, caching=None)).seconds
    assert fast < slow if bytes_per_s == 1e9 else fast == slow
    chosen = plan(replace(found, seconds=1.05 * fast))
    assert chosen.seconds is not None
    assert chosen.seconds <= 1.05 * fast
    assert bool(chosen.boundary) == (bytes_per_s == 1e9)
    there = found.at(2)
    way, footing = there.ways()[0], there.footing
    assert footing is not None
    moved = (footing.read_bytes + footing.nbytes) / bytes_per_s
    dispatch = RATES.dispatch_s * 2 * there.micro_batches(way)
    made = RATES.skipped_s(there.table, 2, footing.fill)
    assert there.saved_s(way) == pytest.approx(
        RATES.skipped_s(there.table, 2, footing.skipped) + dispatch - made - moved
    )


def test_what_is_recorded_can_be_read_again() -> None:
    caching = problem(rows(3), 0.5, 3, (1, 0)).caching
    assert caching is not None
    assert Caching.from_json(caching.to_json()) == caching
