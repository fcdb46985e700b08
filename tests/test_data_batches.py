"""Batches hold every row once, and a padded row is worth exactly what it is worth alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from edgegt.cost import BatchShape
from edgegt.data.batches import IGNORE, Batch, collate, length_bucketed, shape_of, split_micro
from edgegt.data.examples import Example
from edgegt.data.read import Row, parse_columns, read_rows
from edgegt.data.tokens import tokenize
from edgegt.errors import InputError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
ROW = Row("p", "c", 1)
EOS = 2


def example(prompt: int, completion: int) -> Example:
    """Ids that say where they came from: 100 on for the prompt, 200 on for the completion, which ends in EOS."""
    return Example(tuple(range(100, 100 + prompt)), (*range(200, 199 + completion), EOS), ROW)


@pytest.mark.parametrize(("count", "batch_size"), [(0, 4), (1, 4), (7, 1), (1000, 8), (1003, 8), (401, 4)])
def test_every_index_once_and_one_short_batch(count: int, batch_size: int) -> None:
    draw = random.Random(0)
    lengths = [draw.randint(5, 200) for _ in range(count)]
    batches = length_bucketed(lengths, batch_size, seed=3, epoch=0)
    assert sorted(index for batch in batches for index in batch) == list(range(count))
    sizes = sorted(len(batch) for batch in batches)
    assert all(size == batch_size for size in sizes[1:])
    assert batches == length_bucketed(lengths, batch_size, seed=3, epoch=0)


def test_seed_and_epoch_shuffle_and_padding_is_small() -> None:
    draw = random.Random(0)
    lengths = [draw.randint(5, 200) for _ in range(2000)]
    first = length_bucketed(lengths, 8, seed=3, epoch=0)
    assert first != length_bucketed(lengths, 8, seed=3, epoch=1)
    assert first != length_bucketed(lengths, 8, seed=4, epoch=0)
    padded = sum(len(batch) * max(lengths[index] for index in batch) for batch in first)
    assert padded < 1.05 * sum(lengths)
    one_window = [max(lengths[index] for index in batch) for batch in length_bucketed(lengths[:300], 8, 3, 0)]
    assert one_window != sorted(one_window)
    with pytest.raises(InputError, match="--batch-size 0"):
        length_bucketed(lengths, 0, seed=3, epoch=0)


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ([(3, 3)], BatchShape(1, 5, 3)),
        ([(8, 1)], BatchShape(1, 8, 1)),
        ([(8, 2), (2, 6)], BatchShape(2, 9, 6)),
        ([(1, 9)], BatchShape(1, 9, 9)),
        ([(0, 5)], BatchShape(1, 4, 4)),
    ],
)
def test_a_batch_is_as_wide_as_its_longest_row(sizes: list[tuple[int, int]], shape: BatchShape) -> None:
    examples = [example(*size) for size in sizes]
    assert shape_of(examples) == shape
    batch = collate(examples, 0)
    assert batch.shape == shape
    assert batch.input_ids.shape == batch.attention_mask.shape == batch.position_ids.shape == (shape.rows, shape.tokens)
    assert batch.labels.shape == (shape.rows, shape.kept)


def test_left_padding_positions_and_labels_when_the_padding_is_eos() -> None:
    batch = collate([example(2, 3), example(4, 5)], pad_id=EOS)
    assert batch.input_ids.tolist() == [
        [EOS, EOS, EOS, EOS, 100, 101, 200, 201],
        [100, 101, 102, 103, 200, 201, 202, 203],
    ]
    assert batch.attention_mask.tolist() == [[0] * 4 + [1] * 4, [1] * 8]
    assert batch.position_ids.tolist() == [[0, 0, 0, 0, 0, 1, 2, 3], list(range(8))]
    assert batch.labels.tolist() == [[IGNORE] * 2 + [200, 201, EOS], [200, 201, 202, 203, EOS]]
    assert batch.supervised == 8


def test_without_a_prompt_the_first_token_is_not_learned() -> None:
    batch = collate([example(0, 4)], pad_id=0)
    assert batch.input_ids.tolist() == [[200, 201, 202]]
    assert batch.labels.tolist() == [[201, 202, EOS]]


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 9])
def test_micro_batches_are_the_batch(rows: int) -> None:
    batch = collate([example(n, 6 - n) for n in range(1, 6)], pad_id=0)
    parts = split_micro(batch, rows)
    assert sum(part.supervised for part in parts) == batch.supervised == 15
    assert [part.shape.rows for part in parts] == [len(part.labels) for part in parts]
    for name in ("input_ids", "attention_mask", "position_ids", "labels"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    assert all((part.shape.tokens, part.shape.kept) == (batch.shape.tokens, batch.shape.kept) for part in parts)


@pytest.fixture(scope="module")
def stories() -> Iterator[tuple[Any, list[Example]]]:
    """stories260K in float32 and E2E rows of different lengths; its padding id is its EOS."""
    if not SHARED.is_dir():
        pytest.skip("../shared/data is absent")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = SHARED / "models" / "stories260K"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = read_rows(SHARED / "e2e" / "devset.csv", parse_columns("prompt=mr,completion=ref")).rows[::700]
    examples, _ = tokenize(rows, AutoTokenizer.from_pretrained(folder), 160)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    yield model.eval(), examples
    torch.set_num_threads(threads)


def kept_logits(model: Any, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        output = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            logits_to_keep=batch.shape.kept,
            use_cache=False,
        )
    logits: torch.Tensor = output.logits
    return logits


def test_a_padded_row_has_the_logits_and_the_loss_of_the_row_alone(stories: tuple[Any, list[Example]]) -> None:
    model, examples = stories
    assert len({len(example.inputs) for example in examples}) > 2
    batch = collate(examples, pad_id=EOS)
    logits = kept_logits(model, batch)
    by_hand = 0.0
    for row, one in enumerate(examples):
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([one.prompt + one.completion])).logits[0]
        learned = alone[len(one.prompt) - 1 : -1]
        torch.testing.assert_close(logits[row, -len(one.completion) :], learned, atol=1e-4, rtol=0)
        by_hand += cross_entropy(learned, torch.tensor(one.completion), reduction="sum").item()
    total = cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE, reduction="sum").item()
    assert total / batch.supervised == pytest.approx(by_hand / sum(len(one.completion) for one in examples), abs=1e-5)


def test_loss_of_micro_batches_adds_up(stories: tuple[Any, list[Example]]) -> None:
    model, examples = stories

    def loss(batch: Batch) -> float:
        flat = kept_logits(model, batch).flatten(0, 1)
        return cross_entropy(flat, batch.labels.flatten(), ignore_index=IGNORE, reduction="sum").item()

    batch = collate(examples, pad_id=EOS)
    assert sum(map(loss, split_micro(batch, 2))) == pytest.approx(loss(batch), rel=1e-5)
