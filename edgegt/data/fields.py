"""The value of a field as text: dotted paths into nested records, numbers as text, lists as several texts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import islice

from edgegt.data.formats import Fault, Fields, listed
from edgegt.errors import nearest
from edgegt.units import format_text

ABSENT = object()
_LONGEST_NAME = 100
_MOST_NAMES = 1000


def lookup(record: Fields, path: str) -> object:
    """The value at a field's name or dotted path, such as question.text, answers.0 or answers.text; ABSENT if none.

    A name that has dots itself comes first. A name behind a list takes that field of each of its objects.
    """
    if path in record or "." not in path:
        return record.get(path, ABSENT)
    value: object = record
    for part in path.split("."):
        if isinstance(value, list) and part.isdecimal() and len(part) < 9:
            value = value[int(part)] if int(part) < len(value) else ABSENT
        elif isinstance(value, list):
            found = [one[part] for one in value if isinstance(one, Mapping) and part in one]
            value = found if found or not value else ABSENT
        else:
            value = value.get(part, ABSENT) if isinstance(value, Mapping) else ABSENT
        if value is ABSENT:
            return ABSENT
    return value


def texts(record: Fields, field: str, several: bool) -> list[str] | Fault:
    """The texts of a field: one, or those of a list where `several` may be; null is empty, numbers become text."""
    short = format_text(field, 20)
    value = lookup(record, field)
    if value is ABSENT:
        reason = f"no field '{short}'"
        return Fault(reason, f" has {reason}: it has {listed(record)}; add it or delete the row")
    if isinstance(value, list) and several:
        wrong = next((one for one in value if isinstance(one, (list, dict))), None)
        if wrong is None:
            return [_text(one) for one in value]
        reason = f"field '{short}' has {_kind(wrong)} in its list"
        return Fault(reason, f": {reason}, wanted texts: name one of its fields, such as {short}.text, with --columns")
    if not isinstance(value, (list, dict)):
        return [_text(value)]
    reason = f"field '{short}' is {_kind(value)}"
    return Fault(reason, f": {reason}, wanted text or a number: join it to one text first")


def _kind(value: object) -> str:
    return "a list" if isinstance(value, list) else "an object"


def _text(value: object) -> str:
    if value is None or value != value:  # NaN, which pandas writes where there is nothing
        return ""
    # What Parquet and Arrow hold beside JSON's types (dates, decimals, bytes) is written as Python writes it.
    return value if isinstance(value, str) else json.dumps(value, default=str)


def hint(name: str, known: Iterable[str]) -> str:
    """`nearest` among names that a person could have mistyped: comparing long ones takes time with their square."""
    if len(name) > _LONGEST_NAME:
        return ""
    short = (one for one in islice(known, _MOST_NAMES) if len(one) <= _LONGEST_NAME)
    return format_text(nearest(name, short), None)
