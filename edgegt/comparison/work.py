"""What a job does in its process: prepare as `edgegt run` does, train, and score on the rows that nobody trained on."""

from __future__ import annotations

import gc
import math
import random
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from edgegt.comparison.contenders import CONTENDERS
from edgegt.comparison.jobs import MEASURE, TUNE, WARM_UP, Job, cumulated
from edgegt.comparison.peers import PeerTrainee, trainee_of_peer
from edgegt.data import Example, Reading
from edgegt.errors import BudgetError, EdgegtError, InputError, Interrupted
from edgegt.folder import make_folder
from edgegt.job import Corpus, make_schedule, read_corpus
from edgegt.keeper import Keeper
from edgegt.log import Log
from edgegt.options import RunOptions
from edgegt.prepare import Setup, default_lr, prepare
from edgegt.rounds import Rounds, Standing
from edgegt.run import evaluate, keeper_of, trainee_of
from edgegt.subject import Subject
from edgegt.use import ANSWERED_ROWS, answered, questions

SPLIT_SEED = 0  # of held-out and validation rows: the same for every seed, so that these differ in training alone
VALIDATION_SHARE = 0.1
MOST_VALIDATION = 256


class Steps(Log):
    """A quiet log that keeps the steps, and stops a measurement after `stop_after` of them."""

    def __init__(self, stop_after: int | None) -> None:
        super().__init__(quiet=True)
        self.entries: list[dict[str, Any]] = []
        self.stop_after = stop_after
        self.trainee: Any = None

    def step(self, entry: dict[str, Any]) -> None:
        """One finished training step."""
        self.entries.append(entry)
        if self.stop_after is not None and len(self.entries) >= self.stop_after:
            self.trainee.progress.stop = signal.SIGTERM


class Unsaved(Keeper):
    """A keeper that writes no checkpoints: a job that was broken off begins anew, and seconds are those of training."""

    def save(self, wait: bool = False) -> None:
        """Nothing."""


def divided(
    validates: bool, rows: int | None, options: RunOptions, tokenizer: Any, start: int | None = None,
    reading: Reading | None = None,
) -> Corpus:  # fmt: skip
    """The rows of the data in parts that do not depend on the run's seed, with `rows` of training at most.

    validates: a part of the training rows takes the place of those held out. Examples of one row stay together.
    """
    corpus = read_corpus(replace(options, seed=SPLIT_SEED), tokenizer, start, reading)
    by_row: dict[int, list[Example]] = {}
    for example in corpus.train:
        by_row.setdefault(id(example.row), []).append(example)
    groups = list(by_row.values())
    random.Random(f"{SPLIT_SEED}/compared").shuffle(groups)
    groups = groups[:rows]
    if not validates:
        return replace(corpus, train=_flat(groups))
    count = min(MOST_VALIDATION, max(1, round(VALIDATION_SHARE * len(groups))))
    if count >= len(groups):
        raise InputError(f"{len(groups)} row(s) of training are too few to find learning rates on: give --rates stored")
    return replace(corpus, train=_flat(groups[count:]), held_out=_flat(groups[:count]), general=())


def _flat(groups: Sequence[Sequence[Example]]) -> tuple[Example, ...]:
    return tuple(example for group in groups for example in group)


def work(job: Job, place: Path) -> dict[str, Any]:
    """Do the job, with `place` as its run folder. Raises: EdgegtError when it cannot be done."""
    shutil.rmtree(place, ignore_errors=True)
    log = Steps(max(1, job.timed) + (WARM_UP if job.timed > 1 else 0) if job.kind == MEASURE else None)
    setup = prepare(RunOptions(**job.options), log, read=partial(divided, job.kind == TUNE, job.rows))
    try:
        return {**_done(job, setup, log, place), "data": setup.decisions.data, "notes": list(log.fallbacks)}
    finally:
        for name in ("patch.safetensors", "events.jsonl"):
            (place / name).unlink(missing_ok=True)
        shutil.rmtree(place / "checkpoint", ignore_errors=True)


def _done(job: Job, setup: Setup, log: Steps, place: Path) -> dict[str, Any]:
    folder = make_folder(place)
    keeper = keeper_of(setup, folder, log, kind=Unsaved)
    if job.kind == MEASURE:
        return _measured(job, setup, log, keeper)
    trainee = _trainee(job, setup, log, keeper)
    began = time.perf_counter()
    trainee.train()
    seconds, peak_bytes = time.perf_counter() - began, setup.watch.peak_ever()
    trainee.save()
    keeper.close()
    gc.collect()
    numbers = evaluate(setup, trainee, log, "after").numbers
    if not math.isfinite(numbers["loss"]):
        raise EdgegtError(f"the held-out loss is {numbers['loss']}: it did not train")
    return {
        "strategy": job.contender, "rho": job.rho, "seed": job.seed, "flops": trainee.meter.total, "seconds": seconds,
        "peak_bytes": peak_bytes, "loss": numbers["loss"], "metrics": _metrics(job, setup, trainee, numbers),
        "steps": len(log.entries), "lr": setup.lr, "step_seconds": sum(entry["step_s"] for entry in log.entries),
        "flops_of_full": setup.full_flops, "held_out_rows": len(setup.corpus.held_out),
        "train_rows": len({id(example.row) for example in setup.corpus.train}),
    }  # fmt: skip


def _trainee(job: Job, setup: Setup, log: Steps, keeper: Keeper) -> Any:
    peer = CONTENDERS[job.contender].peer
    log.trainee = trainee_of_peer(setup, log, keeper, job.contender) if peer else trainee_of(setup, log, keeper)
    return log.trainee


def _metrics(job: Job, setup: Setup, trainee: Any, numbers: dict[str, Any]) -> dict[str, Any]:
    """The task's scores, from 0 to 100: those asked for, and the household's own."""
    own = ("exact_match", "general_exact_match")
    found: dict[str, Any] = {key: 100 * numbers[key] for key in own if key in numbers}
    if not job.metrics:
        return found
    subject = Subject(trainee.module, setup.tokenizer, setup.device, None, setup.corpus.separator)
    if "perplexity" in job.metrics:
        found["perplexity"] = numbers["perplexity"]
    asked = questions(setup.corpus.held_out, job.answers or ANSWERED_ROWS, job.metrics)
    with trainee.meter.off():
        scores = answered(subject, asked, job.metrics, None, {})["scores"] if asked else {}
    return found | scores


def _measured(job: Job, setup: Setup, log: Steps, keeper: Keeper) -> dict[str, Any]:
    """What a contender costs, from a few steps; of full fine-tuning also the FLOPs of its steps and of many more."""
    found: dict[str, Any] = {"ratio": 1.0, "once": 0.0}
    if job.contender == "full":
        longer = make_schedule(replace(setup.options, steps=math.ceil(job.listed * setup.schedule.steps), epochs=None),
                               setup.corpus.train)  # fmt: skip
        work_of = setup.need.table.full_work()
        found |= {
            "steps": setup.schedule.steps, "flops": cumulated([work_of.at(shape) for shape in longer.shapes]),
            "per_epoch": math.ceil(len(setup.corpus.train) / setup.options.batch_size),
            "default_lr": default_lr(setup.config),
        }  # fmt: skip
    try:
        trainee = _trainee(job, setup, log, keeper)
    except BudgetError as error:
        if job.contender != "full":
            raise
        return found | {"problem": str(error)}  # the budget of the others is known all the same
    if isinstance(trainee, PeerTrainee):
        found |= trainee.cost()
    began = time.perf_counter()
    try:
        trainee.train()
    except Interrupted:
        if len(log.entries) < (log.stop_after or 0):
            raise
    seconds = time.perf_counter() - began
    keeper.close()
    filling = 0.0
    if CONTENDERS[job.contender].budgeted and not isinstance(trainee, PeerTrainee):
        filling = trainee.prefix.fill_s
        measures = setup.options.measures_importance
        ratio = keeper.folder.read("plan-0.json")["predicted"]["flops_ratio"] if measures else _planned(setup, log)
        found |= {"ratio": ratio, "once": float(len(setup.schedule.rounds) * trainee.probe_flops)}
    return found | _timed(setup, log, seconds, filling)


def _planned(setup: Setup, log: Log) -> float:
    """FLOPs of all rounds of a strategy that measures nothing, of full fine-tuning's: it can be planned whole."""
    values = {weight.name: float(weight.numel) for weight in setup.need.table.weights}
    rounds, before, spent, step = Rounds(setup, log), None, 0, 0
    trained: set[str] = set()
    for index, steps in enumerate(rounds.lengths):
        cached = (before.boundary, before.cache_first) if before and before.boundary else None
        at = Standing(index, step, spent, tuple(sorted(trained)), len(rounds.lengths) - index - 1, 0.0, cached)
        before = rounds.plan(at, values, before)
        rounds.fix(before)
        spent += rounds.flops_left(step, step + steps, before) + before.cached.get("fill_flops", 0)
        trained |= {*before.selected}
        step += steps
    return spent / setup.full_flops


def _timed(setup: Setup, log: Steps, seconds: float, filling: float) -> dict[str, Any]:
    """Seconds per FLOP of full fine-tuning on the same steps, and seconds beside the steps.

    seconds: of the measurement, one round of which `filling` went into keeping hidden states, which is done once; the
    rest beside the steps, as importance and planning, comes with every round.
    """
    shapes, work_of = setup.schedule.shapes, setup.need.table.full_work()
    first = WARM_UP if len(log.entries) > WARM_UP else 0
    steps_s = sum(entry["step_s"] for entry in log.entries[first:])
    flops = work_of.total(shapes[first : len(log.entries)])
    beside = seconds - filling - sum(entry["step_s"] for entry in log.entries)
    return {
        "seconds_per_flop": steps_s / flops,
        "once_s": filling + len(setup.schedule.rounds) * max(0.0, beside),
    }
