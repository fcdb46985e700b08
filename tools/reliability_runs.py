"""Small real runs that tools/reliability.py breaks off: how they are started, watched and compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from edgegt.disk import read_lines

REPOSITORY = Path(__file__).resolve().parents[1]
DATA = REPOSITORY.parent / "shared" / "data"
MODELS = DATA / "models"
ROWS = 400


def environment(cache: Path) -> dict[str, str]:
    """This environment with a cache of its own, one thread and no network."""
    more = {"EDGEGT_CACHE": str(cache), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **more}


def some_rows(folder: Path) -> Path:
    """The first rows of E2E, in a file of their own."""
    path = folder / "rows.csv"
    lines = (DATA / "e2e" / "devset.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[: ROWS + 1]), encoding="utf-8")
    return path


def words(out: Path, rows: Path, *more: str, model: str = "stories260K") -> list[str]:
    """`edgegt run` of a small model on these rows; options given last win."""
    return [
        "run", "--device", "jetson", "--model", str(MODELS / model), "--data", str(rows),
        "--columns", "prompt=mr,completion=ref", "--output", str(out), "--threads", "1", "--batch-size", "4",
        "--max-length", "96", "--eval-rows", "24", "--rho", "0.5", "--memory", "2GiB", "--lr", "3e-3",
        "--no-early-stopping", *more,
    ]  # fmt: skip


def start(arguments: list[str], cache: Path, errors: Path) -> subprocess.Popen[bytes]:
    """Start `edgegt ...`; what it says on standard error goes to a file."""
    with errors.open("wb") as file:
        command = [sys.executable, "-m", "edgegt", *arguments]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file, env=environment(cache))


def finish(arguments: list[str], cache: Path, errors: Path) -> int:
    """Run `edgegt ...` to its end; returns the exit code."""
    return start(arguments, cache, errors).wait()


def essence(folder: Path) -> dict[str, Any]:
    """What must be the same bits: the patch, and step, loss and learning rate of every step."""
    steps = [(line["step"], line["loss"], line["lr"]) for line in read_lines(folder / "metrics.jsonl")]
    loss = json.loads((folder / "eval.json").read_text(encoding="utf-8"))["after"]["loss"]
    return {"patch": (folder / "patch.safetensors").read_bytes(), "steps": steps, "loss": loss}


def scratch(name: str) -> Path:
    """A new folder for a trial."""
    return Path(tempfile.mkdtemp(prefix=f"reliability-{name}-"))
