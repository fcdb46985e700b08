"""One method of the benchmark: its process, what it measured, and the products of its step.

Peers are started by bench_peers. edgegt is `python -m edgegt run` from the outside: a run of so few steps as are timed
would spend a large part of its FLOPs on measuring importance, and its steps would be cheaper than those of a run that
is worth making. So a run of RUN_STEPS steps is started, and stopped by SIGTERM when the timed ones are made; its FLOPs
are those that it would have at its end.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from bench_floor import Product, int8_products, step_of
from bench_peers import METHODS, REPOSITORY
from bench_rows import HELD_OUT, HELD_OUT_FILE, TRAIN_FILE, Size
from edgegt.architecture import all_layers
from edgegt.comparison.published import select

WARM_UP = 2
RUN_STEPS = 200
RHOS = {"edgegt-0.5": 0.5, "edgegt-0.36": 0.36, "edgegt-0.28-kept": 0.28}
KEPT, EPOCHS = "-kept", 5  # with hidden states kept on the disk, and so many visits of each row
NAMES = (*METHODS, *RHOS)
DEVICE = "laptop-x86-16gb"
MEMORY_SHARE = 0.9
LEAST_BYTES = 600 * 2**20
SHARES = {"full": 0.35, "lora-8bit": 0.5}  # of these peers' peaks, the less of both, is edgegt's budget
POLL_S = 0.1
Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """One shape: its model folder, its work folder, and how every method is run."""

    shape: str
    model: Path
    work: Path
    size: Size
    steps: int
    threads: int
    timeout_s: float

    def environment(self) -> dict[str, str]:
        """The same for all methods but for what each sets itself."""
        return {
            **os.environ, "EDGEGT_CACHE": str(self.work / "cache"), "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": str(self.threads), "PYTHONPATH": str(REPOSITORY),
        }  # fmt: skip

    def start(self, words: Sequence[str], said: Path) -> subprocess.Popen[bytes]:
        """A process whose words end in a file."""
        with said.open("wb") as file:
            return subprocess.Popen(words, stdout=file, stderr=file, env=self.environment(), cwd=self.work)


class MethodError(Exception):
    """A method did not run; the message says why in one line."""


def run_peer(bench: Bench, name: str) -> dict[str, Any]:
    """What a peer's process measured. Raises: MethodError."""
    out, said = bench.work / f"{name}.json", bench.work / f"{name}.txt"
    out.unlink(missing_ok=True)
    script = Path(__file__).with_name("bench_peers.py")
    words = [sys.executable, str(script), name, str(bench.model), str(bench.work), str(out)]
    process = bench.start([*words, "--steps", str(WARM_UP + bench.steps), "--threads", str(bench.threads)], said)
    try:
        process.wait(bench.timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise MethodError(f"not done after {bench.timeout_s:g} s") from None
    if process.returncode != 0 or not out.is_file():
        raise MethodError(last_line(said) or f"exit code {process.returncode}")
    result: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return result


def memory_for_edgegt(rows: Sequence[Row]) -> int:
    """edgegt's budget in bytes: shares of what peers took if they are here, else most of what is available.

    Of a small model's peers the shares are less than the interpreter and its libraries: they do not count then.
    """
    import psutil

    peaks = {row["name"]: row["peak_bytes"] for row in rows if "problem" not in row}
    asked = [int(share * peaks[name]) for name, share in SHARES.items() if name in peaks]
    share = min(asked, default=0)
    return share if share > LEAST_BYTES else int(MEMORY_SHARE * psutil.virtual_memory().available)


def run_edgegt(bench: Bench, name: str, memory: int) -> Path:
    """The folder of a run that was stopped when the timed steps were made. Raises: MethodError."""
    folder, said = bench.work / name, bench.work / f"{name}.txt"
    shutil.rmtree(folder, ignore_errors=True)
    process = bench.start([sys.executable, "-m", "edgegt", *edgegt_words(bench, name, memory, folder)], said)
    metrics, wanted, end = folder / "metrics.jsonl", WARM_UP + bench.steps, time.monotonic() + bench.timeout_s
    while process.poll() is None and lines_of(metrics) < wanted and time.monotonic() < end:
        time.sleep(POLL_S)
    late = lines_of(metrics) < wanted
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(bench.timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if late or not (folder / "run.json").is_file():
        raise MethodError(last_line(said) or f"not done after {bench.timeout_s:g} s")
    return folder


def edgegt_words(bench: Bench, name: str, memory: int, folder: Path) -> list[str]:
    """What a user would write after `edgegt`, with a budget of so many bytes."""
    return [
        "run", "--model", str(bench.model), "--data", str(bench.work / TRAIN_FILE),
        "--eval-data", str(bench.work / HELD_OUT_FILE), "--eval-rows", str(HELD_OUT), "--device", DEVICE,
        "--rho", f"{RHOS[name]:g}", "--cache", "auto" if name.endswith(KEPT) else "off",
        "--memory", f"{memory // 2**20}MiB", "--strategy", "greentrainer",
        "--steps", str(run_steps(bench, name)), "--batch-size", str(bench.size.rows),
        "--max-length", str(bench.size.tokens), "--threads", str(bench.threads), "--no-examples", "--quiet",
        "--no-early-stopping", "--output", str(folder),
    ]  # fmt: skip


def run_steps(bench: Bench, name: str) -> int:
    """Steps of the run that is started: one visit of each row, or several where states are kept between them."""
    return max(RUN_STEPS, WARM_UP + bench.steps) * (EPOCHS if name.endswith(KEPT) else 1)


def lines_of(path: Path) -> int:
    """Lines of a file that is being written; 0 before there is one."""
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def last_line(said: Path) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in said.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def peer_row(bench: Bench, name: str, config: Any, full_flops: int) -> tuple[Row, Counter[Product]]:
    """A peer's row but for its floor, and the products of its step."""
    result = run_peer(bench, name)
    prepare = METHODS[name] if result["selected"] is None else partial(selecting, result["selected"])
    step = step_of(config, prepare, bench.size.rows, bench.size.tokens)
    row = timed(bench, name, result["steps"], result["peak_bytes"]) | {"flops_ratio": step.flops / full_flops}
    if result["selected"] is not None:
        row["selected"] = len(result["selected"])
    return row, step.products


def selecting(names: Sequence[str], model: Any, boundary: int = 0) -> Any:
    """The model with exactly these parameters trained, and without the work of the layers below the boundary."""
    select(model, names)
    for layer in all_layers(model)[:boundary]:
        layer.forward = _passing
    return model


def _passing(hidden_states: Any, *args: Any, **named: Any) -> Any:
    return hidden_states


def edgegt_row(bench: Bench, name: str, config: Any, memory: int) -> tuple[Row, Counter[Product]]:
    """edgegt's row but for its floor, and the products of its step."""
    folder = run_edgegt(bench, name, memory)
    run, plan, costs = (json.loads((folder / f"{file}.json").read_text()) for file in ("run", "plan-0", "costs"))
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [entry for entry in entries if entry["round"] == 0][: WARM_UP + bench.steps]
    per_step = (steps[-1]["flops"] - steps[0]["flops"]) / (len(steps) - 1)
    total = run_steps(bench, name)
    rounds = -(-total // plan["steps"])
    planned = len(list(folder.glob("plan-*.json")))  # rounds that have begun, and have measured importance
    flops = total * per_step + rounds * run["measured"]["probe_flops"] / planned
    flops += plan["cache"].get("fill_flops", 0)
    heads = [weight["name"] for weight in costs["weights"] if weight["kind"] == "head"]
    row = timed(bench, name, [entry["step_s"] for entry in steps], run["measured"]["peak_bytes"])
    row |= {
        "flops_ratio": flops / run["full_flops"], "used_of_budget": flops / run["budget"]["flops"],
        "step_flops_ratio": per_step * total / run["full_flops"], "selected": len(plan["selected"]),
        "memory_budget": memory, "head_rows": plan["head_rows"], "micro_batch": plan["micro_batch"],
        "recomputed": len(plan["recompute"]), "head_trained": bool({*heads} & {*plan["selected"]}),
        "boundary": plan["boundary"], "fallbacks": run["fallbacks"], "backend": run["backend"],
    }  # fmt: skip
    blocks = {weight["name"].removesuffix(".weight"): weight["block"] for weight in costs["weights"]}
    return row, plan_products(bench, config, plan, heads[0], blocks)


def plan_products(
    bench: Bench, config: Any, plan: dict[str, Any], head: str, blocks: dict[str, int]
) -> Counter[Product]:
    """The products of a step of this plan, in edgegt's number formats."""
    untied = copy.deepcopy(config)
    untied.tie_word_embeddings = False
    # Of a part of the rows that runs on its own, as often as there are parts.
    chosen = partial(selecting, plan["selected"], boundary=plan["boundary"])
    step = step_of(untied, chosen, plan["micro_batch"], bench.size.tokens, bench.size.supervised)
    again = {prefix for prefix, block in blocks.items() if block in set(plan["recompute"])}
    inside = {prefix.rpartition(".")[0] for prefix in again}

    def recomputed(name: str) -> bool:
        return name in again or name in inside

    head_rows = plan["head_rows"] or 0
    counted = int8_products(step, plan["selected"], recomputed, head.removesuffix(".weight"), head_rows)
    return Counter({product: times * plan["accumulation"] for product, times in counted.items()})


def processor_seconds() -> tuple[float, float]:
    """Seconds of processors that the whole machine has spent so far, or had taken from it, and this bench of them.

    Processes that were started count once they have ended.
    """
    import psutil

    times = psutil.cpu_times()._asdict()
    idle = ("idle", "iowait", "guest", "guest_nice")  # guests are in user and nice already
    return sum(spent for kind, spent in times.items() if kind not in idle), sum(os.times()[:4])


def timed(bench: Bench, name: str, seconds: Sequence[float], peak: int) -> Row:
    """The part of a row that every method has."""
    counted = sorted(seconds[WARM_UP : WARM_UP + bench.steps])
    low, _, high = quantiles(counted, n=4) if len(counted) > 1 else counted * 3
    middle = median(counted)
    return {
        "name": name, "shape": bench.shape, "step_s": middle,
        "tokens_per_s": bench.size.rows * bench.size.tokens / middle, "peak_bytes": peak,
        "flops_ratio": None, "floor_share": None, "spread": [low, high], "fastest_s": counted[0],
        "slowest_s": counted[-1], "steps": len(counted), "threads": bench.threads, "rows": bench.size.rows,
        "tokens": bench.size.tokens, "supervised": bench.size.supervised,
    }  # fmt: skip


def failed(bench: Bench, name: str, problem: str) -> Row:
    """The row of a method that did not run."""
    empty = dict.fromkeys(("step_s", "tokens_per_s", "peak_bytes", "flops_ratio", "floor_share"))
    return {"name": name, "shape": bench.shape, **empty, "problem": problem}
