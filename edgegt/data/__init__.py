"""The user's data: files to rows, rows to token ids, ids to batches.

Reading and tokenising need no torch, and bad data should be refused before torch is loaded: the names of `batches`
are therefore looked up on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgegt.data.examples import Example
from edgegt.data.folder import DataFiles, data_files
from edgegt.data.labels import LabelReport, Reading, classes_of, labelled, matched
from edgegt.data.read import parse_columns, read_parts, read_rows, split_rows
from edgegt.data.rows import BY_TEMPLATE, BadRow, Row, Source, Turn
from edgegt.data.tokens import TokenReport, asked, tokenize

if TYPE_CHECKING:
    from edgegt.data.batches import Batch, collate, length_bucketed, shape_of, split_micro

__all__ = [
    "BY_TEMPLATE",
    "BadRow",
    "Batch",
    "DataFiles",
    "Example",
    "LabelReport",
    "Reading",
    "Row",
    "Source",
    "TokenReport",
    "Turn",
    "asked",
    "classes_of",
    "collate",
    "data_files",
    "labelled",
    "length_bucketed",
    "matched",
    "parse_columns",
    "read_parts",
    "read_rows",
    "shape_of",
    "split_micro",
    "split_rows",
    "tokenize",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from edgegt.data import batches

    return getattr(batches, name)
