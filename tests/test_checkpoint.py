"""Checkpoints: everything that continues a run bit for bit, the last two kept, and damage never goes unseen."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from edgegt import checkpoint
from edgegt.checkpoint import Checkpoints
from edgegt.disk import DiskError
from edgegt.errors import EdgegtError
from edgegt.memory import Formats
from edgegt.optimizer import AdamW, eight_bit_works
from edgegt.selection import Resting, Trainables
from test_selection import DOWN, HEAD, NORM, QUERY, UP, train
from tiny_models import CPU, FAMILIES, load, save_model

EIGHT_BIT = eight_bit_works(CPU) is None
STATES = "8-bit" if EIGHT_BIT else "float32"
WAYS = [
    (Formats("float32", "float32"), None), (Formats("float32", STATES), torch.arange(0, 320, 5)),
    (Formats("bfloat16", STATES), None), (Formats("bfloat16", STATES), torch.arange(0, 320, 5)),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", FAMILIES["llama"]())
    return tmp_path / "model"


def fresh(folder: Path, formats: Formats, rows: torch.Tensor | None) -> Trainables:
    model = load(folder, folder.parent / "cache")
    trainables = Trainables(model, AdamW(EIGHT_BIT), folder.parent / "checkpoint" / "parked")
    trainables.configure(formats, rows)
    return trainables


def saved_by(trainables: Trainables, checkpoints: Checkpoints, step: int) -> None:
    resting = {name: [place.path.name, place.seal] for name, place in trainables.resting.items()}
    state = {"live": list(trainables.live), "resting": resting}
    checkpoints.begin(step, state, {name: trainables.tensors(name) for name in reversed(trainables.live)})


def put_back(trainables: Trainables, checkpoints: Checkpoints) -> int:
    saved = checkpoints.newest(lambda line: None)
    assert saved is not None
    places = saved.state["resting"].items()
    resting = {name: Resting(checkpoints.folder / "parked" / file, seal) for name, (file, seal) in places}
    trainables.restore(saved.state["live"], saved.tensors, resting)
    return int(saved.state["step"])


def everything(trainables: Trainables) -> dict[str, torch.Tensor]:
    """Masters, states, and what the model computes with."""
    found = {f"{name}|{key}": value.clone() for name in trainables.live for key, value in
             trainables.tensors(name).items()}  # fmt: skip
    for name, linear in trainables.model.linears.items():
        for part, weight in (("whole", linear.weight), ("rows", linear.rows and linear.rows.weight)):
            if weight:
                planes = {"q": weight.q, "scale": weight.scale, "low": weight.low}
                found |= {f"{name}|{part}|{key}": value.clone() for key, value in planes.items() if value is not None}
    return found | {name: vector.detach().clone() for name, vector in trainables.model.vectors.items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


@pytest.mark.parametrize(("formats", "rows"), WAYS, ids=str)
def test_a_restored_model_goes_on_bit_for_bit(folder: Path, formats: Formats, rows: torch.Tensor | None) -> None:
    """With tensors at rest, tensors that were selected and never updated, and both kinds of the head."""
    first = fresh(folder, formats, rows)
    first.select([UP, QUERY, NORM])
    train(first, 2)
    first.select([NORM, HEAD])
    train(first, 2, seed=7)
    first.select([NORM, HEAD, DOWN])
    checkpoints = Checkpoints(folder.parent / "checkpoint")
    saved_by(first, checkpoints, 4)
    checkpoints.finish()
    second = fresh(folder, formats, rows)
    assert put_back(second, Checkpoints(folder.parent / "checkpoint")) == 4
    assert list(second.live) == list(first.live) and set(second.resting) == {UP, QUERY}
    same(everything(first), everything(second))
    for trainables in (first, second):
        train(trainables, 2, seed=20)
        trainables.select([UP, HEAD])
        train(trainables, 1, seed=30)
    same(everything(first), everything(second))


@pytest.mark.parametrize(("formats", "rows"), WAYS, ids=str)
def test_a_model_that_went_on_is_put_back(folder: Path, formats: Formats, rows: torch.Tensor | None) -> None:
    trainables = fresh(folder, formats, rows)
    trainables.select([UP, NORM, HEAD])
    checkpoints = Checkpoints(folder.parent / "checkpoint")
    for steps in (0, 2):
        train(trainables, steps)
        saved_by(trainables, checkpoints, steps)
        checkpoints.finish()
        before = everything(trainables)
        train(trainables, 3, seed=9)
        assert put_back(trainables, checkpoints) == steps
        same(before, everything(trainables))


@pytest.mark.parametrize(("formats", "rows"), WAYS, ids=str)
def test_what_was_selected_since_is_put_back_too(folder: Path, formats: Formats, rows: torch.Tensor | None) -> None:
    """Live then and resting now, resting then and live now, neither then: all as they were, the others as loaded."""
    trainables = fresh(folder, formats, rows)
    trainables.select([UP, QUERY])
    train(trainables, 2)
    trainables.select([UP])
    checkpoints = Checkpoints(folder.parent / "checkpoint")
    saved_by(trainables, checkpoints, 2)
    checkpoints.finish()
    before = everything(trainables)
    trainables.select([QUERY, HEAD, NORM, DOWN])
    train(trainables, 2, seed=9)
    trainables.select([QUERY, DOWN])
    put_back(trainables, checkpoints)
    assert list(trainables.live) == [UP] and list(trainables.resting) == [QUERY]
    same(before, everything(trainables))


def test_an_update_waits_until_its_tensor_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint holds one moment, however far the training is by the time that it is written."""
    trainables = fresh(folder, *WAYS[2])
    checkpoints = Checkpoints(folder.parent / "checkpoint")
    trainables.before_update, trainables.before_selection = checkpoints.wait_for, checkpoints.finish
    trainables.select([UP, NORM, HEAD])
    train(trainables, 2)
    before = everything(trainables)
    gate, real = threading.Semaphore(0), checkpoint.write_sealed

    def slowly(path: Path, items: Any, about: Any, written: Any) -> str:
        def one_by_one(name: str) -> None:
            gate.acquire()
            written(name)

        return real(path, items, about, one_by_one)

    monkeypatch.setattr(checkpoint, "write_sealed", slowly)
    saved_by(trainables, checkpoints, 2)
    worker = threading.Thread(target=train, args=(trainables, 1, 50))
    worker.start()
    worker.join(0.5)
    assert worker.is_alive()  # it waits for a tensor
    for _ in range(30):
        gate.release()
    worker.join(30)
    trainables.select([UP])
    assert not worker.is_alive() and trainables.optimizer.states[UP].step == 3
    again = fresh(folder, *WAYS[2])
    put_back(again, checkpoints)
    same(before, everything(again))


def test_a_process_that_ends_meanwhile_ends_well_and_its_checkpoint_is_whole(tmp_path: Path) -> None:
    script = f"""
import time, torch
from pathlib import Path
from edgegt.checkpoint import Checkpoints
checkpoints = Checkpoints(Path({str(tmp_path)!r}), lambda: time.sleep(0.5))
checkpoints.begin(7, {{"resting": {{}}}}, {{"a": {{"master": torch.ones(1000, 1000)}}}})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    saved = Checkpoints(tmp_path).newest(pytest.fail)
    assert saved is not None and saved.state["step"] == 7


def some_checkpoints(folder: Path, count: int) -> Checkpoints:
    checkpoints = Checkpoints(folder)
    for step in range(count):
        checkpoints.begin(step, {"resting": {}}, {"a": {"master": torch.full((50,), float(step))}})
    checkpoints.finish()
    return checkpoints


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    checkpoints = some_checkpoints(tmp_path, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"state-00000{n}.safetensors" for n in (4, 5)]
    assert checkpoints.last_step == 4
    saved = Checkpoints(tmp_path).newest(lambda line: None)
    assert saved is not None and saved.state["step"] == 4
    assert torch.equal(saved.tensors("a")["master"], torch.full((50,), 4.0))


def test_a_damaged_one_is_said_and_the_one_before_it_is_used(tmp_path: Path) -> None:
    draw = random.Random(1)
    for _ in range(40):
        some_checkpoints(tmp_path, 3)
        newest = max(tmp_path.glob("state-*"))
        raw = bytearray(newest.read_bytes())
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        newest.write_bytes(raw)
        said: list[str] = []
        saved = Checkpoints(tmp_path).newest(said.append)
        assert saved is not None and saved.state["step"] == 1
        assert len(said) == 1 and said[0].startswith(f"'{newest}' ") and said[0].endswith("before it is used")
        assert not newest.exists()
        Checkpoints(tmp_path).remove()


def test_a_tensor_at_rest_is_part_of_its_checkpoint(folder: Path) -> None:
    trainables = fresh(folder, *WAYS[0])
    trainables.select([UP])
    train(trainables, 1)
    checkpoints = Checkpoints(folder.parent / "checkpoint")
    saved_by(trainables, checkpoints, 1)
    checkpoints.finish()
    trainables.select([NORM])
    saved_by(trainables, checkpoints, 1)
    checkpoints.finish()
    (place,) = trainables.resting.values()
    raw = bytearray(place.path.read_bytes())
    raw[-1] ^= 1
    place.path.write_bytes(raw)
    said: list[str] = []
    saved = Checkpoints(folder.parent / "checkpoint").newest(said.append)
    assert saved is not None and saved.state["live"] == [UP] and str(place.path) in said[0]
    with pytest.raises(EdgegtError, match="damaged"):
        trainables.select([UP])


@pytest.mark.parametrize("file", ["../a.safetensors", "/etc/passwd", "a/b"])
def test_a_checkpoint_names_no_file_outside_its_folder(tmp_path: Path, file: str) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.begin(1, {"resting": {"x": [file, "0" * 64]}}, {})
    checkpoints.finish()
    said: list[str] = []
    assert Checkpoints(tmp_path).newest(said.append) is None
    assert "outside its folder" in said[0]


def test_parked_tensors_go_when_no_checkpoint_names_them(tmp_path: Path) -> None:
    (tmp_path / "parked").mkdir()
    for name in ("kept", "old"):
        (tmp_path / "parked" / f"{name}.safetensors").write_text("x")
    checkpoints = Checkpoints(tmp_path)
    for _ in range(2):
        checkpoints.begin(1, {"resting": {"x": ["kept.safetensors", ""]}}, {})
    checkpoints.finish()
    assert [path.name for path in (tmp_path / "parked").iterdir()] == ["kept.safetensors"]


def test_a_full_disk_is_told_at_the_next_call_and_the_earlier_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = some_checkpoints(tmp_path, 2)

    def full(*_: Any) -> str:
        raise DiskError("no room")

    monkeypatch.setattr(checkpoint, "write_sealed", full)
    checkpoints.begin(9, {"resting": {}}, {"a": {"master": torch.ones(3)}})
    checkpoints.wait_for("a")
    assert checkpoints._thread is not None
    checkpoints._thread.join()
    with pytest.raises(DiskError, match="no room"):
        checkpoints.check()
    checkpoints.check()
    saved = Checkpoints(tmp_path).newest(lambda line: None)
    assert saved is not None and saved.state["step"] == 1


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path) -> None:
    some_checkpoints(tmp_path, 1)
    (tmp_path / ".state-000002.safetensors.77.tmp").write_text("half")
    assert Checkpoints(tmp_path).newest(lambda line: None) is not None
    assert [path.name for path in tmp_path.iterdir()] == ["state-000001.safetensors"]
