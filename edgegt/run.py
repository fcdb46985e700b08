"""`edgegt run`, as one list of calls, each of which leaves its result in the run folder.

The folder is made first, with the options in it. From the first plan on there is a checkpoint, and a run that was
killed goes on from its last one.
"""

from __future__ import annotations

import math
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from edgegt.budget import ANSWER_TOKENS
from edgegt.checkpoint import Checkpoints, Saved
from edgegt.disk import read_lines, remove_halves
from edgegt.errors import BudgetError, EdgegtError, InputError, Interrupted, is_out_of_memory
from edgegt.folder import RunFolder, check_output, claim_folder, lasting, open_folder
from edgegt.keeper import Keeper, Machine
from edgegt.log import Log
from edgegt.options import RunOptions, options_of
from edgegt.prepare import Decisions, Setup, prepare, torch_threads
from edgegt.process import share_the_machine, terminated_is_interrupted, trim
from edgegt.sensors import MachineSensors, nvidia_gpu
from edgegt.stopping import stopping_of
from edgegt.tensorboard import Scalars, check_tensorboard
from edgegt.units import format_duration
from edgegt.version import __version__

# Of a time budget, what the evaluation after training may take more than the one before it, and saving and the report.
EVALUATION_MARGIN = 1.2
SAVING_S = 4.0


def run(options: RunOptions, log: Log | None = None, command: str = "", machine: Machine | None = None) -> Path:
    """Personalise a model as `options` say; returns the run folder.

    machine: where it hears of heat, battery and memory; by default from this one. Raises: InputError and BudgetError,
    without a run folder; Interrupted when stopped, with the work saved; EdgegtError when training fails.
    """
    log = log or Log()
    share_the_machine()
    with terminated_is_interrupted():
        check_tensorboard(options.tensorboard)
        check_output(options.output)
        folder = claim_folder(options)
        log.say(f"run folder: {folder.path}")
        try:
            return _Session(folder, options, log, command, machine or Machine(), None).go()
        except BaseException as error:
            if not Checkpoints(folder.checkpoints).any():
                folder.remove()  # not a step was made, and nothing was decided
            raise _with_a_way_on(error, folder) from error.__cause__


def resume(path: Path, log: Log | None = None, command: str = "", machine: Machine | None = None) -> Path:
    """Go on with a run that was broken off, from its last checkpoint, or from the start where it has none.

    Returns the run folder. Raises: InputError when it is no run folder, is in use, or its data changed; as `run`.
    """
    log = log or Log()
    share_the_machine()
    with terminated_is_interrupted():
        folder = open_folder(path)
        try:
            if folder.finished:
                log.say(f"'{path}' is finished: nothing is left to do")
                Checkpoints(folder.checkpoints).remove()
                if not (path / "report.html").is_file():
                    write_report_apart(path, log)
                return path
            remove_halves(path)
            checkpoints = Checkpoints(folder.checkpoints)
            saved = checkpoints.newest(log.fallback)
            if checkpoints.lost():
                raise InputError(
                    f"none of the checkpoints of '{path}' is whole: what was trained last is in its patch, if it has "
                    "one; begin a new run"
                )
            options = folder.options() if saved is None else options_of(saved.state["options"], saved.sealed.path)
            check_tensorboard(options.tensorboard)
            if saved is None:
                log.say(f"'{path}' has no checkpoint: the run starts over")
                folder.clear()
            else:
                log.say(f"going on with '{path}' after step {saved.state['step']}")
            return _Session(folder, options, log, command, machine or Machine(), saved).go()
        except BaseException as error:
            raise _with_a_way_on(error, folder) from error.__cause__
        finally:
            folder.release()


def _with_a_way_on(error: BaseException, folder: RunFolder) -> BaseException:
    """The error; one that broke the run off says how it goes on."""
    folder.release()
    saved = Checkpoints(folder.checkpoints).any()
    if saved and isinstance(error, KeyboardInterrupt):
        return Interrupted(f"stopped; what was trained is saved, `edgegt run --resume {folder.path}` goes on", 130)
    if saved and is_out_of_memory(error):
        return EdgegtError(f"out of memory: end other programs, then `edgegt run --resume {folder.path}` goes on")
    if saved and isinstance(error, Interrupted) and "--resume" not in str(error):
        error.args = (f"{error}; `edgegt run --resume {folder.path}` goes on",)
    if saved and isinstance(error, EdgegtError) and not isinstance(error, (InputError, Interrupted)):
        said = str(error)
        if "--resume" not in said:
            error.args = (f"{said}; `edgegt run --resume {folder.path}` then goes on from the last checkpoint",)
    return error


@dataclass
class _Session:
    """One process's part of a run. saved: the checkpoint that it goes on from."""

    folder: RunFolder
    options: RunOptions
    log: Log
    command: str
    machine: Machine
    saved: Saved | None

    def go(self) -> Path:
        """From the input to the report; returns the run folder."""
        state = self.saved.state if self.saved else {}
        self.log.fallbacks += [line for line in state.get("fallbacks", ()) if line not in self.log.fallbacks]
        decided = Decisions.from_json(state["decisions"]) if state else None
        setup = prepare(self.options, self.log, decided, state.get("seconds_spent", 0.0))
        keeper = keeper_of(setup, self.folder, self.log, self.machine)
        trainee = trainee_of(setup, self.log, keeper)
        keeper.sessions = [*state.get("sessions", []), {"command": self.command, "from_step": state.get("step", 0)}]
        if state.get("fingerprint", trainee.fingerprint) != trainee.fingerprint:
            raise InputError(
                f"the model of this run is another than it was ('{setup.source.directory}'): put it back, or begin a "
                "new run"
            )
        if self.saved is None:
            before = self._begin(setup, trainee, keeper)
        else:
            before = self._restore(self.saved, trainee, keeper)
        self.saved = None
        keeper.common |= {"evaluated": asdict(before), "after_s": trainee.after_s}
        try:
            trainee.train()
            keeper.trained()
        finally:
            self.log.end_steps()
            self._end(setup, trainee, keeper)
        after = evaluate(trainee.setup, trainee, self.log, "after")
        self.folder.write("eval.json", _evaluation(setup, before, after))
        keeper.close()
        _record_run(self.folder, self.log, trainee, keeper, self.command, finished=True)
        keeper.checkpoints.remove()
        del trainee
        write_report_apart(self.folder.path, self.log)
        self.log.say(summary(self.folder))
        self.folder.release()
        return self.folder.path

    def _begin(self, setup: Setup, trainee: Any, keeper: Keeper) -> Evaluation:
        _record_inputs(setup, self.folder)
        began = time.perf_counter()
        before = evaluate(setup, trainee, self.log, "before")
        evaluation_s = time.perf_counter() - began
        trainee.after_s = EVALUATION_MARGIN * evaluation_s + SAVING_S + keeper.expect(evaluation_s)
        _check_time_left(setup, trainee)
        self.folder.write("eval.json", {"before": before.numbers, "examples": []})
        return before

    def _restore(self, saved: Saved, trainee: Any, keeper: Keeper) -> Evaluation:
        try:
            before = Evaluation(**saved.state["evaluated"])
            trainee.restore(saved)
            trainee.after_s = saved.state["after_s"]
            keeper.resumed(saved.state)
        except (KeyError, TypeError) as error:
            raise InputError(
                f"'{saved.sealed.path}' is from another version of edgegt ({error}): go on with that one, or begin "
                "a new run"
            ) from error
        return before

    def _end(self, setup: Setup, trainee: Any, keeper: Keeper) -> None:
        """After training, or what there was of it: the patch, the record, and of a stopped run the report so far."""
        failing = sys.exc_info()[1]
        try:
            if trainee.progress.step:
                trainee.save()
            keeper.close()
            _record_run(self.folder, self.log, trainee, keeper, self.command, finished=False)
        except EdgegtError:
            if failing is None:
                raise
            return  # the first error is the one to tell
        if failing is not None and trainee.progress.step:
            write_report_apart(self.folder.path, self.log)


def keeper_of(
    setup: Setup, folder: RunFolder, log: Log, machine: Machine | None = None, kind: type[Keeper] = Keeper
) -> Keeper:  # fmt: skip
    """The keeper of a run with this setup."""
    options, machine = asdict(lasting(setup.options)), machine or Machine()
    common = {"version": __version__, "options": options, "decisions": asdict(setup.decisions)}
    sensors = machine.sensors or MachineSensors(nvidia_gpu() if setup.device.type == "cuda" else None)
    # The ceiling of another machine says nothing about this one; `auto` takes the profile that is nearest to it.
    mine = setup.resolved.on_board or setup.options.device == "auto" or machine.sensors is not None
    ceiling_c = setup.resolved.profile.ceiling_c if mine else None
    scalars = Scalars(folder.tensorboard, setup.full_flops, log.fallback) if setup.options.tensorboard else None
    return kind(
        folder, setup.options, sensors, ceiling_c, setup.watch, setup.memory_bytes, machine, log, common, setup.started,
        scalars,
    )  # fmt: skip


def trainee_of(setup: Setup, log: Log, keeper: Keeper) -> Any:
    """The loaded model in the form that the strategy trains. Raises: InputError for files that are no such model."""
    trainee: Any
    if setup.options.strategy == "full":
        from edgegt.full import FloatTrainee

        trainee = FloatTrainee(setup, log, keeper)
    else:
        from edgegt.trainee import Int8Trainee

        trainee = Int8Trainee(setup, log, keeper)
    keeper.kept, keeper.stops = trainee, stopping_of(trainee, keeper, log)
    keeper.common["fingerprint"] = trainee.fingerprint
    return trainee


def _check_time_left(setup: Setup, trainee: Any) -> None:
    """Raises: BudgetError when the evaluations leave no time to train."""
    left = setup.seconds_left
    if left is None or left > trainee.after_s:
        return
    assert setup.seconds is not None
    needed = math.ceil(1.5 * (setup.seconds - left + trainee.after_s))
    raise BudgetError(
        f"after preparing and evaluating, no time is left to train within {format_duration(setup.seconds)}: give "
        f"--time {needed}s or more, or fewer --eval-rows",
        smallest_s=needed,
    )


def _record_inputs(setup: Setup, folder: RunFolder) -> None:
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
    from edgegt.evaluate import answer, classified, exact_match, held_out_loss, says, score_words

    held_out, module = setup.corpus.held_out, trainee.module
    rows, prompts_together = setup.evaluation_rows(trainee.held_bytes), setup.answer_rows(trainee.held_bytes)
    with trainee.meter.off():
        measure = classified if setup.corpus.labels else held_out_loss
        numbers = measure(module, held_out, setup.pad_id, rows, setup.device)
        if setup.corpus.general:
            for key, examples in (("exact_match", held_out), ("general_exact_match", setup.corpus.general)):
                prompts = [example.prompt for example in examples]
                texts = answer(module, setup.tokenizer, prompts, home.NEW_TOKENS, prompts_together, setup.device)
                numbers[key] = exact_match(texts, [example.row for example in examples])
        answers: list[str] = []
        if setup.options.examples and setup.corpus.labels:
            answers = says(module, shown(setup), setup.corpus.labels, setup.pad_id, rows, setup.device)
        elif setup.options.examples:
            longest = max(len(example.completion) for example in held_out)
            prompts = [example.prompt for example in shown(setup)]
            new, together = min(ANSWER_TOKENS, longest + 8), min(prompts_together, 8)
            answers = answer(module, setup.tokenizer, prompts, new, together, setup.device)
    trim()
    said = f"loss {numbers['loss']:.3f} on {numbers['rows']} held-out rows{score_words(numbers)}"
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


def _record_run(
    folder: RunFolder, log: Log, trainee: Any, keeper: Keeper, command: str, finished: bool
) -> None:  # fmt: skip
    setup, predicted = trainee.setup, trainee.predicted
    profile = setup.resolved.profile
    steps = [line for line in read_lines(folder.metrics) if "loss" in line]
    done = sum(entry["tokens_per_s"] * entry["step_s"] for entry in steps)
    train_s = sum(entry["step_s"] for entry in steps)
    progress = trainee.progress
    # A run that needed no more steps spent less than was planned for all of them.
    full_done = setup.need.table.full_work().total(setup.schedule.shapes[: None if progress.enough else progress.step])
    measured: dict[str, Any] = {
        "peak_bytes": setup.watch.peak_ever(), "floor_bytes": setup.need.floor_bytes, "train_s": train_s,
        "elapsed_s": time.perf_counter() - setup.started, "flops": trainee.meter.total,
        "probe_flops": trainee.probe_flops, "steps": progress.step, "flops_by_kind": dict(trainee.meter.by_kind),
        "dropped_steps": len(progress.dropped), "paused_s": keeper.pacer.paused_s,
    }  # fmt: skip
    lowered = limit if (limit := keeper.guard.budget_bytes) < setup.decisions.memory_bytes else None
    measured["peak_since_bytes"] = None if lowered is None else setup.watch.peak()  # since it was lowered
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
        "budget": {"rho": setup.rho, "flops": setup.flops, "memory_bytes": setup.decisions.memory_bytes,
                   "lowered_to_bytes": lowered, "seconds": setup.seconds},
        "predicted": {"flops_ratio": predicted.flops / setup.full_flops, "flops": predicted.flops,
                      "peak_bytes": predicted.peak, "step_s": predicted.step_s,
                      "device_step_s": predicted.device_step_s, "floor_bytes": setup.need.floor_bytes},
        "measured": measured, "full_flops": setup.full_flops, "memory_terms": predicted.memory_terms,
        "measured_terms": predicted.measured_terms, "lr": setup.lr * progress.lr_scale,
        "backend": trainee.backend, "threads": torch_threads(), "fallbacks": list(log.fallbacks),
        "power": _power(setup, keeper, steps), "cache": trainee.prefix.facts() if hasattr(trainee, "prefix") else None,
        "sessions": keeper.sessions, "finished": finished, "early_stopping": keeper.stops and keeper.stops.facts(),
    })  # fmt: skip


def _power(setup: Setup, keeper: Keeper, steps: list[dict[str, Any]]) -> dict[str, Any]:
    """What the board's sensor measured in training, on the board itself; else the profile's watts."""
    power = setup.resolved.profile.power
    measured = [entry["power_w"] for entry in steps if "power_w" in entry]
    if not setup.resolved.on_board or not measured:
        return {"watts": power.watts, "mode": keeper.power_mode or power.name, "source": "profile"}
    return {"watts": fmean(measured), "mode": keeper.power_mode or power.name, "source": "the power sensor's mean"}


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
    from edgegt.evaluate import score_words
    from edgegt.units import format_bytes

    run_json, result = folder.read("run.json"), folder.read("eval.json")
    measured, budget = run_json["measured"], run_json["budget"]
    before, after = result["before"], result["after"]
    lines = [f"held-out loss {before['loss']:.3f} -> {after['loss']:.3f}{score_words(before, after)}"]
    if "exact_match" in after:
        lines.append(
            f"household exact match {before['exact_match']:.1%} -> {after['exact_match']:.1%}, "
            f"general commands {before['general_exact_match']:.1%} -> {after['general_exact_match']:.1%}"
        )
    if "flops_ratio" not in measured:
        lines.append("no step was made")
        return "\n".join([*lines, f"report: {folder.path / 'report.html'}"])
    planned = " on all that was planned" if (run_json["early_stopping"] or {}).get("stopped") else ""
    lines.append(
        f"FLOPs {measured['flops_ratio']:.1%} of full fine-tuning{planned} (budget {budget['rho']:.0%}), peak memory "
        f"{format_bytes(measured['peak_bytes'])} of {format_bytes(budget['memory_bytes'])}, "
        f"{format_duration(measured['elapsed_s'])}"
    )
    lines.append(f"report: {folder.path / 'report.html'}")
    lines.append(f'try it: edgegt generate {folder.path} "..."')
    return "\n".join(lines)
