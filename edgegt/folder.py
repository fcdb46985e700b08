"""The run folder: one place that knows its file names, and that makes it only once the input is known to be good."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgegt.errors import InputError


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
        except FileNotFoundError as error:
            raise InputError(
                f"'{self.path}' is not a finished run folder (it has no {name}): give the folder that "
                "`edgegt run` named"
            ) from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{self.path / name} is damaged ({error}): run `edgegt run` again") from error
        return tree


def choose_folder(output: str | None, model: str, device: str) -> Path:
    """The folder of a new run: --output, else the first free runs/<model>-<device>-<number>.

    Raises: InputError when --output exists and is not an empty folder.
    """
    if output is not None:
        path = Path(output)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise InputError(f"--output '{output}' exists and is not an empty folder: give a new name, or delete it")
        return path
    number = 1
    while (path := Path("runs") / f"{model}-{device}-{number}").exists():
        number += 1
    return path


def make_folder(path: Path) -> RunFolder:
    """Create the run folder. Raises: InputError when it cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        os.chmod(path, 0o700)
    except OSError as error:
        raise InputError(
            f"the run folder '{path}' cannot be made ({error.strerror}): give a writable place with --output"
        ) from error
    return RunFolder(path)
