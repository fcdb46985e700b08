"""Peak memory: each term by hand and against real tensors, its phases, and that it is what the planner's case says."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence

import pytest
import torch

from edgegt.chunks import chunk_positions
from edgegt.cost import BatchShape, Block, CostTable, Path, Weight, Work
from edgegt.integers import case_of
from edgegt.memory import (
    FRAGMENTS_PERCENT,
    HIDDEN_BYTES,
    HOLES_PERCENT,
    LIBRARY_BYTES,
    LOGIT_BYTES,
    SLACK_BYTES,
    SLACK_SHARE,
    Formats,
    Setting,
    Surroundings,
    fixed_terms,
    gradient_bytes,
    library_bytes,
    logit_bytes,
    loss_bytes,
    master_bytes,
    most_labelled,
    optimizer_bytes,
    peak_terms,
    plane_bytes,
    slack_bytes,
    state_bytes,
    worst_shape,
)
from edgegt.optimizer import AdamW
from edgegt.planner import FORMATS
from edgegt.problem import Problem
from edgegt.quant import split_planes
from edgegt.trace import trace
from test_planner import problem_of, random_problem
from tiny_models import EVERY

VOCABULARY = 300
WORST = BatchShape(rows=2, tokens=10, kept=4)
AROUND = Surroundings(10**6)
LOGITS = int(LOGIT_BYTES * 2 * 4 * VOCABULARY) + HIDDEN_BYTES * 2 * 4 * 64
NAMES = ("matrix", "norm", "tall", "head")
HALF = Formats("bfloat16", "8-bit")
FULL = Formats("float32", "float32")


def table(widest: int = 500) -> CostTable:
    """Two layers under a head: 'matrix' in the lower one, 'norm' and 'tall' in the upper one."""
    weights = (
        Weight("matrix", "linear", 0, (100, 64), 0, Work(token=12800)),
        Weight("norm", "vector", 1, (64,), 1, Work()),
        Weight("tall", "linear", 1, (400, 64), 2, Work(token=51200)),
        Weight("head", "head", 2, (VOCABULARY, 64), 3, Work(kept=2 * VOCABULARY * 64)),
    )
    paths = (
        Path(0b0001, Work(token=1), Work(token=68), 0),
        Path(0b0001, Work(), Work(token=3000), 0),
        Path(0b0011, Work(token=1), Work(token=2000, row=8), 1),
        Path(0b0100, Work(), Work(token=68), 1),
        Path(0b0111, Work(kept=1), Work(kept=40)),
        Path(0b1000, Work(), Work(kept=68)),
    )
    layers = (Block(Work(token=5), Work(token=256), 0b0001), Block(Work(token=6), Work(token=256), 0b0111))
    return CostTable(
        2, weights, paths, layers, Work(token=64000), Work(), 52064, 53000, 256, Work(token=widest)
    )  # fmt: skip


def terms_of(
    selected: Sequence[str],
    recompute: Sequence[int] = (),
    *,
    accumulate: bool = False,
    formats: Formats = HALF,
    demoted: tuple[str, ...] = (),
    worst: BatchShape = WORST,
    widest: int = 500,
) -> dict[str, int]:
    around = dataclasses.replace(AROUND, demoted=demoted)
    return peak_terms(table(widest), selected, recompute, around, Setting(worst, VOCABULARY, accumulate, formats))


def later(terms: dict[str, int]) -> bool:
    """Whether the peak is after the loss."""
    return terms["transient"] > 0


def test_each_term_by_hand() -> None:
    """After the loss: the largest gradient and the widest product are there, and the logits are not."""
    terms = terms_of(("matrix", "norm"), demoted=("tall", "matrix"))
    named = {
        "masters": 2 * 6400 + 4 * 64,
        "planes": 2 * 6400 + 2 * 100,
        "optimizer": 2 * 6400 + 6400 // 32 + 8 * 64,
        "demoted": 2 * 25600 + 2 * 400,
        "activations": 2 * (10 * (68 + 3000 + 2000) + 8 + 4 * 40),
        "logits": 0,
        "gradients": 4 * 6400,
        "recomputed": 0,
        "transient": 2 * 10 * 500,
        "fragments": 0,
    }
    slack = int(SLACK_SHARE * sum(named.values())) + SLACK_BYTES
    assert terms == {"floor": 10**6, "libraries": LIBRARY_BYTES, "base": 53000, **named, "slack": slack}


def test_at_the_loss_there_are_logits_and_the_gradient_of_the_head() -> None:
    terms = terms_of(("head",))
    assert (terms["logits"], terms["transient"]) == (LOGITS, 0)
    assert terms["gradients"] == 4 * VOCABULARY * 64
    assert terms["activations"] == 2 * 4 * 68
    assert not later(terms_of(("norm",)))
    assert later(terms_of(("norm",), widest=5000))


def test_the_gradients_of_the_head_and_of_a_layer_are_not_there_together() -> None:
    both = terms_of(("head", "tall"))
    assert both["gradients"] == 4 * 25600
    assert later(both)
    at_the_loss = 4 * VOCABULARY * 64 + LOGITS
    assert both["gradients"] + both["transient"] == max(at_the_loss, 4 * 25600 + 2 * 10 * 500)


def test_a_large_trained_head_works_in_wider_chunks() -> None:
    small, large = (Weight("head", "head", 1, (2**rows, 2**10), 0, Work()) for rows in (15, 17))
    assert loss_bytes(small) == gradient_bytes(small)
    assert loss_bytes(large) == gradient_bytes(large) + int(LOGIT_BYTES * 2**22)


def test_the_largest_moment_counts_and_the_others_do_not() -> None:
    """Logits, transient and gradients add up to the larger of the peak at the loss and of the one later."""
    for kept, name in itertools.product((0, 1, 2, 3, 4, 10, 40, 400), NAMES):
        shape = BatchShape(2, 10, kept)
        terms = terms_of((name,), worst=shape)
        weight = table().weights[NAMES.index(name)]
        head = gradient_bytes(weight) if name == "head" else 0
        largest = gradient_bytes(weight) - head
        at_the_loss = logit_bytes(table(), shape, VOCABULARY) + head
        expected = max(at_the_loss, table().widest.at(shape) + largest)
        assert terms["logits"] + terms["transient"] + terms["gradients"] == expected


def test_a_recomputed_layer_has_its_turn_when_those_above_it_are_gone() -> None:
    kept = {index: table().layer_bytes(index, 0b0001).at(WORST) for index in (0, 1)}
    above = 2 * 4 * 40
    inputs = 2 * 10 * 256
    plain, lower, both = (terms_of(("matrix",), again) for again in ((), (0,), (0, 1)))
    assert plain["activations"] == kept[0] + kept[1] + above
    # Layer 0 keeps more than layer 1 and its own input: the peak is in its turn, when layer 1 is done.
    assert lower["recomputed"] == table().layer_bytes(0).at(WORST) > kept[1]
    assert lower["activations"] == inputs + above
    assert (both["activations"], both["recomputed"]) == (2 * inputs + above, lower["recomputed"])
    assert sum(lower.values()) < sum(plain.values())


def test_before_a_recomputed_layer_has_its_turn_the_others_are_there() -> None:
    """With little in the recomputed layer, the peak stays where backward begins."""
    small = dataclasses.replace(table(), paths=(Path(0b0001, Work(), Work(token=68), 0), *table().paths[2:]))
    terms = peak_terms(small, ("matrix",), (0,), AROUND, Setting(WORST, VOCABULARY, False, HALF))
    assert terms["recomputed"] == 0
    assert terms["activations"] == 2 * (10 * (256 + 2000) + 8 + 4 * 40)


def test_a_layer_that_takes_no_part_is_not_recomputed() -> None:
    assert terms_of(("head",), (0, 1)) == terms_of(("head",))
    assert terms_of(("tall",), (0, 1)) == terms_of(("tall",), (1,))


def test_fixed_terms_are_those_of_choosing_nothing() -> None:
    for worst in (WORST, BatchShape(2, 10, 1)):
        fixed = fixed_terms(table(), AROUND, worst, VOCABULARY)
        assert set(fixed) == {"floor", "libraries", "base", "logits", "transient"}
        assert fixed == {name: terms_of((), worst=worst)[name] for name in fixed}
        assert fixed["logits"] + fixed["transient"] == max(
            logit_bytes(table(), worst, VOCABULARY), table().widest.at(worst)
        )
        assert 0 in (fixed["logits"], fixed["transient"])


def test_logits_are_those_of_one_chunk() -> None:
    vocabulary, shape = 150_000, BatchShape(4, 300, 200)
    chunk = chunk_positions(vocabulary, 800)
    assert chunk < 800
    assert logit_bytes(table(), shape, vocabulary) == LOGIT_BYTES * vocabulary * chunk + HIDDEN_BYTES * 800 * 64


def test_the_head_runs_on_labelled_positions_alone() -> None:
    """A micro-batch may hold all labels of its batch, but no more than it has positions."""
    batches = [BatchShape(8, 96, 68, 378), BatchShape(8, 96, 60, 391), BatchShape(3, 40, 40)]
    assert [most_labelled(batches, rows) for rows in (8, 4, 2, 1)] == [391, 272, 136, 68]
    assert most_labelled(batches[2:], 8) == 120
    shape = BatchShape(8, 96, 68)
    assert logit_bytes(table(), shape, 300, 391) == LOGIT_BYTES * 300 * 391 + HIDDEN_BYTES * 8 * 68 * 64
    assert logit_bytes(table(), shape, 300) == logit_bytes(table(), shape, 300, 8 * 68)


def test_small_micro_batches_leave_holes_in_the_heap() -> None:
    """Their hidden states of 64 floats lie in the heap below 1,024 tokens."""
    batches = [BatchShape(8, 160, 10), BatchShape(8, 120, 20), BatchShape(1, 40, 9)]
    settings = [Setting.of(table(), batches[:count], VOCABULARY, 8, 8, FULL) for count in (1, 2, 3)]
    assert [setting.holes for setting in settings] == [0, 19, 19]
    assert Setting.of(table(), batches, VOCABULARY, 4, 8, FULL).holes == HOLES_PERCENT
    plain, holed = (peak_terms(table(), ("matrix",), (), AROUND, setting)["fragments"] for setting in settings[:2])
    kept = [path.saved_bytes.at(settings[1].worst) for path in table().paths if path.weights & 1]
    assert (plain, holed) == (0, sum(size * 19 // 100 for size in kept))


def test_slack_is_a_share_of_the_tensors_only() -> None:
    assert slack_bytes({"floor": 10**9, "libraries": 10**8, "base": 10**8, "slack": 10**7}) == SLACK_BYTES
    named = {"masters": 10**8, "logits": 10**7}
    assert slack_bytes({"floor": 10**9, **named}) == int(SLACK_SHARE * 11 * 10**7) + SLACK_BYTES


def test_accumulated_gradients_are_all_there_beside_the_one_being_formed() -> None:
    numel = {weight.name: weight.numel for weight in table().weights}
    for count in range(1, 5):
        for selected in itertools.combinations(NAMES, count):
            fused, accumulated = (terms_of(selected, accumulate=accumulate) for accumulate in (False, True))
            assert accumulated["gradients"] - fused["gradients"] == 4 * sum(numel[name] for name in selected)
            assert {key for key in fused if fused[key] != accumulated[key]} == {
        "gradients", "fragments", "libraries", "slack",
    }  # fmt: skip


def test_choosing_nothing_holds_what_stays() -> None:
    terms = terms_of((), demoted=NAMES)
    chosen = ("masters", "planes", "optimizer", "gradients", "activations", "recomputed")
    assert all(terms[name] == 0 for name in chosen)
    assert terms["demoted"] == 2 * (6400 + 25600 + VOCABULARY * 64) + 2 * (100 + 400 + VOCABULARY)


def test_state_is_what_the_terms_add_up_to() -> None:
    for weight, accumulate, formats in itertools.product(table().weights, (False, True), FORMATS):
        terms = terms_of((weight.name,), accumulate=accumulate, formats=formats)
        gradients = 4 * weight.numel * accumulate
        states = terms["masters"] + terms["planes"] + terms["optimizer"] + gradients
        assert state_bytes(weight, accumulate, formats) == states
        assert terms["fragments"] == FRAGMENTS_PERCENT * states // 100 * accumulate


def test_a_head_trained_in_some_rows_needs_states_of_these_only() -> None:
    few = table().with_head_rows(30)
    setting = Setting(WORST, VOCABULARY, True, FULL)
    terms = peak_terms(few, ("head",), (), AROUND, setting)
    assert terms["masters"] == 4 * 30 * 64
    assert terms["planes"] == 2 * 30 * 64 + 2 * 30
    assert terms["optimizer"] == 8 * 30 * 64
    assert terms["logits"] == LOGITS
    assert sum(terms.values()) < sum(peak_terms(table(), ("head",), (), AROUND, setting).values())


@pytest.mark.parametrize("shape", [(63, 64), (64, 64), (100, 41), (257, 300)], ids=str)
@pytest.mark.parametrize("formats", FORMATS, ids=lambda formats: f"{formats.master}-{formats.states}")
def test_the_bytes_of_a_trained_tensor_are_those_of_its_real_tensors(shape: tuple[int, int], formats: Formats) -> None:
    weight = Weight("w", "linear", 0, shape, 0, Work())
    master = torch.randn(shape).to(getattr(torch, formats.master))
    assert master.nbytes == master_bytes(weight, formats)
    optimizer = AdamW(eight_bit=formats.states == "8-bit")
    optimizer.update("w", master, torch.ones(shape), 1e-3)
    tensors = optimizer.states["w"].tensors()
    tensors.pop("step")
    scale = 2 * 4  # an 8-bit state has one float32 per started block of 256
    assert 0 <= sum(state.nbytes for state in tensors.values()) - optimizer_bytes(weight, formats) <= scale
    planes = split_planes(master.float())
    assert planes.low is not None
    assert planes.q.nbytes + planes.low.nbytes + planes.scale.nbytes == plane_bytes(weight)
    assert torch.ones(shape).nbytes == gradient_bytes(weight)


def test_norms_and_biases_have_float_masters_and_no_planes() -> None:
    norm = Weight("norm", "vector", 0, (5000,), 0, Work())
    assert [master_bytes(norm, formats) for formats in FORMATS] == [20000] * 3
    assert plane_bytes(norm) == 0


def test_small_tensors_keep_float_states() -> None:
    sizes = {count: Weight("w", "linear", 0, (count, 1), 0, Work()) for count in (4095, 4096)}
    assert optimizer_bytes(sizes[4095], HALF) == 8 * 4095
    assert optimizer_bytes(sizes[4096], HALF) == 2 * 4096 + 128
    assert optimizer_bytes(sizes[4096], FULL) == 8 * 4096


def test_richer_formats_never_need_less() -> None:
    for weight, accumulate in itertools.product(table().weights, (False, True)):
        sizes = [state_bytes(weight, accumulate, formats) for formats in FORMATS]
        assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("demoted", [(), ("matrix",), NAMES])
@pytest.mark.parametrize("again", [(), (0,), (0, 1)])
def test_choosing_more_never_needs_less(accumulate: bool, demoted: tuple[str, ...], again: tuple[int, ...]) -> None:
    for count in range(4):
        for selected in itertools.combinations(NAMES, count):
            peak = sum(terms_of(selected, again, accumulate=accumulate, demoted=demoted).values())
            for other in set(NAMES) - set(selected):
                more = terms_of((*selected, other), again, accumulate=accumulate, demoted=demoted)
                assert sum(more.values()) > peak


def test_the_worst_shape_is_made_of_shapes_cut_to_the_micro_batch() -> None:
    shapes = [BatchShape(4, 100, 7), BatchShape(3, 20, 15), BatchShape(1, 30, 30)]
    assert worst_shape(table(), shapes, 8, VOCABULARY).rows == 4
    for micro_batch in (1, 2, 4):
        worst = worst_shape(table(), shapes, micro_batch, VOCABULARY)
        assert worst.rows == micro_batch
        assert worst.tokens in (20, 30, 100)
        assert worst.kept in (7, 15, 30)
    assert worst_shape(table(), shapes[:1], 4, VOCABULARY) == shapes[0]
    assert worst_shape(table(), shapes[:1], 2, VOCABULARY) == BatchShape(2, 100, 7)


def lowest(table: CostTable, mask: int, count: int) -> tuple[int, ...]:
    """The lowest `count` layers that take part in backward."""
    return tuple([index for index in range(table.blocks) if table.layers[index].weights & mask][:count])


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "t5"])
def test_no_micro_batch_needs_more_than_the_worst_shape(family: str) -> None:
    """Whatever is selected and recomputed: alone, everything, nothing and random choices, on random sets of batches."""
    found, draw = trace(EVERY[family]()), random.Random(0)
    names = [weight.name for weight in found.weights]
    for _ in range(60):
        lengths = [draw.randint(8, 200) for _ in range(draw.randint(2, 6))]
        shapes = [BatchShape(draw.choice((8, 8, 3)), tokens, draw.randint(1, tokens)) for tokens in lengths]
        micro_batch = draw.choice((1, 2, 8))
        worst = worst_shape(found, shapes, micro_batch, VOCABULARY)
        chosen = [(), names[:1], names[-1:], names, draw.sample(names, draw.randint(1, 8))]
        for selected, accumulate in itertools.product(chosen, (False, True)):
            again = lowest(found, found.mask(selected), draw.randint(0, found.blocks))
            setting = Setting(worst, VOCABULARY, accumulate, draw.choice(FORMATS))
            covered = sum(peak_terms(found, selected, again, AROUND, setting).values())
            for shape in shapes:
                micro = dataclasses.replace(shape, rows=min(shape.rows, micro_batch))
                peak = peak_terms(found, selected, again, AROUND, dataclasses.replace(setting, worst=micro))
                assert sum(peak.values()) <= covered, (selected, again, micro, worst)


@pytest.mark.parametrize("family", ["llama", "opt", "t5"])
def test_recomputing_adds_no_more_than_the_inputs_of_the_layers(family: str) -> None:
    found, draw = trace(EVERY[family]()), random.Random(1)
    names = [weight.name for weight in found.weights]
    setting, helped = Setting(BatchShape(4, 100, 30), VOCABULARY, False), 0
    for _ in range(100):
        selected = draw.sample(names, draw.randint(1, 10))
        mask = found.mask(selected)
        again = lowest(found, mask, draw.randint(1, found.blocks))
        plain, less = (peak_terms(found, selected, layers, AROUND, setting) for layers in ((), again))
        inputs = sum(found.layers[index].input_bytes.at(setting.worst) for index in again)
        assert less["activations"] <= plain["activations"] + inputs
        assert found.saved_work(mask, again).at(setting.worst) <= plain["activations"] + inputs
        helped += sum(less.values()) < sum(plain.values())
    assert helped


def assert_the_case_agrees(problem: Problem, draw: random.Random) -> None:
    """The peak is the largest of the case's three memory budgets over what is there anyway, to the byte."""
    way = draw.choice(problem.ways())
    case, table, setting = case_of(problem, way), problem.table_of(way), problem.setting(way)
    resting = sum(plane_bytes(weight) for weight in table.weights if weight.name in problem.around.demoted)
    fixed = problem.around.floor_bytes + library_bytes(setting.accumulate) + table.base_bytes + resting
    logits = logit_bytes(table, setting.worst, problem.vocabulary, setting.labelled)
    transient = table.widest.at(setting.worst)
    for _ in range(8):
        mask = sum(1 << bit for bit in draw.sample(case.candidates, draw.randint(1, len(case.candidates))))
        again = lowest(table, mask, draw.randint(0, table.blocks)) if way.recompute else ()
        flops, loss, backward, turn = case.cost(mask, again)
        terms = problem.memory(way, mask, again)
        assert sum(terms.values()) - terms["slack"] == fixed + max(
            loss + logits, backward + transient, turn + transient
        )
        assert flops + table.forward.over(problem.totals) == problem.spent_flops(way, mask, again)
        within = problem.spent_flops(way, mask, again) <= problem.flops
        within = within and sum(terms.values()) <= problem.memory_bytes
        assert case.fits(mask, again) == within


@pytest.mark.parametrize("seed", range(80))
def test_the_case_has_the_same_bytes_and_flops_as_the_table(seed: int) -> None:
    assert_the_case_agrees(random_problem(seed, most=14), random.Random(seed))


@pytest.mark.parametrize("family", ["smollm", "gpt2", "falcon-alibi", "flan-t5", "bart"])
def test_the_case_agrees_with_traced_tables(family: str) -> None:
    table, draw = trace(EVERY[family]()), random.Random(2)
    for _ in range(10):
        problem = problem_of(table, draw, draw.choice((1, 4)))
        names = draw.sample([weight.name for weight in table.weights], 5)
        shapes = tuple(dataclasses.replace(shape, labelled=draw.randint(1, 40)) for shape in problem.shapes)
        problem = dataclasses.replace(problem, shapes=shapes)
        problem = dataclasses.replace(
            problem, head_rows=draw.choice(((None,), (50,))), around=Surroundings(10**6, tuple(names))
        )
        way = draw.choice(problem.ways())
        mask = draw.randrange(1, 1 << len(table.weights))
        flops, peak = problem.spent_flops(way, mask, ()), sum(problem.memory(way, mask, ()).values())
        assert_the_case_agrees(dataclasses.replace(problem, flops=flops, memory_bytes=peak), draw)
