"""What each default is worth: the same training with one of them changed, at equal FLOPs, on validation rows.

Every variant spends what full fine-tuning spends in --steps, on the same --rows, with the learning rate that `edgegt
compare` found (--factor, of 0.4 / hidden size); rows that nobody is trained or scored on elsewhere say how good it is.
A variant is options of a run, constants of the program, or an idea (ablation_ideas.py). Each training is a process of
its own. Without --model it is the household's.

    python tools/bench_ablation.py --model stories260K --data devset.csv --columns prompt=mr,completion=ref --factor 2
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from statistics import mean, stdev
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # after PYTHONPATH, which may name another copy

from edgegt import home
from edgegt.comparison.jobs import TUNE, Job
from edgegt.process import share_the_machine

STRATEGY, RHO, BATCH = "greentrainer", 0.5, 8
SIMPLER = ("last-layers", "random")


@dataclass(frozen=True)
class Variant:
    """What is changed. options: of a run; constants: as 'module.NAME'; ideas: by name, each with its number."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    ideas: dict[str, float] = field(default_factory=dict)

    def steps(self, full: int) -> int:
        """As many as cost what full fine-tuning's do, all rounds included."""
        rho: float = self.options.get("rho", RHO)
        return round(full * BATCH / _batch(self) / rho)


VARIANTS = (
    Variant("the defaults"),
    Variant("strategy last-layers", {"strategy": "last-layers"}),
    Variant("strategy random", {"strategy": "random"}),
    Variant("value: importance alone", constants={"edgegt.value.BY_SIZE": 0.0}),
    Variant("value: half of it by size", constants={"edgegt.value.BY_SIZE": 0.5}),
    Variant("value: size alone", constants={"edgegt.value.BY_SIZE": 1.0}),
    Variant("value: not tilted", constants={"edgegt.value.TILT": 0.0}),
    Variant("value: tilted by the fourth power", constants={"edgegt.value.TILT": 4.0}),
    Variant("value: concave in each layer, 0.8", ideas={"concave": 0.8}),
    Variant("value: half for what was trained before", ideas={"again": 0.5}),
    Variant("value: the root of importance", ideas={"power": 0.5}),
    Variant("value: AdamW's statistics for what is trained", ideas={"statistics": 1.0}),
    Variant("first round: 30 % more FLOPs", ideas={"first round": 1.3}),
    Variant("first round: 30 % fewer FLOPs", ideas={"first round": 0.7}),
    Variant("probes: 5 % of the FLOPs", constants={"edgegt.budget.PROBE_SHARE": 0.05}),
    Variant("one round", {"round_epochs": 1000.0}),
    Variant("four rounds", {"rounds": 4}),
    Variant("no hidden states kept", {"cache": "off"}),
    *(Variant(f"rho {rho}, {one}", {"rho": rho, "strategy": one}) for rho in (0.25, 0.36) for one in SIMPLER),
    Variant("rho 0.25", {"rho": 0.25}),
    Variant("rho 0.36", {"rho": 0.36}),
    Variant("rho 0.7", {"rho": 0.7}),
    Variant("4 rows per step", {"batch_size": 4}),
    Variant("16 rows per step", {"batch_size": 16}),
    Variant("clipped at 1", {"max_grad_norm": 1.0}),
    Variant("cosine schedule", {"schedule": "cosine"}),
    Variant("no weight decay", {"weight_decay": 0.0}),
    Variant("weight decay 0.3", {"weight_decay": 0.3}),
    Variant("weight decay 0.6", {"weight_decay": 0.6}),
    Variant("0.3 towards the pretrained values instead", {"weight_decay": 0.0}, ideas={"decay to start": 0.3}),
    Variant("beta2 0.99", ideas={"beta2": 0.99}),
    Variant("half the learning rate for the head", ideas={"head rate": 0.5}),
    Variant("twice the learning rate for the head", ideas={"head rate": 2.0}),
    Variant("four times the learning rate for norms", ideas={"vector rate": 4.0}),
)


def job_of(variant: Variant, seed: int, args: argparse.Namespace) -> Job:
    """The training of one variant with one seed."""
    steps = variant.steps(args.steps)
    options: dict[str, Any] = {
        "model": args.model, "data": args.data, "columns": args.columns, "device": args.device, "strategy": STRATEGY,
        "rho": RHO, "seed": seed, "steps": steps, "lr": args.factor * 0.4 / width_of(args.model),
        "threads": args.threads, "examples": False, "early_stopping": False,
        "checkpoint_every": "1000000000", **variant.options,
    }  # fmt: skip
    rounds = options.pop("rounds", None)
    if rounds:  # in epochs of the rows that are trained on
        options["round_epochs"] = steps / rounds * options.get("batch_size", BATCH) / (0.9 * args.rows)
    return Job(TUNE, "edgegt", seed, {"batch_size": BATCH, **options}, options["rho"], args.rows)


def width_of(model: str | None) -> int:
    """Its hidden size."""
    config = json.loads((Path(model or home.MODEL) / "config.json").read_text(encoding="utf-8"))
    return int(config["hidden_size"])


def train(job: Job, constants: dict[str, Any], ideas: dict[str, float]) -> dict[str, Any]:
    """The job, in this process, with constants and functions of the program changed."""
    share_the_machine()
    for name, value in constants.items():
        module, _, constant = name.rpartition(".")
        loaded = import_module(module)
        if not hasattr(loaded, constant):
            raise AttributeError(f"there is no {name}")
        setattr(loaded, constant, value)
    if ideas:
        from ablation_ideas import IDEAS

        for name, number in ideas.items():
            IDEAS[name](number)
    from edgegt.comparison.work import work

    with tempfile.TemporaryDirectory(prefix="ablation-") as place:
        return work(job, Path(place) / job.name)


def trained_apart(variant: Variant, job: Job) -> dict[str, Any]:
    """The same in a process of its own. Raises: RuntimeError with what it said."""
    words = [sys.executable, __file__, "--job", json.dumps([job.to_json(), variant.constants, variant.ideas])]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or ["it failed"])[-1])
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def row_of(name: str, results: Sequence[dict[str, Any]], budget: float) -> str:
    """A line of the table; budget: FLOPs of full fine-tuning."""
    losses = [one["loss"] for one in results]
    spread = f" ± {stdev(losses):.4f}" if len(losses) > 1 else ""
    spent = mean(one["flops"] for one in results) / budget
    return f"| {name} | {results[0]['steps']} | {spent:.3f} | {mean(losses):.4f}{spread} |"


def arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Each default against another value, at equal FLOPs.")
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--columns")
    parser.add_argument("--device", default="laptop-x86-16gb")
    parser.add_argument("--factor", type=float, default=1.0)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=250, help="of full fine-tuning")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="variants with one of these words in their name")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if not args.job and bool(args.model) != bool(args.data):
        parser.error("give --model DIR and --data FILE, or neither")
    return args


def main() -> int:
    args = arguments(sys.argv[1:])
    if args.job:
        tree, constants, ideas = json.loads(args.job)
        print(json.dumps(train(Job.from_json(tree), constants, ideas)))
        return 0
    print("| changed | steps | FLOPs of full | loss |\n| --- | ---: | ---: | ---: |", flush=True)
    failed = False
    for variant in VARIANTS:
        if args.only and not any(word in variant.name for word in args.only):
            continue
        try:
            results = [trained_apart(variant, job_of(variant, seed, args)) for seed in range(args.seeds)]
        except RuntimeError as error:
            failed = True
            print(f"| {variant.name} | did not run: {error} | | |", flush=True)
            continue
        budget = mean(one["flops_of_full"] * args.steps * BATCH / (one["steps"] * _batch(variant)) for one in results)
        print(row_of(variant.name, results, budget), flush=True)
    return int(failed)


def _batch(variant: Variant) -> int:
    return int(variant.options.get("batch_size", BATCH))


if __name__ == "__main__":
    sys.exit(main())
