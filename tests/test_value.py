"""The value of a weight: the head before all, the rest by importance, tilted towards the loss."""

from __future__ import annotations

import pytest

from edgegt.cost import CostTable, Weight, Work
from edgegt.value import values_of

TABLE = CostTable(
    blocks=4,
    weights=(
        Weight("low", "linear", 0, (8, 8), 0, Work()),
        Weight("high", "linear", 3, (8, 8), 1, Work()),
        Weight("norm", "vector", 4, (8,), -1, Work()),
        Weight("head", "head", 4, (16, 8), 2, Work()),
    ),
    paths=(), layers=(), forward=Work(), head=Work(), parameters=0, base_bytes=0, float_bytes=0,
)  # fmt: skip


def test_the_head_is_worth_as_much_as_everything_together() -> None:
    values = values_of({"low": 5.0, "high": 3.0, "norm": 1.0, "head": 0.0}, TABLE)
    assert values["head"] == pytest.approx(sum(values[name] for name in ("low", "high", "norm")))


def test_equal_importance_is_worth_more_towards_the_loss() -> None:
    values = values_of(dict.fromkeys(("low", "high", "norm", "head"), 1.0), TABLE)
    assert values["high"] / values["low"] == pytest.approx(1.75**2)


def test_importance_still_decides_within_a_layer_and_nothing_is_worth_nothing() -> None:
    first, second = values_of({"low": 2.0, "high": 1.0}, TABLE), values_of({"low": 1.0, "high": 2.0}, TABLE)
    assert first["low"] > second["low"] and first["high"] < second["high"]
    assert set(values_of({}, TABLE).values()) == {0.0}


def test_what_has_no_importance_is_worth_its_size_where_anything_has_some() -> None:
    values = values_of({"low": 1.0}, TABLE)
    assert 0 < values["norm"] < values["high"] < values["low"]
