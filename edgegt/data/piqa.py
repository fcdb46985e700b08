"""PIQA: a goal and two solutions per line, and which one is right in a label file beside it. `--format piqa`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from edgegt.data.formats import Fault, Record
from edgegt.errors import InputError
from edgegt.units import format_text

_REMEDY = "PIQA has NAME.jsonl beside NAME-labels.lst, with a 0 or 1 per row"


def labelled(records: Iterable[Record], path: Path) -> Iterator[Record]:
    """The goal as the prompt and the right solution as the completion.

    Raises: InputError for a label file that is not there, or does not fit the rows.
    """
    beside = path.with_name(f"{path.stem}-labels.lst")
    try:
        labels = beside.read_text(encoding="utf-8").split()
    except (OSError, ValueError) as error:
        raise InputError(f"--format piqa: '{format_text(beside, None)}' cannot be read: {_REMEDY}") from error
    count = 0
    for count, (number, record) in enumerate(records, start=1):
        if count > len(labels) or labels[count - 1] not in ("0", "1"):
            said = "no label" if count > len(labels) else f"the label '{format_text(labels[count - 1], 20)}'"
            raise InputError(f"'{format_text(beside, None)}' has {said} for row {count}: {_REMEDY}")
        right = f"sol{int(labels[count - 1]) + 1}"
        if isinstance(record, Fault):
            yield number, record
        elif "goal" not in record or right not in record:
            lacks = f"no field '{'goal' if 'goal' not in record else right}'"
            yield number, Fault(lacks, f" has {lacks}: a row of PIQA has goal, sol1 and sol2")
        else:
            yield number, {"prompt": record["goal"], "completion": record[right]}
    if count != len(labels):
        raise InputError(f"'{format_text(beside, None)}' has {len(labels)} labels for {count} rows: {_REMEDY}")
