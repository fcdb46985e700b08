"""Rows of text from the user's file, and the part of them that is held out. Needs no torch.

A row is a prompt and the completion to be learned. A file of any format becomes a stream of (number, record) pairs,
one function per format. Bad input stops here, in one line that names file, row and remedy; rows without anything to
learn are dropped and counted, never silently.

Prompt and completion are joined as given. Only where both sides lack whitespace at the seam (table columns such as
E2E's `mr` and `ref`) a newline goes between them, so that their words do not run together. `Row.prompt` stays the text
as given; `Row.context` is what the model reads.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from edgegt.errors import InputError, nearest

Record = tuple[int, Mapping[str, object]]
END_OF_TEXT = "<|endoftext|>"
COLUMN_EXAMPLE = "--columns prompt=NAME,completion=NAME or --columns text=NAME"


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
class Source:
    """The rows of one file. dropped: number of rows left out, by reason; name: the file's name without its folder."""

    rows: tuple[Row, ...]
    format: str
    name: str
    dropped: dict[str, int]


def read_rows(path: Path, columns: dict[str, str] | None) -> Source:
    """The rows of a JSONL, JSON, CSV, TSV or plain-text file.

    columns: from `parse_columns`; None reads `prompt` and `completion`, or `text`.
    Raises: InputError naming file and row for anything that cannot be read, and for a file without a usable row.
    """
    format_name = _format_of(path)
    if format_name == "text" and columns:
        raise InputError(f"'{path}' is plain text and has no columns: leave --columns out")
    records = FORMATS[format_name](_decoded(path), path)
    rows, dropped = _rows_of(records, path, columns)
    if not rows:
        counted = " and ".join(f"{count} with {reason}" for reason, count in dropped.items())
        raise InputError(f"'{path}' has no usable row ({counted or 'it is empty'}): give a file with text to learn")
    return Source(tuple(rows), format_name, path.name, dropped)


def parse_columns(text: str) -> dict[str, str]:
    """The mapping in 'prompt=mr,completion=ref' or 'text=body'.

    Raises: InputError for another shape or an unknown role.
    """
    columns: dict[str, str] = {}
    for part in text.split(","):
        role, equals, column = (piece.strip() for piece in part.partition("="))
        if not equals or not column or role in columns:
            raise InputError(f"--columns '{text}': '{part.strip()}' is not one ROLE=NAME; write {COLUMN_EXAMPLE}")
        if role not in ("prompt", "completion", "text"):
            raise InputError(f"--columns '{text}': unknown role '{role}'; write {COLUMN_EXAMPLE}")
        columns[role] = column
    if set(columns) not in ({"prompt", "completion"}, {"text"}):
        raise InputError(f"--columns '{text}' names only {_listed(columns)}; write {COLUMN_EXAMPLE}")
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
    if os.path.isdir(path):
        raise InputError(f"data '{path}' is a folder: give one file, {_listed(SUFFIXES)}")
    if not os.path.exists(path):
        siblings = os.listdir(path.parent) if os.access(path.parent, os.R_OK | os.X_OK) else []
        raise InputError(f"data file '{path}' does not exist{nearest(path.name, siblings)}: check the path of --data")
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"'{path}' has the unknown format '{suffix}': convert or rename to {_listed(SUFFIXES)}")
    return SUFFIXES[suffix]


def _decoded(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"'{path}' cannot be read ({error.strerror}): check its permissions") from error
    encoding, name = ("utf-16", "UTF-16") if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else ("utf-8-sig", "UTF-8")
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        at = error.start + (3 if raw[:3] == codecs.BOM_UTF8 else 0)
        where = f"'{path}' line {raw.count(bytes([10]), 0, at) + 1}"
        raise InputError(f"{where}: byte {at} (0x{raw[at]:02x}) is not valid {name}: save the file as UTF-8") from error


def _rows_of(records: Iterable[Record], path: Path, columns: dict[str, str] | None) -> tuple[list[Row], dict[str, int]]:
    rows: list[Row] = []
    dropped: Counter[str] = Counter()
    roles: Mapping[str, str] | None = None
    for number, record in records:
        roles = roles or _roles(record, path, columns)
        values = {role: _value(record, field, f"'{path}' row {number}") for role, field in roles.items()}
        learned = "text" if "text" in roles else "completion"
        row = Row(values.get("prompt", ""), values[learned], number)
        if not row.completion.strip():
            dropped[f"empty {learned}"] += 1
        elif re.search("[\ud800-\udfff]", row.prompt + row.completion):
            dropped["half a surrogate pair (broken Unicode)"] += 1
        else:
            rows.append(row)
    return rows, dict(dropped)


def _roles(record: Mapping[str, object], path: Path, columns: dict[str, str] | None) -> Mapping[str, str]:
    """Which field of the file plays which role, decided on its first row."""
    for name in (columns or {}).values():
        if name not in record:
            hint = nearest(name, record)
            raise InputError(f"'{path}' has no column '{name}'{hint}: it has {_listed(record)}; correct --columns")
    if columns:
        return columns
    for roles in (("prompt", "completion"), ("text",)):
        if all(role in record for role in roles):
            return {role: role for role in roles}
    found = f"it has {_listed(record)}; use {COLUMN_EXAMPLE}"
    raise InputError(f"'{path}' has neither 'prompt' and 'completion' nor 'text': {found}")


def _value(record: Mapping[str, object], field: str, where: str) -> str:
    """The text of a field; null is empty, numbers become text."""
    if field not in record:
        raise InputError(f"{where} has no field '{field}': it has {_listed(record)}; add it or delete the row")
    value = record[field]
    if value is None:
        return ""
    if not isinstance(value, (list, dict)):
        return value if isinstance(value, str) else json.dumps(value)
    kind = "a list" if isinstance(value, list) else "an object"
    raise InputError(f"{where}: field '{field}' is {kind}, wanted text or a number: join it to one text first")


def _jsonl(text: str, path: Path) -> Iterator[Record]:
    """One object per line. Not splitlines(): U+2028 and others may stand inside a JSON string."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _object(_parsed(line, path, number), path, number)


def _json(text: str, path: Path) -> Iterator[Record]:
    """One list of objects; one object per line is accepted under this name too."""
    if all(line.lstrip()[:1] in ("", "{") for line in text.split("\n")):
        yield from _jsonl(text, path)
        return
    if not text.lstrip().startswith("["):
        raise InputError(f"'{path}' is not a list of objects: write [{{...}}, {{...}}] or one object per line")
    for number, value in enumerate(cast("list[object]", _parsed(text, path, None)), start=1):
        yield number, _object(value, path, number)


def _parsed(text: str, path: Path, row: int | None) -> object:
    """The JSON value of a line, or of a whole list when row is None."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"row {row}" if row else f"row {_failing_row(text, error.pos)} (line {error.lineno})"
        excerpt = text[max(0, error.pos - 20) : error.pos + 20]
        what = f"malformed JSON at column {error.colno} ({error.msg}) near {excerpt!r}"
        raise InputError(f"'{path}' {where}: {what}: correct or delete it") from error
    except (ValueError, RecursionError) as error:
        where = f" row {row}" if row else ""
        raise InputError(f"'{path}'{where}: a number too long or brackets too deep to read: delete it") from error


def _failing_row(text: str, position: int) -> int:
    """1-based place in the list of the object at or around a position that could not be read."""
    between = re.compile(r"[\s,]*")
    row, at = 1, text.index("[") + 1
    with contextlib.suppress(ValueError, RecursionError):
        while (at := between.match(text, at).end()) < position:  # type: ignore[union-attr]
            at = json.JSONDecoder().raw_decode(text, at)[1]
            row += 1
    return row


def _object(value: object, path: Path, number: int) -> Mapping[str, object]:
    if isinstance(value, dict):
        return value
    wanted = 'an object: write {"prompt": ..., "completion": ...}'
    raise InputError(f"'{path}' row {number} is {json.dumps(value)[:40]}, not {wanted}")


def _csv(text: str, path: Path) -> Iterator[Record]:
    """Spreadsheets of some countries write semicolons."""
    return _table(text, path, ";" if re.match(r"[^,\n]*;[^,\n]*(\n|$)", text) else ",")


def _table(text: str, path: Path, delimiter: str = "\t") -> Iterator[Record]:
    """A table whose first row names the columns."""
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    number = 0
    try:
        for number, fields in enumerate(reader, start=1):
            if not header:
                header = [name.strip() for name in fields]
            elif fields:
                if len(fields) != len(header):
                    counts = f"{len(fields)} fields, the header has {len(header)}"
                    raise InputError(f"'{path}' row {number} has {counts}: put text that holds {delimiter!r} in quotes")
                yield number, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise InputError(f"'{path}' row {number + 1}: {error}: close every quote and double those inside") from error


def _text(text: str, path: Path) -> Iterator[Record]:
    """Texts divided by lines of <|endoftext|>, else by blank lines, else the whole."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    marked = any(line.strip() == END_OF_TEXT for line in lines)
    piece: list[str] = []
    start = 1
    for number, line in enumerate([*lines, END_OF_TEXT], start=1):
        if line.strip() == END_OF_TEXT or not (marked or line.strip()):
            if piece:
                yield start, {"text": "\n".join(piece).rstrip()}
            piece = []
        elif piece or line.strip():
            start = start if piece else number
            piece.append(line)


def _listed(names: Iterable[str], most: int = 8) -> str:
    shown = [f"'{name}'" for name in names]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")


Reader = Callable[[str, Path], Iterator[Record]]
FORMATS: dict[str, Reader] = {"jsonl": _jsonl, "json": _json, "csv": _csv, "tsv": _table, "text": _text}
SUFFIXES = {".jsonl": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".txt": "text"}
