"""The run folder: one place that knows its file names, and that makes it only once the input is known to be good."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgegt.errors import EdgegtError, InputError


class RunFolder:
    """Files of one run. Readable by their owner only, because they may hold the user's text."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def patch(self) -> Path:
        return self.path / "patch.safetensors"

    @property
    def parked(self) -> Path:
        return self.path / "checkpoint" / "parked"

    def write(self, name: str, tree: Any) -> None:
        """Write a JSON file of the run, whole or not at all."""
        partial = self.path / f".{name}.tmp"
        partial.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path / name)

    def read(self, name: str) -> Mapping[str, Any]:
        """Read a JSON file of the run. Raises: InputError when the folder is not a run or the file is damaged."""
        try:
            tree: Mapping[str, Any] = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise InputError(
                f"'{self.path}' is not a finished run folder (it has no {name}): give the folder that "
                "`edgegt run` named"
            ) from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{self.path / name} is damaged ({error}): run `edgegt run` again") from error
        if not isinstance(tree, dict):
            raise InputError(f"{self.path / name} is damaged (not a JSON object): run `edgegt run` again")
        return tree


def write_tensors(path: Path, tensors: Mapping[str, Any], about: dict[str, str]) -> None:
    """Write a safetensors file with metadata, whole or not at all. Raises: EdgegtError when it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    partial = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), str(partial), metadata=about)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise EdgegtError(f"'{path}' could not be written ({error}): free space on its disk and run again") from error


def check_output(output: str | None) -> None:
    """Before any work: whether --output can become a run folder. Raises: InputError when not."""
    if output is None:
        return
    path = Path(output)
    if os.path.lexists(path) and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"--output '{output}' exists and is not an empty folder: give a new name, or delete it")
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
    while os.path.lexists(path := Path("runs") / f"{model}-{device}-{number}"):
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
