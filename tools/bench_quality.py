"""What int8 and a selection cost in quality, and how soon full fine-tuning's held-out loss is reached.

Four runs on the same rows, each in a process of its own, one after the other:

    full       full fine-tuning in float32
    edgegt     a selection under --rho, in int8
    float32    the same selection in float32: the plans of that run, the same batches, learning rates and optimizer
    edgegt+    edgegt with more epochs, or with another budget of FLOPs (--more-epochs, --more-rho, --more-lr)

Every few steps the loss on some held-out rows is evaluated; that stops the clock. What must hold:

    int8       the held-out loss of edgegt at the end is within 1 % of the one of the same selection in float32
    time       edgegt, or edgegt+, reaches full's last loss in at most 0.8 of the seconds of full's own training, with
               all that belongs to training: measuring importance, planning, checkpoints; evaluations are left out

Exit code 1 when one of them does not. Learning rates are given, each the best of a grid for its method.

    python tools/bench_quality.py --model DIR --data FILE --columns prompt=mr,completion=ref --epochs 2 --threads 2
    python tools/bench_quality.py --model DIR --data FILE --steps 200 --lr 8e-4 --lr-full 3e-4 --report-time
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # after PYTHONPATH, which may name another copy

from edgegt.folder import make_folder
from edgegt.log import Log
from edgegt.options import RunOptions
from edgegt.process import share_the_machine
from float_twin import FloatTwin, read_plans

REPOSITORY = Path(__file__).resolve().parents[1]
FULL, OURS, TWIN, MORE = "full", "edgegt", "float32", "edgegt+"
INT8_SHARE, TIME_SHARE = 0.01, 0.8
ROWS_TOGETHER = 8
SHOWN = 8


@dataclass(frozen=True)
class Task:
    """One run. options: of `edgegt run`; every: steps between two evaluations of so many held-out `rows`.

    plans: the folder of the run whose selection is trained in float32.
    """

    name: str
    options: dict[str, Any]
    every: int
    rows: int
    folder: str
    plans: str | None = None


@dataclass(frozen=True)
class Point:
    """Held-out loss after a step. seconds: of training so far without evaluations; steps_s: of the steps alone."""

    step: int
    loss: float
    seconds: float
    steps_s: float


@dataclass(frozen=True)
class Result:
    """What became of one run. final: loss on all held-out rows; losses and step_s: of every training step."""

    name: str
    epochs: float
    lr: float
    final: float
    final_rows: int
    flops_ratio: float
    selected: list[int]
    micro_batch: list[int]
    formats: list[str]
    curve: list[Point]
    losses: list[float]
    step_s: list[float]
    notes: list[str]

    @property
    def last(self) -> Point:
        return self.curve[-1]

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Result:
        return cls(**tree | {"curve": [Point(**point) for point in tree["curve"]]})


class Curve(Log):
    """The log of a run that evaluates held-out rows every few steps. It says nothing."""

    def __init__(self, every: int, rows: int) -> None:
        super().__init__(quiet=True)
        self.every, self.rows = every, rows
        self.points: list[Point] = []
        self.entries: list[dict[str, Any]] = []

    def begin(self, setup: Any, trainee: Any) -> None:
        """Evaluate before the first step, and start the clock."""
        held_out = setup.corpus.held_out
        apart = max(1, len(held_out) // self.rows)
        self.setup, self.trainee, self.examples = setup, trainee, held_out[::apart][: self.rows]
        self.points.append(Point(0, self.loss(self.examples), 0.0, 0.0))
        self.started, self.stopped_s = time.perf_counter(), 0.0

    def step(self, entry: dict[str, Any]) -> None:
        self.entries.append(entry)
        if entry["step"] % self.every and entry["step"] != self.setup.schedule.steps:
            return
        began = time.perf_counter()
        loss = self.loss(self.examples)
        self.points.append(Point(entry["step"], loss, began - self.started - self.stopped_s, entry["elapsed_s"]))
        self.stopped_s += time.perf_counter() - began

    def loss(self, examples: Sequence[Any]) -> float:
        """Held-out loss of the model as it is now; its FLOPs are not training FLOPs."""
        from edgegt.evaluate import held_out_loss

        with self.trainee.meter.off():
            setup, module = self.setup, self.trainee.module
            found = held_out_loss(module, examples, setup.pad_id, ROWS_TOGETHER, setup.device)
        if hasattr(self.trainee, "model"):
            self.trainee.model.inputs.clear()
        return float(found["loss"])


def work(task: Task) -> Result:
    """Prepare and train as `edgegt run` does, and evaluate on the way; changes this process's settings."""
    share_the_machine()
    from edgegt.prepare import prepare
    from edgegt.run import keeper_of, trainee_of

    options, log = RunOptions(**task.options), Curve(task.every, task.rows)
    setup = prepare(options, log)
    folder = make_folder(Path(task.folder))
    if task.plans is not None:
        trainee: Any = FloatTwin(setup, log, Path(task.plans), folder)
    else:
        trainee = trainee_of(setup, log, keeper_of(setup, folder, log))
    log.begin(setup, trainee)
    trainee.train()
    trainee.keeper.close()
    plans = read_plans(Path(task.plans or task.folder))
    return Result(
        name=task.name,
        epochs=setup.schedule.steps * options.batch_size / len(setup.corpus.train),
        lr=setup.lr,
        final=log.loss(setup.corpus.held_out),
        final_rows=len(setup.corpus.held_out),
        flops_ratio=trainee.meter.total / setup.full_flops,
        selected=[len(plan["selected"]) for plan in plans],
        micro_batch=[plan["micro_batch"] for plan in plans],
        formats=[
            f"{plan['formats']['master']}, {plan['formats']['states']} states, {plan['head_rows'] or 'all'} head rows"
            for plan in plans if "formats" in plan and not task.plans
        ],
        curve=log.points,
        losses=[round(entry["loss"], 5) for entry in log.entries],
        step_s=[round(entry["step_s"], 5) for entry in log.entries],
        notes=list(log.fallbacks),
    )  # fmt: skip


def work_apart(task: Task, folder: Path) -> Result:
    """The same in a process of its own. Raises: SystemExit with what it said when it failed."""
    stem = folder / f"task-{task.name}"
    given, made = stem.with_suffix(".json"), stem.with_suffix(".result.json")
    given.write_text(json.dumps(asdict(task)), encoding="utf-8")
    environment = {
        "EDGEGT_CACHE": str(folder / "cache"), "PYTHONPATH": str(REPOSITORY), "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", **os.environ, "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    words = [sys.executable, str(Path(__file__).resolve()), "--worker", str(given), str(made)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{task.name}: exit code {done.returncode}\n{done.stderr[-2000:].strip()}")
    return Result.from_json(json.loads(made.read_text(encoding="utf-8")))


def tasks_of(args: argparse.Namespace, folder: Path) -> list[Task]:
    """The four runs, in their order; the third needs the folder of the second."""
    common = {
        "device": args.device, "model": str(args.model.resolve()), "data": str(args.data.resolve()),
        "columns": args.columns, "threads": args.threads, "memory": args.memory, "batch_size": args.batch_size,
        "max_length": args.max_length, "seed": args.seed, "examples": False,
        "early_stopping": False,
    }  # fmt: skip
    once = {"steps": args.steps} if args.steps else {"epochs": args.epochs}
    times = args.more_epochs / args.epochs
    longer = {"steps": round(args.steps * times)} if args.steps else {"epochs": args.more_epochs}
    ours = common | {"rho": args.rho, "lr": args.lr}

    def task(name: str, options: dict[str, Any], plans: str | None = None) -> Task:
        return Task(name, options, args.every, args.rows, str(folder / name), plans)

    return [
        task(FULL, common | once | {"strategy": "full", "lr": args.lr_full}),
        task(OURS, ours | once),
        task(TWIN, ours | once, str(folder / OURS)),
        task(MORE, ours | longer | {"rho": args.more_rho or args.rho, "lr": args.more_lr or args.lr}),
    ]


def reached(result: Result, loss: float) -> Point | None:
    """The first evaluation at or below this loss."""
    return next((point for point in result.curve if point.loss <= loss), None)


def int8_share(results: dict[str, Result]) -> float:
    """How much higher the held-out loss of edgegt is at the end than that of the same selection in float32."""
    return results[OURS].final / results[TWIN].final - 1


def time_shares(results: dict[str, Result]) -> dict[str, tuple[float, float]]:
    """Seconds to full's last loss over full's own, of each run of edgegt that reaches it; and of the steps alone."""
    full, found = results[FULL].last, {}
    for name in (OURS, MORE):
        if point := reached(results[name], full.loss):
            found[name] = point.seconds / full.seconds, point.steps_s / full.steps_s
    return found


def furthest(results: dict[str, Result]) -> float:
    """The largest distance of the two curves, as a share of the float32 one."""
    pairs = zip(results[OURS].curve, results[TWIN].curve, strict=True)
    return max(abs(ours.loss / theirs.loss - 1) for ours, theirs in pairs)


def verdicts(results: dict[str, Result]) -> dict[str, tuple[bool, str]]:
    """Each criterion: whether it holds, and the numbers."""
    ours, twin, full, apart = results[OURS], results[TWIN], results[FULL].last, int8_share(results)
    shares = time_shares(results)
    said = [f"{name} in {share:.3f} of it ({steps:.3f}, steps alone)" for name, (share, steps) in shares.items()]
    best = ", ".join(f"{name} {min(point.loss for point in results[name].curve):.4f}" for name in (OURS, MORE))
    text = f"full's {full.loss:.4f} took {full.seconds:.0f} s: " + (", ".join(said) or f"not reached (lowest: {best})")
    return {
        "int8": (
            abs(apart) <= INT8_SHARE,
            f"{ours.final:.4f} in int8, {twin.final:.4f} in float32, {apart:+.2%} on {ours.final_rows} held-out rows "
            f"(at most {INT8_SHARE:.0%}); curves at most {furthest(results):.2%} apart",
        ),
        "time": (any(share <= TIME_SHARE for share, _ in shares.values()), f"{text} (at most {TIME_SHARE})"),
    }


HEADER = (
    f"{'run':<8} {'epochs':>6} {'steps':>5} {'lr':>7} {'tensors':>9} {'FLOPs':>6} {'step ms':>8} {'steps s':>8} "
    f"{'train s':>8} {'loss':>7}"
)


def line_of(result: Result) -> str:
    """One row of the table; seconds are those of training, loss is that of all held-out rows."""
    tensors = "/".join(map(str, result.selected))
    return (
        f"{result.name:<8} {result.epochs:6.2f} {result.last.step:5} {result.lr:7.1e} {tensors:>9} "
        f"{result.flops_ratio:6.1%} {1000 * median(result.step_s):8.1f} {result.last.steps_s:8.1f} "
        f"{result.last.seconds:8.1f} {result.final:7.4f}"
    )


def curves(results: dict[str, Result]) -> str:
    """The held-out loss of all runs at some shares of their steps."""
    lines = [f"{'of steps':>8} " + " ".join(f"{name:>8}" for name in results)]
    for number in range(SHOWN + 1):
        at = [result.curve[round(number / SHOWN * (len(result.curve) - 1))] for result in results.values()]
        lines.append(f"{number / SHOWN:>8.1%} " + " ".join(f"{point.loss:8.4f}" for point in at))
    return "\n".join(lines)


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Held-out loss over training seconds: int8, float32 and full.")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--columns", help="which fields of the data to read, as for `edgegt run`")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--more-epochs", type=float, default=4.0, help="of the other run of edgegt")
    parser.add_argument("--more-rho", type=float, help="its share of the FLOPs (default: that of --rho)")
    parser.add_argument("--more-lr", type=float, help="its learning rate (default: that of --lr)")
    parser.add_argument("--steps", type=int, help="steps instead of epochs; the longer run has as many times more")
    parser.add_argument("--rho", type=float, default=0.5)
    parser.add_argument("--lr", type=float, default=3.2e-3, help="of edgegt (default: the best for base-7m on E2E)")
    parser.add_argument("--lr-full", type=float, default=1e-3, help="of full fine-tuning (default: likewise)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--device", default="jetson", help="profile of every run")
    parser.add_argument("--memory", help="budget of every run (default: the profile's); full must fit too")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=40, help="steps between two evaluations")
    parser.add_argument("--rows", type=int, default=128, help="held-out rows of these; the last one has all")
    parser.add_argument("--report-time", action="store_true", help="the share of time is told and not judged")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run's numbers and curve")
    return parser.parse_args(list(words))


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        task = Task(**json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))
        Path(sys.argv[3]).write_text(json.dumps(asdict(work(task))), encoding="utf-8")
        return 0
    args = arguments(sys.argv[1:])
    results: dict[str, Result] = {}
    print(HEADER, flush=True)
    with tempfile.TemporaryDirectory(prefix="bench-quality-") as folder:
        for task in tasks_of(args, Path(folder)):
            results[task.name] = work_apart(task, Path(folder))
            print(line_of(results[task.name]), flush=True)
    print(curves(results))
    holds: dict[str, bool] = {}
    for name, (good, text) in verdicts(results).items():
        told = args.report_time and name == "time"
        holds |= {} if told else {name: good}
        print(f"{'told ' if told else 'holds' if good else 'FAILS'}  {name:<5} {text}")
    if args.json:
        tree = {
            "holds": holds, "int8_share": int8_share(results), "time_shares": time_shares(results),
            "runs": [asdict(result) for result in results.values()],
        }  # fmt: skip
        args.json.write_text(json.dumps(tree) + "\n", encoding="utf-8")
    return 0 if all(holds.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
