"""kill -9 at random moments of a run, resumed to the end each time: are the results the same bits?"""

from __future__ import annotations

import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from reliability_runs import essence, finish, scratch, some_rows, start, words

STEPS = 240
EXTRA = ("--steps", str(STEPS), "--checkpoint-every", "10", "--round-epochs", "1.3", "--no-examples")
POLL_S = 0.0005
PATIENCE_S = 300.0


@dataclass(frozen=True)
class Kill:
    """One trial. phase: what was aimed at; after_step: steps in the log when it died; resumed: from which step."""

    phase: str
    after_step: int
    resumed: int | None
    same: bool
    problem: str = ""


def kills(times: int, seed: int, jobs: int, say: Callable[[str], None]) -> list[Kill]:
    """Kill and resume so many runs; the phases by turns."""
    folder = scratch("kill")
    cache, rows = folder / "cache", some_rows(folder)
    began = time.perf_counter()
    code = finish(words(folder / "whole", rows, *EXTRA), cache, folder / "whole.err")
    if code != 0:
        raise SystemExit(f"the uninterrupted run failed: see {folder / 'whole.err'}")
    whole_s = time.perf_counter() - began
    say(f"uninterrupted: {STEPS} steps in {whole_s:.0f} s")
    expected = essence(folder / "whole")

    def one(number: int) -> Kill:
        draw = random.Random(f"{seed}/{number}")
        phase = list(_MOMENTS)[number % len(_MOMENTS)]
        place, errors = folder / str(number), folder / f"{number}.err"
        process = start(words(place, rows, *EXTRA), cache, errors)
        _MOMENTS[phase](process, place, errors, draw, whole_s)
        process.send_signal(signal.SIGKILL)
        process.wait()
        died = _steps(place)
        again = folder / f"{number}.again.err"
        arguments = ["run", "--resume", str(place)]
        if not (place / "options.json").is_file():
            arguments = words(place, rows, *EXTRA)  # not even the folder was made: the same command again
        code = finish(arguments, cache, again)
        text = again.read_text(encoding="utf-8")
        found = re.search(r"after step (\d+)$", text, re.MULTILINE)
        problem, same = "", False
        if code != 0:
            problem = f"exit code {code}: {text.strip().splitlines()[-1] if text.strip() else 'no message'}"
        else:
            result = essence(place)
            differing = [key for key in expected if result[key] != expected[key]]
            same, problem = not differing, f"{', '.join(differing)} differ" if differing else ""
        kill = Kill(phase, died, int(found[1]) if found else None, same, problem)
        say(f"{number + 1}/{times}: {kill}")
        return kill

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(one, range(times)))


def _steps(place: Path) -> int:
    metrics = place / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0


def _until(process: subprocess.Popen[bytes], reached: Callable[[], bool]) -> None:
    """Wait for something to be reached, or for the end of the process."""
    end = time.monotonic() + PATIENCE_S
    while not reached() and process.poll() is None and time.monotonic() < end:
        time.sleep(POLL_S)


def _anywhere(process: subprocess.Popen[bytes], place: Path, errors: Path, draw: random.Random, whole_s: float) -> None:
    end = time.monotonic() + draw.uniform(0, whole_s)
    _until(process, lambda: time.monotonic() > end)


def _training(process: subprocess.Popen[bytes], place: Path, errors: Path, draw: random.Random, whole_s: float) -> None:
    wanted = draw.randrange(1, STEPS)
    _until(process, lambda: _steps(place) >= wanted)
    time.sleep(draw.uniform(0, 0.01))


def _selecting(
    process: subprocess.Popen[bytes], place: Path, errors: Path, draw: random.Random, whole_s: float
) -> None:
    """Between the evaluation and the first plan, or between two rounds: importance, planner, promotion."""
    second = draw.random() < 0.5
    if second:
        _until(process, lambda: _steps(place) >= STEPS // 2 - 2 and not _steps(place) % (STEPS // 2))
    else:
        _until(process, lambda: b"before:" in errors.read_bytes())
    time.sleep(draw.uniform(0, 0.4))


def _checkpointing(
    process: subprocess.Popen[bytes], place: Path, errors: Path, draw: random.Random, whole_s: float
) -> None:
    """While a checkpoint is half written: its temporary file is there."""
    wanted = draw.randrange(0, STEPS)
    _until(process, lambda: _steps(place) >= wanted)
    _until(process, lambda: any(place.glob("checkpoint/.*.tmp")))


def _exporting(
    process: subprocess.Popen[bytes], place: Path, errors: Path, draw: random.Random, whole_s: float
) -> None:
    """After the last step: patch, evaluation, record, report."""
    _until(process, lambda: _steps(place) >= STEPS)
    time.sleep(draw.uniform(0, 2.0))


_MOMENTS = {
    "anywhere": _anywhere, "training": _training, "selecting": _selecting, "checkpointing": _checkpointing,
    "exporting": _exporting,
}  # fmt: skip


def table(found: list[Kill]) -> str:
    """Markdown: what was aimed at, how often, and how many ended with the same bits."""
    lines = [
        "| killed while | runs | resumed from a checkpoint | started over | had ended | the same bits |",
        "|---|---|---|---|---|---|",
    ]
    for phase in (*_MOMENTS, "all"):
        mine = [kill for kill in found if phase in ("all", kill.phase)]
        if mine:
            resumed = sum(kill.resumed is not None for kill in mine)
            ended = sum(kill.resumed is None and kill.after_step == STEPS for kill in mine)
            over, same = len(mine) - resumed - ended, sum(kill.same for kill in mine)
            lines.append(f"| {phase} | {len(mine)} | {resumed} | {over} | {ended} | {same} |")
    return "\n".join(lines)
