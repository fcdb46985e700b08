"""The small parts of the report: lines thinned and smoothed, and tensors placed in a grid by their names."""

from __future__ import annotations

import random

import pytest

from edgegt.report.charts import smooth, thin
from edgegt.report.grid import lay_out, place, short_labels
from fake_run import MATRICES, NORMS, candidates


def test_a_long_run_is_thinned_and_a_smooth_line_has_no_bias_at_its_start() -> None:
    assert thin([1.0, 5.0, 2.0], max) == [1.0, 5.0, 2.0]
    assert thin([], max) == []
    assert thin([float(value) for value in range(10)], max, most=4) == [2.0, 5.0, 8.0, 9.0]
    assert len(thin([0.0] * 100_000, max)) <= 500
    assert smooth([3.0] * 20, 0.9) == pytest.approx([3.0] * 20)
    assert smooth([2.0, 4.0], 0.5) == pytest.approx([2.0, 10 / 3])


def test_the_grid_finds_layers_and_kinds_in_the_names_of_every_family() -> None:
    assert place("model.layers.7.self_attn.q_proj.weight") == ("7", "self_attn.q_proj")
    assert place("transformer.h.11.attn.c_attn.bias") == ("11", "attn.c_attn bias")
    assert place("gpt_neox.layers.0.mlp.dense_h_to_4h.weight") == ("0", "mlp.dense_h_to_4h")
    assert place("model.layers.3.mlp.experts.5.w1.weight") == ("3", "mlp.experts.*.w1")
    assert place("lm_head.weight") == ("lm_head", "")
    assert place("encoder.block.2.layer.0.SelfAttention.q.weight", True) == ("encoder 2", "layer.*.SelfAttention.q")
    assert place("decoder.final_layer_norm.weight", True) == ("decoder norm", "")
    columns = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    assert short_labels(columns) == ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]
    assert short_labels(["attention.output.dense", "output.dense"]) == ["attention.output.dense", "output.dense"]


def test_an_encoders_layers_and_a_decoders_are_rows_apart() -> None:
    names = ["encoder.block.0.o.weight", "decoder.block.0.o.weight", "decoder.block.1.o.weight", "lm_head.weight"]
    found = [{"name": name, "kind": "linear", "block": block} for block, name in enumerate(names)]
    assert lay_out([{"candidates": found}]).rows == ("lm_head", "decoder 1", "decoder 0", "encoder 0")
    alone = [{"name": "model.decoder.layers.0.fc1.weight", "kind": "linear", "block": 0}]  # OPT has a decoder only
    assert lay_out([{"candidates": alone}]).rows == ("0",)


def test_the_grid_goes_from_the_loss_down_with_matrices_first() -> None:
    grid = lay_out([{"candidates": candidates(3, random.Random(0), 0.5)}, {}])
    assert grid.rows == ("lm_head", "norm", "2", "1", "0")
    assert grid.columns == (*MATRICES, *NORMS)
    assert grid.places["model.layers.1.mlp.up_proj.weight"] == ("1", "mlp.up_proj")
