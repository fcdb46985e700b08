"""The cost table: arithmetic of Work, what a choice pays for, and the way to JSON and back."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from edgegt.cost import BatchShape, Block, CostTable, Path, Totals, Weight, Work

SHAPE = BatchShape(rows=2, tokens=5, kept=3)


def table_of_three() -> CostTable:
    """a -> b -> c: training a needs the gradient through b and c, training b the one through c. a and b are a layer."""
    weights = (
        Weight("a", "linear", 0, (4, 2), 0, Work(token=16)),
        Weight("b", "vector", 0, (4,), 1, Work()),
        Weight("c", "head", 1, (10, 4), 2, Work(kept=80)),
    )
    paths = (
        Path(0b001, Work(token=3), Work(token=2), 0),
        Path(0b011, Work(kept=80), Work(kept=40, row=1)),
        Path(0b100, Work(), Work(kept=4)),
    )
    forward = Work(token=16, pair=2, kept=80)
    layers = (Block(Work(token=16, pair=2), Work(token=1), 0b011),)
    return CostTable(1, weights, paths, layers, forward, Work(kept=80), 52, 60, 16, Work(token=7, row=1))


def test_work_is_linear_in_rows_tokens_pairs_and_kept() -> None:
    assert Work(row=7).at(SHAPE) == 2 * 7
    assert Work(token=7).at(SHAPE) == 2 * 5 * 7
    assert Work(pair=7).at(SHAPE) == 2 * 25 * 7
    assert Work(kept=7).at(SHAPE) == 2 * 3 * 7
    assert Work(cross=7).at(SHAPE) == 2 * 15 * 7
    assert Work(kept_pair=7).at(SHAPE) == 2 * 9 * 7
    assert Work(1, 2, 3, 4, 5, 6).at(SHAPE) == 2 * (1 + 10 + 75 + 12 + 75 + 54)


def test_work_adds_and_totals_over_batches() -> None:
    first, second = Work(1, 2, 3, 4, 5, 6), Work(5, 6, 7, 8, 9, 10)
    assert first + second == Work(6, 8, 10, 12, 14, 16)
    assert (first + second).at(SHAPE) == first.at(SHAPE) + second.at(SHAPE)
    shapes = [SHAPE, BatchShape(1, 9, 0)]
    assert first.total(shapes) == first.at(SHAPE) + first.at(shapes[1])
    assert first.total(shapes) == first.over(Totals.of(shapes))
    assert first.attention == Work(pair=3, cross=5, kept_pair=6)
    assert first.total([]) == 0
    assert Work(token=10**18).at(BatchShape(1000, 1000, 0)) == 10**24


def test_a_weight_counts_its_elements() -> None:
    assert [weight.numel for weight in table_of_three().weights] == [8, 4, 40]


def test_masks_number_the_weights_in_table_order() -> None:
    table = table_of_three()
    assert table.mask([]) == 0
    assert table.mask(["c", "a"]) == 0b101
    with pytest.raises(KeyError):
        table.mask(["d"])


def test_a_path_is_paid_once_by_any_of_its_weights() -> None:
    table = table_of_three()
    assert table.train_work(0) == table.forward
    assert table.train_work(0b010) == table.forward + Work(kept=80)
    assert table.train_work(0b011) == table.forward + Work(kept=80) + Work(token=3) + Work(token=16)
    assert table.train_work(0b100) == table.forward + Work(kept=80)
    assert table.saved_work(0) == Work()
    assert table.saved_work(0b011) == Work(row=1, token=2, kept=40)
    assert table.saved_work(0b110) == Work(row=1, kept=44)


def test_training_more_never_costs_less() -> None:
    table = table_of_three()
    for mask in range(8):
        for more in (mask | 1 << bit for bit in range(3)):
            assert table.train_work(more).at(SHAPE) >= table.train_work(mask).at(SHAPE)
            assert table.saved_work(more).at(SHAPE) >= table.saved_work(mask).at(SHAPE)


def test_full_fine_tuning_runs_the_head_on_every_position() -> None:
    table = table_of_three()
    assert table.full_work() == Work(token=3 * (16 + 80), pair=3 * 2)
    everywhere = BatchShape(rows=2, tokens=5, kept=5)
    assert table.full_work().at(everywhere) == 3 * table.forward.at(everywhere)
    assert table.full_work().at(SHAPE) > 3 * table.forward.at(SHAPE)


def test_an_encoder_decoder_runs_its_head_on_the_decoders_positions_anyway() -> None:
    table = replace(table_of_three(), encoder_decoder=True)
    work, labelled = table.full_work(), replace(SHAPE, labelled=2)
    assert work.at(SHAPE) == 3 * table.forward.at(SHAPE)
    assert work.at(labelled) == work.at(SHAPE) and table.forward.at(labelled) < table.forward.at(SHAPE)


def test_a_recomputed_layer_keeps_its_input_only_and_runs_again() -> None:
    table = table_of_three()
    assert table.train_work(0b001, [0]) == table.train_work(0b001) + Work(token=16, pair=2)
    assert table.saved_work(0b001, [0]) == Work(row=1, kept=40, token=1)
    assert table.saved_work(0b101, [0, 0]) == Work(row=1, kept=44, token=1)
    assert table.layer_bytes(0) == Work(token=2)


def test_a_layer_that_no_trained_weight_reaches_is_not_recomputed() -> None:
    table = table_of_three()
    assert table.train_work(0b100, [0]) == table.train_work(0b100)
    assert table.saved_work(0b100, [0]) == table.saved_work(0b100)
    assert table.train_work(0, [0]) == table.forward


def test_a_probe_computes_everything_the_layers_twice_and_the_logits_again() -> None:
    table = table_of_three()
    assert table.probe_work() == table.train_work(0b111) + Work(token=16, pair=2, kept=2 * 40)


def test_a_table_comes_back_from_json_as_it_was() -> None:
    table = table_of_three()
    assert CostTable.from_json(json.loads(json.dumps(table.to_json()))) == table


def test_masks_of_a_thousand_weights_survive_json() -> None:
    weights = tuple(Weight(f"w{k}", "linear", k, (2, 2), k, Work(token=8)) for k in range(1000))
    wide = Path((1 << 1000) - 1, Work(token=1), Work())
    layers = tuple(Block(Work(token=8), Work(token=1), (1 << k + 1) - 1) for k in range(1000))
    table = CostTable(1000, weights, (wide,), layers, Work(token=8000), Work(), 4000, 4100, 0)
    again = CostTable.from_json(json.loads(json.dumps(table.to_json())))
    assert again == table
    assert again.train_work(1 << 999) == Work(token=8009)
