"""The joint planner against brute force, and the invariants that no budget, size or strategy may break."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import re

import pytest

from edgegt.case import bits
from edgegt.cost import BatchShape, Block, CostTable, Path, Weight, Work
from edgegt.errors import BudgetError, InputError
from edgegt.integers import case_of
from edgegt.memory import Surroundings
from edgegt.planner import FORMATS, STRATEGIES, Plan, Problem, Way, plan, smallest
from edgegt.rates import Rates
from edgegt.solver import joint
from edgegt.units import parse_bytes

VOCABULARY = 500
FLOOR = 50 * 2**20


def random_table(draw: random.Random, count: int) -> CostTable:
    """A few weights in layers of three under a head, and random paths: nested prefixes, saved inputs, any masks."""
    blocks = -(-(count - 1) // 3)
    weights = [
        Weight(f"w{k}", draw.choice(("linear", "linear", "vector")), k // 3, (draw.randint(1, 900), 400), k, Work())
        for k in range(count - 1)
    ]
    weights = [dataclasses.replace(weight, dw=Work(token=2 * weight.numel)) for weight in weights]
    rows = draw.randint(100, VOCABULARY)
    weights.append(Weight("head", "head", blocks, (rows, 400), count, Work(kept=2 * rows * 400)))
    below = [(1 << min(3 * block + 3, count - 1)) - 1 for block in range(blocks)]
    layers = [Block(Work(token=draw.randint(0, 2 * 10**6)), Work(token=draw.randint(0, 9_000)), mask) for mask in below]
    paths = []
    for mask in [(1 << k) - 1 for k in range(1, count + 1)] + [draw.randrange(1, 1 << count) for _ in range(2 * count)]:
        block = draw.randint(-1, blocks - 1)
        mask = mask & below[block] if block >= 0 else mask
        if mask:
            flops = Work(row=draw.randint(0, 90), token=draw.randint(0, 300_000))
            paths.append(Path(mask, flops, Work(token=draw.randint(0, 40_000)), block))
    head, widest = Work(kept=400_000), Work(token=draw.choice((200, 200, 50_000)))
    forward = Work(token=600_000, pair=40) + head
    return CostTable(
        blocks, tuple(weights), tuple(paths), tuple(layers), forward, head, 10**6, 10**6, 0, widest
    )  # fmt: skip


def llama_table(layers: int, hidden: int = 1024, inner: int = 2816, vocabulary: int = 32000) -> CostTable:
    """Masks as a pre-norm Llama has them: the residual stream depends on every weight below."""
    weights: list[Weight] = []
    paths: list[Path] = []

    def add(name: str, kind: str, block: int, shape: tuple[int, ...], kept_bytes: int) -> int:
        numel = math.prod(shape)
        weights.append(Weight(name, kind, block, shape, len(paths), Work(token=2 * numel * (kind != "vector"))))
        return 1 << len(weights) - 1

    def pay(mask: int, token_flops: int, token_bytes: int, pair_flops: int = 0) -> None:
        flops, saved = Work(token=token_flops, pair=pair_flops), Work(token=token_bytes)
        paths.append(Path(mask, flops, saved, len(blocks)))

    below, blocks = 0, []
    for block in range(layers):
        name = f"layers.{block}."
        norm = add(name + "norm1", "vector", block, (hidden,), 4 * hidden)
        qkv = sum(add(name + letter, "linear", block, (hidden, hidden), hidden) for letter in "qkv")
        out = add(name + "o", "linear", block, (hidden, hidden), hidden)
        norm2 = add(name + "norm2", "vector", block, (hidden,), 4 * hidden)
        wide = sum(add(name + part, "linear", block, (inner, hidden), hidden) for part in ("gate", "up"))
        down = add(name + "down", "linear", block, (hidden, inner), inner)
        for mask, saved in ((norm, 4), (qkv, 1), (out, 1), (norm2, 4), (wide, 1)):
            pay(mask, 0, saved * hidden)
        pay(down, 0, inner)
        pay(below | norm, 6 * hidden**2, 0)
        pay(below | norm | qkv, 2 * hidden**2, 16 * hidden, 8 * hidden)
        middle = below | norm | qkv | out | norm2
        pay(middle, 4 * hidden * inner, 4 * hidden)
        pay(middle | wide, 2 * hidden * inner, 12 * inner)
        below = middle | wide | down
        pay(below, 0, 4 * hidden)
        forward = Work(token=2 * (4 * hidden**2 + 3 * hidden * inner), pair=4 * hidden)
        blocks.append(Block(forward, Work(token=4 * hidden), below))
    below |= add("norm", "vector", layers, (hidden,), 4 * hidden)
    add("head", "head", layers, (vocabulary, hidden), hidden)
    paths.append(Path(below, Work(kept=2 * vocabulary * hidden), Work()))
    head = Work(kept=2 * vocabulary * hidden)
    linear = sum(weight.numel for weight in weights if weight.kind == "linear")
    forward = Work(token=2 * linear, pair=4 * hidden * layers) + head
    parameters = linear + vocabulary * hidden
    return CostTable(
        layers, tuple(weights), tuple(paths), tuple(blocks), forward, head, parameters, parameters, 0, Work(token=9000)
    )  # fmt: skip


def problem_of(table: CostTable, draw: random.Random, batch_size: int, tokens: int = 128) -> Problem:
    """Both budgets as large as everything needs, lognormal importances."""
    shapes = tuple(BatchShape(batch_size, draw.randint(tokens // 2, tokens), tokens // 4) for _ in range(5))
    values = {weight.name: draw.lognormvariate(0, 1) * weight.numel**0.5 for weight in table.weights}
    flops = table.full_work().total(shapes) * 2
    return Problem(table, values, shapes, flops, 2**50, Surroundings(FLOOR), VOCABULARY, batch_size)


def way_of(problem: Problem, found: Plan) -> Way:
    return Way(found.micro_batch, found.formats, found.head_rows, bool(found.recompute))


def spent(problem: Problem, names: tuple[str, ...], way: Way, recompute: tuple[int, ...] = ()) -> tuple[int, int]:
    """FLOPs and peak bytes straight from the table."""
    mask = problem.table.mask(names)
    return problem.spent_flops(way, mask, recompute), sum(problem.memory(way, mask, recompute).values())


def everything(problem: Problem) -> tuple[int, int]:
    names = tuple(weight.name for weight in problem.table.weights)
    return spent(problem, names, Way(problem.batch_size, problem.formats[0], problem.head_rows[0]))


def tightened(problem: Problem, rho: float, share: float) -> Problem:
    """The same problem with rho, and `share` of the way from the least memory to that of training everything."""
    least, most = smallest(problem).memory_bytes, everything(problem)[1]
    flops = int(rho * problem.full_flops)
    return dataclasses.replace(problem, flops=flops, memory_bytes=int(least + share * (most - least)))


def assert_holds(problem: Problem, found: Plan) -> None:
    flops, peak_bytes = spent(problem, found.selected, way_of(problem, found), found.recompute)
    assert found.selected
    assert (found.flops, found.peak_bytes) == (flops, peak_bytes)
    assert sum(found.memory.values()) == peak_bytes
    assert flops <= problem.flops
    assert peak_bytes <= problem.memory_bytes
    assert found.micro_batch * found.accumulation >= problem.batch_size
    assert found.value == pytest.approx(sum(problem.values[name] for name in found.selected))


def brute_force(problem: Problem, way: Way) -> float:
    """The best value over all subsets of the weights with importance above 0 and all depths of recomputation."""
    table = problem.table
    useful = sum(1 << bit for bit, weight in enumerate(table.weights) if problem.values[weight.name] > 0)
    best, mask = 0.0, useful
    while mask:
        value = sum(problem.values[table.weights[bit].name] for bit in bits(mask))
        if value > best:
            active = [index for index in range(table.blocks) if table.layers[index].weights & mask]
            for count in range(len(active) + 1 if way.recompute else 1):
                again = tuple(active[:count])
                if problem.spent_flops(way, mask, again) > problem.flops:
                    break
                seconds = problem.spent_s(way, mask, again) if problem.seconds is not None else 0.0
                late = problem.seconds is not None and seconds is not None and seconds > problem.seconds
                if not late and sum(problem.memory(way, mask, again).values()) <= problem.memory_bytes:
                    best = value
                    break
        mask = (mask - 1) & useful
    return best


def random_problem(seed: int, most: int = 8) -> Problem:
    """Budgets exactly equal to what some random choices cost, so that both bind and rounding shows."""
    draw = random.Random(seed)
    count = draw.randint(4, most)
    batch_size = draw.choice((1, 1, 2, 4))
    problem = problem_of(random_table(draw, count), draw, batch_size)
    names = [weight.name for weight in problem.table.weights]
    values = {name: draw.choice((value, value, value, -value)) for name, value in problem.values.items()}
    values[names[0]] = abs(values[names[0]])
    around = Surroundings(FLOOR, tuple(draw.sample(names[:-1], count // 3)))
    rows = draw.choice(((None,), (None, 60), (60,)))
    problem = dataclasses.replace(problem, values=values, around=around, head_rows=rows)
    way = draw.choice(problem.ways())
    flops = spent(problem, tuple(draw.sample(names, draw.randint(1, count))), way)[0]
    again = tuple(range(draw.randint(0, problem.table.blocks)))
    peak = spent(problem, tuple(draw.sample(names, draw.randint(1, count))), way, again)[1]
    return dataclasses.replace(problem, flops=flops, memory_bytes=peak)


def assert_exact(problem: Problem, way: Way) -> None:
    best, found = brute_force(problem, way), joint(case_of(problem, way).affordable())
    flops, peak_bytes = (
        problem.spent_flops(way, found.mask, found.recompute),
        problem.memory(way, found.mask, found.recompute),
    )
    assert found.value == pytest.approx(best, rel=1e-6)
    if found.mask:
        assert flops <= problem.flops
        assert sum(peak_bytes.values()) <= problem.memory_bytes


@pytest.mark.parametrize("seed", range(200))
def test_the_choice_of_a_way_equals_brute_force(seed: int) -> None:
    problem = random_problem(seed)
    assert_exact(problem, random.Random(seed).choice(problem.ways()))


@pytest.mark.parametrize("seed", range(1000, 1200))
def test_the_choice_among_fourteen_equals_brute_force(seed: int) -> None:
    problem = random_problem(seed, most=14)
    assert_exact(problem, random.Random(seed).choice(problem.ways()))


@pytest.mark.parametrize("seed", range(60))
def test_the_plan_is_the_best_of_all_ways_by_worth(seed: int) -> None:
    problem = random_problem(seed, most=6)
    best = {way: way.worth * brute_force(problem, way) for way in problem.ways()}
    if not max(best.values()):
        with pytest.raises(BudgetError):
            plan(problem)
        return
    found = plan(problem)
    assert_holds(problem, found)
    way = next(way for way in best if best[way] >= (1 - 1e-6) * max(best.values()))
    assert found.value == pytest.approx(best[way] / way.worth, rel=2e-6)
    assert (found.micro_batch, found.formats) == (way.micro_batch, way.formats)


def test_every_budget_and_recomputation_bind_in_the_brute_force_cases() -> None:
    planned = [(problem, plan_of(problem)) for problem in map(random_problem, range(80))]
    feasible = [problem for problem, found in planned if found is not None]
    plans = [found for _, found in planned if found is not None]
    freer_flops = sum(
        plan(dataclasses.replace(problem, flops=10 * problem.flops)).value > 1.01 * found.value
        for problem, found in zip(feasible, plans, strict=True)
    )
    freer_memory = sum(
        plan(dataclasses.replace(problem, memory_bytes=2**50)).value > 1.01 * found.value
        for problem, found in zip(feasible, plans, strict=True)
    )
    assert len(feasible) >= 60
    assert freer_flops >= 20
    assert freer_memory >= 15
    assert sum(bool(found.recompute) for found in plans) >= 8
    assert sum(found.head_rows is not None for found in plans) >= 5
    assert len({found.formats for found in plans}) == len(FORMATS)


def plan_of(problem: Problem) -> Plan | None:
    try:
        return plan(problem)
    except BudgetError:
        return None


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("layers", "rho", "share"), [(4, 0.5, 0.3), (4, 0.65, 0.02), (12, 0.4, 2.0), (12, 0.5, 0.1)])
def test_no_strategy_exceeds_a_budget(strategy: str, layers: int, rho: float, share: float) -> None:
    for seed in range(2):
        draw = random.Random(seed)
        problem = tightened(problem_of(llama_table(layers), draw, draw.choice((1, 4))), rho, share)
        found = plan(problem, strategy, seed)
        assert_holds(problem, found)
        assert 0.0 <= found.optimality_gap < 1.0
        if strategy == "greentrainer":
            assert found.optimality_gap <= 2e-3 or found.notes
        else:
            assert found.value <= plan(problem).value / (0.97 * 0.97 * 0.999)


@pytest.mark.parametrize("layers", [32, 80])
def test_a_large_model_is_planned(layers: int) -> None:
    problem = tightened(problem_of(llama_table(layers), random.Random(layers), 1), 0.5, 0.3)
    found = plan(problem)
    assert_holds(problem, found)
    assert found.optimality_gap <= 2e-3


def test_permuting_the_importances_changes_the_plan() -> None:
    problem = tightened(problem_of(llama_table(6), random.Random(3), 4), 0.5, 0.3)
    names = list(problem.values)
    shuffled = random.Random(5).sample(names, len(names))
    permuted = {name: problem.values[other] for name, other in zip(names, shuffled, strict=True)}
    assert plan(dataclasses.replace(problem, values=permuted)).selected != plan(problem).selected


def test_the_same_problem_has_the_same_plan() -> None:
    problem = tightened(problem_of(llama_table(6), random.Random(4), 4), 0.5, 0.2)
    assert plan(problem) == plan(problem)
    assert plan(problem, "random", seed=1).selected == plan(problem, "random", seed=1).selected
    assert plan(problem, "random", seed=1).selected != plan(problem, "random", seed=2).selected


def test_a_larger_budget_never_lowers_the_value() -> None:
    whole = problem_of(llama_table(5), random.Random(6), 1)
    along_memory = [plan(tightened(whole, 0.5, share)).value for share in (0.01, 0.05, 0.1, 0.2, 0.4, 0.8)]
    along_flops = [plan(tightened(whole, rho, 0.3)).value for rho in (0.4, 0.45, 0.5, 0.6, 0.8)]
    for values in (along_memory, along_flops):
        assert all(later >= 0.999 * earlier for earlier, later in itertools.pairwise(values))
        assert values[-1] > values[0]


def test_a_smaller_micro_batch_is_taken_only_when_memory_asks_for_it() -> None:
    whole = problem_of(llama_table(4), random.Random(7), 8)
    roomy, tight = plan(tightened(whole, 0.5, 1.5)), plan(tightened(whole, 0.5, 0.0))
    assert (roomy.micro_batch, roomy.accumulation, roomy.notes) == (8, 1, ())
    assert (tight.micro_batch, tight.accumulation) == (1, 8)
    assert "micro-batches of 1 rows instead of 8" in tight.notes[0]


def test_weights_without_importance_are_never_chosen() -> None:
    problem = problem_of(llama_table(3), random.Random(8), 2)
    values = {name: value if "down" in name else -value for name, value in problem.values.items()}
    values["layers.0.down"] = math.nan
    for strategy in set(STRATEGIES) - {"bias"}:
        found = plan(dataclasses.replace(problem, values=values), strategy)
        assert set(found.selected) == {"layers.1.down", "layers.2.down"}


def test_bias_trains_vectors_only_and_says_when_there_is_none() -> None:
    problem = tightened(problem_of(llama_table(3), random.Random(8), 2), 0.6, 0.5)
    found = plan(problem, "bias")
    assert found.selected
    assert all("norm" in name for name in found.selected)
    values = {name: value if "down" in name else 0.0 for name, value in problem.values.items()}
    with pytest.raises(InputError, match="--strategy bias finds nothing to train"):
        plan(dataclasses.replace(problem, values=values), "bias")


def test_last_layers_are_the_ones_next_to_the_loss() -> None:
    problem = tightened(problem_of(llama_table(6), random.Random(9), 1), 0.45, 2.0)
    found = plan(problem, "last-layers")
    assert {"head", "norm", "layers.5.down"} <= set(found.selected)
    blocks = sorted({int(name.split(".")[1]) for name in found.selected if "." in name})
    assert blocks == list(range(blocks[0], 6))
    assert blocks[0] > 0


def test_the_smallest_memory_is_feasible_and_one_byte_less_is_not() -> None:
    for seed in range(12):
        problem = random_problem(seed)
        roomy = dataclasses.replace(problem, flops=2 * problem.full_flops)
        least = smallest(roomy)
        assert plan(dataclasses.replace(roomy, memory_bytes=least.memory_bytes)).peak_bytes == least.memory_bytes
        with pytest.raises(BudgetError) as refused:
            plan(dataclasses.replace(roomy, memory_bytes=least.memory_bytes - 1))
        assert refused.value.smallest_bytes == least.memory_bytes
        assert refused.value.smallest_rho is None


def test_the_smallest_flops_are_feasible_and_one_less_is_not() -> None:
    for seed in range(12):
        problem = dataclasses.replace(random_problem(seed), memory_bytes=2**50)
        least = smallest(problem).rho_flops
        assert plan(dataclasses.replace(problem, flops=least)).flops == least
        with pytest.raises(BudgetError) as refused:
            plan(dataclasses.replace(problem, flops=least - 1))
        rho = refused.value.smallest_rho
        assert rho is not None
        full = problem.full_flops
        assert plan(dataclasses.replace(problem, flops=int(rho * full))).selected
        assert rho * full - least <= 2e-6 * full


def test_memory_that_fits_nothing_is_refused_with_what_would_do() -> None:
    whole = problem_of(llama_table(4), random.Random(10), 4)
    least = smallest(whole).memory_bytes
    with pytest.raises(BudgetError) as refused:
        plan(dataclasses.replace(whole, memory_bytes=least - 2**20))
    message = str(refused.value)
    assert message.startswith("no weight can be trained within ")
    assert f"the cheapest, {smallest(whole).memory_weight}, needs " in message
    assert "lower --max-length (rows have up to " in message
    assert "\n" not in message
    advice = re.search(r"--memory (\S+)$", message)
    assert advice is not None
    assert plan(dataclasses.replace(whole, memory_bytes=parse_bytes(advice[1]))).selected
    with pytest.raises(BudgetError, match="take a smaller model"):
        plan(dataclasses.replace(whole, memory_bytes=FLOOR))


def test_flops_that_reach_nothing_are_refused_with_what_would_do() -> None:
    whole = problem_of(llama_table(4), random.Random(11), 4)
    full = whole.full_flops
    with pytest.raises(BudgetError, match=r"^rho 0.2 is below the smallest reachable 0\.\d+ .*give --rho") as refused:
        plan(dataclasses.replace(whole, flops=int(0.2 * full)))
    advice = float(str(refused.value).split("--rho ")[1].split()[0])
    assert plan(dataclasses.replace(whole, flops=int(advice * full))).selected


def test_input_that_cannot_be_planned_is_refused() -> None:
    problem = problem_of(llama_table(2), random.Random(12), 2)
    with pytest.raises(InputError, match=r"unknown strategy 'randon' \(did you mean 'random'\?\): choose one of"):
        plan(problem, "randon")
    with pytest.raises(InputError, match="no weight has an importance above 0"):
        plan(dataclasses.replace(problem, values={}))
    with pytest.raises(InputError, match="no batch to plan for"):
        plan(dataclasses.replace(problem, shapes=()))


def test_planning_writes_nothing_to_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    plan(tightened(problem_of(llama_table(6), random.Random(13), 4), 0.5, 0.2))
    assert capfd.readouterr() == ("", "")


def test_a_way_that_other_budgets_rule_out_does_not_make_the_least_memory() -> None:
    """With little FLOPs only the rows of the head are affordable: the refusal is about memory, and its number holds."""
    whole = dataclasses.replace(problem_of(llama_table(4), random.Random(15), 1), head_rows=(None, 64))
    least = smallest(whole).rho_flops
    scarce = dataclasses.replace(whole, flops=least, memory_bytes=smallest(whole).memory_bytes)
    with pytest.raises(BudgetError, match="no weight can be trained within") as refused:
        plan(dataclasses.replace(scarce, memory_bytes=scarce.memory_bytes // 2))
    assert refused.value.smallest_bytes is not None
    assert plan(dataclasses.replace(scarce, memory_bytes=refused.value.smallest_bytes)).selected


@pytest.mark.parametrize("seed", range(40))
def test_with_a_time_budget_too_the_plan_is_the_best_of_all_ways(seed: int) -> None:
    """What needs less memory may need more time: smaller micro-batches, 8-bit states, rows, recomputation."""
    draw = random.Random(seed)
    rates = Rates(1e9, 8e8, 5e8, 5e8, 4e8, 1e8, 1e8, 1e8, 1e5, 1e-3, 1e-4, 1e7)
    problem = dataclasses.replace(random_problem(seed, most=6), rates=rates)
    way = draw.choice(problem.ways())
    mask = draw.randrange(1, 1 << len(problem.table.weights))
    again = tuple(range(draw.randint(0, problem.table.blocks)))
    problem = dataclasses.replace(problem, seconds=problem.spent_s(way, mask, again))
    best = {way: way.worth * brute_force(problem, way) for way in problem.ways()}
    if not max(best.values()):
        with pytest.raises(BudgetError):
            plan(problem)
        return
    found = plan(problem)
    assert_holds(problem, found)
    assert found.seconds is not None and problem.seconds is not None
    assert found.seconds <= problem.seconds * (1 + 1e-6)
    assert way_of(problem, found).worth * found.value >= (1 - 2e-6) * max(best.values())
    assert way_of(problem, found).worth * found.value / (1 - found.optimality_gap) >= max(best.values()) * (1 - 1e-9)
