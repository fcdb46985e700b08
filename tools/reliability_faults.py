"""A disk that fills up at every write of a run, and bytes that flip in its checkpoints and its patch."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reliability_runs import environment, essence, scratch, some_rows, words

STEPS = 12
EXTRA = ("--steps", str(STEPS), "--checkpoint-every", "4", "--no-examples", "--quiet", "--round-epochs", "0.07",
         "--rho", "0.8", "--memory", "8GiB")  # fmt: skip


@dataclass
class Disk:
    """A disk that is full from its n-th write on (0: never). writes: the file of every write so far."""

    full_from: int = 0
    writes: list[str] = field(default_factory=list)

    def write(self, path: Path, file: Any, data: Any) -> int:
        self.writes.append(path.name)
        if self.full_from and len(self.writes) >= self.full_from:
            file.write(memoryview(data)[: memoryview(data).nbytes // 2])  # half of it still finds a place
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(file.write(data))


class _File:
    """A file on such a disk."""

    def __init__(self, disk: Disk, path: Path, file: Any) -> None:
        self._disk, self._path, self._file = disk, path, file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: Any) -> int:
        return self._disk.write(self._path, self._file, data)


@contextmanager
def on(disk: Disk) -> Iterator[None]:
    """Have edgegt write to this disk."""
    from edgegt import disk as layer

    real = layer.open_file

    def open_file(path: Path, append: bool = False) -> Any:
        return _File(disk, path, real(path, append))

    layer.open_file = open_file
    try:
        yield
    finally:
        layer.open_file = real


@dataclass(frozen=True)
class Full:
    """One trial: the write that found no room, what was said, and what became of the run."""

    file: str
    message: str
    resumed: bool
    same: bool
    problem: str


def _command(arguments: list[str], errors: list[str]) -> int:
    """`edgegt ...` in this process; what it says on standard error is added to `errors`."""
    import contextlib
    import io

    from edgegt.cli import main

    told, out = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(out):
        code = main(arguments)
    errors += told.getvalue().strip().splitlines()
    return code


def full_disks(say: Callable[[str], None]) -> list[Full]:
    """A run for every write that a run makes, on a disk that is full from there on; then room, and a resume."""
    folder = scratch("full")
    os.environ.update(environment(folder / "cache"))
    rows, disk = some_rows(folder), Disk()
    with on(disk):
        code = _command(words(folder / "whole", rows, *EXTRA), [])
    if code != 0:
        raise SystemExit("the uninterrupted run failed")
    expected = essence(folder / "whole")
    say(f"uninterrupted: {len(disk.writes)} writes to {len(set(disk.writes))} files")
    found = []
    for number in range(1, len(disk.writes) + 1):
        place, errors = folder / str(number), list[str]()
        broken = Disk(number)
        with on(broken):
            code = _command(words(place, rows, *EXTRA), errors)
        if len(broken.writes) < number:
            break  # the first run said more, since it had to choose its kernels
        problems = [] if code == 1 else [f"exit code {code}"]
        if len(errors) != 1 or "could not be written (No space left on device)" not in errors[0]:
            problems.append(f"said {errors}")
        message, resumed = errors[0] if errors else "", (place / "options.json").is_file()
        again = ["run", "--resume", str(place), "--quiet"] if resumed else words(place, rows, *EXTRA)
        if resumed and "--resume" not in message:
            problems.append("does not say how to go on")
        code = _command(again, errors := list[str]())
        same = code == 0 and essence(place) == expected
        if not same:
            problems.append(f"resume: exit code {code} {errors}")
        found.append(Full(broken.writes[number - 1], message, resumed, same, "; ".join(problems)))
        say(f"{number}/{len(disk.writes)}: {found[-1]}")
        shutil.rmtree(place, ignore_errors=True)
    return found


def table_of_full(found: list[Full]) -> str:
    """Markdown: by the kind of file."""
    lines = [
        "| the disk is full while this is written | writes | one clear error | resumed | began anew | the same bits |",
        "|---|---|---|---|---|---|",
    ]
    kinds: dict[str, list[Full]] = {}
    for trial in found:
        kinds.setdefault(_kind(trial.file), []).append(trial)
    for kind, trials in [*kinds.items(), ("all", found)]:
        clear = sum(not trial.problem for trial in trials)
        resumed = sum(trial.resumed for trial in trials)
        same = sum(trial.same for trial in trials)
        lines.append(f"| {kind} | {len(trials)} | {clear} | {resumed} | {len(trials) - resumed} | {same} |")
    return "\n".join(lines)


def _kind(file: str) -> str:
    """What a file is, from the name that it has while it is written."""
    name = file.removeprefix(".").split(".")[0]
    if name.startswith("state-"):
        return "checkpoint"
    if re.fullmatch(r"[0-9a-f]{16}-\d+", name):
        return "tensors at rest"
    return "plan" if name.startswith("plan-") else name


@dataclass(frozen=True)
class Flips:
    """What became of flipped bytes in one kind of file."""

    kind: str
    flips: int
    seen: int
    resumed_same: str


def flips(times: int, seed: int, resumes: int, say: Callable[[str], None]) -> list[Flips]:
    """Flip a random bit of a random byte, so many times in the newest checkpoint and in a patch."""
    from edgegt.checkpoint import Checkpoints
    from edgegt.errors import InputError
    from edgegt.patch import read_patch

    folder = scratch("flips")
    os.environ.update(environment(folder / "cache"))
    rows, draw = some_rows(folder), random.Random(seed)
    if _command(words(folder / "whole", rows, *EXTRA), errors := list[str]()) != 0:
        raise SystemExit(f"the uninterrupted run failed: {errors}")
    expected = essence(folder / "whole")
    with on(disk := Disk()):
        _command(words(folder / "count", rows, *EXTRA), [])
    place = folder / "run"
    # Full while the last checkpoint is written: two whole ones stay.
    last = max(index for index, name in enumerate(disk.writes, 1) if name.startswith(".state-"))
    with on(Disk(last)):
        _command(words(place, rows, *EXTRA), [])
    newest = max((place / "checkpoint").glob("state-*"))
    raw = newest.read_bytes()
    seen = same = 0
    for number in range(times):
        changed = bytearray(raw)
        changed[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        newest.write_bytes(changed)
        if number < resumes:
            copy = folder / f"copy-{number}"
            shutil.copytree(place, copy)
            _command(["run", "--resume", str(copy)], errors := list[str]())
            told = any(newest.name in line and "before it is used" in line for line in errors)
            same += told and essence(copy) == expected
            seen += told
            continue
        said: list[str] = []
        saved = Checkpoints(place / "checkpoint").newest(said.append)
        seen += len(said) == 1 and newest.name in said[0] and saved is not None and saved.sealed.path != newest
    say(f"checkpoint: {seen} of {times}")
    found = [Flips("checkpoint", times, seen, f"{same} of {resumes}")]
    patch, seen = folder / "whole" / "patch.safetensors", 0
    raw = patch.read_bytes()
    for _ in range(times):
        changed = bytearray(raw)
        changed[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        (folder / "patch.safetensors").write_bytes(changed)
        try:
            read_patch(folder / "patch.safetensors")
        except InputError:
            seen += 1
    say(f"patch: {seen} of {times}")
    return [*found, Flips("patch", times, seen, "")]


def table_of_flips(found: list[Flips]) -> str:
    """Markdown."""
    lines = ["| file | bits flipped | noticed | resumed from the one before, same bits |", "|---|---|---|---|"]
    return "\n".join(
        [*lines, *(f"| {kind.kind} | {kind.flips} | {kind.seen} | {kind.resumed_same} |" for kind in found)]
    )
