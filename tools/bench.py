"""edgegt against peers: full fine-tuning, LoRA, LoRA over 8 bits, prefix tuning, last layers, published GreenTrainer.

Every method trains on the same rows (see bench_rows), each in a process of its own, one after the other, with the same
number of threads: peers as bench_peers says, edgegt as `python -m edgegt run` from the outside. Measured are

    step_s         seconds of a step, the median (and quartiles) after two steps to warm up
    tokens_per_s   rows times tokens over step_s
    peak_bytes     resident memory of the process at its highest (VmHWM), loading and selection included
    flops_ratio    training FLOPs over those of full fine-tuning with the head on every position; of edgegt over the
                   whole run, with the measuring of importance
    floor_share    the arithmetic floor over step_s (see bench_floor)

    others         processors that other programs took meanwhile, on average

edgegt-0.28-kept keeps hidden states (`--cache auto`) of rows that a run of five epochs visits: its steps are those
after filling, whose FLOPs are in flops_ratio and whose seconds are in no step.

edgegt's memory budget is 0.35 of what full took and 0.5 of lora-8bit, the less of both, where these ran first, else
most of what is available. Checked is that edgegt uses 95 % of the FLOPs it may use and trains the head, and that the
machine was at rest: methods run one after the other, so that load which comes and goes favours some. Exit code 1 when
one of these does not hold, or when a method did not run: its row says why, and the others go on.

    python tools/bench.py --shape smollm2-135m --json bench.json
    python tools/bench.py --shape base-7m --model DIR
    python tools/bench.py --chart docs/speed.svg --from bench.json
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_floor import Product, floor_of, step_of, to_json
from bench_methods import (
    NAMES,
    RHOS,
    RUN_STEPS,
    WARM_UP,
    Bench,
    MethodError,
    Row,
    edgegt_row,
    failed,
    memory_for_edgegt,
    peer_row,
    processor_seconds,
)
from bench_peers import CHAIN_FILE, METHODS, published_chain
from bench_rows import Size, write_batches, write_rows, write_tokenizer
from shapes import SHAPES, TOKENIZER_FILES, write_random_model

DEFAULT_SHAPES = ("smollm2-135m", "qwen2.5-0.5b", "base-7m")
USED = 0.95
OTHERS = 0.15


def add_floors(bench: Bench, rows: Sequence[Row], products: dict[str, Counter[Product]]) -> None:
    """Measure every distinct product once, in a process of its own, and fill in floor_share."""
    distinct = sorted({product for counted in products.values() for product in counted})
    asked, told = bench.work / "products.json", bench.work / "seconds.json"
    asked.write_text(json.dumps(to_json(distinct)), encoding="utf-8")
    script = Path(__file__).with_name("bench_floor.py")
    words = [sys.executable, str(script), str(asked), str(told), "--threads", str(bench.threads)]
    if subprocess.run(words, env=bench.environment(), cwd=bench.work, check=False).returncode != 0:
        print(f"{bench.shape}: the floor could not be measured", flush=True)
        return
    seconds = dict(zip(distinct, json.loads(told.read_text(encoding="utf-8")), strict=True))
    for row in rows:
        if row["name"] in products:
            row["floor_s"] = floor_of(products[row["name"]], seconds)
            row["floor_share"] = row["floor_s"] / row["step_s"]


def bench_shape(bench: Bench, names: Sequence[str]) -> list[Row]:
    """One row per method, each told as soon as it is there."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(bench.model), local_files_only=True)
    full_flops = prepare_work(bench, config, names)
    rows: list[Row] = []
    products: dict[str, Counter[Product]] = {}
    for name in names:
        started, (machine, ours) = time.monotonic(), processor_seconds()
        try:
            if name in RHOS:
                row, products[name] = edgegt_row(bench, name, config, memory_for_edgegt(rows))
            else:
                row, products[name] = peer_row(bench, name, config, full_flops)
        except MethodError as error:
            row = failed(bench, name, str(error))
        machine, ours = (after - before for after, before in zip(processor_seconds(), (machine, ours), strict=True))
        row["others"] = max(0.0, machine - ours) / (time.monotonic() - started)
        print(line_of(row), flush=True)
        rows.append(row)
    if products:
        add_floors(bench, rows, products)
    return rows


def prepare_work(bench: Bench, config: Any, names: Sequence[str]) -> int:
    """Write rows, batches and what the published selection needs; returns FLOPs of a step of full fine-tuning."""
    size, vocabulary = bench.size, int(config.vocab_size)
    write_tokenizer(bench.model, vocabulary)
    write_rows(bench.work, vocabulary, size, max(RUN_STEPS, WARM_UP + bench.steps))
    write_batches(bench.work, bench.model, size, WARM_UP + bench.steps)
    if "greentrainer-published" in names:
        chain = published_chain(config, (size.rows, size.tokens))
        (bench.work / CHAIN_FILE).write_text(json.dumps(chain), encoding="utf-8")
    return step_of(config, METHODS["full"], size.rows, size.tokens).flops


def line_of(row: Row, against: dict[str, Row] | None = None) -> str:
    """One row of the table; against: rows by name, whose step_s stand above a ratio."""
    start = f"{row['shape']:<13.13} {row['name']:<22}"
    if "problem" in row:
        return f"{start} did not run: {row['problem']}"
    low, high = row["spread"]
    text = f"{start} {row['step_s']:8.3f} {low:8.3f}-{high:<8.3f} {row['tokens_per_s']:8.0f} "
    text += f"{row['peak_bytes'] / 2**20:8.0f} {row['flops_ratio']:7.1%}"
    if against is None:
        return text
    text += f" {row['floor_share']:7.1%}" if row["floor_share"] is not None else f" {'':>7}"
    seconds = row["step_s"]
    for name, width in (("full", 10), ("lora-8bit", 13)):
        other = against.get(name, {}).get("step_s")
        text += f" {f'{other / seconds:.2f}x' if other else '':>{width}}"
    return text


HEADER = (
    f"{'shape':<13} {'method':<22} {'step s':>8} {'quartiles':^17} {'tokens/s':>8} {'MiB':>8} {'FLOPs':>7} "
    f"{'floor':>7} {'vs full':>10} {'vs lora-8bit':>13}"
)


def table(rows: Sequence[Row]) -> str:
    """The table of one or more shapes, with how many times as fast as full and as lora-8bit each method is."""
    lines = [HEADER]
    for shape in dict.fromkeys(row["shape"] for row in rows):
        mine = [row for row in rows if row["shape"] == shape]
        lines += [line_of(row, {row["name"]: row for row in mine}) for row in mine]
    return "\n".join(lines)


def verdicts(rows: Sequence[Row]) -> list[tuple[bool, str]]:
    """What was checked of each row: that it ran, of edgegt's that the FLOPs are used and the head is trained.

    And that the machine was at rest: other programs took no processor meanwhile, and of peers torch's products alone
    do not take longer than the step that is made of them. Seconds of methods do not compare otherwise.
    """
    found = [(False, f"{row['shape']} {row['name']}: did not run") for row in rows if "problem" in row]
    found += [(False, f"{row['shape']} {row['name']}: has no floor") for row in rows
              if "problem" not in row and row["floor_share"] is None]  # fmt: skip
    for row in rows:
        if row.get("others", 0) > OTHERS:
            taken = f"other programs took {row['others']:.2f} processors meanwhile"
            found.append((False, f"{row['shape']} {row['name']}: {taken}: its seconds do not compare"))
        if row["name"] in METHODS and (row["floor_share"] or 0) > 1:
            found.append((False, f"{row['shape']} {row['name']}: its products alone took longer; is the machine busy?"))
        if "used_of_budget" in row:
            start = f"{row['shape']} {row['name']}:"
            share = row["used_of_budget"]
            found.append((USED <= share <= 1, f"{start} {share:.1%} of the allowed FLOPs are used ({USED:.0%} needed)"))
            found.append((row["head_trained"], f"{start} the head is {'' if row['head_trained'] else 'not '}trained"))
    return found


def model_folder(shape: str, model: Path | None, work: Path) -> Path:
    """A folder of our own with the weights of `model`, or random ones of the shape, whose tokenizer may be replaced."""
    folder = work / "model"
    if model is None:
        if not (folder / "model.safetensors.index.json").is_file():
            write_random_model(shape, folder, None)
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for path in model.iterdir():
        if path.is_file() and path.name not in TOKENIZER_FILES and not (folder / path.name).exists():
            (folder / path.name).symlink_to(path.resolve())
    return folder


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="edgegt against peers, on the same rows.")
    parser.add_argument("--shape", nargs="+", default=list(DEFAULT_SHAPES), metavar="NAME",
                        help=f"shapes with random weights: {', '.join(SHAPES)}; with --model its name")  # fmt: skip
    parser.add_argument("--model", type=Path, help="folder with weights of the one --shape instead")
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME",
                        help=f"of {', '.join(NAMES)}; all by default")  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256, help="of a row")
    parser.add_argument("--supervised", type=int, default=64, help="of them")
    parser.add_argument("--steps", type=int, default=8, help=f"timed, after {WARM_UP} to warm up")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds of one method at most")
    parser.add_argument("--work", type=Path, help="folder for weights, rows and runs, to keep (default: a passing one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw the rows, as SVG or PNG")
    parser.add_argument("--from", dest="rows", type=Path, metavar="FILE", help="draw these rows; measure nothing")
    args = parser.parse_args(words)
    unknown = [name for name in args.shape if name not in SHAPES]
    if args.model is not None and len(args.shape) != 1:
        parser.error("--model needs one --shape NAME")
    if args.model is None and unknown:
        parser.error(f"--shape {unknown[0]}: give {', '.join(SHAPES)}, or --model DIR too")
    if args.rows is not None and args.chart is None:
        parser.error("--from needs --chart FILE")
    return args


def measure(args: argparse.Namespace) -> list[Row]:
    """The rows of every shape that was asked for, written after each."""
    rows: list[Row] = []
    size = Size(args.batch_size, args.tokens, args.supervised)
    with tempfile.TemporaryDirectory(prefix="bench-") as passing:
        for shape in args.shape:
            work = (args.work or Path(passing)).resolve() / shape
            work.mkdir(parents=True, exist_ok=True)
            folder = model_folder(shape, args.model, work)
            rows += bench_shape(Bench(shape, folder, work, size, args.steps, args.threads, args.timeout), args.methods)
            if args.json:
                args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return rows


def main() -> int:
    args = arguments(sys.argv[1:])
    if args.rows is not None:
        rows = json.loads(args.rows.read_text(encoding="utf-8"))
    else:
        rows = measure(args)
        print(table(rows))
    if args.chart:
        from bench_chart import draw

        draw(rows, args.chart)
        print(args.chart)
    found = verdicts(rows)
    for good, text in found:
        print(f"{'holds' if good else 'FAILS'}  {text}")
    return 0 if args.rows is not None or all(good for good, _ in found) else 1


if __name__ == "__main__":
    sys.exit(main())
