"""`edgegt run`, as one list of calls, each of which leaves its result in the run folder."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from edgegt.budget import ANSWER_TOKENS
from edgegt.errors import BudgetError
from edgegt.folder import RunFolder, check_output, new_folder
from edgegt.log import Log
from edgegt.options import RunOptions
from edgegt.prepare import Setup, prepare
from edgegt.process import share_the_machine, terminated_is_interrupted, trim
from edgegt.units import format_duration
from edgegt.version import __version__

# Of a time budget, what the evaluation after training may take more than the one before it, and saving and the report.
EVALUATION_MARGIN = 1.2
SAVING_S = 4.0


@dataclass
class Outcome:
    """What run.json says, gathered while the run goes on."""

    started: float = field(default_factory=time.perf_counter)
    predicted_peak: int = 0
    predicted_flops: int = 0
    predicted_step_s: float = 0.0
    device_step_s: float = 0.0
    memory_terms: dict[str, int] = field(default_factory=dict)
    measured_terms: dict[str, int] = field(default_factory=dict)


def run(options: RunOptions, log: Log | None = None, command: str = "") -> Path:
    """Personalise a model as `options` say; returns the run folder.

    Raises: InputError and BudgetError before a run folder exists; Interrupted when stopped, with the work saved;
    EdgegtError when training fails.
    """
    log = log or Log()
    outcome = Outcome()
    share_the_machine()
    with terminated_is_interrupted():
        check_output(options.output)
        setup = prepare(options, log)
        trainee = _trainee(setup, log)
        folder = new_folder(options.output, setup.source.name, setup.resolved.profile.name)
        log.say(f"run folder: {folder.path}")
        _record_inputs(setup, folder)
        began = time.perf_counter()
        before = evaluate(setup, trainee, log, "before")
        trainee.after_s = EVALUATION_MARGIN * (time.perf_counter() - began) + SAVING_S
        _check_time_left(setup, trainee, folder)
        folder.write("eval.json", {"before": before.numbers, "examples": []})
        try:
            trainee.train(folder, outcome)
        finally:
            log.end_steps()
            trainee.save(folder)
            _record_run(setup, folder, log, trainee, outcome, command)
            if not trainee.complete:
                _leave(folder, trainee, log)
        after = evaluate(setup, trainee, log, "after")
        folder.write("eval.json", _evaluation(setup, before, after))
        _record_run(setup, folder, log, trainee, outcome, command)
        del trainee
        write_report_apart(folder.path, log)
        log.say(summary(folder))
    return folder.path


def _trainee(setup: Setup, log: Log) -> Any:
    """The loaded model in the form that the strategy trains. Raises: InputError for files that are no such model."""
    if setup.options.strategy == "full":
        from edgegt.full import FloatTrainee

        return FloatTrainee(setup, log)
    from edgegt.trainee import Int8Trainee

    return Int8Trainee(setup, log)


def _check_time_left(setup: Setup, trainee: Any, folder: RunFolder) -> None:
    """Raises: BudgetError when the evaluations leave no time to train; the empty run folder is removed."""
    left = setup.seconds_left
    if left is None or left > trainee.after_s:
        return
    shutil.rmtree(folder.path, ignore_errors=True)
    assert setup.seconds is not None
    needed = math.ceil(1.5 * (setup.seconds - left + trainee.after_s))
    raise BudgetError(
        f"after preparing and evaluating, no time is left to train within {format_duration(setup.seconds)}: give "
        f"--time {needed}s or more, or fewer --eval-rows",
        smallest_s=needed,
    )


def _leave(folder: RunFolder, trainee: Any, log: Log) -> None:
    """After a stop or a failure: a report of what there is, or no folder when not a step was made."""
    if trainee.progress.step == 0:
        shutil.rmtree(folder.path, ignore_errors=True)
    else:
        write_report_apart(folder.path, log)


def _record_inputs(setup: Setup, folder: RunFolder) -> None:
    given = asdict(setup.options)
    for name in ("data", "eval_data"):  # so that the run can be evaluated again from any folder
        given[name] = str(Path(given[name]).resolve()) if given[name] else None
    folder.write("options.json", given)
    folder.write("profile.json", setup.resolved.profile.to_json())
    folder.write("costs.json", setup.need.table.to_json())


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: the numbers, and the answers to the first held-out prompts."""

    numbers: dict[str, Any]
    answers: list[str]


EXAMPLES = 6


def evaluate(setup: Setup, trainee: Any, log: Log, when: str) -> Evaluation:
    """Held-out loss, exact match for the household, and answers to show; its FLOPs are not training FLOPs."""
    from edgegt import home
    from edgegt.evaluate import answer, exact_match, held_out_loss

    held_out, module = setup.corpus.held_out, trainee.module
    rows, prompts_together = setup.evaluation_rows(trainee.held_bytes), setup.answer_rows(trainee.held_bytes)
    with trainee.meter.off():
        numbers = held_out_loss(module, held_out, setup.pad_id, rows, setup.device)
        if setup.corpus.general:
            for key, examples in (("exact_match", held_out), ("general_exact_match", setup.corpus.general)):
                prompts = [example.prompt for example in examples]
                texts = answer(module, setup.tokenizer, prompts, home.NEW_TOKENS, prompts_together, setup.device)
                numbers[key] = exact_match(texts, [example.row for example in examples])
        answers: list[str] = []
        if setup.options.examples:
            longest = max(len(example.completion) for example in held_out)
            prompts = [example.prompt for example in shown(setup)]
            new, together = min(ANSWER_TOKENS, longest + 8), min(prompts_together, 8)
            answers = answer(module, setup.tokenizer, prompts, new, together, setup.device)
    trim()
    said = f"loss {numbers['loss']:.3f} on {numbers['rows']} held-out rows"
    if "exact_match" in numbers:
        said += f", exact match {numbers['exact_match']:.1%}, general {numbers['general_exact_match']:.1%}"
    log.say(f"{when}: {said}")
    return Evaluation(numbers, answers)


def shown(setup: Setup) -> list[Any]:
    """The first held-out examples with prompts that differ."""
    different = {example.prompt: example for example in reversed(setup.corpus.held_out) if example.prompt}
    return list(reversed(different.values()))[:EXAMPLES]


def _evaluation(setup: Setup, before: Evaluation, after: Evaluation) -> dict[str, Any]:
    examples = [
        {"prompt": example.row.prompt, "reference": example.row.completion, "before": old, "after": new}
        for example, old, new in zip(shown(setup), before.answers, after.answers, strict=False)
    ]
    return {"before": before.numbers, "after": after.numbers, "examples": examples}


def _record_run(setup: Setup, folder: RunFolder, log: Log, trainee: Any, outcome: Outcome, command: str) -> None:
    profile = setup.resolved.profile
    steps = [json.loads(line) for line in folder.metrics.read_text().splitlines()] if folder.metrics.exists() else []
    done = sum(entry["tokens_per_s"] * entry["step_s"] for entry in steps)
    train_s = sum(entry["step_s"] for entry in steps)
    full_done = setup.need.table.full_work().total(setup.schedule.shapes[: len(steps)])
    measured: dict[str, Any] = {
        "peak_bytes": setup.watch.peak(), "floor_bytes": setup.need.floor_bytes, "train_s": train_s,
        "elapsed_s": time.perf_counter() - outcome.started, "flops": trainee.meter.total,
        "probe_flops": trainee.probe_flops, "steps": len(steps), "flops_by_kind": dict(trainee.meter.by_kind),
    }  # fmt: skip
    if steps:
        measured["flops_ratio"] = trainee.meter.total / full_done
        measured["step_s"] = median(entry["step_s"] for entry in steps)
        measured["tokens_per_s"] = done / train_s
    folder.write("run.json", {
        "version": __version__, "command": command, "strategy": setup.options.strategy,
        "device": {"name": profile.name, "title": profile.title, "kind": profile.kind,
                   "notice": setup.resolved.notice, "on_board": setup.resolved.on_board},
        "model": {"name": setup.source.name, "parameters": setup.need.table.parameters,
                  "architecture": (setup.config.architectures or ["?"])[0], "fingerprint": trainee.fingerprint,
                  "directory": str(setup.source.directory.resolve())},
        "data": setup.corpus.to_json(),
        "budget": {"rho": setup.rho, "flops": setup.flops, "memory_bytes": setup.memory_bytes,
                   "seconds": setup.seconds},
        "predicted": {"flops_ratio": outcome.predicted_flops / setup.full_flops, "flops": outcome.predicted_flops,
                      "peak_bytes": outcome.predicted_peak, "step_s": outcome.predicted_step_s,
                      "device_step_s": outcome.device_step_s, "floor_bytes": setup.need.floor_bytes},
        "measured": measured, "full_flops": setup.full_flops, "memory_terms": outcome.memory_terms,
        "measured_terms": outcome.measured_terms, "lr": setup.lr,
        "backend": trainee.backend, "threads": _threads(), "fallbacks": list(log.fallbacks),
        "power": {"watts": profile.power.watts, "mode": profile.power.name, "source": "profile"},
        "finished": trainee.complete,
    })  # fmt: skip


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def write_report_apart(path: Path, log: Log) -> None:
    """Draw the report in a process of its own, so that drawing does not count against the run's memory budget."""
    package = Path(__file__).resolve().parent
    words = [sys.executable, "-m", package.name, "report", str(path.resolve()), "--quiet"]
    done = subprocess.run(words, cwd=package.parent, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        log.fallback(f"the report could not be drawn ({said}): `edgegt report {path}` tries again")


def summary(folder: RunFolder) -> str:
    """The last lines of a run: what was gained, what it cost, and what to do with it."""
    from edgegt.units import format_bytes

    run_json, result = folder.read("run.json"), folder.read("eval.json")
    measured, budget = run_json["measured"], run_json["budget"]
    before, after = result["before"], result["after"]
    lines = [f"held-out loss {before['loss']:.3f} -> {after['loss']:.3f}"]
    if "exact_match" in after:
        lines.append(
            f"household exact match {before['exact_match']:.1%} -> {after['exact_match']:.1%}, "
            f"general commands {before['general_exact_match']:.1%} -> {after['general_exact_match']:.1%}"
        )
    if "flops_ratio" not in measured:
        lines.append("no step was made")
        return "\n".join([*lines, f"report: {folder.path / 'report.html'}"])
    lines.append(
        f"FLOPs {measured['flops_ratio']:.1%} of full fine-tuning (budget {budget['rho']:.0%}), peak memory "
        f"{format_bytes(measured['peak_bytes'])} of {format_bytes(budget['memory_bytes'])}, "
        f"{format_duration(measured['elapsed_s'])}"
    )
    lines.append(f"report: {folder.path / 'report.html'}")
    lines.append(f'try it: edgegt generate {folder.path} "..."')
    return "\n".join(lines)
