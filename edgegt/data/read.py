"""Rows of text from the user's files, and the part of them that is held out. Needs no torch.

A file of any format becomes a stream of (number, record) pairs (see `formats`), and these become rows by the fields
they have (see `layouts`). Bad input stops here, in one line that names file, row and remedy, unless bad rows are to be
left out: then they are listed. Rows without anything to learn are dropped and counted, never silently.
"""

from __future__ import annotations

import codecs
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from edgegt.data import arrow, piqa
from edgegt.data.fields import hint
from edgegt.data.formats import FORMATS, SKIP, listed
from edgegt.data.formats import SUFFIXES as TEXT_SUFFIXES
from edgegt.data.layouts import CLASSIFICATION, COLUMN_EXAMPLE, LABEL_EXAMPLE, LABELLED, LAYOUTS, Layout, rows_of
from edgegt.data.rows import BadRow, Row, Source
from edgegt.errors import InputError
from edgegt.units import format_text

SUFFIXES = {**TEXT_SUFFIXES, **arrow.SUFFIXES}
_ROLES = ({"prompt", "completion"}, {"text"}, {"messages"})
_LABEL_ROLES = {"text", "label"}


def read_rows(
    path: Path, columns: dict[str, str] | None, skip_bad: bool = False, layout: str | None = None
) -> Source:  # fmt: skip
    """The rows of a JSONL, JSON, CSV, TSV, Parquet, Arrow or plain-text file.

    columns: from `parse_columns`; None takes the layout that fits, or the one named; for classification the layout
    is 'classification' in either case. skip_bad: leave out and list rows that cannot be read, where the rest can.
    Raises: InputError naming file and row for anything that cannot be read, and for a file without a usable row.
    """
    format_name = _format_of(path)
    labels = layout == CLASSIFICATION
    if format_name == "text" and labels:
        raise InputError(f"'{_shown(path)}' is plain text and has no labels: give JSONL, CSV or another table")
    if columns and layout and not labels:
        raise InputError(f"--columns and --format {layout} both say which fields to read: leave one of them out")
    if format_name == "text" and (columns or layout not in (None, "text")):
        said = "--columns" if columns else f"--format {layout}"
        raise InputError(f"'{_shown(path)}' is plain text and has no columns: leave {said} out")
    if format_name in arrow.SUFFIXES.values():
        records = arrow.records_of(path, format_name)
    else:
        records = FORMATS[format_name](_decoded(path, skip_bad), path)
    wanted = Layout("columns", columns) if columns else None
    if layout == "piqa":
        records = piqa.labelled(records, path)
        wanted = LAYOUTS["prompt-completion"]
    elif layout is not None and not labels:
        wanted = LAYOUTS[layout]
    choices = LABELLED if labels else tuple(LAYOUTS.values())
    rows, dropped, bad, name = rows_of(records, path, wanted, skip_bad, choices)
    if not rows:
        counted = [f"{count} with {reason}" for reason, count in dropped.items()]
        if bad:
            rest = "" if dropped else "all "
            counted.append(f"{rest}{len(bad)} bad, such as row {bad[0].number}: {bad[0].reason}")
        found = " and ".join(counted) or "it is empty"
        raise InputError(f"'{_shown(path)}' has no usable row ({found}): give a file with text to learn")
    return Source(tuple(rows), format_name, path.name, dropped, tuple(bad), "piqa" if layout == "piqa" else name)


def read_parts(
    paths: Sequence[Path], columns: dict[str, str] | None, skip_bad: bool = False, layout: str | None = None
) -> Source:  # fmt: skip
    """The rows of the files of one split, in order. Row numbers count within each file."""
    parts = [read_rows(path, columns, skip_bad, layout) for path in paths]
    if len(parts) == 1:
        return parts[0]
    rows = tuple(row for part in parts for row in part.rows)
    bad: tuple[BadRow, ...] = tuple(row for part in parts for row in part.bad)
    dropped = sum((Counter(part.dropped) for part in parts), Counter[str]())
    name = f"{parts[0].name} and {len(parts) - 1} more"
    return Source(rows, parts[0].format, name, dict(dropped), bad, parts[0].layout)


def parse_columns(text: str, labels: bool = False) -> dict[str, str]:
    """The mapping in 'prompt=mr,completion=ref', 'text=body' or 'messages=turns'; a name may be a dotted path.

    labels: for classification, the one in 'text=review,label=stars'.
    Raises: InputError for another shape or an unknown role.
    """
    sets, example = ((_LABEL_ROLES,), LABEL_EXAMPLE) if labels else (_ROLES, COLUMN_EXAMPLE)
    columns: dict[str, str] = {}
    shown = format_text(text, 100)
    for part in text.split(","):
        role, equals, column = (piece.strip() for piece in part.partition("="))
        if not equals or not column or role in columns:
            one = format_text(part.strip())
            raise InputError(f"--columns '{shown}': '{one}' is not one ROLE=NAME; write {example}")
        if role == "label" and not labels:
            raise InputError(f"--columns '{shown}' names a label: add --task classification, or write {example}")
        if not any(role in roles for roles in sets):
            raise InputError(f"--columns '{shown}': unknown role '{format_text(role)}'; write {example}")
        columns[role] = column
    if set(columns) not in sets:
        raise InputError(f"--columns '{shown}' names only {listed(columns)}; write {example}")
    return columns


def split_rows(rows: Sequence[Row], eval_fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows held out; equal prompts (but for case and spaces) stay on one side.

    Seed and key (what is asked, or the completion where that is empty) decide, so that adding rows moves no others.
    Raises: InputError when the fraction is not between 0 and 1, or with fewer than the two keys that two sides need.
    """
    if not 0 < eval_fraction < 1:
        raise InputError(f"--eval-fraction {eval_fraction:g} is not between 0 and 1: write 0.1 to hold out a tenth")
    places = {key: _place(key, seed) for key in {row.key for row in rows}}
    if len(places) < 2:
        found = f"{len(rows)} row(s) with {len(places)} distinct prompt(s)"
        remedy = "give --eval-data FILE, or more rows (plain text: put a blank line between texts)"
        raise InputError(f"{found} cannot be split into training and held-out rows: {remedy}")
    ordered = sorted(places, key=lambda key: places[key])
    held_out = {key for key in ordered if places[key] < eval_fraction} or {ordered[0]}
    if len(held_out) == len(ordered):
        held_out.discard(ordered[-1])
    train = [row for row in rows if row.key not in held_out]
    return train, [row for row in rows if row.key in held_out]


def _place(key: str, seed: int) -> float:
    """A number in [0, 1) drawn by seed and key."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:6], "big") / 2**48


def _format_of(path: Path) -> str:
    shown = _shown(path)
    if os.path.isdir(path):
        raise InputError(f"data '{shown}' is a folder: give one file, {listed(SUFFIXES)}")
    if not os.path.exists(path):
        near = hint(path.name, _siblings(path))
        raise InputError(f"data file '{shown}' does not exist{near}: check the path of --data")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"'{shown}' has the unknown format '{format_text(suffix)}': convert or rename to "
                         f"{listed(SUFFIXES)}")  # fmt: skip
    if not os.path.isfile(path):
        raise InputError(f"'{shown}' is not a regular file: copy what it gives into one")
    return SUFFIXES[suffix]


def _siblings(path: Path) -> list[str]:
    try:
        return os.listdir(path.parent)
    except (OSError, ValueError):
        return []


def _decoded(path: Path, skip_bad: bool) -> str:
    """The text of the file; with `skip_bad`, a byte that is not UTF-8 becomes U+DC00 and its value, to be found later.

    UTF-16 has no such place holder, since what follows a lost byte is lost too.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"'{_shown(path)}' cannot be read ({error.strerror}): check its permissions") from error
    wide = raw[:2] in (b"\xff\xfe", b"\xfe\xff")
    try:
        if wide:
            return raw.decode("utf-16")
        return raw.decode("utf-8-sig", "surrogateescape" if skip_bad else "strict")
    except UnicodeDecodeError as error:
        at = error.start + (3 if raw[:3] == codecs.BOM_UTF8 else 0)
        where = f"'{_shown(path)}' line {raw.count(bytes([10]), 0, at) + 1}"
        name, remedy = ("UTF-16", "") if wide else ("UTF-8", f", {SKIP}")
        fault = f"byte {at} (0x{raw[at]:02x}) is not valid {name}"
        raise InputError(f"{where}: {fault}: save the file as UTF-8{remedy}") from error


def _shown(path: Path) -> str:
    return format_text(path, None)
