"""The formats of data files: decoded text to a stream of (row number, record or fault), one function per format.

A fault is a row that cannot be read while the rows after it can: the caller refuses the file for it, or leaves the row
out. What concerns the whole file (no list, a header that cannot be read) is an InputError here.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from edgegt.errors import InputError
from edgegt.units import format_text

END_OF_TEXT = "<|endoftext|>"
SKIP = "or leave such rows out with --skip-bad-rows"
# How often a line of a table is read at most, on average, behind quotes that are never closed.
_READ_AGAIN = 8


@dataclass(frozen=True)
class Fault:
    """Why a row cannot be read.

    reason: for the list of rows left out, with next to nothing of the user's text; refusal: what follows the number of
    the row where the file is refused, with a remedy.
    """

    reason: str
    refusal: str

    def error(self, path: Path, number: int) -> InputError:
        """The refusal of the file for this row."""
        return InputError(f"'{format_text(path, None)}' row {number}{self.refusal}, {SKIP}")


Fields = Mapping[str, object]
Record = tuple[int, Fields | Fault]


def listed(names: Iterable[str], most: int = 8) -> str:
    """'a', 'b' and 3 more."""
    shown = [f"'{format_text(name, 40)}'" for name in names]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")


def _jsonl(text: str, path: Path) -> Iterator[Record]:
    """One object per line; one list of objects is accepted under this name too.

    Not splitlines(): U+2028 and others may stand inside a JSON string.
    """
    if (objects := _list_of_objects(text)) is not None:
        yield from enumerate(objects, start=1)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, _line(line)


def _list_of_objects(text: str) -> list[Fields] | None:
    """The objects of a text that is one list of them, at least one; None for any other."""
    if not text.lstrip().startswith("["):
        return None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return values if values and all(isinstance(value, dict) for value in values) else None


def _line(line: str) -> Fields | Fault:
    try:
        return _object(json.loads(line))
    except json.JSONDecodeError as error:
        return Fault(f"malformed JSON at column {error.colno}", f": {_malformed(line, error)}: correct or delete it")
    except (ValueError, RecursionError):
        what = "a number too long or brackets too deep to read"
        return Fault(what, f": {what}: delete it")


def _json(text: str, path: Path) -> Iterator[Record]:
    """One list of objects; one object per line is accepted under this name too."""
    if all(line.lstrip()[:1] in ("", "{") for line in text.split("\n")):
        yield from _jsonl(text, path)
        return
    shown = format_text(path, None)
    if not text.lstrip().startswith("["):
        raise InputError(f"'{shown}' is not a list of objects: write [{{...}}, {{...}}] or one object per line")
    try:
        values = cast("list[object]", json.loads(text))
    except json.JSONDecodeError as error:
        where = f"row {_failing_row(text, error.pos)} (line {error.lineno})"
        raise InputError(f"'{shown}' {where}: {_malformed(text, error)}: correct or delete it") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"'{shown}': a number too long or brackets too deep to read: delete it") from error
    for number, value in enumerate(values, start=1):
        yield number, _object(value)


def _malformed(text: str, error: json.JSONDecodeError) -> str:
    excerpt = text[max(0, error.pos - 20) : error.pos + 20]
    return f"malformed JSON at column {error.colno} ({error.msg}) near {excerpt!r}"


def _failing_row(text: str, position: int) -> int:
    """1-based place in the list of the object at or around a position that could not be read."""
    between = re.compile(r"[\s,]*")
    row, at = 1, text.index("[") + 1
    with contextlib.suppress(ValueError, RecursionError):
        while (at := between.match(text, at).end()) < position:  # type: ignore[union-attr]
            at = json.JSONDecoder().raw_decode(text, at)[1]
            row += 1
    return row


def _object(value: object) -> Fields | Fault:
    if isinstance(value, dict):
        return value
    kinds = {list: "a list", str: "a text", bool: "a truth value", type(None): "null"}
    try:
        shown = format_text(json.dumps(value), 40)
    except (ValueError, RecursionError):
        shown = "too long to show"
    wanted = 'an object: write {"prompt": ..., "completion": ...}'
    return Fault(f"{kinds.get(type(value), 'a number')}, not an object", f" is {shown}, not {wanted}")


def _csv(text: str, path: Path) -> Iterator[Record]:
    """Spreadsheets of some countries write semicolons, and some programs tabs."""
    first = text.partition("\n")[0]
    return _table(text, path, next((one for one in ",;\t" if one in first), ","))


def _table(text: str, path: Path, delimiter: str = "\t") -> Iterator[Record]:
    """A table whose first row names the columns. Behind a row that cannot be read it goes on with that row's next line.

    Raises: InputError for a header that cannot be read, and where so many quotes stay open that this would not end.
    """
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    lines = io.StringIO(text, newline="").readlines()
    header: list[str] = []
    number = start = left = 0
    while start < len(lines):
        reader = csv.reader(map(lines.__getitem__, range(start, len(lines))), delimiter=delimiter, strict=True)
        begin = start
        try:
            for fields in reader:
                number, begin = number + 1, start + reader.line_num
                if not header:
                    header = _header(fields, path)
                elif fields:
                    yield number, _named(fields, header, delimiter)
            return
        except csv.Error as error:
            number += 1
            reason = format_text(error)
            fault = Fault(reason, f": {reason}: close every quote and double those inside")
            left += start + reader.line_num - begin
            if not header or left > _READ_AGAIN * len(lines):
                raise InputError(f"'{format_text(path, None)}' row {number}{fault.refusal}") from error
            yield number, fault
            start = begin + 1


def _header(fields: list[str], path: Path) -> list[str]:
    """The names of the columns. Raises: InputError for one that occurs twice, of which one would be lost."""
    names = [name.strip() for name in fields]
    twice = next((name for name, count in Counter(names).items() if name and count > 1), None)
    if twice is not None:
        raise InputError(f"'{format_text(path, None)}' has the column '{format_text(twice)}' twice: rename one of them")
    return names


def _named(fields: list[str], header: list[str], delimiter: str) -> Fields | Fault:
    if len(fields) == len(header):
        return dict(zip(header, fields, strict=True))
    counts = f"{len(fields)} field{'s' * (len(fields) > 1)}, the header has {len(header)}"
    return Fault(counts, f" has {counts}: put text that holds {delimiter!r} in quotes")


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


Reader = Callable[[str, Path], Iterator[Record]]
FORMATS: dict[str, Reader] = {"jsonl": _jsonl, "json": _json, "csv": _csv, "tsv": _table, "text": _text}
SUFFIXES = {".jsonl": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".txt": "text"}
