"""Runs with a streamed base: the bits of a run that holds it whole, after a kill and a signal while states are made."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import runs
from edgegt import frozen, prefix, prepare, stopping
from edgegt.budget import Need
from edgegt.disk import read_lines
from edgegt.errors import Interrupted
from edgegt.hidden import HiddenStore
from edgegt.log import Log
from edgegt.run import resume, run
from edgegt.stream import BaseStream, _is_there
from test_frozen import Stopped, dying, essence, options

pytestmark = pytest.mark.skipif(not runs.HERE, reason="no stories260K or no E2E rows under shared/data")
QUIET = Log(quiet=True)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.some_rows(tmp_path_factory.mktemp("rows"), 40)


def surroundings(patch: pytest.MonkeyPatch, cache: Path, streams: bool) -> None:
    """Some files of states though rows are few, and a base that is streamed though memory is plenty."""

    def chosen(options: Any, need: Need, *given: Any) -> Need:
        return replace(need, streams=streams)

    for key, value in runs.environment(cache).items():
        patch.setenv(key, value)
    patch.setattr(prefix, "FILE_BYTES", 60_000)
    patch.setattr(prepare, "within_memory", chosen)
    patch.setattr(sys.modules[run.__module__], "write_report_apart", lambda path, log: None)


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, cache: Path, rows: Path
) -> Callable[[bool], Path]:  # fmt: skip
    """An uninterrupted run, streamed or not."""
    found: dict[bool, Path] = {}

    def of(streams: bool) -> Path:
        if streams not in found:
            with pytest.MonkeyPatch.context() as patch:
                surroundings(patch, cache, streams)
                out = tmp_path_factory.mktemp("finished") / "run"
                found[streams] = run(options(rows, out, rho=0.4), QUIET)
        return found[streams]

    return of


def test_a_streamed_run_ends_with_the_same_bits(finished: Callable[[bool], Path]) -> None:
    whole, streamed = finished(False), finished(True)
    assert essence(streamed) == essence(whole)
    first, second = (runs.read(one, "plan-0.json") for one in (whole, streamed))
    assert first["selected"] == second["selected"] and second["boundary"] > 1
    assert second["memory"]["base"] < first["memory"]["base"]
    assert not first["problem"]["streams"] and second["problem"]["streams"]
    assert second["cache"]["streamed_bytes"] > 0 == first["cache"]["streamed_bytes"]
    found = runs.read(streamed, "run.json")
    assert found["measured"]["flops"] == found["predicted"]["flops"] <= found["budget"]["flops"]
    assert any("the int8 base is streamed (" in line for line in found["fallbacks"])
    assert not any("streamed" in line for line in runs.read(whole, "run.json")["fallbacks"])


def test_a_streamed_run_that_died_while_filling_ends_with_the_same_bits(
    finished: Callable[[bool], Path], cache: Path, rows: Path, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        surroundings(patch, cache, True)
        dying(patch, 1)
        with pytest.raises(Stopped):
            run(options(rows, tmp_path / "run", rho=0.4), QUIET)
    there = list((tmp_path / "run" / "checkpoint" / frozen.FOLDER).glob("*/rows-*"))
    assert len(there) == 1
    with pytest.MonkeyPatch.context() as patch:
        surroundings(patch, cache, False)  # what was decided holds
        arrived: list[int] = []
        load = BaseStream._load
        patch.setattr(BaseStream, "_load", lambda self, index: (arrived.append(index), load(self, index))[1])
        resume(tmp_path / "run", QUIET)
    assert arrived
    assert essence(tmp_path / "run") == essence(finished(False))


def test_states_that_were_made_before_a_signal_count_once(
    finished: Callable[[bool], Path], cache: Path, rows: Path, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        surroundings(patch, cache, False)
        write = HiddenStore.write

        def signalled(self: HiddenStore, *given: Any) -> None:
            write(self, *given)
            os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr(HiddenStore, "write", signalled)
        with pytest.raises(Interrupted):
            run(options(rows, tmp_path / "run", rho=0.4), QUIET)
        assert not read_lines(tmp_path / "run" / "metrics.jsonl")
        patch.setattr(HiddenStore, "write", write)
        resume(tmp_path / "run", QUIET)
    assert essence(tmp_path / "run") == essence(finished(False))


def test_a_held_out_loss_between_epochs_has_one_layer_of_a_streamed_base_at_a_time(
    cache: Path, rows: Path, tmp_path: Path
) -> None:
    losses: list[list[float]] = []
    there: list[int] = []
    for streams in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            surroundings(patch, cache, streams)
            measure, load = stopping.held_out_loss, BaseStream._load
            measuring: list[bool] = []

            def measured(*given: Any, measure: Any = measure, measuring: list[bool] = measuring) -> Any:
                measuring.append(True)
                try:
                    return measure(*given)
                finally:
                    measuring.clear()

            def loaded(self: BaseStream, index: int, load: Any = load, measuring: list[bool] = measuring) -> None:
                load(self, index)
                if measuring:
                    there.append(sum(any(_is_there(one) for one in members.values()) for members in self.linears))

            patch.setattr(stopping, "held_out_loss", measured)
            patch.setattr(BaseStream, "_load", loaded)
            folder = run(options(rows, tmp_path / str(streams), rho=0.4, early_stopping=True, epochs=2.0), QUIET)
        lines = read_lines(folder / "metrics.jsonl")
        losses.append([line["held_out_loss"] for line in lines if "held_out_loss" in line])
    assert len(losses[0]) == 2
    assert losses[0] == losses[1]
    assert there
    assert max(there) == 1
