"""Parquet and Arrow files (Hugging Face datasets on disk) as records. pyarrow is asked for only here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgegt.data.formats import Record
from edgegt.errors import InputError
from edgegt.units import format_text

SUFFIXES = {".parquet": "parquet", ".arrow": "arrow"}


def records_of(path: Path, format_name: str) -> Iterator[Record]:
    """(row number from 1 on, record) of every row, batch by batch.

    Raises: InputError without pyarrow, and for a file that it cannot read.
    """
    shown = format_text(path, None)
    try:
        import pyarrow
    except ImportError as error:
        raise InputError(f"'{shown}' needs pyarrow to be read: pip install edgegt[data]") from error
    number = 0
    try:
        for batch in _batches(path, format_name):
            for record in batch.to_pylist():
                number += 1
                yield number, record
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        line = format_text((str(error).splitlines() or [type(error).__name__])[0], 100)
        raise InputError(f"'{shown}' cannot be read as {format_name} ({line}): save it again") from error


def _batches(path: Path, format_name: str) -> Iterator[Any]:
    if format_name == "parquet":
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as table:
            yield from table.iter_batches(batch_size=1024)
        return
    import pyarrow.ipc

    with pyarrow.memory_map(str(path)) as file:  # datasets writes streams; a file of the same suffix begins with ARROW1
        framed = file.read(6) == b"ARROW1"
        file.seek(0)
        if framed:
            reader = pyarrow.ipc.open_file(file)
            yield from (reader.get_batch(place) for place in range(reader.num_record_batches))
        else:
            yield from pyarrow.ipc.open_stream(file)
