"""Rows for classification: a text that is read, and the class of the whole of it. Needs no torch.

A text gets the tokens that the model's own tokenizer puts around it, and loses its right where it is too long. The
classes are those of the training rows, numbers in their order and words in the alphabet's, or those that a model knows.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgegt.data.examples import Example, encode
from edgegt.data.rows import Row
from edgegt.data.tokens import TokenReport
from edgegt.errors import InputError
from edgegt.units import format_text

MOST_CLASSES = 4096
SHOWN_CLASSES = 12
UNKNOWN = "label that no training row has"


@dataclass(frozen=True)
class Reading:
    """known: the classes that the model tells apart already. right: rows are padded on the right, as for an encoder.

    fixed: the known classes are those of a trained model, and rows of other classes are left out.
    """

    known: tuple[str, ...] = ()
    right: bool = False
    fixed: bool = False


@dataclass(frozen=True)
class LabelReport(TokenReport):
    """What became of the rows. counts: kept rows of each class, in the order of the classes."""

    counts: tuple[tuple[str, int], ...] = ()

    def line(self) -> str:
        """'80 rows: 80 kept, 0 of them cut; 2 classes (no 30, yes 50); 12 tokens per example, at most 30'."""
        rows, _, lengths = super().line().split("; ")
        return f"{rows}; {counted(self.counts)}; {lengths}"


def counted(counts: Sequence[tuple[str, int]]) -> str:
    """'2 classes (no 30, yes 50)'."""
    shown = ", ".join(f"{format_text(label, 20)} {count}" for label, count in counts[:SHOWN_CLASSES])
    more = f" and {len(counts) - SHOWN_CLASSES} more" if len(counts) > SHOWN_CLASSES else ""
    return f"{len(counts)} classes ({shown}{more})"


def classes_of(rows: Sequence[Row], reading: Reading) -> tuple[str, ...]:
    """The classes of the training rows; those that the model knows where these rows have no others.

    Raises: InputError for fewer than two, and for labels that are no classes.
    """
    found = {_label(row) for row in rows}
    if reading.fixed or (reading.known and (found <= set(reading.known) or found == _numbers(len(reading.known)))):
        return reading.known
    if len(found) < 2:
        only = format_text(next(iter(found), ""))
        raise InputError(f"all {len(rows)} rows have the label '{only}': give rows of two classes or more")
    if len(found) > MOST_CLASSES or len(found) == len(rows) > 2:
        one = format_text(min(found), 40)
        raise InputError(
            f"{len(rows)} rows have {len(found)} different labels, such as '{one}': name the column that holds the "
            "class with --columns text=NAME,label=NAME"
        )
    try:
        return tuple(sorted(found, key=lambda label: (float(label), label)))
    except ValueError:
        return tuple(sorted(found))


def labelled(
    rows: Sequence[Row], tokenizer: Any, max_length: int, classes: Sequence[str], reading: Reading
) -> tuple[list[Example], LabelReport]:
    """Examples of at most `max_length` tokens, in the order of the rows.

    Rows of a class that is not among `classes` are left out and counted. Raises: InputError when none is left.
    """
    places = {label: place for place, label in enumerate(classes)}
    notes: tuple[str, ...] = ()
    found = {_label(row) for row in rows}
    if found.isdisjoint(places) and found <= _numbers(len(classes)):
        places = {str(place): place for place in range(len(classes))}
        notes = (f"labels are taken as numbers of the model's classes, {_named(classes)}, counted from 0",)
    kept = [row for row in rows if _label(row) in places]
    if not kept:
        one = format_text(_label(rows[0]), 40)
        raise InputError(
            f"none of {len(rows)} row(s) has a label that is known, such as '{one}': known are {_named(classes)}; "
            "correct the labels"
        )
    special = set(getattr(tokenizer, "all_special_ids", None) or ())
    examples, cut = [], 0
    for row, ids in zip(kept, encode(tokenizer, [row.prompt for row in kept], special=True), strict=True):
        if len(ids) > max_length:
            cut += 1
            ids = (*ids[: max_length - 1], ids[-1]) if ids[-1] in special else ids[:max_length]
        if ids:
            examples.append(Example(ids, (), row, label=places[_label(row)], right=reading.right))
    dropped = {UNKNOWN: len(rows) - len(kept)} if len(kept) < len(rows) else {}
    if len(examples) < len(kept):
        dropped["text without a token"] = len(kept) - len(examples)
    if not examples:
        raise InputError(f"no text in {len(rows)} row(s) has a token: give text that the tokenizer knows")
    counts = Counter(example.label for example in examples)
    lengths = [len(example.inputs) for example in examples]
    return examples, LabelReport(
        len(rows), len(examples), cut, dropped, len(examples), max(lengths), sum(lengths) / len(lengths), len(examples),
        notes, tuple((label, counts[place]) for place, label in enumerate(classes)),
    )  # fmt: skip


def matched(
    examples: Sequence[Example], pool: Sequence[int], rows: int, batches: int, draw: random.Random
) -> list[int]:  # fmt: skip
    """Indices of `batches` (even) times `rows` (even) examples of the pool, to measure importance on.

    Both halves of a batch, and both batches of a pair, have the same classes row by row: what rows of different classes
    ask of a weight differs in sign, which says nothing of what it is worth.
    """
    members: dict[int | None, list[int]] = {}
    for index in pool:
        members.setdefault(examples[index].label, []).append(index)
    found: list[int] = []
    for _ in range(batches // 2):
        classes = [examples[draw.choice(pool)].label for _ in range(rows // 2)]
        for _ in range(4):
            found += [draw.choice(members[label]) for label in classes]
    return found


def _named(classes: Sequence[str]) -> str:
    shown = ", ".join(format_text(label, 20) for label in classes[:SHOWN_CLASSES])
    return shown + (f" and {len(classes) - SHOWN_CLASSES} more" if len(classes) > SHOWN_CLASSES else "")


def _label(row: Row) -> str:
    return row.completion.strip()


def _numbers(count: int) -> set[str]:
    return {str(place) for place in range(count)}
