"""Runs that are broken off and go on: the same bits, whatever broke them off, and whatever is in the way is said."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import runs
from edgegt import disk, train
from edgegt import folder as folder_module
from edgegt.checkpoint import Checkpoints
from edgegt.cli import main
from edgegt.disk import read_lines
from edgegt.errors import EdgegtError, InputError
from edgegt.folder import RunFolder, unfinished
from edgegt.guard import RESERVE_BYTES
from edgegt.keeper import Machine
from edgegt.log import Log
from edgegt.options import RunOptions
from edgegt.prepare import prepare
from edgegt.problem import Problem
from edgegt.rounds import Rounds, Standing
from edgegt.run import resume, run
from edgegt.sensors import Reading
from edgegt.tensorboard import SHARE, TAGS
from edgegt.watch import MemoryWatch
from event_files import curves

pytestmark = pytest.mark.skipif(not runs.HERE, reason="no stories260K or no E2E rows under shared/data")
STEPS = 24
WIDE = {"batch_size": 64, "steps": 12, "round_epochs": None, "early_stopping": False}  # so wide that memory is saved
QUIET = Log(quiet=True)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.some_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(autouse=True)
def here(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in runs.environment(cache).items():
        monkeypatch.setenv(key, value)


def options(rows: Path, out: Path | None, **more: Any) -> RunOptions:
    """Two rounds of 12 steps with a checkpoint every 5."""
    given: dict[str, Any] = {
        "device": "jetson", "model": str(runs.STORIES), "data": str(rows), "columns": "prompt=mr,completion=ref",
        "threads": 1, "batch_size": 4, "max_length": 96, "steps": STEPS, "eval_rows": 8, "rho": 0.5, "memory": "2GiB",
        "lr": 3e-3, "examples": False, "checkpoint_every": "5", "round_epochs": 12 * 4 / 373,
        "output": None if out is None else str(out),
    }  # fmt: skip
    return RunOptions(**given | more)


def essence(folder: Path) -> tuple[bytes, list[tuple[int, float, float]], float]:
    """The patch, step, loss and rate of every step, and the loss after: what must be the same bits."""
    steps = [(line["step"], line["loss"], line["lr"]) for line in read_lines(folder / "metrics.jsonl")]
    return (folder / "patch.safetensors").read_bytes(), steps, runs.read(folder, "eval.json")["after"]["loss"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cache: Path, rows: Path) -> Path:
    """An uninterrupted run."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in runs.environment(cache).items():
            patch.setenv(key, value)
        return run(options(rows, tmp_path_factory.mktemp("whole") / "run"), QUIET)


@pytest.fixture
def plenty(tmp_path_factory: pytest.TempPathFactory, cache: Path, rows: Path) -> Path:
    """A run with wide batches and all the memory that it wants, just now: what a process takes before it drifts."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in runs.environment(cache).items():
            patch.setenv(key, value)
        return run(options(rows, tmp_path_factory.mktemp("plenty") / "run", **WIDE), QUIET)


class Stopped(BaseException):
    """Stands for a process that dies."""


def dying_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the run die after this step was written to the log."""
    add = disk.Lines.add

    def until(self: disk.Lines, tree: dict[str, Any]) -> None:
        add(self, tree)
        if tree.get("step") == step and "loss" in tree:
            raise Stopped

    monkeypatch.setattr(disk.Lines, "add", until)


def broken_off(folder: Path, rows: Path, step: int, **more: Any) -> Path:
    """A run that died after this step."""
    with pytest.MonkeyPatch.context() as patch:
        dying_at(step, patch)
        with pytest.raises(Stopped):
            run(options(rows, folder, **more), QUIET)
    return folder


@pytest.mark.parametrize("step", [1, 7, 12, 13, 24])
def test_a_run_that_died_goes_on_with_the_same_bits(step: int, rows: Path, whole: Path, tmp_path: Path) -> None:
    folder = broken_off(tmp_path / "run", rows, step, tensorboard=True)
    assert len(read_lines(folder / "metrics.jsonl")) == step
    resume(folder, QUIET)
    assert essence(folder) == essence(whole)
    lines, shown = read_lines(folder / "metrics.jsonl"), curves(folder / "tensorboard")
    for name in ("loss", "lr", "tokens_per_s", "peak_bytes"):
        assert shown[TAGS[name]] == pytest.approx({line["step"]: line[name] for line in lines})
    assert shown[SHARE][STEPS] == pytest.approx(runs.read(folder, "run.json")["measured"]["flops_ratio"])
    about = runs.read(folder, "run.json")
    assert about["finished"] is True and len(about["sessions"]) == 2
    assert about["measured"]["flops"] == runs.read(whole, "run.json")["measured"]["flops"]
    assert [event["kind"] for event in read_lines(folder / "events.jsonl")] == ["resume"]
    assert not (folder / "checkpoint").exists()


@pytest.mark.parametrize("strategy", ["full", "last-layers"])
def test_other_ways_to_train_go_on_too(
    strategy: str, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full fine-tuning, and training with gradients that are accumulated."""
    ways = Problem.ways
    monkeypatch.setattr(Problem, "ways", lambda self: [way for way in ways(self) if way.micro_batch == 2])
    expected = run(options(rows, tmp_path / "whole", steps=8, strategy=strategy), QUIET)
    folder = broken_off(tmp_path / "run", rows, 7, steps=8, strategy=strategy)
    resume(folder, QUIET)
    assert essence(folder) == essence(expected)
    assert runs.read(folder, "plan-0.json")["micro_batch"] == (4 if strategy == "full" else 2)


@pytest.mark.parametrize("seed", [pytest.param(n, marks=[pytest.mark.slow] if n % 3 else []) for n in range(10)])
def test_ten_kills_in_ten_places(seed: int, cache: Path, rows: Path, whole: Path, tmp_path: Path) -> None:
    """kill -9 of a real process at a random moment, six of ten in `make test-all`; tools/reliability.py: 100."""
    draw, folder = random.Random(seed), tmp_path / "run"
    wanted = seed * STEPS // 10
    words = [
        "run", "--device", "jetson", "--model", str(runs.STORIES), "--data", str(rows), "--columns",
        "prompt=mr,completion=ref", "--threads", "1", "--batch-size", "4", "--max-length", "96", "--steps", str(STEPS),
        "--eval-rows", "8", "--rho", "0.5", "--memory", "2GiB", "--lr", "3e-3", "--no-examples", "--checkpoint-every",
        "5", "--round-epochs", str(12 * 4 / 373), "--output", str(folder), "--quiet",
    ]  # fmt: skip
    process = subprocess.Popen([sys.executable, "-m", "edgegt", *words], env=runs.environment(cache))
    metrics, end = folder / "metrics.jsonl", time.monotonic() + 120
    while process.poll() is None and time.monotonic() < end:
        if (folder / "options.json").is_file() and (not wanted or (metrics.is_file() and _lines(metrics) >= wanted)):
            break
        time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.3 if wanted else 5))
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    assert main(["run", "--resume", str(folder), "--quiet"]) == 0
    assert essence(folder) == essence(whole)


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")


def test_a_run_without_a_checkpoint_starts_over(
    rows: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = broken_off(tmp_path / "run", rows, 7)
    shutil.rmtree(folder / "checkpoint")
    log = Log(quiet=True)
    said: list[str] = []
    monkeypatch.setattr(log, "say", said.append)
    resume(folder, log)
    assert f"'{folder}' has no checkpoint: the run starts over" in said
    assert essence(folder) == essence(whole)


def test_a_damaged_checkpoint_is_said_and_the_one_before_it_taken(rows: Path, whole: Path, tmp_path: Path) -> None:
    folder = broken_off(tmp_path / "run", rows, 17)
    newest = max((folder / "checkpoint").glob("state-*"))
    raw = bytearray(newest.read_bytes())
    raw[len(raw) // 2] ^= 1
    newest.write_bytes(raw)
    resume(folder, QUIET)
    assert essence(folder) == essence(whole)
    assert any(str(newest) in line and "damaged" in line for line in runs.read(folder, "run.json")["fallbacks"])


def test_a_finished_run_has_nothing_left_to_do(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = essence(whole)
    assert main(["run", "--resume", str(whole)]) == 0
    assert "is finished: nothing is left to do" in capsys.readouterr().err
    assert essence(whole) == before


def test_two_processes_cannot_train_into_one_folder(rows: Path, tmp_path: Path) -> None:
    folder = broken_off(tmp_path / "run", rows, 7)
    holder = RunFolder(folder)
    holder.lock()
    with pytest.raises(InputError, match=r"another process is training into '.*run': wait for it to end"):
        resume(folder, QUIET)
    assert unfinished(options(rows, folder)) is None
    holder.release()
    assert unfinished(options(rows, folder)) == folder


def test_the_same_command_again_offers_to_go_on(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    first = RunFolder(Path("runs") / "stories260K-jetson-1")
    with pytest.MonkeyPatch.context() as patch:
        dying_at(3, patch)
        with pytest.raises(Stopped):
            run(options(rows, None), QUIET)
    assert unfinished(options(rows, None)) == first.path
    assert unfinished(options(rows, None, seed=1)) is None
    words = [
        "run", "--device", "jetson", "--model", str(runs.STORIES), "--data", str(rows), "--steps", "3", "--columns",
        "prompt=nothing,completion=ref",
    ]  # fmt: skip
    assert main(words) == 2
    assert "broken off" not in capsys.readouterr().err
    with pytest.raises(InputError, match=r"it holds a run that was broken off, `edgegt run --resume .*` goes on"):
        run(options(rows, first.path), QUIET)


def test_when_no_checkpoint_is_whole_nothing_is_thrown_away(rows: Path, tmp_path: Path) -> None:
    folder = broken_off(tmp_path / "run", rows, 7)
    for path in (folder / "checkpoint").glob("state-*"):
        path.write_bytes(path.read_bytes()[:-1])
    before = {path.name for path in folder.iterdir()}
    for _ in range(2):
        with pytest.raises(InputError, match=r"none of the checkpoints of '.*' is whole"):
            resume(folder, QUIET)
    assert {path.name for path in folder.iterdir()} == before


def test_a_checkpoint_of_another_format_is_left_alone(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = broken_off(tmp_path / "run", rows, 7)
    before = sorted((folder / "checkpoint").glob("state-*"))
    monkeypatch.setattr("edgegt.checkpoint.FORMAT", "9")
    with pytest.raises(InputError, match="has the format 2, and this version reads 9"):
        resume(folder, QUIET)
    assert sorted((folder / "checkpoint").glob("state-*")) == before


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name, text in (("options.json", '{"theme": "dark"}'), ("thesis.txt", "mine"), ("sub/y.txt", "mine")):
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=r"is not a run folder \(options\.json is another program's\)"):
        resume(tmp_path, QUIET)
    assert (tmp_path / "thesis.txt").read_text() == (tmp_path / "sub" / "y.txt").read_text() == "mine"


def test_starting_over_deletes_what_the_run_wrote_and_nothing_else(rows: Path, tmp_path: Path) -> None:
    folder = broken_off(tmp_path / "run", rows, 3)
    (folder / "notes.txt").write_text("mine")
    shutil.rmtree(folder / "checkpoint")
    resume(folder, QUIET)
    assert (folder / "notes.txt").read_text() == "mine" and (folder / "report.html").is_file()


def test_who_comes_second_leaves_the_folder_of_the_first_alone(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both find the folder free; the first has locked it by the time that the second tries."""
    first = RunFolder(tmp_path / "run")
    make = folder_module.new_folder

    def slowly(*arguments: Any) -> RunFolder:
        made = make(*arguments)
        first.lock()
        (first.path / "options.json").write_text("the first one's")
        return made

    monkeypatch.setattr(folder_module, "new_folder", slowly)
    with pytest.raises(InputError, match="another process is training into"):
        run(options(rows, first.path), QUIET)
    assert (first.path / "options.json").read_text() == "the first one's"
    first.release()
    with pytest.raises(InputError, match="exists and is not an empty folder"):
        run(options(rows, first.path), QUIET)


@pytest.mark.parametrize("name", ["data", "model"])
def test_a_run_whose_input_changed_does_not_go_on(name: str, rows: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.csv"
    shutil.copy(rows, data)
    model = tmp_path / "model"
    shutil.copytree(runs.STORIES, model)
    folder = broken_off(tmp_path / "run", data, 3, model=str(model))
    if name == "data":
        data.write_text(data.read_text() + "name[x],y\n")
        match = "--data of this run is another file than it was"
    else:
        path = model / "model.safetensors"
        raw = bytearray(path.read_bytes())
        raw[-5] ^= 1
        path.write_bytes(raw)
        match = "the model of this run is another than it was"
    with pytest.raises(InputError, match=match):
        resume(folder, QUIET)
    assert Checkpoints(folder / "checkpoint").any()


def test_bad_words_with_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--resume", str(tmp_path), "--lr", "1"]) == 2
    assert "--resume goes on with the options that the run has" in capsys.readouterr().err
    assert main(["run", "--resume", str(tmp_path)]) == 2
    assert "is not a run folder (it has no options.json)" in capsys.readouterr().err


@pytest.mark.parametrize("torn", [False, True])
def test_a_step_that_is_not_finite_is_left_out(
    torn: bool, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss, or the second gradient of a step, becomes NaN once: the run is as if that step had never been.

    In one round, because a second one is planned with what the step had cost.
    """
    real_loss, real_clip, seen = train.supervised_loss, train.clip, {"loss": 0, "clip": 0}

    def loss(*arguments: Any) -> torch.Tensor:
        seen["loss"] += 1
        return real_loss(*arguments) * (torch.nan if seen["loss"] == 8 and not torn else 1)

    def clip(gradient: torch.Tensor, most: float, name: str = "") -> float:
        seen["clip"] += seen["loss"] == 8
        if torn and seen["loss"] == 8 and seen["clip"] == 2:
            gradient.mul_(torch.nan)
        return real_clip(gradient, most, name)

    monkeypatch.setattr(train, "supervised_loss", loss)
    monkeypatch.setattr(train, "clip", clip)
    folder = run(options(rows, tmp_path / "run", round_epochs=None), QUIET)
    lines, events = read_lines(folder / "metrics.jsonl"), read_lines(folder / "events.jsonl")
    assert [line["step"] for line in lines] == [step for step in range(1, STEPS + 1) if step != 8]
    assert [event["kind"] for event in events] == (["nan", "rollback"] if torn else ["nan"])
    assert runs.read(folder, "run.json")["measured"]["dropped_steps"] == 1
    assert runs.read(folder, "run.json")["measured"]["flops_ratio"] <= 0.5
    monkeypatch.undo()
    for key, value in runs.environment(tmp_path / "cache").items():
        monkeypatch.setenv(key, value)
    passed_over = train.train_round

    def without(parts: Any, recipe: Any, batches: Any, micro: int, index: int, progress: Any, *more: Any, **rest: Any):
        progress.dropped = {7}
        passed_over(parts, recipe, batches, micro, index, progress, *more, **rest)

    monkeypatch.setattr("edgegt.trainee.train_round", without)
    other = run(options(rows, tmp_path / "other", round_epochs=None), QUIET)
    assert essence(other)[0] == essence(folder)[0]


@pytest.mark.parametrize("for_good", [False, True])
def test_many_steps_that_are_not_finite_halve_the_rate_once(
    for_good: bool, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = train.supervised_loss, 0

    def loss(*arguments: Any) -> torch.Tensor:
        nonlocal seen
        seen += 1
        return real(*arguments) * (torch.nan if seen > 8 and (for_good or seen <= 13) else 1)

    monkeypatch.setattr(train, "supervised_loss", loss)
    out = tmp_path / "run"
    if for_good:
        with pytest.raises(EdgegtError, match=r"5 steps in a row up to step \d+ were not finite, with half.*--resume"):
            run(options(rows, out), QUIET)
        saved = Checkpoints(out / "checkpoint").newest(lambda line: None)
        assert saved is not None and 0 < saved.state["step"] <= 8
        assert (out / "patch.safetensors").is_file() and (out / "report.html").is_file()
        return
    run(options(rows, out), QUIET)
    lines = read_lines(out / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    expected = runs.read(out, "run.json")
    assert any("the learning rate is halved" in line for line in expected["fallbacks"])
    assert lines[-1]["lr"] < lines[4]["lr"] / 2 and expected["lr"] == pytest.approx(1.5e-3)


class Room:
    """A machine with as much memory left as it is told, and no sensors."""

    def __init__(self, left: Callable[[], int]) -> None:
        self.left = left

    def machine(self) -> Machine:
        return Machine(sensors=_NoSensors(), available=self.left, clock=_steady())


class _NoSensors:
    def read(self) -> Reading:
        return Reading(None, None, None, None, None)

    def power_mode(self) -> str | None:
        return None


def _steady() -> Callable[[], float]:
    """A clock on which much time passes between any two looks, so that every step is guarded."""
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 10.0
        return now

    return clock


def test_without_memory_a_run_steps_back_and_says_so(rows: Path, plenty: Path, tmp_path: Path) -> None:
    import psutil

    looks = 0

    def left() -> int:
        nonlocal looks
        looks += 1
        held = psutil.Process().memory_info().rss
        return 8 << 30 if looks < 6 else max(0, budget - held)

    out = tmp_path / "run"
    plan = runs.read(plenty, "plan-0.json")
    budget = plan["predicted"]["peak_bytes"] + RESERVE_BYTES - (6 << 20)
    run(options(rows, out, **WIDE), QUIET, machine=Room(left).machine())
    events = [event for event in read_lines(out / "events.jsonl") if event["kind"] == "memory"]
    assert len(events) == 1 and "the run steps back from" in events[0]["text"]
    smaller = runs.read(out, "plan-1.json")
    assert smaller["predicted"]["peak_bytes"] <= events[0]["budget_bytes"] < plan["predicted"]["peak_bytes"]
    assert [line["step"] for line in read_lines(out / "metrics.jsonl")] == list(range(1, 13))
    assert runs.read(out, "plan-0.json")["steps"] == smaller["first_step"] == 12 - smaller["steps"] > 0
    about = runs.read(out, "run.json")
    assert about["measured"]["flops_ratio"] <= 0.5
    assert about["budget"]["memory_bytes"] == 2 << 30
    assert about["measured"]["peak_since_bytes"] <= about["budget"]["lowered_to_bytes"] == events[0]["budget_bytes"]


@pytest.mark.parametrize("updated", [0, 1])
def test_an_allocation_that_fails_is_survived(
    updated: int, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In forward, or after a tensor was changed already: no batch is lost or seen twice."""
    from edgegt.selection import Trainables

    real, steps, failed = Trainables.step, 0, False

    def step(self: Trainables, name: str, gradient: torch.Tensor, lr: float) -> None:
        nonlocal steps, failed
        steps += 1
        if steps == 6 * len(self.live) + 1 + updated and not failed:
            failed = True
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes.")
        real(self, name, gradient, lr)

    monkeypatch.setattr(Trainables, "step", step)
    out = tmp_path / "run"
    run(options(rows, out, **WIDE), QUIET, machine=Room(lambda: 8 << 30).machine())
    assert failed
    assert [line["step"] for line in read_lines(out / "metrics.jsonl")] == list(range(1, 13))
    kinds = [event["kind"] for event in read_lines(out / "events.jsonl")]
    assert kinds == ["rollback", "memory"]


@pytest.mark.parametrize("strategy", ["greentrainer", pytest.param("last-layers", marks=pytest.mark.slow), "full"])
def test_allocations_that_always_fail_end_the_run_with_a_reason(
    strategy: str, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, steps = train.supervised_loss, 0

    def loss(*arguments: Any) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps > 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes.")
        return real(*arguments)

    monkeypatch.setattr(train, "supervised_loss", loss)
    out = tmp_path / "run"
    with pytest.raises(EdgegtError, match=r"memory could not be had .*--resume"):
        run(options(rows, out, strategy=strategy, **WIDE), QUIET, machine=Room(lambda: 8 << 30).machine())
    assert len([event for event in read_lines(out / "events.jsonl") if event["kind"] == "memory"]) < 20
    monkeypatch.setattr(train, "supervised_loss", real)
    resume(out, QUIET)
    assert [line["step"] for line in read_lines(out / "metrics.jsonl")] == list(range(1, 13))
    assert runs.read(out, "run.json")["measured"]["flops_ratio"] <= (1.001 if strategy == "full" else 0.5)


def test_full_fine_tuning_that_never_gets_its_states_ends_with_a_reason(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its optimizer states are made in the first step, which is torn then, and taken back."""
    from edgegt.full import FloatTrainee

    real, updates = FloatTrainee._update, 0

    def update(self: FloatTrainee, name: str, gradient: torch.Tensor, lr: float) -> None:
        nonlocal updates
        updates += 1
        if updates > 3:
            raise MemoryError
        real(self, name, gradient, lr)

    monkeypatch.setattr(FloatTrainee, "_update", update)
    out = tmp_path / "run"
    with pytest.raises(EdgegtError, match=r"full fine-tuning cannot go on within .*--resume"):
        run(options(rows, out, strategy="full", batch_size=8), QUIET, machine=Room(lambda: 8 << 30).machine())
    texts = [event["text"] for event in read_lines(out / "events.jsonl") if event["kind"] == "memory"]
    assert 1 <= len(texts) <= 3 and texts[0].endswith("rows instead of 8")


def test_a_peak_that_was_predicted_too_low_is_made_up_for_once(
    rows: Path, plenty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step takes 40 MiB more than planned: the next plan is that much smaller, and the limit stays."""
    plan = runs.read(plenty, "plan-0.json")
    budget = plan["predicted"]["peak_bytes"] + (14 << 20)
    real = MemoryWatch.peak

    def peak(self: MemoryWatch) -> int:
        return real(self) + (40 << 20 if training else 0)

    training, add = False, disk.Lines.add

    def added(self: disk.Lines, tree: dict[str, Any]) -> None:
        nonlocal training
        training = True
        add(self, tree)

    monkeypatch.setattr(disk.Lines, "add", added)
    monkeypatch.setattr(MemoryWatch, "peak", peak)
    out = tmp_path / "run"
    more = {**WIDE, "memory": f"{budget >> 20}MiB"}
    run(options(rows, out, **more), QUIET, machine=Room(lambda: 8 << 30).machine())
    events = [event for event in read_lines(out / "events.jsonl") if event["kind"] == "memory"]
    assert len(events) <= 3  # a little more may be missing with another micro-batch
    last = max(out.glob("plan-*.json"), key=lambda path: int(path.stem.rpartition("-")[2]))
    assert runs.read(out, last.name)["selected"] == plan["selected"]
    assert runs.read(out, "run.json")["budget"]["lowered_to_bytes"] is None
    assert [line["step"] for line in read_lines(out / "metrics.jsonl")] == list(range(1, 13))


def test_a_resumed_run_keeps_the_budget_that_it_stepped_back_to(rows: Path, plenty: Path, tmp_path: Path) -> None:
    import psutil

    looks, out = 0, tmp_path / "run"
    plan = runs.read(plenty, "plan-0.json")
    budget = plan["predicted"]["peak_bytes"] + RESERVE_BYTES - (6 << 20)

    def left() -> int:
        nonlocal looks
        looks += 1
        return 8 << 30 if looks < 4 else max(0, budget - psutil.Process().memory_info().rss)

    with pytest.MonkeyPatch.context() as patch:
        dying_at(9, patch)
        with pytest.raises(Stopped):
            run(options(rows, out, **WIDE), QUIET, machine=Room(left).machine())
    stepped = [event["budget_bytes"] for event in read_lines(out / "events.jsonl") if event["kind"] == "memory"]
    resume(out, QUIET)
    assert stepped and runs.read(out, "run.json")["budget"]["lowered_to_bytes"] == stepped[-1]
    report = runs.read(out, "report.json")
    assert sum(entry["steps"] for entry in report["rounds"]) == 12


def test_a_smaller_plan_is_for_the_steps_that_a_deadline_leaves(rows: Path) -> None:
    """The time ends them in any case: a lack of it must not pass for a lack of memory."""
    setup = prepare(options(rows, None, time="1h", steps=100), QUIET)
    rounds = Rounds(setup, QUIET)
    values = {weight.name: 1.0 for weight in setup.need.table.weights}
    at = Standing(index=0, step=10, spent=0, trained=(), later=0, after_s=0.0)
    before = rounds.plan(at, values, None)
    assert before.seconds is not None
    rounds.fix(before)
    rounds.last_step = 40
    rounds.setup = replace(setup, started=setup.started - 3599, memory_bytes=before.peak_bytes)
    found = rounds.smaller(at, values, before)
    assert found.flops <= rounds.flops_of(40) < setup.flops
    assert rounds.problem is not None and rounds.problem.steps == 30
    assert rounds.least_bytes(at, values) <= found.peak_bytes <= before.peak_bytes


class _Changing:
    """Sensors that say one thing after another, and the last for good."""

    def __init__(self, *readings: Reading) -> None:
        self.readings = list(readings)

    def read(self) -> Reading:
        return self.readings.pop(0) if len(self.readings) > 1 else self.readings[0]

    def power_mode(self) -> str | None:
        return None


def test_heat_and_battery_pause_a_run_and_it_goes_on(rows: Path, whole: Path, tmp_path: Path) -> None:
    now, slept = 0.0, 0.0

    def clock() -> float:
        nonlocal now
        now += 0.3
        return now

    def sleep(seconds: float) -> None:
        nonlocal now, slept
        now += seconds
        slept += seconds

    cool, hot = Reading(50.0, False, 80.0, 0, 6.5), Reading(99.0, False, 80.0, 0, 9.5)
    low = Reading(50.0, True, 15.0, 0, 6.5)
    sensors = _Changing(cool, hot, hot, cool, cool, low, low, cool)
    machine = Machine(sensors=sensors, available=lambda: 8 << 30, clock=clock, sleep=sleep)
    out = run(options(rows, tmp_path / "run", min_battery=20.0), QUIET, machine=machine)
    assert {event["kind"] for event in read_lines(out / "events.jsonl")} == {"heat", "battery"}
    assert slept > 0 and runs.read(out, "run.json")["measured"]["paused_s"] > 0
    assert any("temperature_c" in line and "power_w" in line for line in read_lines(out / "metrics.jsonl"))
    assert essence(out) == essence(whole)


def test_files_of_a_run_are_for_their_owner(whole: Path) -> None:
    for path in whole.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path
    assert json.loads((whole / "options.json").read_text())["data"].startswith("/")
