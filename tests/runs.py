"""How tests start real runs: as the user does in a process of their own, or in this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tiny_models import SHARED

REPOSITORY = Path(__file__).resolve().parents[1]
STORIES = SHARED / "data" / "models" / "stories260K"
E2E = SHARED / "data" / "e2e" / "devset.csv"
HERE = STORIES.is_dir() and E2E.is_file()


def model_here(name: str) -> Path:
    """The folder of a model under shared/data; skips the test when it or the rows of E2E are not there."""
    folder = SHARED / "data" / "models" / name
    if not (folder.is_dir() and E2E.is_file()):
        pytest.skip(f"no {name} or no E2E rows under shared/data")
    return folder


def environment(cache: Path) -> dict[str, str]:
    """This process's environment with one thread, this repository and a cache of the tests' own."""
    return {**os.environ, "EDGEGT_CACHE": str(cache), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def some_rows(folder: Path, count: int = 400) -> Path:
    """The first rows of E2E as a file of their own, so that a small run does not tokenise all of them."""
    path = folder / "rows.csv"
    path.write_text("".join(E2E.read_text(encoding="utf-8").splitlines(keepends=True)[: count + 1]), encoding="utf-8")
    return path


def words(out: Path, *more: str, model: Path = STORIES, data: Path = E2E) -> list[str]:
    """A small run of E2E rows; options given last win."""
    return [
        "run", "--device", "jetson", "--model", str(model), "--data", str(data),
        "--columns", "prompt=mr,completion=ref", "--output", str(out), "--threads", "1",
        "--batch-size", "4", "--max-length", "96", "--steps", "12", "--eval-rows", "24", *more,
    ]  # fmt: skip


def edgegt(arguments: list[str], cache: Path) -> subprocess.CompletedProcess[str]:
    """`edgegt ...` in a process of its own."""
    command = [sys.executable, "-m", "edgegt", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment(cache), check=False)


def read(folder: Path, name: str) -> Any:
    """A JSON file of a run folder."""
    return json.loads((folder / name).read_text(encoding="utf-8"))
