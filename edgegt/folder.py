"""The run folder: one place that knows its file names. It is made before any heavy work, so that nothing is lost.

From its first moment it holds the options of the run, so that a run that was killed can go on or start over, and a lock
that no second process gets.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from edgegt.disk import DiskError, write_json
from edgegt.errors import InputError
from edgegt.options import RunOptions, options_of

LOCK = ".lock"
RUNS = "runs"
# Options that every record of a run has, and the files that a run writes beside its plans and checkpoints.
_ALWAYS = {"device", "model", "data", "strategy", "batch_size", "max_length", "schedule", "seed"}
_WRITTEN = {
    "metrics.jsonl", "events.jsonl", "eval.json", "run.json", "costs.json", "profile.json", "frontier.json",
    "report.json", "report.html", "patch.safetensors",
}  # fmt: skip
OPTIONS = "options.json"


class RunFolder:
    """Files of one run. Readable by their owner only, because they may hold the user's text."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: Any = None

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def patch(self) -> Path:
        return self.path / "patch.safetensors"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoint"

    @property
    def parked(self) -> Path:
        return self.checkpoints / "parked"

    @property
    def finished(self) -> bool:
        """Whether the run came to its end, evaluation and patch included."""
        try:
            return self.read("run.json").get("finished") is True
        except InputError:
            return False

    def lock(self) -> None:
        """Take the folder for this process, until it ends. Raises: InputError when another process has it."""
        lock = FileLock(str(self.path / LOCK), timeout=0, mode=0o600)
        try:
            lock.acquire()
        except Timeout as error:
            raise InputError(
                f"another process is training into '{self.path}': wait for it to end, or stop it first"
            ) from error
        except OSError as error:
            raise InputError(
                f"the run folder '{self.path}' cannot be locked ({error.strerror}): give a writable place"
            ) from error
        self._lock = lock

    def release(self) -> None:
        """Give the folder up. The lock's file stays: another process may hold it by now."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def clear(self) -> None:
        """Delete what a run left that was broken off before its first checkpoint: its files, and no others."""
        for path in self.path.iterdir():
            if path.name in _WRITTEN or re.fullmatch(r"plan-\d+\.json", path.name):
                path.unlink(missing_ok=True)
        for folder in (self.checkpoints, self.tensorboard):
            if not folder.is_symlink():
                shutil.rmtree(folder, ignore_errors=True)

    def remove(self) -> None:
        """Delete the folder and release it: nothing was trained."""
        self.release()
        shutil.rmtree(self.path, ignore_errors=True)
        if self.path.parent == Path(RUNS):
            with suppress(OSError):
                self.path.parent.rmdir()  # unless there are other runs

    def write(self, name: str, tree: Any) -> None:
        """Write a JSON file of the run, whole or not at all. Raises: DiskError."""
        write_json(self.path / name, tree)

    def read(self, name: str) -> Mapping[str, Any]:
        """Read a JSON file of the run. Raises: InputError when the folder is not a run or the file is damaged."""
        try:
            tree: Mapping[str, Any] = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise InputError(
                f"'{self.path}' is not a finished run folder (it has no {name}): give the folder that "
                "`edgegt run` named"
            ) from error
        except OSError as error:
            raise InputError(
                f"{self.path / name} cannot be read ({error.strerror}): check the disk and the permissions"
            ) from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.path / name} is damaged ({error}): run `edgegt run` again") from error
        if not isinstance(tree, dict):
            raise InputError(f"{self.path / name} is damaged (not a JSON object): run `edgegt run` again")
        return tree

    def options(self) -> RunOptions:
        """The options of this run; those that only another version knows are left out. Raises: InputError."""
        return options_of(self.read(OPTIONS), self.path / OPTIONS)


def lasting(options: RunOptions) -> RunOptions:
    """The options with paths that hold from any folder, as a run keeps them."""
    given: dict[str, Any] = {name: getattr(options, name) for name in ("data", "eval_data", "model", "device")}
    if not options.device.endswith(".toml"):
        del given["device"]  # a name, even where a file is called so
    there = {name: str(Path(value).resolve()) for name, value in given.items() if value and os.path.exists(value)}
    return dataclasses.replace(options, **(given | there))


def claim_folder(options: RunOptions) -> RunFolder:
    """Make and lock the folder of a new run, and write its options: --output, else runs/<model>-<device>-<number>.

    Raises: InputError when it cannot be made.
    """
    model = "home" if options.model is None else Path(options.model).resolve().name
    device = Path(options.device).stem if options.device.endswith(".toml") else options.device
    folder = new_folder(options.output, model, device.replace("/", "-"))
    folder.lock()
    check_output(str(folder.path))  # another process may have been faster, and have ended since
    try:
        folder.write(OPTIONS, dataclasses.asdict(lasting(options)))
    except DiskError:
        folder.remove()
        raise
    return folder


def open_folder(path: Path) -> RunFolder:
    """The folder of a run to go on with, locked. Raises: InputError when it is none, or is in use."""
    folder = RunFolder(path)
    if not (path / OPTIONS).is_file():
        raise InputError(f"'{path}' is not a run folder (it has no {OPTIONS}): give the folder that `edgegt run` named")
    if not set(folder.read(OPTIONS)) >= _ALWAYS:
        raise InputError(f"'{path}' is not a run folder ({OPTIONS} is another program's): give the folder of a run")
    folder.options()
    folder.lock()
    return folder


def unfinished(options: RunOptions) -> Path | None:
    """A run with these very options that was broken off: --output, or the newest in runs/; None without one."""
    wanted = dataclasses.replace(lasting(options), output=None)
    places = [Path(options.output)] if options.output else sorted(Path(RUNS).glob("*"), key=_age, reverse=True)
    for place in places:
        folder = RunFolder(place)
        try:
            same = dataclasses.replace(folder.options(), output=None) == wanted
        except InputError:
            continue
        if same and not folder.finished and _free(folder):
            return place
    return None


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _free(folder: RunFolder) -> bool:
    """Whether no process is training into the folder."""
    if not (folder.path / LOCK).exists():
        return True
    try:
        folder.lock()
    except InputError:
        return False
    folder.release()
    return True


def check_output(output: str | None) -> None:
    """Before any work: whether --output can become a run folder. Raises: InputError when not."""
    if output is None:
        return
    path = Path(output)
    if os.path.lexists(path) and (not path.is_dir() or any(found.name != LOCK for found in path.iterdir())):
        remedy = "give a new name, or delete it"
        if (path / OPTIONS).is_file() and not RunFolder(path).finished:
            remedy = f"it holds a run that was broken off, `edgegt run --resume {path}` goes on with it; or {remedy}"
        raise InputError(f"--output '{output}' exists and is not an empty folder: {remedy}")
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"--output '{output}' cannot be made in '{there}': give a writable place")


def choose_folder(output: str | None, model: str, device: str) -> Path:
    """The folder of a new run: --output, else the first free runs/<model>-<device>-<number>.

    Raises: InputError as check_output.
    """
    check_output(output)
    if output is not None:
        return Path(output)
    number = 1
    while os.path.lexists(path := Path(RUNS) / f"{model}-{device}-{number}"):
        number += 1
    return path


def new_folder(output: str | None, model: str, device: str) -> RunFolder:
    """Choose and create; a chosen name that another run takes in between gives way to the next number."""
    while True:
        try:
            return make_folder(choose_folder(output, model, device), given=output is not None)
        except FileExistsError:
            continue


def make_folder(path: Path, given: bool = True) -> RunFolder:
    """Create the run folder.

    Raises: InputError when it cannot be written; FileExistsError when a name that was not given exists by now.
    """
    try:
        path.mkdir(parents=True, exist_ok=given)
        os.chmod(path, 0o700)
    except OSError as error:
        if isinstance(error, FileExistsError) and not given:
            raise
        raise InputError(
            f"the run folder '{path}' cannot be made ({error.strerror}): give a writable place with --output"
        ) from error
    return RunFolder(path)
