"""Runs that keep hidden states: the predicted FLOPs, the same bits after a kill, and no cache where that fails."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import runs
from edgegt import frozen, hidden, job, prefix
from edgegt.disk import fault, read_lines
from edgegt.errors import BudgetError, EdgegtError
from edgegt.hidden import HiddenStore
from edgegt.log import Log
from edgegt.options import RunOptions
from edgegt.run import resume, run

pytestmark = pytest.mark.skipif(not runs.HERE, reason="no stories260K or no E2E rows under shared/data")
QUIET = Log(quiet=True)
LOW_RHO = 0.33  # below what is reachable without kept states on these rows


class Stopped(BaseException):
    """Stands for a process that dies."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.some_rows(tmp_path_factory.mktemp("rows"), 60)


@pytest.fixture(autouse=True)
def here(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in runs.environment(cache).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(prefix, "FILE_BYTES", 100_000)  # some files, though rows are few
    monkeypatch.setattr(sys.modules[run.__module__], "write_report_apart", lambda path, log: None)


def options(rows: Path, out: Path, **more: Any) -> RunOptions:
    """Two rounds of 28 steps, four visits of each row, and a checkpoint every 5 steps."""
    given: dict[str, Any] = {
        "device": "jetson", "model": str(runs.STORIES), "data": str(rows), "columns": "prompt=mr,completion=ref",
        "threads": 1, "batch_size": 4, "max_length": 96, "epochs": 4.0, "eval_rows": 6, "rho": 0.36, "memory": "2GiB",
        "lr": 3e-3, "examples": False, "checkpoint_every": "5", "output": str(out), "cache": "on",
        "early_stopping": False,
    }  # fmt: skip
    return RunOptions(**given | more)


def essence(folder: Path) -> tuple[bytes, list[tuple[int, float, int]], float]:
    """The patch, step, loss and FLOPs of every step, and the loss after: what must be the same bits."""
    steps = [(line["step"], line["loss"], line["flops"]) for line in read_lines(folder / "metrics.jsonl")]
    return (folder / "patch.safetensors").read_bytes(), steps, runs.read(folder, "eval.json")["after"]["loss"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cache: Path, rows: Path) -> Path:
    """An uninterrupted run."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in runs.environment(cache).items():
            patch.setenv(key, value)
        patch.setattr(prefix, "FILE_BYTES", 100_000)
        return run(options(rows, tmp_path_factory.mktemp("whole") / "run"), QUIET)


def test_the_flops_that_ran_are_those_that_were_predicted(whole: Path) -> None:
    found, report = runs.read(whole, "run.json"), runs.read(whole, "report.json")
    assert found["measured"]["flops"] == found["predicted"]["flops"] <= found["budget"]["flops"]
    kept = report["cache"]
    assert kept["boundary"] == runs.read(whole, "plan-1.json")["boundary"] > 0
    assert kept["hits"] == kept["visits"] == 4 * 54
    assert kept["rows"] == 53  # two rows read the same tokens
    assert 0 < kept["bytes"] <= runs.read(whole, "plan-0.json")["cache"]["bytes"]
    assert len(kept["epoch_s"]) == 4
    assert kept["saved_flops"] > 0.1 * found["full_flops"]
    assert "cache_hits" in read_lines(whole / "metrics.jsonl")[-1]
    assert not (whole / "checkpoint").exists()  # nothing of the rows is left


def test_the_second_round_keeps_the_boundary_that_is_there(whole: Path) -> None:
    first, second = (runs.read(whole, f"plan-{index}.json")["cache"] for index in (0, 1))
    assert second["kept"] == first["boundary"]
    costs = {one["boundary"]: one["fill_flops"] for one in second["boundaries"]}
    assert [boundary for boundary, flops in costs.items() if flops == 0] == [first["boundary"]]


def test_a_budget_below_the_forward_pass_is_kept_and_refused_without(rows: Path, tmp_path: Path) -> None:
    with pytest.raises(
        BudgetError, match=r"below the smallest reachable 0\.\d+ .*; (0\.\d+) with --cache auto"
    ) as told:
        run(options(rows, tmp_path / "off", cache="off", rho=LOW_RHO, epochs=8.0), QUIET)
    assert told.value.smallest_rho is not None
    assert told.value.smallest_rho > LOW_RHO
    found = runs.read(run(options(rows, tmp_path / "on", cache="auto", rho=LOW_RHO, epochs=8.0), QUIET), "run.json")
    assert found["measured"]["flops_ratio"] <= LOW_RHO
    assert found["cache"]["boundary"] > 0
    with pytest.raises(BudgetError, match=r"below the smallest reachable 0\.\d+ .*; 0\.\d+ with --cache off"):
        run(options(rows, tmp_path / "less", cache="auto", rho=0.1), QUIET)


def dying(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Have the process die while it writes a file of states, after so many of them."""
    write, count = HiddenStore.write, [0]

    def until(self: HiddenStore, *given: Any) -> None:
        count[0] += 1
        if count[0] > after:
            raise Stopped
        write(self, *given)

    monkeypatch.setattr(HiddenStore, "write", until)


@pytest.mark.parametrize("after", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_run_that_died_while_filling_ends_with_the_same_bits(
    after: int, whole: Path, rows: Path, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix, "FILE_BYTES", 100_000)
        dying(patch, after)
        with pytest.raises(Stopped):
            run(options(rows, tmp_path / "run"), QUIET)
    there = sorted((tmp_path / "run" / "checkpoint" / frozen.FOLDER).glob("*/rows-*"))
    assert len(there) == after
    written, made = HiddenStore.write, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix, "FILE_BYTES", 100_000)

        def noting(self: HiddenStore, number: int, *given: Any) -> None:
            made.append(number)
            written(self, number, *given)

        patch.setattr(HiddenStore, "write", noting)
        resume(tmp_path / "run", QUIET)
    assert made[0] == after  # what was whole is not made again
    assert essence(tmp_path / "run") == essence(whole)


@pytest.mark.slow
def test_states_that_are_lost_are_made_again_with_the_same_bits(whole: Path, rows: Path, tmp_path: Path) -> None:
    add = frozen.FrozenPrefix.step_facts

    def until(self: frozen.FrozenPrefix) -> dict[str, float]:
        if self.visits > 80:
            raise Stopped
        return add(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frozen.FrozenPrefix, "step_facts", until)
        with pytest.raises(Stopped):
            run(options(rows, tmp_path / "run"), QUIET)
    first, second, *_ = sorted((tmp_path / "run" / "checkpoint" / frozen.FOLDER).glob("*/rows-*"))
    first.unlink()
    data = bytearray(second.read_bytes())
    data[-9] ^= 1
    second.write_bytes(data)
    resume(tmp_path / "run", QUIET)
    assert essence(tmp_path / "run") == essence(whole)


def test_a_full_disk_means_no_kept_states_and_one_line(rows: Path, tmp_path: Path) -> None:
    written = hidden.write_sealed

    def full(path: Path, *given: Any) -> str:
        if path.name.startswith("rows-000001"):
            raise fault(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        return written(path, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hidden, "write_sealed", full)
        found = run(options(rows, tmp_path / "run", rho=0.55), QUIET)
    record = runs.read(found, "run.json")
    told = [line for line in record["fallbacks"] if "hidden states" in line]
    assert len(told) == 1 and "No space left" in told[0]
    assert record["cache"]["boundary"] == record["cache"]["hits"] == 0
    assert record["measured"]["flops"] <= record["budget"]["flops"]


@pytest.mark.slow
def test_a_full_disk_is_said_where_the_budget_counted_on_states(rows: Path, tmp_path: Path) -> None:
    def full(*given: Any) -> str:
        raise fault(Path("rows"), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hidden, "write_sealed", full)
        with pytest.raises(EdgegtError, match=r"without kept hidden states .*No space left.*--resume"):
            run(options(rows, tmp_path / "run", rho=LOW_RHO, epochs=8.0, cache="auto"), QUIET)
    resume(tmp_path / "run", QUIET)
    assert runs.read(tmp_path / "run", "run.json")["cache"]["boundary"] > 0


def test_rows_that_do_not_fit_are_computed(whole: Path, rows: Path, tmp_path: Path) -> None:
    limit = runs.read(whole, "report.json")["cache"]["bytes"] // 2
    with pytest.MonkeyPatch.context() as patch:
        free = SimpleNamespace(free=prefix.FREE_SHARE * limit)
        patch.setattr(job, "shutil", SimpleNamespace(disk_usage=lambda place: free))
        found = run(options(rows, tmp_path / "run", rho=0.45), QUIET)
    said = runs.read(found, "run.json")
    kept = said["cache"]
    assert 0 < kept["rows"] < 54
    assert 0 < kept["hits"] < kept["visits"]
    assert kept["bytes"] <= limit
    assert said["measured"]["flops"] == said["predicted"]["flops"]
    assert any("half of what is free" in line for line in said["fallbacks"])


@pytest.mark.slow
def test_kept_and_computed_states_train_alike(rows: Path, tmp_path: Path) -> None:
    """The same selection with and without kept states: nearly the same losses, fewer FLOPs."""
    found = {}
    for mode in ("auto", "off"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "edgegt.rounds.values_of",
                lambda values, table: {w.name: float(w.block >= 3 and w.kind != "vector") for w in table.weights},
            )
            folder = run(options(rows, tmp_path / mode, cache=mode, rho=0.9), QUIET)
        found[mode] = {name: runs.read(folder, f"{name}.json") for name in ("plan-0", "eval", "run")}
    assert found["auto"]["plan-0"]["selected"] == found["off"]["plan-0"]["selected"]
    assert found["auto"]["plan-0"]["boundary"] == 3
    losses = [one["eval"]["after"]["loss"] for one in found.values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert losses[0] < 0.6 * found["off"]["eval"]["before"]["loss"]
    kept, whole = (one["run"]["measured"]["flops"] for one in found.values())
    assert kept < 0.85 * whole
