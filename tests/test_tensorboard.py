"""Scalars for TensorBoard: what they hold, what a resumed run leaves of them, and a disk that takes no more."""

from __future__ import annotations

import errno
import os
import stat
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

import runs
from edgegt import disk
from edgegt.cli import main
from edgegt.disk import read_lines
from edgegt.tensorboard import SHARE, TAGS, Scalars

ENTRY = {"loss": 2.5, "lr": 1e-3, "tokens_per_s": 100.0, "step_s": 0.5, "bytes": 1, "peak_bytes": 2, "epoch": 0.1}


def entry(step: int, **more: float) -> dict[str, Any]:
    return {"step": step, **ENTRY, "flops": 10 * step, **more}


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


@pytest.mark.skipif(not runs.HERE, reason="no stories260K or no E2E rows under shared/data")
def test_a_run_that_died_goes_on_in_its_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, real = tmp_path / "run", disk.Lines.add
    for key, value in runs.environment(tmp_path / "cache").items():
        monkeypatch.setenv(key, value)
    words = runs.words(
        folder, "--tensorboard", "--checkpoint-every", "4", "--rho", "0.6", data=runs.some_rows(tmp_path)
    )

    def until(self: disk.Lines, tree: dict[str, Any]) -> None:
        real(self, tree)
        if self.path == folder / "metrics.jsonl" and tree["step"] == 7:
            raise RuntimeError("died")

    monkeypatch.setattr(disk.Lines, "add", until)
    with pytest.raises(RuntimeError, match="died"):
        main([*words, "--quiet"])
    assert max(curves(folder / "tensorboard")["train/loss"]) == 6
    monkeypatch.setattr(disk.Lines, "add", real)
    assert main(["run", "--resume", str(folder), "--quiet"]) == 0
    steps, found = read_lines(folder / "metrics.jsonl"), curves(folder / "tensorboard")
    assert [line["step"] for line in steps] == list(range(1, 13))
    for name in ("loss", "lr", "tokens_per_s", "peak_bytes"):
        assert found[TAGS[name]] == pytest.approx({line["step"]: line[name] for line in steps})
    ratio = runs.read(folder, "run.json")["measured"]["flops_ratio"]
    assert found[SHARE][12] == pytest.approx(ratio, rel=1e-5)
    assert len(list((folder / "tensorboard").iterdir())) == 2
    assert runs.read(folder, "options.json")["tensorboard"] is True
