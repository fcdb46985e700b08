"""Files are written whole or not at all, for their owner only, and a full disk is one line that says what it lacks."""

from __future__ import annotations

import errno
import json
import os
import resource
import stat
from pathlib import Path
from typing import Any

import pytest

from edgegt import disk
from edgegt.disk import DiskError, Lines, fault, read_lines, remove_halves, replacing_folder, write_json, write_text


class FullAfter:
    """A file that takes so many bytes and then has no room."""

    def __init__(self, file: Any, room: int) -> None:
        self._file, self.room = file, room

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if size > self.room:
            self._file.write(memoryview(data)[: self.room])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= size
        return int(self._file.write(data))


@pytest.fixture
def nearly_full(monkeypatch: pytest.MonkeyPatch) -> None:
    real = disk.open_file
    monkeypatch.setattr(disk, "open_file", lambda path, append=False: FullAfter(real(path, append), 10))


def test_a_file_is_for_its_owner_and_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.usefixtures("nearly_full")
def test_a_full_disk_keeps_the_old_file_and_says_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(DiskError) as refusal:
        write_text(path, "x" * 3000)
    said = str(refusal.value)
    assert said.startswith(f"'{path}' could not be written (No space left on device): it takes 2.9 KiB and ")
    assert said.endswith("are free there; free space on that disk") and "\n" not in said
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_limit_of_the_system_is_a_full_disk_too(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(DiskError, match=r"could not be written \(File too large\): it takes 9\.8 KiB"):
            write_text(tmp_path / "a", "x" * 10000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_another_fault_is_named_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(DiskError, match=r"a' could not be written \(Is a directory\): check the disk and the perm"):
        write_text(tmp_path / "a", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert "its disk is full" in str(fault(tmp_path / "b", OSError(errno.ENOSPC, "No space left on device")))


def test_lines_are_added_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with Lines(path) as lines:
        lines.add({"step": 1})
        assert read_lines(path) == [{"step": 1}]
        lines.synchronise()
        lines.close()
        lines.add({"step": 2})
    assert read_lines(path) == [{"step": 1}, {"step": 2}]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_line_without_room_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.jsonl"
    with Lines(path) as lines:
        lines.add({"step": 1})
    real = disk.open_file
    monkeypatch.setattr(disk, "open_file", lambda place, append=False: FullAfter(real(place, append), 5))
    with Lines(path) as lines, pytest.raises(DiskError, match="it takes 13 B"):
        lines.add({"step": 22})
    assert path.read_bytes() == b'{"step": 1}\n'


def test_a_line_after_a_torn_one_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st')
    with Lines(path) as lines:
        lines.add({"step": 2})
        lines.add({"step": 3})
    assert read_lines(path) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_torn_and_damaged_lines_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n[2]\nnonsense\n\xff\xfe\n' + b"[" * 5000 + b'\n{"step": 3}\n{"step": 4')
    assert read_lines(path) == [{"step": 1}, {"step": 3}]
    assert read_lines(tmp_path / "absent") == []


def test_halves_of_files_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".a.json.123.tmp", ".lock", "b.tmp", "a.json"):
        (tmp_path / name).write_text("x")
    remove_halves(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "b.tmp", "a.json"}


def test_a_folder_that_came_to_be_there_meanwhile_is_not_replaced_without_force(tmp_path: Path) -> None:
    path = tmp_path / "out"

    def write(force: bool) -> None:
        with replacing_folder(path, force) as partly:
            (partly / "mine").touch()
            path.mkdir(exist_ok=True)
            (path / "theirs").touch()

    with pytest.raises(DiskError, match="made by another program meanwhile"):
        write(False)
    assert [one.name for one in path.iterdir()] == ["theirs"] and list(tmp_path.iterdir()) == [path]
    write(True)
    assert [one.name for one in path.iterdir()] == ["mine"] and list(tmp_path.iterdir()) == [path]
