"""Memory that is taken away in the middle of a run, what a resume costs, and whether a long run grows."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from edgegt.disk import read_lines
from edgegt.guard import RESERVE_BYTES
from edgegt.units import MIB
from reliability_runs import environment, finish, scratch, some_rows, start, words

MODEL, STEPS = "base-7m", 30
EXTRA = ("--steps", str(STEPS), "--batch-size", "16", "--no-examples", "--quiet", "--round-epochs", "100")
CGROUP = Path("/sys/fs/cgroup/memory")
SPARE = 8 * MIB


@dataclass(frozen=True)
class Taken:
    """One trial. how: injected, or a limit of a control group; limit: bytes for the process after `at_step`.

    planned: peak planned before; after: largest resident memory from the step back on; text: what the run said.
    """

    how: str
    at_step: int
    limit: int
    planned: int
    after: int
    steps: int
    text: str
    problem: str


def child(limit_file: Path, arguments: list[str]) -> None:
    """`edgegt run` where a file says how much this process may hold; prints its peak since the last step back."""
    from edgegt.cli import _parse
    from edgegt.cli.parser import options_given
    from edgegt.keeper import Machine
    from edgegt.log import Log
    from edgegt.run import run
    from edgegt.watch import peak_resident_bytes, resident_bytes

    def available() -> int:
        return max(0, int(limit_file.read_text(encoding="ascii")) - resident_bytes())

    injected = str(limit_file) != os.devnull
    run(options_given(_parse(arguments)), Log(quiet=True), machine=Machine(available=available if injected else None))
    print(peak_resident_bytes())


def taken_away(times: int, seed: int, say: Callable[[str], None]) -> list[Taken]:
    """Take memory away at a random step, down to a random limit above the least that can go on; half by cgroups."""
    folder = scratch("memory")
    cache, rows = folder / "cache", some_rows(folder)
    for name in ("cold", "whole"):  # the first one compiles kernels, which takes more
        if finish(words(folder / name, rows, *EXTRA, model=MODEL), cache, folder / f"{name}.err") != 0:
            raise SystemExit(f"the uninterrupted run failed: see {folder / name}.err")
    planned = json.loads((folder / "whole" / "plan-0.json").read_text(encoding="utf-8"))["predicted"]["peak_bytes"]
    finish(words(folder / "least", rows, *EXTRA, "--memory", "100MiB", model=MODEL), cache, folder / "least.err")
    found = re.search(r"smallest budget that would do is (\d+) MiB", (folder / "least.err").read_text(encoding="utf-8"))
    assert found is not None
    least = int(found[1]) * MIB
    groups = _can_group()
    trials: list[Taken] = []
    shared = 0
    if groups:
        quiet = _one(folder / "group", words(folder / "group", rows, *EXTRA, model=MODEL), cache, 0, 99, 0, planned)
        shared = max(0, quiet.after - quiet.limit)
    say(
        f"planned {planned / MIB:.0f} MiB, least {least / MIB:.0f} MiB, control groups: {groups} "
        f"({shared / MIB:.0f} MiB of libraries are charged to others)"
    )
    for number in range(times):
        draw = random.Random(f"{seed}/{number}")
        step, group = draw.randrange(1, STEPS - 4), groups and number % 2 == 1
        limit = draw.randrange(least + RESERVE_BYTES + SPARE, planned + (0 if group else RESERVE_BYTES - 2 * MIB))
        place = folder / str(number)
        arguments = words(place, rows, *EXTRA, model=MODEL)
        trials.append(_one(place, arguments, cache, shared if group else None, step, limit, planned))
        say(f"{number + 1}/{times}: {trials[-1]}")
    return trials


def _one(
    place: Path, arguments: list[str], cache: Path, shared: int | None, step: int, limit: int, planned: int
) -> Taken:
    """One run. shared: resident bytes that a control group does not count; None: memory is taken by injection.

    limit: 0 for none, then the trial's limit is what the group counted at most.
    """
    how = "injected" if shared is None else "cgroup"
    file, group = place.with_suffix(".limit"), CGROUP / f"edgegt-{os.getpid()}-{place.name}"
    file.write_text(str(1 << 40), encoding="ascii")
    source = file if how == "injected" else Path(os.devnull)
    command = [sys.executable, __file__, "--child", str(source), *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(cache)
    )
    if how == "cgroup":
        group.mkdir()
        (group / "cgroup.procs").write_text(str(process.pid), encoding="ascii")
    metrics = place / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and metrics.read_bytes().count(b"\n") >= step):
        time.sleep(0.001)
    if limit and shared is not None:
        (group / "memory.limit_in_bytes").write_text(str(limit - shared), encoding="ascii")
    elif limit:
        file.write_text(str(limit), encoding="ascii")
    out, err = process.communicate()
    if shared is not None:
        limit = limit or int((group / "memory.max_usage_in_bytes").read_text(encoding="ascii"))
        group.rmdir()
    events = [event for event in read_lines(place / "events.jsonl") if event["kind"] == "memory"]
    steps = [line["step"] for line in read_lines(metrics)]
    after = int(out.strip() or 0)
    problems = []
    if process.returncode != 0:
        problems.append(f"exit code {process.returncode}: {err.strip()[-300:]}")
    if steps != list(range(1, STEPS + 1)):
        problems.append(f"{len(steps)} steps")
    if not events:
        problems.append("no step back")
    if after > limit:
        problems.append("over its limit")
    text = events[0]["text"] if events else ""
    return Taken(how, step, limit, planned, after, len(steps), text, "; ".join(problems))


def _can_group() -> bool:
    """Whether control groups with a memory limit can be made here."""
    probe = CGROUP / f"edgegt-{os.getpid()}-probe"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError:
        return False
    return True


def table_of_taken(trials: list[Taken]) -> str:
    """Markdown: one line per trial."""
    lines = [
        "| taken by | after step | limit from then on | planned before | peak from then on | within | steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for trial in trials:
        sizes = " | ".join(f"{size / MIB:.0f} MiB" for size in (trial.limit, trial.planned, trial.after))
        within = "yes" if not trial.problem else trial.problem
        lines.append(f"| {trial.how} | {trial.at_step} | {sizes} | {within} | {trial.steps} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Cost:
    """Seconds from the start of a process to its first new step, and its peak memory: fresh, and resumed."""

    fresh_s: float
    resumed_s: float
    fresh_bytes: int
    resumed_bytes: int


def resume_costs(times: int, model: str, say: Callable[[str], None]) -> list[Cost]:
    """Start a run, kill it, resume it: how long each takes to its first step, and how much memory each takes."""
    folder = scratch("cost")
    cache, rows = folder / "cache", some_rows(folder)
    more = ("--steps", "60", "--checkpoint-every", "5", "--no-examples", "--quiet", "--round-epochs", "100")
    for name in ("cold", "warm"):  # the first one compiles kernels, which takes more
        finish(words(folder / name, rows, *more, model=model), cache, folder / f"{name}.err")
    fresh_bytes = json.loads((folder / "warm" / "run.json").read_text(encoding="utf-8"))["measured"]["peak_bytes"]
    costs = []
    for number in range(times):
        place = folder / str(number)
        fresh_s = _until_step(words(place, rows, *more, model=model), cache, place, 30)
        resumed_s = _until_step(["run", "--resume", str(place), "--quiet"], cache, place, None)
        peak = json.loads((place / "run.json").read_text(encoding="utf-8"))["measured"]["peak_bytes"]
        costs.append(Cost(fresh_s, resumed_s, fresh_bytes, peak))
        say(f"{model} {number + 1}/{times}: {costs[-1]}")
    return costs


def _until_step(arguments: list[str], cache: Path, place: Path, kill_after: int | None) -> float:
    """Seconds until a process has made its first step; it is killed after a step, or left to end."""
    metrics = place / "metrics.jsonl"
    before = len(read_lines(metrics))
    began = time.perf_counter()
    process = start(arguments, cache, place.with_suffix(".err"))
    first = 0.0
    while process.poll() is None:
        lines = read_lines(metrics)
        # A resumed run first cuts its log to the checkpoint.
        if not first and lines and (len(lines) > before or (before and "resume" in _kinds(place))):
            first = time.perf_counter() - began
        if kill_after is not None and len(lines) >= kill_after:
            process.kill()
        time.sleep(0.005)
    process.wait()
    return first


def _kinds(place: Path) -> list[str]:
    return [event["kind"] for event in read_lines(place / "events.jsonl")]


def table_of_costs(costs: dict[str, list[Cost]]) -> str:
    """Markdown: medians."""
    lines = ["| model | fresh start | resume | peak of a whole run | peak of a resumed one |", "|---|---|---|---|---|"]
    for model, found in costs.items():
        fresh, again = (median(getattr(cost, name) for cost in found) for name in ("fresh_s", "resumed_s"))
        most = max(cost.resumed_bytes for cost in found)
        sizes = f"{found[0].fresh_bytes / MIB:.1f} MiB | {most / MIB:.1f} MiB"
        lines.append(f"| {model} | {fresh:.1f} s | {again:.1f} s | {sizes} |")
    return "\n".join(lines)


def long_run(steps: int, say: Callable[[str], None]) -> str:
    """A run of so many steps: Markdown with the slope of its resident memory and the sizes of its files."""
    folder = scratch("long")
    cache, rows, place = folder / "cache", some_rows(folder), folder / "run"
    more = ("--steps", str(steps), "--no-examples", "--checkpoint-every", "30s", "--round-epochs", str(steps / 94 / 4))
    process = start(words(place, rows, *more), cache, folder / "run.err")
    largest = 0
    while process.poll() is None:
        largest = max(largest, sum(path.stat().st_size for path in _files(place / "checkpoint")))
        time.sleep(1)
    if process.returncode != 0:
        raise SystemExit(f"the long run failed: see {folder / 'run.err'}")
    lines = read_lines(place / "metrics.jsonl")
    held = [(line["step"], line["bytes"]) for line in lines if line["step"] > steps // 10]
    slope = _slope(held) * 1000 / MIB
    first, last = (median(size for _, size in part) / MIB for part in (held[:500], held[-500:]))
    say(f"slope {slope:.3f} MiB per 1000 steps, {first:.1f} to {last:.1f} MiB")
    sizes = {path.name: path.stat().st_size for path in _files(place)}
    grown = ", ".join(f"{name} {size / 1024:.0f} KiB" for name, size in sorted(sizes.items(), key=lambda one: -one[1]))
    return "\n".join(
        [
            "| steps | resident memory after a tenth | at the end | slope | largest checkpoint folder |",
            "|---|---|---|---|---|",
            f"| {len(lines)} | {first:.1f} MiB | {last:.1f} MiB | {slope:+.3f} MiB per 1,000 steps "
            f"| {largest / MIB:.1f} MiB |",
            "",
            f"Files at the end: {grown}.",
        ]
    )


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []


def _slope(points: list[tuple[int, int]]) -> float:
    """Least squares."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


if __name__ == "__main__":
    assert sys.argv[1] == "--child"
    child(Path(sys.argv[2]), sys.argv[3:])
