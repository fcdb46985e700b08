"""Peak memory: each term by hand, their sum, and that choosing more never needs less."""

from __future__ import annotations

import itertools

import pytest

from edgegt.cost import BatchShape, CostTable, Path, Weight, Work
from edgegt.memory import (
    SLACK_BYTES,
    SLACK_SHARE,
    Surroundings,
    fused_gradient_bytes,
    optimizer_bytes,
    peak_terms,
    plane_bytes,
    state_bytes,
    worst_shape,
)

VOCABULARY = 300
WORST = BatchShape(rows=2, tokens=10, kept=4)
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


def terms_of(selected: tuple[str, ...], accumulate: bool, demoted: tuple[str, ...] = ()) -> dict[str, int]:
    return peak_terms(table(), selected, Surroundings(10**6, demoted), WORST, VOCABULARY, accumulate)


def test_each_term_by_hand() -> None:
    terms = terms_of(("matrix", "norm"), accumulate=False, demoted=("tall", "matrix"))
    named = {
        "logits": 16 * 2 * 4 * 300,
        "transient": 2 * 10 * 500,
        "masters": 4 * (6400 + 64),
        "planes": 2 * 6400,
        "optimizer": 2 * 6400 + 6400 // 32 + 8 * 64,
        "gradients": 2 * 4 * 6400,
        "demoted": 2 * 25600,
        "activations": 2 * (10 * 64 + 10 * 256 + 8),
    }
    slack = int(SLACK_SHARE * sum(named.values())) + SLACK_BYTES
    assert terms == {"floor": 10**6, "base": 33000, **named, "slack": slack}


def test_accumulated_gradients_are_all_there_and_fused_ones_one_at_a_time() -> None:
    assert terms_of(NAMES, accumulate=True)["gradients"] == 4 * (6400 + 64 + 25600)
    assert terms_of(NAMES, accumulate=False)["gradients"] == 2 * 4 * 25600


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
        assert fused_gradient_bytes(weight) == terms_of((weight.name,), False)["gradients"]
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


def test_the_worst_shape_covers_every_micro_batch() -> None:
    shapes = [BatchShape(4, 100, 7), BatchShape(3, 20, 15), BatchShape(1, 30, 30)]
    assert worst_shape(shapes, 8) == BatchShape(4, 100, 30)
    assert worst_shape(shapes, 2) == BatchShape(2, 100, 30)
    work = Work(3, 5, 7, 11)
    assert all(work.at(worst_shape(shapes, 4)) >= work.at(shape) for shape in shapes)
