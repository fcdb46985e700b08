"""Memory budgets against reality: random feasible budgets, each a run of its own, predicted beside measured peak.

Every run draws its options (--rho, --batch-size, --max-length), asks for an impossible budget to hear which is the
smallest that would do, and then gets between 1.05 and 3 times that (every fifth exactly 1.05 times). What must hold:

    never above      no measured peak is above its budget
    total            |predicted - measured| within 5 % of the measured peak, in 90 % of the runs
    not under        no prediction more than 3 % below the measured peak
    above the floor  what the run adds to the floor is predicted within 10 % or 16 MiB, in every run
    all ran          no run was refused although its budget had been called feasible, and none failed

Exit code 1 when one of them does not. Options after `--` go to `edgegt run` as they are.

    python tools/bench_memory.py --model DIR --data FILE --columns prompt=mr,completion=ref --count 20
    python tools/bench_memory.py --tiny all --data FILE --columns prompt=mr,completion=ref --count 3 -- --threads 1
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
MIB = 2**20
IMPOSSIBLE = "64MiB"
SMALLEST = (r"smallest budget that would do is ([\d.]+) ?(MiB|GiB)", r"--memory ([\d.]+) ?(MiB|GiB)")
TIGHT, WIDEST, EVERY_TIGHT = 1.05, 3.0, 5
BATCH_SIZES, MAX_LENGTHS, TINY_MAX_LENGTHS = (1, 2, 4, 8), (64, 96, 128, 256), (48, 64, 96)
RHO = (0.4, 1.0)
TRIES = 6
TOTAL_SHARE, TOTAL_IN, UNDER_SHARE, FLOOR_SHARE, FLOOR_BYTES = 0.05, 0.9, 0.03, 0.10, 16 * MIB


@dataclass(frozen=True)
class Draw:
    """The options of one run."""

    model: Path
    rho: float
    batch_size: int
    max_length: int
    steps: int

    def words(self) -> list[str]:
        return [
            "--model", str(self.model), "--rho", f"{self.rho:g}", "--batch-size", str(self.batch_size),
            "--max-length", str(self.max_length), "--steps", str(self.steps),
        ]  # fmt: skip


@dataclass
class Result:
    """What became of one run; bytes are 0 and `problem` says why where there was none."""

    draw: Draw
    budget: int = 0
    predicted: int = 0
    measured: int = 0
    floor: int = 0
    micro_batches: list[int] = field(default_factory=list)
    recomputed: list[int] = field(default_factory=list)
    selected: list[int] = field(default_factory=list)
    terms: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    problem: str = ""

    @property
    def error(self) -> int:
        """Predicted minus measured, the same above the floor: negative is a peak that was not foreseen."""
        return self.predicted - self.measured

    @property
    def share(self) -> float:
        return self.error / self.measured

    @property
    def share_above(self) -> float:
        return self.error / max(1, self.measured - self.floor)

    def to_json(self) -> dict[str, Any]:
        shares = {} if self.problem else {"error_share": self.share, "error_share_above_floor": self.share_above}
        tree = dataclasses.asdict(self) | {"error": self.error} | shares
        return tree | {"draw": {**tree["draw"], "model": self.draw.model.name}}


class Bench:
    """Starts runs, one at a time, each in a process and a folder of its own. more: words for every run."""

    def __init__(self, work: Path, data: Path, more: Sequence[str], timeout_s: float) -> None:
        self.work, self.timeout_s = work, timeout_s
        self.common = ["run", "--data", str(data), "--quiet", "--eval-rows", "16", "--no-early-stopping", *more]
        self.runs = 0

    def run(self, draw: Draw, memory: str) -> tuple[int | None, str, Path]:
        """Exit code (None after the timeout), what was said on standard error, and the run folder."""
        self.runs += 1
        folder = self.work / f"run-{self.runs}"
        words = [sys.executable, "-m", "edgegt", *self.common, *draw.words(), "--memory", memory]
        environment = {"EDGEGT_CACHE": str(self.work / "cache"), "PYTHONPATH": str(REPOSITORY), **os.environ}
        try:
            done = subprocess.run(
                [*words, "--output", str(folder)], cwd=self.work, env=environment, timeout=self.timeout_s,
                capture_output=True, text=True, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return None, f"not done after {self.timeout_s:g} s", folder
        return done.returncode, last_line(done.stderr), folder

    def smallest(self, draw: Draw, chance: random.Random) -> tuple[Draw, int]:
        """The smallest feasible budget in bytes, and the draw, with a higher rho or more steps where it needs them.

        Raises: ValueError with what was said when no budget is named.
        """
        said = ""
        for _ in range(TRIES):
            code, said, _ = self.run(draw, IMPOSSIBLE)
            needed = re.search(r"give --rho (\d+(?:\.\d+)?)", said)
            if code == 2 and (named := smallest_named(said)):
                return draw, named
            if code == 2 and needed and float(needed[1]) <= 1:
                draw = dataclasses.replace(draw, rho=round(chance.uniform(float(needed[1]), 1.0) + 0.005, 2))
                draw = dataclasses.replace(draw, rho=min(1.0, draw.rho))
            elif code == 2 and "more --steps" in said:
                draw = dataclasses.replace(draw, steps=2 * draw.steps)
            else:
                break
        raise ValueError(f"no smallest budget was named: {said}")

    def measure(self, draw: Draw, budget: int) -> Result:
        """One run within `budget` bytes (a whole number of MiB)."""
        started = time.perf_counter()
        code, said, folder = self.run(draw, f"{budget // MIB}MiB")
        result = Result(draw, budget, seconds=time.perf_counter() - started)
        if code == 0:
            read_result(folder, result)
        else:
            result.problem = said if code is None else f"{'refused' if code == 2 else f'exit code {code}'}: {said}"
        return result


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""


def smallest_named(said: str) -> int | None:
    """Bytes of the budget that a refusal names, in the one or the other wording."""
    for pattern in SMALLEST:
        if found := re.search(pattern, said):
            return math.ceil(float(found[1]) * (1024 if found[2] == "GiB" else 1)) * MIB
    return None


def read_result(folder: Path, result: Result) -> None:
    """Fill in what the run folder says."""
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    result.budget = run["budget"]["memory_bytes"]
    result.predicted = run["predicted"]["peak_bytes"]
    result.measured, result.floor = run["measured"]["peak_bytes"], run["measured"]["floor_bytes"]
    result.terms = run["memory_terms"]
    for path in sorted(folder.glob("plan-*.json"), key=lambda path: int(path.stem.rpartition("-")[2])):
        plan = json.loads(path.read_text(encoding="utf-8"))
        result.micro_batches.append(plan["micro_batch"])
        result.recomputed.append(len(plan.get("recompute", [])))
        result.selected.append(len(plan["selected"]))


def draw_one(model: Path, steps: int, lengths: Sequence[int], chance: random.Random) -> Draw:
    """Random options of one run."""
    rho = round(chance.uniform(*RHO), 2)
    return Draw(model, rho, chance.choice(BATCH_SIZES), chance.choice(list(lengths)), steps)


def factor_of(index: int, chance: random.Random) -> float:
    """How many times the smallest budget a run gets: log-uniform, and every fifth time the tightest."""
    drawn = math.exp(chance.uniform(math.log(TIGHT), math.log(WIDEST)))
    return TIGHT if index % EVERY_TIGHT == 0 else drawn


def bench(
    models: Sequence[Path], count: int, steps: int, lengths: Sequence[int], seed: int, runs: Bench,
    tell: Callable[[Result], None],
) -> list[Result]:  # fmt: skip
    """`count` runs of each model, each told as soon as it is done."""
    results = []
    for model in models:
        chance = random.Random(f"{seed}/{model.name}")
        for index in range(count):
            draw, factor = draw_one(model, steps, lengths, chance), factor_of(index, chance)
            try:
                draw, least = runs.smallest(draw, chance)
                result = runs.measure(draw, math.ceil(least * factor / MIB) * MIB)
            except ValueError as error:
                result = Result(draw, problem=str(error))
            results.append(result)
            tell(result)
    return results


HEADER = (
    f"{'model':<14} {'rho':>4} {'rows':>4} {'len':>4} {'steps':>5} {'train':>5} {'micro':>5} {'recomp':>6} "
    f"{'budget':>8} {'predicted':>9} {'measured':>8} {'floor':>7} {'error':>7} {'total':>7} {'above floor':>11}  MiB"
)


def line_of(result: Result) -> str:
    """One row of the table; sizes in MiB, error predicted minus measured and as a share of either."""
    draw = result.draw
    start = f"{draw.model.name:<14.14} {draw.rho:4.2f} {draw.batch_size:4} {draw.max_length:4} {draw.steps:5}"
    if result.problem:
        return f"{start} {'':>18} {result.budget / MIB:8.0f} {result.problem}"
    plans = [
        "/".join(map(str, sorted(set(values)))) for values in (result.selected, result.micro_batches, result.recomputed)
    ]
    sizes = [result.predicted / MIB, result.measured / MIB, result.floor / MIB, result.error / MIB]
    return (
        f"{start} {plans[0]:>5} {plans[1]:>5} {plans[2]:>6} {result.budget / MIB:8.0f} {sizes[0]:9.1f} {sizes[1]:8.1f} "
        f"{sizes[2]:7.1f} {sizes[3]:+7.1f} {result.share:+7.1%} {result.share_above:+11.1%}"
        f"{'  OVER BUDGET' if result.measured > result.budget else ''}"
    )


def verdicts(results: Sequence[Result]) -> dict[str, tuple[bool, str]]:
    """Each criterion: whether it holds, and in how many runs."""
    ran = [result for result in results if not result.problem]
    over = sum(result.measured > result.budget for result in ran)
    near = sum(abs(result.share) <= TOTAL_SHARE for result in ran)
    under = sum(result.share < -UNDER_SHARE for result in ran)
    close = sum(abs(r.share_above) <= FLOOR_SHARE or abs(r.error) <= FLOOR_BYTES for r in ran)
    most_under = min((result.share for result in ran), default=0.0)
    most_over = max((result.share for result in ran), default=0.0)
    problems = [result.problem.partition(":")[0] for result in results if result.problem]
    kinds = ", ".join(f"{problems.count(kind)} {kind}" for kind in sorted(set(problems)))
    return {
        "never above": (over == 0, f"{over} of {len(ran)} runs above their budget"),
        "total": (
            bool(ran) and near >= TOTAL_IN * len(ran),
            f"{near} of {len(ran)} within {TOTAL_SHARE:.0%} (needed: {TOTAL_IN:.0%} of them)",
        ),
        "not under": (
            under == 0,
            f"{under} of {len(ran)} more than {UNDER_SHARE:.0%} under; errors {most_under:+.1%} to {most_over:+.1%}",
        ),
        "above the floor": (
            close == len(ran),
            f"{close} of {len(ran)} within {FLOOR_SHARE:.0%} or {FLOOR_BYTES // MIB} MiB",
        ),
        "all ran": (not problems, f"{len(ran)} of {len(results)}{f' ({kinds})' if kinds else ''}"),
    }


def summary(results: Sequence[Result]) -> str:
    """The criteria, and the terms of the two predictions that were furthest off."""
    lines = [f"{'holds' if good else 'FAILS'}  {name:<16} {text}" for name, (good, text) in verdicts(results).items()]
    ran = [result for result in results if not result.problem]
    for result in sorted(ran, key=lambda result: abs(result.share), reverse=True)[:2]:
        terms = ", ".join(f"{name} {size / MIB:.1f}" for name, size in result.terms.items() if size)
        draw = result.draw
        shape = f"rho {draw.rho:g}, {draw.batch_size} rows of {draw.max_length}"
        lines.append(
            f"furthest off: {draw.model.name}, {shape}, {result.error / MIB:+.1f} MiB; training in MiB: {terms}"
        )
    return "\n".join(lines)


def tiny_models(wanted: str, tokenizer: Path, work: Path) -> list[Path]:
    """Random models of the families that the tests know, with the vocabulary of a real tokenizer.

    Raises: SystemExit for a family that is not there.
    """
    from shapes import TOKENIZER_FILES

    sys.path[1:1] = [str(REPOSITORY / "tests")]
    sys.path.append(str(REPOSITORY))
    tests = importlib.import_module("tiny_models")
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    names = list(tests.FAMILIES) if wanted == "all" else wanted.split(",")
    unknown = [name for name in names if name not in tests.FAMILIES]
    if unknown:
        raise SystemExit(f"--tiny {unknown[0]}: give all, or some of {', '.join(tests.FAMILIES)}")
    words = len(AutoTokenizer.from_pretrained(str(tokenizer), local_files_only=True))
    folders = []
    for name in names:
        config = tests.FAMILIES[name]()
        config.vocab_size = words
        folder = work / "models" / name
        tests.save_model(folder, config)
        for file in TOKENIZER_FILES:
            if (tokenizer / file).is_file():
                shutil.copyfile(tokenizer / file, folder / file)
        folders.append(folder)
    return folders


def arguments(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    own, more = list(words), []
    if "--" in own:
        own, more = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(description="Predicted and measured peak memory of random feasible budgets.")
    parser.add_argument("--model", type=Path, action="append", default=[], help="model folder; may be given again")
    parser.add_argument("--tiny", metavar="FAMILY", help="random models of these families of the tests, or all")
    parser.add_argument("--tokenizer", type=Path, help="model folder whose tokenizer --tiny uses")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--columns", help="which fields of the data to read, as for `edgegt run`")
    parser.add_argument("--count", type=int, default=10, help="runs of each model")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-length", type=int, help="tokens of a row (default: drawn from a few)")
    parser.add_argument("--device", default="jetson", help="profile of every run; --memory and --rho are drawn")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds of one run at most")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run's numbers and terms")
    args = parser.parse_args(own)
    if not args.model and not args.tiny:
        parser.error("give --model DIR or --tiny FAMILY")
    if args.tiny and args.tokenizer is None:
        parser.error("--tiny needs --tokenizer DIR, a folder with tokenizer.json")
    return args, more


def main() -> int:
    args, more = arguments(sys.argv[1:])
    more = ["--device", args.device, *(["--columns", args.columns] if args.columns else []), *more]
    with tempfile.TemporaryDirectory(prefix="bench-memory-") as folder:
        work = Path(folder)
        models = [path.resolve() for path in args.model]
        if args.tiny:
            models += tiny_models(args.tiny, args.tokenizer.resolve(), work)
        lengths = [args.max_length] if args.max_length else TINY_MAX_LENGTHS if args.tiny else MAX_LENGTHS
        runs = Bench(work, args.data.resolve(), more, args.timeout)
        print(HEADER, flush=True)
        results = bench(
            models, args.count, args.steps, lengths, args.seed, runs, lambda result: print(line_of(result), flush=True)
        )
    print(summary(results))
    holds = {name: good for name, (good, _) in verdicts(results).items()}
    if args.json:
        tree = {"holds": holds, "runs": [result.to_json() for result in results]}
        args.json.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    return 0 if all(holds.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
