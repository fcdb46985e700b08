"""Batches that waste little: neighbours in length together, padded on the left, the head only where it is needed.

With padding on the left all completions end in the last column, so `logits_to_keep=K` (transformers' own argument)
makes the head run on the last K positions only. Position t predicts token t + 1: inputs are prompt + completion[:-1],
and the last column of the logits belongs to the last completion token, EOS. Of a conversation the kept positions reach
back to its first answer, with IGNORE between two answers. Labels are made from the completions, never by comparing ids
with the padding id, which is EOS for many models: EOS is always learned.

The two sides of an encoder-decoder are padded on the right, as models with learned positions expect it; so are rows
for an encoder that says the class of each, which is the only label that they have.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from edgegt.cost import BatchShape
from edgegt.data.examples import IGNORE, Example
from edgegt.errors import InputError

__all__ = ["IGNORE", "Batch", "collate", "length_bucketed", "shape_of", "split_micro"]
WINDOW_BATCHES = 50


@dataclass(frozen=True, eq=False)
class Batch:
    """B rows of T inputs, of which the last K reach the head.

    input_ids, attention_mask, position_ids: [B, T] int64, positions from 0 at the first real token; labels: [B, K]
    int64, column j is what the j-th kept position predicts, IGNORE where nothing is learned; supervised: how many
    labels are learned. classes: the only label of a row is its class (K is 1). right: rows are padded on the right.
    Of an encoder-decoder T is the encoder's and K the decoder's: decoder_input_ids are [B, K]. Of it, and where rows
    are padded on the right, position_ids say nothing.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor
    shape: BatchShape
    supervised: int
    decoder_input_ids: Tensor | None = None
    classes: bool = False
    right: bool = False


def length_bucketed(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Indices 0 .. len(lengths) - 1 in batches of similar length, in an order drawn by seed and epoch.

    Every index occurs once; at most one batch is smaller. Raises: InputError for a batch size below 1.
    """
    if batch_size < 1:
        raise InputError(f"--batch-size {batch_size} is not possible: give at least 1")
    draw = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    draw.shuffle(order)
    window = batch_size * WINDOW_BATCHES
    batches: list[list[int]] = []
    for start in range(0, len(order), window):
        near = sorted(order[start : start + window], key=lambda index: lengths[index])
        batches += [near[at : at + batch_size] for at in range(0, len(near), batch_size)]
    draw.shuffle(batches)
    return batches


def shape_of(examples: Sequence[Example]) -> BatchShape:
    """The shape that `collate` gives these examples: as wide as the longest of them."""
    tokens = max(len(example.inputs) for example in examples)
    kept = max(len(example.targets) for example in examples)
    return BatchShape(len(examples), tokens, kept, sum(example.supervised for example in examples))


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """One padded batch of the shape that `shape_of` says."""
    shape = shape_of(examples)
    if examples[0].start is not None:
        return _pairs(examples, shape, pad_id)
    classes, right = examples[0].label is not None, examples[0].right
    input_ids = torch.full((shape.rows, shape.tokens), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    position_ids = torch.zeros_like(input_ids)
    labels = torch.full((shape.rows, shape.kept), IGNORE, dtype=torch.int64)
    for row, example in enumerate(examples):
        first = 0 if right else shape.tokens - len(example.inputs)
        there = slice(first, first + len(example.inputs))
        input_ids[row, there] = torch.tensor(example.inputs, dtype=torch.int64)
        attention_mask[row, there] = 1
        position_ids[row, there] = torch.arange(len(example.inputs))
        labels[row, shape.kept - len(example.targets) :] = torch.tensor(example.targets, dtype=torch.int64)
    return Batch(input_ids, attention_mask, position_ids, labels, shape, shape.labelled, None, classes, right)


def _pairs(examples: Sequence[Example], shape: BatchShape, pad_id: int) -> Batch:
    """What an encoder reads, and what a decoder reads and learns: its start, then the answer moved on by one."""
    input_ids = torch.full((shape.rows, shape.tokens), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    decoder_input_ids = torch.full((shape.rows, shape.kept), pad_id, dtype=torch.int64)
    labels = torch.full_like(decoder_input_ids, IGNORE)
    for row, example in enumerate(examples):
        read, written = torch.tensor(example.inputs), torch.tensor(example.targets)
        input_ids[row, : len(read)], attention_mask[row, : len(read)] = read, 1
        labels[row, : len(written)] = written
        decoder_input_ids[row, : len(written)] = torch.tensor(example.decoder_inputs)
    positions = torch.zeros_like(input_ids)
    return Batch(input_ids, attention_mask, positions, labels, shape, shape.labelled, decoder_input_ids)


def split_micro(batch: Batch, rows: int) -> list[Batch]:
    """The batch in micro-batches of at most `rows` rows, as views, with the padding it has."""
    return [_rows(batch, start, min(start + rows, batch.shape.rows)) for start in range(0, batch.shape.rows, rows)]


def _rows(batch: Batch, start: int, stop: int) -> Batch:
    labels = batch.labels[start:stop]
    labelled = int((labels != IGNORE).sum())
    return replace(
        batch,
        input_ids=batch.input_ids[start:stop],
        attention_mask=batch.attention_mask[start:stop],
        position_ids=batch.position_ids[start:stop],
        labels=labels,
        shape=BatchShape(stop - start, batch.shape.tokens, batch.shape.kept, labelled),
        supervised=labelled,
        decoder_input_ids=None if batch.decoder_input_ids is None else batch.decoder_input_ids[start:stop],
    )
