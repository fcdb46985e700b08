"""What measuring importance needs: edgegt's way against the published one, in memory and in FLOPs.

Two processes, one after the other, with the same rows (see bench_rows):

    published   arXiv 2309.13192: two updates with AdamW of all tensors that rho can reach, weights put back afterwards
                (see bench_peers)
    edgegt      a run's preparation, the int8 model, and one statistic per tensor while backward goes down

Compared are their peaks (VmHWM), less what the program holds before it loads the model: libraries, rows, tokenizer.
FLOPs are those of a run of --steps steps at rho 0.5: what all of its rounds measure, of what it may spend.

    python tools/bench_importance.py --shape smollm2-135m --threads 2
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import model_folder, prepare_work
from bench_methods import DEVICE, RHOS, Bench
from bench_peers import METHODS, load, published_chain, published_selection_of
from bench_rows import HELD_OUT_FILE, TRAIN_FILE, Size, read_batches
from shapes import SHAPES

PUBLISHED, OURS = "published", "edgegt"
LR = 1e-4
MEMORY_SHARE, FLOPS_SHARE = 0.1, 0.02


def published(bench: Bench) -> dict[str, Any]:
    """The published importance and selection in this process."""
    import torch
    from transformers import AutoConfig

    from edgegt.watch import resident_bytes

    torch.set_num_threads(bench.threads)
    chain = published_chain(AutoConfig.from_pretrained(str(bench.model)), (bench.size.rows, bench.size.tokens))
    batch = read_batches(bench.work)[0]
    floor = resident_bytes()
    model = METHODS["full"](load(bench.model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    began = time.perf_counter()
    selected = published_selection_of(model, optimizer, batch, chain)
    return {"seconds": time.perf_counter() - began, "selected": len(selected), "floor_bytes": floor}


def ours(bench: Bench) -> dict[str, Any]:
    """A run's preparation, and the importance of its first round, in this process."""
    from edgegt.process import share_the_machine

    share_the_machine()
    from edgegt.architecture import all_layers
    from edgegt.cache import cache_dir
    from edgegt.data import collate
    from edgegt.importance import importance
    from edgegt.log import Log
    from edgegt.model import load_int8
    from edgegt.options import RunOptions
    from edgegt.prepare import prepare

    size = bench.size
    setup = prepare(RunOptions(
        model=str(bench.model), data=str(bench.work / TRAIN_FILE), eval_data=str(bench.work / HELD_OUT_FILE),
        device=DEVICE, rho=RHOS["edgegt-0.5"], steps=bench.steps, batch_size=size.rows, max_length=size.tokens,
        threads=bench.threads, examples=False,
    ), Log(quiet=True))  # fmt: skip
    model = load_int8(setup.config, setup.source, cache_dir(), setup.kernels.backend, setup.device)
    probes, train = setup.probes, setup.corpus.train
    batches = [
        collate(train[start : start + probes.rows], setup.pad_id)
        for start in range(0, probes.rows * probes.count, probes.rows)
    ]
    began = time.perf_counter()
    values = importance(model, batches, all_layers(model.module))
    seconds = time.perf_counter() - began
    if not any(values.values()):
        raise RuntimeError("no tensor has an importance")
    probing = len(setup.schedule.rounds) * model.meter.total
    return {
        "seconds": seconds, "rows": probes.rows * probes.count, "batch": probes.rows,
        "rounds": len(setup.schedule.rounds), "flops_share": probing / setup.flops,
        "floor_bytes": setup.need.floor_bytes,
    }  # fmt: skip


def measured(bench: Bench, what: str) -> dict[str, Any]:
    """What this process is for, and its peak."""
    found = {PUBLISHED: published, OURS: ours}[what](bench)
    from edgegt.watch import peak_resident_bytes

    return {**found, "peak_bytes": peak_resident_bytes()}


def apart(bench: Bench, what: str, arguments: list[str]) -> dict[str, Any]:
    """The same in a process of its own. Raises: CalledProcessError."""
    out = bench.work / f"{what}.json"
    words = [sys.executable, __file__, *arguments, "--work", str(bench.work), "--process", what, "--out", str(out)]
    subprocess.run(words, env=bench.environment(), check=True)
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Memory and FLOPs of measuring importance.")
    parser.add_argument("--shape", default="smollm2-135m", choices=list(SHAPES))
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--supervised", type=int, default=64)
    parser.add_argument("--steps", type=int, default=500, help="of the run that measures it")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--process", choices=[PUBLISHED, OURS], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = arguments()
    size = Size(args.batch_size, args.tokens, args.supervised)
    with tempfile.TemporaryDirectory(prefix="bench-") as passing:
        work = (args.work or Path(passing)).resolve()
        folder = model_folder(args.shape, None, work)
        bench = Bench(args.shape, folder, work, size, args.steps, args.threads, 3600.0)
        if args.process:
            args.out.write_text(json.dumps(measured(bench, args.process)) + "\n", encoding="utf-8")
            return 0
        return compared(bench, sys.argv[1:])


def compared(bench: Bench, words: list[str]) -> int:
    """The table, and whether what should hold does."""
    from transformers import AutoConfig

    prepare_work(bench, AutoConfig.from_pretrained(str(bench.model), local_files_only=True), ())
    found = {what: apart(bench, what, words) for what in (OURS, PUBLISHED)}
    above = {what: (one["peak_bytes"] - one["floor_bytes"]) / 2**20 for what, one in found.items()}
    print(f"{bench.shape:<14} {'peak, MiB':>10} {'floor, MiB':>10} {'above it':>10} {'seconds':>8}")
    for what, one in found.items():
        peak, floor = one["peak_bytes"] / 2**20, one["floor_bytes"] / 2**20
        print(f"{what:<14} {peak:10.0f} {floor:10.0f} {above[what]:10.0f} {one['seconds']:8.1f}")
    mine, memory = found[OURS], above[OURS] / above[PUBLISHED]
    flops = mine["flops_share"]
    print(f"edgegt: {mine['rows']} rows in batches of {mine['batch']}, {mine['rounds']} round(s), {bench.steps} steps")
    print(f"{'holds' if memory <= MEMORY_SHARE else 'FAILS'}  {memory:.1%} of the published memory above the floor")
    print(f"{'holds' if flops <= FLOPS_SHARE else 'FAILS'}  {flops:.2%} of the run's FLOPs")
    return 0 if memory <= MEMORY_SHARE and flops <= FLOPS_SHARE else 1


if __name__ == "__main__":
    sys.exit(main())
