"""Runs of one random model within budgets below and above its int8 size: what is streamed, and the measured peak.

The model has a well-known shape and random weights, so that losses say nothing. Each run is a process of its own; its
peak is what the kernel counts as resident, touched pages of mapped files among it. Exit code 1 when a run went above
its budget, or failed. Options after `--` go to `edgegt run` as they are.

    python tools/bench_stream.py qwen2.5-1.5b WORK --tokenizer-from MODEL --data FILE \
        --memory 800MiB 1GiB 4GiB -- --columns prompt=mr,completion=ref --steps 24
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import shapes

REPOSITORY = Path(__file__).resolve().parents[1]
MIB = 2**20
HEADER = "budget | base in memory | predicted peak | measured peak | boundary | tensors | tokens/s in steps | whole run"


@dataclass(frozen=True)
class Result:
    """One run; bytes, seconds, and tokens per second of its steps."""

    budget: int
    streamed: bool
    base: int
    predicted: int
    measured: int
    boundary: int
    tensors: int
    tokens_per_s: float
    elapsed_s: float

    @classmethod
    def of(cls, folder: Path) -> Result:
        """What a finished run's folder says, by its first plan."""
        run, plan = (json.loads((folder / name).read_text(encoding="utf-8")) for name in ("run.json", "plan-0.json"))
        measured: dict[str, Any] = run["measured"]
        return cls(
            run["budget"]["memory_bytes"], plan["problem"]["streams"], plan["memory"]["base"],
            run["predicted"]["peak_bytes"], measured["peak_bytes"], plan["boundary"], len(plan["selected"]),
            measured["tokens_per_s"], measured["elapsed_s"],
        )  # fmt: skip

    def line(self) -> str:
        """A row of a Markdown table."""
        sizes = [f"{size / MIB:,.0f} MiB" for size in (self.budget, self.base, self.predicted, self.measured)]
        sizes[1] += ", streamed" if self.streamed else ""
        cells = [*sizes, str(self.boundary), str(self.tensors), f"{self.tokens_per_s:.0f}", f"{self.elapsed_s:.0f} s"]
        return f"| {' | '.join(cells)} |"


def run_within(model: Path, data: Path, memory: str, folder: Path, more: Sequence[str]) -> Result | None:
    """One run with kept hidden states; None when it failed, which it has said itself."""
    shutil.rmtree(folder, ignore_errors=True)
    words = [
        sys.executable, "-m", "edgegt", "run", "--model", str(model), "--data", str(data), "--memory", memory,
        "--cache", "auto", "--output", str(folder), "--quiet", "--no-examples", *more,
    ]  # fmt: skip
    environment = {"PYTHONPATH": str(REPOSITORY), **os.environ}
    done = subprocess.run(words, env=environment, stdout=subprocess.DEVNULL, check=False)
    return Result.of(folder) if done.returncode == 0 else None


def main() -> int:
    parser = argparse.ArgumentParser(description="Peaks of runs with a base that does not fit into memory.")
    parser.add_argument("shape", choices=shapes.SHAPES)
    parser.add_argument("work", type=Path, help="folder for the random model, made once, and the runs")
    parser.add_argument("--tokenizer-from", type=Path, required=True, help="model folder to copy a tokenizer from")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--memory", nargs="+", required=True, help="budgets, each a run")
    own, more = sys.argv[1:], []
    if "--" in own:
        own, more = own[: own.index("--")], own[own.index("--") + 1 :]
    args = parser.parse_args(own)
    model = args.work / args.shape
    if not (model / "model.safetensors.index.json").is_file():
        shapes.write_random_model(args.shape, model, args.tokenizer_from)
    results = [run_within(model, args.data, memory, args.work / f"run-{memory}", more) for memory in args.memory]
    print(f"| {HEADER} |\n|{' --- |' * (HEADER.count('|') + 1)}")
    for result in results:
        print("| failed |" if result is None else result.line())
    return int(any(result is None or result.measured > result.budget for result in results))


if __name__ == "__main__":
    sys.exit(main())
