"""Every write of a run: whole or not at all, readable by its owner only, and a full disk is one clear error.

A file is written beside its place, synchronised and renamed, so that a reader sees the old content or the new one
whenever the power goes. All of it passes through `open_file`, so that a test can take the disk away at any write.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from edgegt.errors import EdgegtError
from edgegt.units import format_bytes

OWNER_ONLY = 0o600


class DiskError(EdgegtError):
    """A file could not be written; the message names it and what is missing."""


def open_file(path: Path, append: bool = False) -> BinaryIO:
    """A file opened for writing, readable by its owner only."""
    flags = os.O_RDWR | os.O_CREAT | (os.O_APPEND if append else os.O_TRUNC)
    number = os.open(path, flags | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0), OWNER_ONLY)
    return os.fdopen(number, "ab" if append else "r+b", buffering=0)


@contextmanager
def replacing(path: Path, needed: int = 0) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the block ends without an error. needed: bytes, for the message.

    Raises: DiskError when it cannot be written; what was there stays.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open_file(partial) as file:
            yield file
            os.fsync(file.fileno())
        partial.replace(path)
        _synchronise(path.parent)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise fault(path, error, needed) from error
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


@contextmanager
def replacing_folder(path: Path, force: bool) -> Iterator[Path]:
    """A folder beside `path` that takes its place when the block ends without an error; with `force` also that of what
    is there.

    Raises: DiskError when it cannot be made, or something came to be there meanwhile; what was there stays.
    """
    partial, old = (path.with_name(f".{path.name}.{os.getpid()}.{word}") for word in ("tmp", "old"))
    try:
        partial.mkdir(mode=0o700, parents=True)
        yield partial
        _synchronise(partial)
        if os.path.lexists(path):
            if not force:
                raise DiskError(f"'{path}' was made by another program meanwhile: it stays; give a new name")
            path.rename(old)
        partial.rename(path)
        _synchronise(path.parent)
    except OSError as error:
        raise fault(path, error) from error
    finally:
        if os.path.lexists(old) and not os.path.lexists(path):
            old.rename(path)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_all(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write every byte; a disk that takes fewer and reports nothing is full. Raises: OSError."""
    left = memoryview(data).cast("B")
    while left.nbytes:
        count = file.write(left)
        if not count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left = left[count:]


def append(file: BinaryIO, data: bytes) -> None:
    """Write all of it at the end of the file; what did not fit is taken back. Raises: OSError."""
    start = file.seek(0, os.SEEK_END)
    try:
        write_all(file, data)
    except OSError:
        with suppress(OSError):
            file.truncate(start)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all. Raises: DiskError."""
    data = text.encode("utf-8")
    with replacing(path, len(data)) as file:
        write_all(file, data)


def write_json(path: Path, tree: Any) -> None:
    """Write a JSON file, whole or not at all. Raises: DiskError."""
    write_text(path, json.dumps(tree, indent=1) + "\n")


class Lines:
    """A file of JSON objects, one per line, to which lines are added; each is in the file when `add` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def add(self, tree: dict[str, Any]) -> None:
        """Append one line; a line that did not fit is taken back. Raises: DiskError."""
        data = (json.dumps(tree) + "\n").encode()
        try:
            if self._file is None:
                self._file = open_file(self.path, append=True)
                data = self._after_a_torn_line() + data
            append(self._file, data)
        except OSError as error:
            raise fault(self.path, error, len(data)) from error

    def _after_a_torn_line(self) -> bytes:
        """An end for a last line that was cut off, so that the next one can be read."""
        try:
            with self.path.open("rb") as file:
                file.seek(-1, os.SEEK_END)
                return b"" if file.read(1) == b"\n" else b"\n"
        except OSError:  # an empty file
            return b""

    def synchronise(self) -> None:
        """Have the lines on the disk itself. Raises: DiskError."""
        try:
            if self._file is not None:
                os.fsync(self._file.fileno())
        except OSError as error:
            raise fault(self.path, error) from error

    def close(self) -> None:
        """Close the file, if it was opened; more lines open it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file that `Lines` wrote; a line that was cut off or damaged is left out."""
    try:
        raw = path.read_bytes()
    except OSError:
        return []
    found = []
    for line in raw.split(b"\n"):
        with suppress(ValueError, RecursionError):
            tree = json.loads(line)
            if isinstance(tree, dict):
                found.append(tree)
    return found


def remove_halves(folder: Path) -> None:
    """Delete what a process that was killed had begun to write."""
    for path in folder.glob(".*.tmp"):
        with suppress(OSError):
            path.unlink()


def fault(path: Path, error: OSError, needed: int = 0) -> DiskError:
    """The one line about a file that could not be written: why, what is needed and what is there."""
    reason = error.strerror or str(error)
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DiskError(f"'{path}' could not be written ({reason}): check the disk and the permissions")
    free = ""
    with suppress(OSError):
        there = next(place for place in (path.parent, *path.absolute().parents) if place.exists())
        free = f" and {format_bytes(shutil.disk_usage(there).free)} are free there"
    wanted = f"it takes {format_bytes(needed)}{free}" if needed else f"its disk is full{free}"
    return DiskError(f"'{path}' could not be written ({reason}): {wanted}; free space on that disk")


def _synchronise(folder: Path) -> None:
    """Have a renamed file's new name on the disk itself, where folders can be synchronised."""
    with suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
