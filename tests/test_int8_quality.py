"""What int8 costs in quality: the loss of a real model on held-out rows, against the same model in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from edgegt.data import read_rows, split_rows, tokenize
from edgegt.evaluate import held_out_loss
from edgegt.source import load_tokenizer
from tiny_models import CPU, SHARED, load

ROWS = 256


@pytest.mark.parametrize("name", [pytest.param("base-7m", marks=pytest.mark.slow), "stories260K"])
def test_the_int8_loss_is_within_half_a_percent_of_the_float_loss(name: str, tmp_path: Path) -> None:
    path, data = SHARED / "data" / "models" / name, SHARED / "data" / "e2e" / "devset.csv"
    if not (path.is_dir() and data.is_file()):
        pytest.skip(f"no {name} or no E2E rows under shared/data")
    from transformers import AutoModelForCausalLM

    rows = split_rows(read_rows(data, {"prompt": "mr", "completion": "ref"}).rows, 0.1, 0)[1]
    examples, _ = tokenize(rows[:ROWS], load_tokenizer(path), 256)
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    expected = held_out_loss(reference, examples, 0, 32, CPU)
    found = held_out_loss(load(path, tmp_path / "cache").module, examples, 0, 32, CPU)
    print(name, expected["loss"], found["loss"], found["loss"] / expected["loss"] - 1)
    assert found["tokens"] == expected["tokens"] > 1000
    assert found["rows"] == ROWS
    assert found["loss"] == pytest.approx(expected["loss"], rel=0.005)
