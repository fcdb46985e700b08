"""TensorBoard's event files, read back as TensorBoard reads them."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any


def events(folder: Path) -> list[Any]:
    """Every whole record of the event files, in the order in which TensorBoard reads them; checksums are checked."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            event, sums = data[12 : 12 + size], (data[8:12], data[12 + size : 16 + size])
            assert sums == tuple(struct.pack("<I", masked_crc32c(part)) for part in (data[:8], event))
            found.append(Event.FromString(event))
            data = data[16 + size :]
    return found


def curves(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows: every tag's values by step, without those before a START that it purges."""
    found: dict[str, dict[int, float]] = {}
    for event in events(folder):
        if event.WhichOneof("what") == "session_log":
            found = {tag: {at: value for at, value in line.items() if at < event.step} for tag, line in found.items()}
        for value in event.summary.value:
            found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found
