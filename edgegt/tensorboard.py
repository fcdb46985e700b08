"""The scalars of metrics.jsonl for TensorBoard, beside it in the run folder (`--tensorboard`).

tensorboardX brings the messages and the checksum of TensorBoard's files; the few bytes around a record are written
here, because its own writers hold events in a queue, hide a full disk in a thread and know no file modes.
"""

from __future__ import annotations

import re
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from edgegt import disk
from edgegt.errors import InputError

# By the name of a column of metrics.jsonl: how it is called in TensorBoard.
TAGS = {
    "loss": "train/loss", "lr": "train/learning_rate", "epoch": "train/epoch", "tokens_per_s": "speed/tokens_per_s",
    "step_s": "speed/step_s", "bytes": "memory/bytes", "peak_bytes": "memory/peak_bytes",
    "temperature_c": "machine/temperature_c", "power_w": "machine/power_w",
    "battery_percent": "machine/battery_percent", "throttled": "machine/throttled",
    "held_out_loss": "held_out/loss",
}  # fmt: skip
SHARE = "flops/share_of_full_fine_tuning"
_NAME = "events.out.tfevents."


def check_tensorboard(wanted: bool) -> None:
    """Raises: InputError when scalars are wanted and their package is missing."""
    if not wanted:
        return
    try:
        import tensorboardX.proto.event_pb2
        import tensorboardX.record_writer  # noqa: F401
    except ImportError as error:
        raise InputError("--tensorboard needs tensorboardX: pip install edgegt[tensorboard]") from error


class Scalars:
    """The event files of one run: one more for every part of it, which begins where the part before it counts to.

    full_flops: of full fine-tuning on the same batches; said: is told once when nothing more can be written.
    """

    def __init__(self, folder: Path, full_flops: int, said: Callable[[str], None]) -> None:
        self.folder, self.full_flops, self._said = folder, full_flops, said
        self._file: BinaryIO | None = None
        self._first: int | None = None
        self._ended = False

    def add(self, entry: dict[str, Any]) -> None:
        """Write one line of metrics.jsonl. A disk that takes no more ends the scalars, and not the run."""
        if self._ended:
            return
        try:
            file = self._file or self._open(entry["step"] if self._first is None else self._first)
            values = {tag: entry[name] for name, tag in TAGS.items() if entry.get(name) is not None}
            if "flops" in entry:
                values[SHARE] = entry["flops"] / self.full_flops
            pairs = [{"tag": tag, "simple_value": float(value)} for tag, value in values.items()]
            _write(file, step=entry["step"], summary={"value": pairs})
        except OSError as error:
            self._ended = True
            self.close()
            self._said(f"no more scalars for TensorBoard, the run goes on: {disk.fault(self.folder, error)}")

    def cut(self, step: int) -> None:
        """What came after this step does not count any more, in the files of other processes too."""
        self.close()
        self._first = step + 1

    def close(self) -> None:
        """Close the file; another event opens the next one."""
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                file.close()

    def _open(self, first: int) -> BinaryIO:
        """The next file, with a mark at which TensorBoard forgets all steps from `first` on. Raises: OSError.

        Files are read in the order of their names, which are numbers and no times: boards wake up in 1970.
        """
        self.folder.mkdir(mode=0o700, exist_ok=True)
        there = [re.fullmatch(rf"{re.escape(_NAME)}(\d+)", path.name) for path in self.folder.iterdir()]
        number = 1 + max((int(name[1]) for name in there if name), default=0)
        self._file = disk.open_file(self.folder / f"{_NAME}{number:06d}")
        _write(self._file, file_version="brain.Event:2")
        _write(self._file, step=first, session_log={"status": "START"})
        self._first = None
        return self._file


def _write(file: BinaryIO, **parts: Any) -> None:
    """Add one record, whole or not at all: its length, the event, and the checksums of both. Raises: OSError."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    event = Event(wall_time=time.time(), **parts).SerializeToString()
    length = struct.pack("<Q", len(event))
    sums = [struct.pack("<I", masked_crc32c(part)) for part in (length, event)]
    disk.append(file, length + sums[0] + event + sums[1])
