"""Rows of text from the user's file, and the part of them that is held out. Needs no torch.

A row is a prompt and the completion to be learned. A file of any format becomes a stream of (number, record) pairs
(see `formats`). Bad input stops here, in one line that names file, row and remedy, unless bad rows are to be left out:
then they are listed. Rows without anything to learn are dropped and counted, never silently.

Prompt and completion are joined as given. Only where both sides lack whitespace at the seam (table columns such as
E2E's `mr` and `ref`) a newline goes between them, so that their words do not run together. `Row.prompt` stays the text
as given; `Row.context` is what the model reads.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from edgegt.data.formats import FORMATS, SKIP, SUFFIXES, Fault, Fields, Record, listed
from edgegt.errors import InputError, nearest
from edgegt.units import format_text

COLUMN_EXAMPLE = "--columns prompt=NAME,completion=NAME or --columns text=NAME"
_LONGEST_NAME = 100
_MOST_NAMES = 1000


@dataclass(frozen=True)
class Row:
    """One example as given. number: 1-based line (JSONL, text), table row with the header as 1, or place in a list."""

    prompt: str
    completion: str
    number: int

    @property
    def separator(self) -> str:
        """A newline where prompt and completion would run together, else nothing."""
        if not self.prompt or self.prompt[-1:].isspace() or self.completion[:1].isspace():
            return ""
        return "\n"

    @property
    def context(self) -> str:
        """What the model reads before the completion: the prompt and the separator."""
        return self.prompt + self.separator


@dataclass(frozen=True)
class BadRow:
    """A row that was left out because it cannot be read. number: as in `Row`; reason: with little of the text."""

    number: int
    reason: str


@dataclass(frozen=True)
class Source:
    """The rows of one file.

    name: the file's name without its folder; dropped: number of rows without anything to learn, by reason; bad: the
    rows that could not be read, in the file's order.
    """

    rows: tuple[Row, ...]
    format: str
    name: str
    dropped: dict[str, int]
    bad: tuple[BadRow, ...] = ()


def read_rows(path: Path, columns: dict[str, str] | None, skip_bad: bool = False) -> Source:
    """The rows of a JSONL, JSON, CSV, TSV or plain-text file.

    columns: from `parse_columns`; None reads `prompt` and `completion`, or `text`. skip_bad: leave out and list rows
    that cannot be read, where the rest of the file can.
    Raises: InputError naming file and row for anything that cannot be read, and for a file without a usable row.
    """
    format_name = _format_of(path)
    if format_name == "text" and columns:
        raise InputError(f"'{_shown(path)}' is plain text and has no columns: leave --columns out")
    records = FORMATS[format_name](_decoded(path, skip_bad), path)
    rows, dropped, bad = _rows_of(records, path, columns, skip_bad)
    if not rows:
        counted = [f"{count} with {reason}" for reason, count in dropped.items()]
        if bad:
            rest = "" if dropped else "all "
            counted.append(f"{rest}{len(bad)} bad, such as row {bad[0].number}: {bad[0].reason}")
        found = " and ".join(counted) or "it is empty"
        raise InputError(f"'{_shown(path)}' has no usable row ({found}): give a file with text to learn")
    return Source(tuple(rows), format_name, path.name, dropped, tuple(bad))


def parse_columns(text: str) -> dict[str, str]:
    """The mapping in 'prompt=mr,completion=ref' or 'text=body'.

    Raises: InputError for another shape or an unknown role.
    """
    columns: dict[str, str] = {}
    shown = format_text(text, 100)
    for part in text.split(","):
        role, equals, column = (piece.strip() for piece in part.partition("="))
        if not equals or not column or role in columns:
            one = format_text(part.strip())
            raise InputError(f"--columns '{shown}': '{one}' is not one ROLE=NAME; write {COLUMN_EXAMPLE}")
        if role not in ("prompt", "completion", "text"):
            raise InputError(f"--columns '{shown}': unknown role '{format_text(role)}'; write {COLUMN_EXAMPLE}")
        columns[role] = column
    if set(columns) not in ({"prompt", "completion"}, {"text"}):
        raise InputError(f"--columns '{shown}' names only {listed(columns)}; write {COLUMN_EXAMPLE}")
    return columns


def split_rows(rows: Sequence[Row], eval_fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on and rows held out; equal prompts (but for case and spaces) stay on one side.

    Seed and key (the prompt, or the completion where that is empty) decide, so that adding rows moves no others.
    Raises: InputError when the fraction is not between 0 and 1, or with fewer than the two keys that two sides need.
    """
    if not 0 < eval_fraction < 1:
        raise InputError(f"--eval-fraction {eval_fraction:g} is not between 0 and 1: write 0.1 to hold out a tenth")
    places = {key: _place(key, seed) for key in map(_key, rows)}
    if len(places) < 2:
        found = f"{len(rows)} row(s) with {len(places)} distinct prompt(s)"
        remedy = "give --eval-data FILE, or more rows (plain text: put a blank line between texts)"
        raise InputError(f"{found} cannot be split into training and held-out rows: {remedy}")
    ordered = sorted(places, key=lambda key: places[key])
    held_out = {key for key in ordered if places[key] < eval_fraction} or {ordered[0]}
    if len(held_out) == len(ordered):
        held_out.discard(ordered[-1])
    train = [row for row in rows if _key(row) not in held_out]
    return train, [row for row in rows if _key(row) in held_out]


def _key(row: Row) -> str:
    return " ".join(row.prompt.split()).casefold() or " ".join(row.completion.split()).casefold()


def _place(key: str, seed: int) -> float:
    """A number in [0, 1) drawn by seed and key."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}".encode()).digest()[:6], "big") / 2**48


def _format_of(path: Path) -> str:
    shown = _shown(path)
    if os.path.isdir(path):
        raise InputError(f"data '{shown}' is a folder: give one file, {listed(SUFFIXES)}")
    if not os.path.exists(path):
        hint = _hint(path.name, _siblings(path))
        raise InputError(f"data file '{shown}' does not exist{hint}: check the path of --data")
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


def _rows_of(
    records: Iterable[Record], path: Path, columns: dict[str, str] | None, skip_bad: bool
) -> tuple[list[Row], dict[str, int], list[BadRow]]:
    """Rows, how many were dropped for which reason, and bad rows. The first row that has them decides the columns."""
    rows: list[Row] = []
    bad: list[BadRow] = []
    dropped: Counter[str] = Counter()
    roles: Mapping[str, str] | None = None
    unfit: Fields | None = None
    for number, record in records:
        found: Row | Fault
        if isinstance(record, Fault):
            found = record
        elif (roles := roles or _roles(record, columns)) is not None:
            found = _row(record, roles, number)
        elif skip_bad:
            unfit = record if unfit is None else unfit
            found = Fault("without the columns", "")
        else:
            raise _lacking(record, path, columns)
        if isinstance(found, Fault):
            if not skip_bad:
                raise found.error(path, number)
            bad.append(BadRow(number, found.reason))
        elif skip_bad and re.search("[\udc80-\udcff]", found.prompt + found.completion):
            bad.append(BadRow(number, "bytes that are not UTF-8"))
        elif not found.completion.strip():
            dropped[f"empty {'completion' if roles is None or 'text' not in roles else 'text'}"] += 1
        elif re.search("[\ud800-\udfff]", found.prompt + found.completion):
            dropped["half a surrogate pair (broken Unicode)"] += 1
        else:
            rows.append(found)
    if roles is None and unfit is not None:
        raise _lacking(unfit, path, columns)
    return rows, dict(dropped), bad


def _row(record: Fields, roles: Mapping[str, str], number: int) -> Row | Fault:
    values: dict[str, str] = {}
    for role, field in roles.items():
        value = _value(record, field)
        if isinstance(value, Fault):
            return value
        values[role] = value
    return Row(values.get("prompt", ""), values["text" if "text" in roles else "completion"], number)


def _roles(record: Fields, columns: dict[str, str] | None) -> Mapping[str, str] | None:
    """Which field of the record plays which role; None where it lacks them."""
    if columns:
        return columns if all(name in record for name in columns.values()) else None
    for roles in (("prompt", "completion"), ("text",)):
        if all(role in record for role in roles):
            return {role: role for role in roles}
    return None


def _lacking(record: Fields, path: Path, columns: dict[str, str] | None) -> InputError:
    for name in (columns or {}).values():
        if name not in record:
            has = f"it has {listed(record)}; correct --columns"
            return InputError(f"'{_shown(path)}' has no column '{format_text(name)}'{_hint(name, record)}: {has}")
    found = f"it has {listed(record)}; use {COLUMN_EXAMPLE}"
    return InputError(f"'{_shown(path)}' has neither 'prompt' and 'completion' nor 'text': {found}")


def _value(record: Fields, field: str) -> str | Fault:
    """The text of a field; null is empty, numbers become text."""
    short = format_text(field, 20)
    if field not in record:
        reason = f"no field '{short}'"
        return Fault(reason, f" has {reason}: it has {listed(record)}; add it or delete the row")
    value = record[field]
    if value is None:
        return ""
    if not isinstance(value, (list, dict)):
        return value if isinstance(value, str) else json.dumps(value)
    reason = f"field '{short}' is {'a list' if isinstance(value, list) else 'an object'}"
    return Fault(reason, f": {reason}, wanted text or a number: join it to one text first")


def _hint(name: str, known: Iterable[str]) -> str:
    """`nearest` among names that a person could have mistyped: comparing long ones takes time with their square."""
    if len(name) > _LONGEST_NAME:
        return ""
    short = (one for one in islice(known, _MOST_NAMES) if len(one) <= _LONGEST_NAME)
    return format_text(nearest(name, short), None)


def _shown(path: Path) -> str:
    return format_text(path, None)
