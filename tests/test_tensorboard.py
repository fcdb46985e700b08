"""Scalars for TensorBoard: what they hold, what is left where steps are repeated, and a disk that takes no more.

Runs that are broken off with --tensorboard are in test_resume.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from edgegt import disk
from edgegt.cli import main
from edgegt.tensorboard import SHARE, Scalars
from event_files import curves, events

ENTRY = {"loss": 2.5, "lr": 1e-3, "tokens_per_s": 100.0, "step_s": 0.5, "bytes": 1, "peak_bytes": 2, "epoch": 0.1}


def entry(step: int, **more: float) -> dict[str, Any]:
    return {"step": step, **ENTRY, "flops": 10 * step, **more}


def test_a_step_is_one_event_of_all_its_scalars(tmp_path: Path) -> None:
    scalars = Scalars(tmp_path / "tensorboard", 1000, pytest.fail)
    scalars.add(entry(1, temperature_c=61.5))
    scalars.add(entry(2, loss=2.25))
    scalars.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [event.WhichOneof("what") for event in events(path.parent)] == [
        "file_version",
        "session_log",
        *["summary"] * 2,
    ]
    found = curves(path.parent)
    assert found["train/loss"] == {1: 2.5, 2: 2.25} and found["machine/temperature_c"] == {1: 61.5}
    assert found[SHARE] == pytest.approx({1: 0.01, 2: 0.02}) and found["memory/peak_bytes"] == {1: 2.0, 2: 2.0}


def test_what_was_cut_off_is_purged_over_several_parts(tmp_path: Path) -> None:
    for first, cut in ((1, None), (4, 3), (3, 2)):
        scalars = Scalars(tmp_path, 100, pytest.fail)
        if cut is not None:
            scalars.cut(cut)
        for step in range(first, first + 5):
            scalars.add(entry(step, loss=first))
        scalars.close()
    assert curves(tmp_path)["train/loss"] == {1: 1, 2: 1, 3: 3, 4: 3, 5: 3, 6: 3, 7: 3}
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"events.out.tfevents.00000{n}" for n in (1, 2, 3)]


@pytest.mark.parametrize("room", [0, 30, 200, 500])
def test_a_full_disk_is_one_note_and_leaves_whole_records(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, said = [room], list[str]()

    def write(file: Any, data: bytes) -> None:
        taken = data[: left[0]]
        left[0] -= len(taken)
        file.write(taken)
        if len(taken) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(disk, "write_all", write)
    scalars = Scalars(tmp_path, 100, said.append)
    for step in range(1, 9):
        scalars.add(entry(step))
    assert (
        len(said) == 1 and "no more scalars for TensorBoard, the run goes on" in said[0] and "No space left" in said[0]
    )
    kept = curves(tmp_path).get("train/loss", {})
    assert list(kept) == list(range(1, len(kept) + 1)) and (len(kept) > 0) == (room == 500)


def test_without_the_package_nothing_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "tensorboardX.proto.event_pb2", None)
    assert main(["run", "--tensorboard", "--quiet"]) == 2
    assert capsys.readouterr().err == "edgegt: --tensorboard needs tensorboardX: pip install edgegt[tensorboard]\n"
    assert list(tmp_path.iterdir()) == []
