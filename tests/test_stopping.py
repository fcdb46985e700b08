"""Early stopping: what is measured, when training ends, and that the run ends with the best, whatever happens."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import runs
from edgegt import disk, stopping
from edgegt.checkpoint import Checkpoints
from edgegt.comparison.contenders import FULL
from edgegt.comparison.request import request_of
from edgegt.comparison.session import _Session
from edgegt.disk import read_lines
from edgegt.folder import RunFolder
from edgegt.job import evaluated_rows
from edgegt.log import Log
from edgegt.options import RunOptions
from edgegt.report.events import stopping_text
from edgegt.run import resume, run
from edgegt.stopping import Stopping, rows_measured

needs_data = pytest.mark.skipif(not runs.HERE, reason="no stories260K or no E2E rows under shared/data")
SLOW = pytest.mark.slow
EPOCH = 5  # steps of one
Losses = Callable[..., dict[str, float]]


class Said(Log):
    """A quiet log that keeps its lines."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def of(self, *parts: str) -> list[str]:
        """The lines that have all of these parts."""
        return [line for line in self.lines if all(part in line for part in parts)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 rows to train on, and beside them `held.csv` with 24 that are held out."""
    folder = tmp_path_factory.mktemp("rows")
    lines = runs.some_rows(folder, 44).read_text().splitlines(keepends=True)
    (folder / "held.csv").write_text("".join([lines[0], *lines[21:]]))
    (folder / "rows.csv").write_text("".join(lines[:21]))
    return folder / "rows.csv"


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("edgegt.run"), "write_report_apart", lambda path, log: None)  # `whole` has one


def options(rows: Path, out: Path, **more: Any) -> RunOptions:
    """Six epochs of five steps with a rate that is too high for them, in three rounds."""
    given: dict[str, Any] = {
        "device": "jetson", "model": str(runs.STORIES), "data": str(rows), "eval_data": str(rows.parent / "held.csv"),
        "columns": "prompt=mr,completion=ref", "threads": 1, "batch_size": 4, "max_length": 64, "epochs": 6.0,
        "eval_rows": 8, "rho": 0.6, "memory": "2GiB", "lr": 1.2e-2, "examples": False, "checkpoint_every": "3",
        "round_epochs": 2.0, "schedule": "constant", "output": str(out),
    }  # fmt: skip
    return RunOptions(**given | more)


def scripted(monkeypatch: pytest.MonkeyPatch, *losses: float) -> None:
    """Have the measurements find these, one after the other."""
    script: Iterator[float] = iter(losses)
    monkeypatch.setattr(stopping, "held_out_loss", lambda *_: {"loss": next(script)})


def trained_when_best(monkeypatch: pytest.MonkeyPatch) -> dict[int, dict[str, torch.Tensor]]:
    """By step what was trained when it was found to be the best."""
    found: dict[int, dict[str, torch.Tensor]] = {}
    keep = Stopping._keep

    def keeping(self: Stopping, step: int, loss: float) -> None:
        trainee: Any = self.trainee
        found[step] = {name: tensor.clone() for name, tensor in trainee.trainables.masters().items()}
        keep(self, step, loss)

    monkeypatch.setattr(Stopping, "_keep", keeping)
    return found


def measurements(folder: Path) -> list[tuple[int, float]]:
    return [
        (line["step"], line["held_out_loss"])
        for line in read_lines(folder / "metrics.jsonl")
        if "held_out_loss" in line
    ]


def essence(folder: Path) -> tuple[Any, ...]:
    """What must be the same bits: patch, steps, measurements, and what is said of them."""
    steps = [(line["step"], line["loss"]) for line in read_lines(folder / "metrics.jsonl") if "loss" in line]
    about = runs.read(folder, "run.json")
    said = {key: value for key, value in about["early_stopping"].items() if key != "seconds"}
    flops, loss = about["measured"]["flops"], runs.read(folder, "eval.json")["after"]["loss"]
    return (folder / "patch.safetensors").read_bytes(), steps, measurements(folder), said, flops, loss


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> tuple[Path, Said]:
    """A run that gets worse, uninterrupted."""
    said = Said()
    return run(options(rows, tmp_path_factory.mktemp("whole") / "run"), said), said


@needs_data
def test_a_run_that_gets_worse_ends_early_with_the_best(whole: tuple[Path, Said]) -> None:
    folder, said = whole
    found, about = measurements(folder), runs.read(folder, "run.json")
    steps, losses = zip(*found, strict=True)
    best = losses.index(min(losses))
    assert list(steps) == [EPOCH * number for number in range(1, len(steps) + 1)]
    assert 0 < len(losses) - 1 - best == stopping.PATIENCE and len(losses) < 6
    told = about["early_stopping"]
    assert told["stopped"] and told["put_back"] and told["best_epoch"] == best + 1
    assert told["losses"] == list(losses) and told["rows"] == 8 and not told["overlaps"]
    assert about["measured"]["steps"] == steps[-1] and about["finished"]
    assert about["measured"]["flops"] <= about["budget"]["flops"] and about["measured"]["flops_ratio"] <= 0.6
    assert said.of("epoch", "of 6: loss") and said.of("training ends after", "--no-early-stopping")
    (line,) = said.of("was the best", "at the end; kept")
    assert f"epoch {best + 1} of 6" in line and f"{losses[-1]:.3f} at the end" in line
    assert not (folder / "checkpoint").exists()
    page = (folder / "report.html").read_text()
    assert "which the numbers here do not report on" in page and "and after epochs" in page


@needs_data
@pytest.mark.parametrize("dies", [pytest.param(8, marks=SLOW), 10.5, pytest.param(11, marks=SLOW), "best"], ids=str)
def test_a_run_that_died_ends_with_the_same_best(
    dies: float | str, rows: Path, whole: tuple[Path, Said], tmp_path: Path
) -> None:
    """Within an epoch, right after a measurement was written (.5), a step later, and when the best was put back."""
    add = disk.Lines.add

    class Died(BaseException):
        pass

    def until(self: disk.Lines, tree: dict[str, Any]) -> None:
        add(self, tree)
        after = tree.get("step", 0) + 0.5 * ("held_out_loss" in tree)
        if after == dies or tree.get("kind") == dies:
            raise Died

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk.Lines, "add", until)
        with pytest.raises(Died):
            run(options(rows, tmp_path / "run"), Said())
    resume(tmp_path / "run", Said())
    assert essence(tmp_path / "run") == essence(whole[0])


@needs_data
def test_tensors_that_were_demoted_since_are_put_back(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best lies in the second round, beside tensors of the first; in the third others are trained."""
    scripted(monkeypatch, 5.0, 6.0, 3.0, 4.0, 3.5)
    bests, said = trained_when_best(monkeypatch), Said()
    folder = run(options(rows, tmp_path / "run", strategy="lisa", lr=2e-3, rho=0.9, seed=3, cache="off"), said)
    assert list(bests) == [5, 15] and said.of("epoch 3 of 6 was the best: 3.000 against 3.500 at the end; kept")
    patch, plans = load_file(str(folder / "patch.safetensors")), [runs.read(folder, f"plan-{i}.json") for i in range(3)]
    first, second, third = ({*plan["selected"]} for plan in plans)
    assert first - second and third - first - second
    assert set(patch) == first | second == set(bests[15])
    assert all(torch.equal(patch[name], tensor) for name, tensor in bests[15].items())


@needs_data
def test_measuring_changes_no_bit_of_training(rows: Path, tmp_path: Path) -> None:
    """Where the last epoch is the best; with kept hidden states, whose counts are of training alone."""
    more: dict[str, Any] = {"lr": 5e-4, "epochs": 3.0, "cache": "on", "round_epochs": None}
    folder = run(options(rows, tmp_path / "with", **more), Said())
    without = run(options(rows, tmp_path / "without", early_stopping=False, **more), Said())
    assert [step for step, _ in measurements(folder)] == [5, 10, 15] and measurements(without) == []
    ours, theirs = runs.read(folder, "run.json"), runs.read(without, "run.json")
    assert not ours["early_stopping"]["put_back"] and theirs["early_stopping"] is None
    assert (folder / "patch.safetensors").read_bytes() == (without / "patch.safetensors").read_bytes()
    assert ours["cache"] == theirs["cache"] and ours["cache"]["hits"] > 0
    assert ours["measured"]["flops_by_kind"] == theirs["measured"]["flops_by_kind"]


@needs_data
def test_full_fine_tuning_ends_with_the_best_too(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, 1.0, 2.0, 3.0)
    kept: dict[str, torch.Tensor] = {}
    keep = Stopping._keep

    def keeping(self: Stopping, step: int, loss: float) -> None:
        trainee: Any = self.trainee
        kept.update({name: parameter.detach().clone() for name, parameter in trainee.parameters.items()})
        keep(self, step, loss)

    monkeypatch.setattr(Stopping, "_keep", keeping)
    folder = run(options(rows, tmp_path / "run", strategy="full", rho=None, lr=1e-3), Said())
    patch = load_file(str(folder / "patch.safetensors"))
    assert patch and all(torch.equal(patch[name], kept[name].reshape(patch[name].shape)) for name in patch)
    assert runs.read(folder, "run.json")["measured"]["steps"] == 15


@needs_data
@pytest.mark.parametrize("full", [pytest.param("at once", marks=SLOW), "while writing"])
def test_a_full_disk_ends_early_stopping_and_not_the_run(
    full: str, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the second best is written, or while it is; what comes after finds room again."""
    scripted(monkeypatch, 2.0, 1.0)
    keep = Stopping._keep

    def keeping(self: Stopping, step: int, loss: float) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if step > EPOCH and full == "at once":
                usage = shutil.disk_usage(tmp_path)._replace(free=100)
                patch.setattr("edgegt.stopping.shutil", SimpleNamespace(disk_usage=lambda _: usage))
            elif step > EPOCH:

                def no_room(*_: Any) -> None:
                    raise OSError(errno.ENOSPC, "No space left on device")

                patch.setattr("edgegt.sealed.write_all", no_room)
            keep(self, step, loss)

    monkeypatch.setattr(Stopping, "_keep", keeping)
    said = Said()
    folder = run(options(rows, tmp_path / "run", epochs=4.0), said)
    (line,) = said.of("the run goes on without early stopping")
    assert "a better one cannot be kept" in line and ("are free" in line or "No space left" in line)
    about = runs.read(folder, "run.json")
    assert about["finished"] and about["measured"]["steps"] == 20 and line.removeprefix("note: ") in about["fallbacks"]
    assert not about["early_stopping"]["put_back"] and about["early_stopping"]["best_epoch"] is None


@needs_data
def test_a_best_that_was_damaged_is_said_and_the_end_kept(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, 1.0, 2.0, 3.0)
    finish = Stopping.finish

    def finishing(self: Stopping) -> None:
        assert self.best is not None
        path = self.keeper.checkpoints.folder / f"state-{self.best.checkpoint:06d}.safetensors"
        raw = bytearray(path.read_bytes())
        raw[-3] ^= 1
        path.write_bytes(raw)
        finish(self)

    monkeypatch.setattr(Stopping, "finish", finishing)
    said = Said()
    folder = run(options(rows, tmp_path / "run"), said)
    assert said.of("epoch 1 of 6 was the best and cannot be had, the end is kept", "checksum does not match")
    assert not runs.read(folder, "run.json")["early_stopping"]["put_back"]


@needs_data
def test_what_has_no_room_in_memory_is_left_out(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stopping, "_rows_together", lambda self: 0 if self.seen in (1, 3) else 2)
    scripted(monkeypatch, 1.0, 2.0)
    said = Said()
    folder = run(options(rows, tmp_path / "run", epochs=3.0), said)
    assert [step for step, _ in measurements(folder)] == [10, 15]
    assert len(said.of("a held-out loss was left out: measuring it does not fit beside what training holds")) == 1


def stopper(setup: Any, standing: int, peak: int) -> Any:
    trainee = SimpleNamespace(setup=setup, standing_bytes=standing, predicted=SimpleNamespace(peak=peak))
    return SimpleNamespace(trainee=trainee, rows=[None] * 9, _rows=0)


@pytest.mark.parametrize(
    ("memory", "peak", "expected", "predicted"),
    [(10_000, 5000, 8, 5000), (10_000, 1300, 2, 1300), (10_000, 900, 1, 1200), (1200, 900, 1, 1200), (1199, 9, 0, 9)],
)
def test_rows_at_a_time_stay_below_the_peak_of_training(memory: int, peak: int, expected: int, predicted: int) -> None:
    """A row takes 100 bytes beside 1000 that training holds and 100 of the model; one row at least."""
    need = SimpleNamespace(evaluation_bytes=lambda rows, held: held + 100 + 100 * rows)
    setup = SimpleNamespace(need=need, memory_bytes=memory, options=SimpleNamespace(batch_size=8))
    found = stopper(setup, 1000, peak)
    assert Stopping._rows_together(found) == expected
    assert found.trainee.predicted.peak == predicted


def example(length: int, kept: int = 2) -> Any:
    return SimpleNamespace(inputs=range(length), targets=range(kept), length=length, supervised=kept)


def test_spare_rows_are_spread_and_no_longer_than_the_evaluated() -> None:
    held = [example(5), example(9), example(10), *(example(3 + number % 8) for number in range(1000))]
    evaluated, spare = evaluated_rows(held, 2)
    assert [one.length for one in evaluated] == [5, 9] and len(spare) == 512
    others = [one for one in held[2:] if one.length <= 9]
    place_of = {id(one): place for place, one in enumerate(others)}
    places = [place_of[id(one)] for one in spare]
    assert len({*places}) == 512 and max(later - one for one, later in pairwise(places)) <= 2
    assert evaluated_rows(held[:2], 8) == (tuple(held[:2]), ())


def test_measurements_take_a_twentieth_of_the_forward_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "shape_of", lambda one: SimpleNamespace(rows=1, tokens=one[0].length))
    forward: Any = SimpleNamespace(
        at=lambda shape: 10 * shape.rows * shape.tokens, total=lambda shapes: sum(10 * 8 * 30 for _ in shapes)
    )
    corpus: Any = SimpleNamespace(held_out=[example(20, 10), example(40, 30)] * 200, spare=())
    shapes: Any = range(600)
    count = rows_measured(forward, shapes, corpus, 6)
    assert count == 600 * 8 // 6 // 20
    assert 6 * count * forward.at(SimpleNamespace(rows=1, tokens=30)) <= 0.05 * forward.total(shapes)
    assert rows_measured(forward, range(6), corpus, 6) == stopping.ROWS[0]
    single: Any = SimpleNamespace(held_out=[example(30, 1)] * 400, spare=())
    assert rows_measured(forward, range(6), single, 6) == stopping.LABELS
    few: Any = SimpleNamespace(held_out=[example(20)] * 3, spare=())
    assert rows_measured(forward, shapes, few, 6) == 3
    assert rows_measured(forward, range(60000), corpus, 6) == 400


def test_seconds_of_measurements_are_counted_before_they_are_spent() -> None:
    found: Any = SimpleNamespace(off=False, steps=30, per_epoch=5, seen=0, rows=[0] * 6)
    found.trainee = SimpleNamespace(setup=SimpleNamespace(corpus=SimpleNamespace(held_out=[0] * 24)))
    assert Stopping.expect(found, 8.0) == 2.0
    assert Stopping.seconds_ahead(found) == 10.0  # five epochs end before the run does
    found.seen = 5
    assert Stopping.seconds_ahead(found) == 0.0
    found.seen, found.off = 0, True
    assert Stopping.seconds_ahead(found) == 0.0


def test_a_checkpoint_stays_as_long_as_a_later_one_names_it(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)

    def begin(*keeps: int) -> set[int]:
        checkpoints.begin(1, {"resting": {}, "keeps": list(keeps)}, {"a": {"master": torch.ones(3)}})
        checkpoints.finish()
        return {int(path.name[6:12]) for path in tmp_path.glob("state-*")}

    assert checkpoints.next_number == 1
    assert begin(1) == {1}
    assert [begin(1) for _ in range(3)] == [{1, 2}, {1, 2, 3}, {1, 3, 4}]
    checkpoints = Checkpoints(tmp_path)  # another process
    assert checkpoints.next_number == 5
    assert begin(5) == {1, 4, 5} and begin(5) == {5, 6} and begin() == {5, 6, 7} and begin() == {7, 8}
    assert checkpoints.of(8).number == 8


def test_comparisons_train_without_it(tmp_path: Path) -> None:
    request = request_of(RunOptions(model="m", data="d"))
    session = _Session(RunFolder(tmp_path), request, Log(quiet=True))
    assert session._options(FULL, 0)["early_stopping"] is False


def test_what_the_report_says() -> None:
    found = {"rows": 46, "overlaps": True, "losses": [0.5, 0.4], "best_epoch": 2.0, "best_loss": 0.4}
    text = stopping_text(found)
    assert text is not None and "46 held-out rows" in text and "flatters" in text and text.endswith("after epoch 2.")
    early = stopping_text({**found, "put_back": True, "stopped": True, "overlaps": False})
    assert early is not None and "is what the run ended with. Training ended early" in early
    assert stopping_text(None) is None and stopping_text({"losses": []}) is None


@pytest.mark.parametrize(("held", "epochs", "wanted"), [(5, 2, True), (5, 1.9, True), (4, 2, True), (5, 2, False)])
def test_when_there_is_early_stopping(held: int, epochs: float, wanted: bool) -> None:
    said = Said()
    corpus = SimpleNamespace(held_out=[example(4)] * held, spare=(), train=range(99))
    forward = SimpleNamespace(at=lambda shape: 1, total=lambda shapes: 200)
    setup: Any = SimpleNamespace(
        options=SimpleNamespace(early_stopping=wanted, batch_size=10), corpus=corpus,
        schedule=SimpleNamespace(steps=int(10 * epochs), shapes=()),
        need=SimpleNamespace(table=SimpleNamespace(forward=forward)),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stopping, "shape_of", lambda one: None)
        found = stopping.stopping_of(SimpleNamespace(setup=setup), SimpleNamespace(), said)
    assert (found is not None) == (held == 5 and epochs == 2 and wanted)
    assert bool(said.of("no early stopping with fewer than 5 held-out rows, and 4 are")) == (held == 4)
