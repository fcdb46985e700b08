"""Peak memory: each term by hand, their sum, and that choosing more never needs less."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest

from edgegt.cost import BatchShape, CostTable, Path, Weight, Work
from edgegt.memory import (
    LIBRARY_BYTES,
    LOGIT_BYTES,
    SLACK_BYTES,
    SLACK_SHARE,
    Surroundings,
    fixed_terms,
    freed_logit_bytes,
    fused_gradient_bytes,
    optimizer_bytes,
    peak_terms,
    plane_bytes,
    slack_bytes,
    state_bytes,
    worst_shape,
)
from edgegt.trace import trace
from tiny_models import FAMILIES

VOCABULARY = 300
WORST = BatchShape(rows=2, tokens=10, kept=4)
LOGITS = 2 * 4 * 300
FEW = BatchShape(rows=2, tokens=10, kept=1)
NAMES = ("matrix", "norm", "tall")


def table() -> CostTable:
    weights = (
        Weight("matrix", "linear", 0, (100, 64), 0, Work(token=12800)),
        Weight("norm", "vector", 0, (64,), 1, Work()),
        Weight("tall", "linear", 0, (400, 64), 2, Work(token=51200)),
    )
    paths = (
        Path(0b001, Work(token=1), Work(token=64)),
        Path(0b011, Work(token=1), Work(token=256, row=8)),
        Path(0b100, Work(), Work(token=64)),
    )
    return CostTable(1, weights, paths, Work(token=64000), Work(), 32064, 33000, 256, Work(token=500))


def terms_of(
    selected: tuple[str, ...], accumulate: bool, demoted: tuple[str, ...] = (), worst: BatchShape = WORST
) -> dict[str, int]:
    return peak_terms(table(), selected, Surroundings(10**6, demoted), worst, VOCABULARY, accumulate)


def test_each_term_by_hand() -> None:
    terms = terms_of(("matrix", "norm"), accumulate=False, demoted=("tall", "matrix"))
    named = {
        "logits": LOGIT_BYTES * LOGITS,
        "transient": 0,
        "masters": 4 * (6400 + 64),
        "planes": 2 * 6400,
        "optimizer": 2 * 6400 + 6400 // 32 + 8 * 64,
        "gradients": 2 * 4 * 6400 - ((LOGIT_BYTES - 4) * LOGITS - 2 * 10 * 500),
        "demoted": 2 * 25600,
        "activations": 2 * (10 * 64 + 10 * 256 + 8),
    }
    slack = int(SLACK_SHARE * sum(named.values())) + SLACK_BYTES
    assert terms == {"floor": 10**6, "libraries": LIBRARY_BYTES, "base": 33000, **named, "slack": slack}


def test_few_logits_leave_the_products_their_transient_and_free_nothing() -> None:
    terms = terms_of(("matrix",), accumulate=False, worst=FEW)
    assert terms["logits"] == LOGIT_BYTES * 2 * 300
    assert terms["transient"] == 2 * 10 * 500 - (LOGIT_BYTES - 4) * 2 * 300 > 0
    assert terms["gradients"] == 2 * 4 * 6400
    assert terms_of(("matrix",), accumulate=True, worst=FEW)["transient"] == terms["transient"]


def test_what_the_logits_free_is_used_once() -> None:
    """Logits, transient and the largest gradient add up to the larger of the peak at the loss and of the one later."""
    for kept, weight in itertools.product((0, 1, 2, 3, 4, 10, 40, 400), table().weights):
        shape = BatchShape(2, 10, kept)
        terms = terms_of((weight.name,), accumulate=False, worst=shape)
        logits, product = 2 * kept * VOCABULARY, table().widest.at(shape)
        at_the_loss, later = LOGIT_BYTES * logits, 4 * logits + product + 2 * 4 * weight.numel
        assert terms["logits"] + terms["transient"] + terms["gradients"] == max(at_the_loss, later)


def test_fixed_terms_are_those_of_every_selection() -> None:
    for worst, accumulate in itertools.product((WORST, FEW), (False, True)):
        fixed = fixed_terms(table(), Surroundings(10**6), worst, VOCABULARY)
        assert set(fixed) == {"floor", "libraries", "base", "logits", "transient"}
        for selected in ((), ("norm",), NAMES):
            terms = terms_of(selected, accumulate, worst=worst)
            assert {name: terms[name] for name in fixed} == fixed


def test_slack_is_a_share_of_the_tensors_only() -> None:
    assert slack_bytes({"floor": 10**9, "libraries": 10**8, "base": 10**8, "slack": 10**7}) == SLACK_BYTES
    named = {"masters": 10**8, "logits": 10**7}
    assert slack_bytes({"floor": 10**9, **named}) == int(SLACK_SHARE * 11 * 10**7) + SLACK_BYTES


def test_accumulated_gradients_are_all_there_and_fused_ones_one_at_a_time() -> None:
    assert terms_of(NAMES, accumulate=True)["gradients"] == 4 * (6400 + 64 + 25600)
    freed = (LOGIT_BYTES - 4) * LOGITS - 2 * 10 * 500
    assert freed_logit_bytes(table(), WORST, VOCABULARY) == freed > 0
    assert terms_of(NAMES, accumulate=False)["gradients"] == 2 * 4 * 25600 - freed
    assert terms_of(("norm",), accumulate=False)["gradients"] == 0


def test_choosing_nothing_holds_what_stays() -> None:
    terms = terms_of((), accumulate=False, demoted=NAMES)
    chosen = ("masters", "planes", "optimizer", "gradients", "activations")
    assert all(terms[name] == 0 for name in chosen)
    assert terms["demoted"] == 2 * (6400 + 25600)


def test_state_is_what_the_terms_add_up_to() -> None:
    for weight, accumulate in itertools.product(table().weights, (False, True)):
        terms = terms_of((weight.name,), accumulate)
        states = terms["masters"] + terms["planes"] + terms["optimizer"] + accumulate * terms["gradients"]
        assert state_bytes(weight, accumulate) == states
        freed = freed_logit_bytes(table(), WORST, VOCABULARY)
        assert fused_gradient_bytes(weight) == 2 * 4 * weight.numel
        assert fused_gradient_bytes(weight, freed) == terms_of((weight.name,), False)["gradients"]
        assert plane_bytes(weight) == (0 if weight.kind == "vector" else 2 * weight.numel)


def test_small_tensors_keep_float_states() -> None:
    sizes = {count: Weight("w", "linear", 0, (count,), 0, Work()) for count in (4095, 4096)}
    assert optimizer_bytes(sizes[4095]) == 8 * 4095
    assert optimizer_bytes(sizes[4096]) == 2 * 4096 + 128


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("demoted", [(), ("matrix",), NAMES])
def test_choosing_more_never_needs_less(accumulate: bool, demoted: tuple[str, ...]) -> None:
    for count in range(3):
        for selected in itertools.combinations(NAMES, count):
            peak = sum(terms_of(selected, accumulate, demoted).values())
            for other in set(NAMES) - set(selected):
                assert sum(terms_of((*selected, other), accumulate, demoted).values()) > peak


def test_the_worst_shape_is_made_of_shapes_cut_to_the_micro_batch() -> None:
    shapes = [BatchShape(4, 100, 7), BatchShape(3, 20, 15), BatchShape(1, 30, 30)]
    assert worst_shape(table(), shapes, 8, VOCABULARY) == BatchShape(4, 100, 7)
    for micro_batch in (1, 2, 4):
        worst = worst_shape(table(), shapes, micro_batch, VOCABULARY)
        assert worst.rows == micro_batch
        assert worst.tokens in (20, 30, 100)
        assert worst.kept in (7, 15, 30)
    assert worst_shape(table(), shapes[:1], 4, VOCABULARY) == shapes[0]
    assert worst_shape(table(), shapes[:1], 2, VOCABULARY) == BatchShape(2, 100, 7)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt-neox"])
def test_no_micro_batch_needs_more_than_the_worst_shape(family: str) -> None:
    """Whatever is selected: alone, everything, nothing and random choices, on random sets of batches."""
    found, draw = trace(FAMILIES[family]()), random.Random(0)
    names = [weight.name for weight in found.weights]
    for _ in range(150):
        lengths = [draw.randint(8, 200) for _ in range(draw.randint(2, 6))]
        shapes = [BatchShape(draw.choice((8, 8, 3)), tokens, draw.randint(1, tokens)) for tokens in lengths]
        micro_batch = draw.choice((1, 2, 8))
        worst = worst_shape(found, shapes, micro_batch, VOCABULARY)
        chosen = [(), names[:1], names[-1:], names, draw.sample(names, draw.randint(1, 8))]
        for selected, accumulate in itertools.product(chosen, (False, True)):
            around = Surroundings(10**6)
            covered = sum(peak_terms(found, selected, around, worst, VOCABULARY, accumulate).values())
            for shape in shapes:
                micro = dataclasses.replace(shape, rows=min(shape.rows, micro_batch))
                peak = sum(peak_terms(found, selected, around, micro, VOCABULARY, accumulate).values())
                assert peak <= covered, (selected, micro, worst)
