"""Which fields of a record hold what: the layouts that people's files have, found by their keys or named by --format.

The first record that has the fields of a layout decides for its file. Adding a layout is one row of LAYOUTS.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgegt.data.fields import ABSENT, hint, lookup, texts
from edgegt.data.formats import Fault, Fields, Record, listed
from edgegt.data.rows import BadRow, Row
from edgegt.data.turns import read_turns
from edgegt.errors import InputError
from edgegt.units import format_text

COLUMN_EXAMPLE = "--columns prompt=NAME,completion=NAME, --columns text=NAME or --columns messages=NAME"
LABEL_EXAMPLE = "--columns text=NAME,label=NAME"
JOINED_BY = " "


@dataclass(frozen=True)
class Layout:
    """fields: the field of each role (messages; prompt and completion; text, perhaps with label).

    extra: a field that follows the prompt after a blank line, where it is there and not empty.
    """

    name: str
    fields: Mapping[str, str]
    extra: str | None = None

    def fits(self, record: Fields) -> bool:
        """Whether the record has all the fields."""
        return all(lookup(record, field) is not ABSENT for field in self.fields.values())

    def row(self, record: Fields, number: int) -> Row | Fault:
        """The record as a row. A list in a prompt is joined by spaces; of one in a completion the first is learned."""
        if "messages" in self.fields:
            turns = read_turns(record, self.fields["messages"])
            return turns if isinstance(turns, Fault) else Row.of_turns(turns, number)
        values: dict[str, list[str]] = {}
        for role, field in self.fields.items():
            found = texts(record, field, several=role not in ("text", "label"))
            if isinstance(found, Fault):
                return found
            values[role] = found
        if "label" in values:
            return Row(values["text"][0], values["label"][0].strip(), number)
        if "text" in values:
            return Row("", values["text"][0], number)
        prompt = JOINED_BY.join(values["prompt"])
        if self.extra is not None and self.extra in record:
            more = texts(record, self.extra, several=True)
            if isinstance(more, Fault):
                return more
            joined = JOINED_BY.join(more)
            prompt = f"{prompt}\n\n{joined}" if joined.strip() else prompt
        right = [one for one in values["completion"] if one.strip()]
        first = right[0] if len(values["completion"]) != 1 and right else "".join(values["completion"][:1])
        return Row(prompt, first, number, references=tuple(right) if len(right) > 1 else ())

    @property
    def nothing(self) -> str:
        """Why a row without a completion is dropped."""
        if "messages" in self.fields:
            return "no assistant turn"
        if "label" in self.fields:
            return "no label"
        return "empty text" if "text" in self.fields else "empty completion"


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("messages", {"messages": "messages"}),
        Layout("conversations", {"messages": "conversations"}),
        Layout("prompt-completion", {"prompt": "prompt", "completion": "completion"}),
        Layout("instruction", {"prompt": "instruction", "completion": "output"}, "input"),
        Layout("text", {"text": "text"}),
    )
}

CLASSIFICATION = "classification"
# For classification only: a text alone is language to everything else.
LABELLED = tuple(Layout(CLASSIFICATION, {"text": text, "label": "label"}) for text in ("text", "sentence"))


def rows_of(
    records: Iterable[Record],
    path: Path,
    wanted: Layout | None,
    skip_bad: bool,
    choices: Collection[Layout] = tuple(LAYOUTS.values()),
) -> tuple[list[Row], dict[str, int], list[BadRow], str]:
    """Rows, how many were dropped for which reason, bad rows, and the layout's name.

    wanted: the only layout that may be; None takes the first of `choices` that fits.
    """
    rows: list[Row] = []
    bad: list[BadRow] = []
    dropped: Counter[str] = Counter()
    layout: Layout | None = None
    unfit: Fields | None = None
    choices = choices if wanted is None else (wanted,)
    for number, record in records:
        found: Row | Fault
        if isinstance(record, Fault):
            found = record
        elif (layout := layout or next((one for one in choices if one.fits(record)), None)) is not None:
            found = layout.row(record, number)
        elif skip_bad:
            unfit = record if unfit is None else unfit
            found = Fault("without the columns", "")
        else:
            raise _lacking(record, path, wanted, choices)
        if isinstance(found, Fault):
            if not skip_bad:
                raise found.error(path, number)
            bad.append(BadRow(number, found.reason))
        elif skip_bad and re.search("[\udc80-\udcff]", found.written):
            bad.append(BadRow(number, "bytes that are not UTF-8"))
        elif not found.completion.strip():
            dropped[layout.nothing if layout else "empty completion"] += 1
        elif layout is not None and "label" in layout.fields and not found.prompt.strip():
            dropped["empty text"] += 1
        elif re.search("[\ud800-\udfff]", found.written):
            dropped["half a surrogate pair (broken Unicode)"] += 1
        else:
            rows.append(found)
    if layout is None and unfit is not None:
        raise _lacking(unfit, path, wanted, choices)
    return rows, dict(dropped), bad, layout.name if layout else ""


def _lacking(record: Fields, path: Path, wanted: Layout | None, choices: Collection[Layout]) -> InputError:
    shown, has = format_text(path, None), f"it has {listed(record)}"
    if wanted is None:
        known = ", ".join(" and ".join(f"'{field}'" for field in one.fields.values()) for one in choices)
        example = LABEL_EXAMPLE if tuple(choices) == LABELLED else COLUMN_EXAMPLE
        return InputError(f"'{shown}' has none of {known}: {has}; use {example}")
    name = next(field for field in wanted.fields.values() if lookup(record, field) is ABSENT)
    remedy = f"leave --format {wanted.name} out or use --columns" if wanted.name in LAYOUTS else "correct --columns"
    return InputError(f"'{shown}' has no column '{format_text(name)}'{hint(name, _paths(record))}: {has}; {remedy}")


def _paths(record: Fields) -> list[str]:
    """The names of the fields, and of those inside them."""
    inner = [f"{name}.{part}" for name, value in record.items() if isinstance(value, Mapping) for part in value]
    return [*record, *inner]
