"""A model in training: int8 with a few tensors in float, over rounds of importance, plan, promotion and steps."""

from __future__ import annotations

import random
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from types import FrameType
from typing import Any

import torch

from edgegt.budget import fitting_probe_rows, largest, probe_seconds
from edgegt.cache import cache_dir
from edgegt.checkpoint import Position, save_checkpoint
from edgegt.cost import CostTable, Totals
from edgegt.data import collate
from edgegt.errors import BudgetError, InputError, Interrupted
from edgegt.folder import RunFolder
from edgegt.importance import importance
from edgegt.log import Log
from edgegt.memory import Formats, plane_bytes, state_bytes
from edgegt.model import load_int8
from edgegt.optimizer import AdamW, schedule
from edgegt.patch import save_patch
from edgegt.planner import Plan, Problem, plan, smallest
from edgegt.prepare import Setup
from edgegt.process import trim
from edgegt.quant import Int8Embedding, Int8Linear
from edgegt.rates import Rates, of_profile
from edgegt.recompute import recomputed
from edgegt.selection import Trainables
from edgegt.train import Parts, Progress, Recipe, train_round
from edgegt.units import format_bytes
from edgegt.value import values_of
from edgegt.version import __version__

# Predicted steps were 0.77 to 1.27 times the measured ones; before the first step is measured the cautious end counts.
FIRST_GUESS = 1.3
# Where time is too short for all steps: what a plan that is still worth making takes, of the cheapest one's seconds.
CHEAP = 1.15


class Int8Trainee:
    """The int8 model of one run and its trained tensors."""

    def __init__(self, setup: Setup, log: Log) -> None:
        self.setup, self.log = setup, log
        self.model = load_int8(setup.config, setup.source, cache_dir(), setup.kernels.backend, setup.device)
        self.module, self.meter, self.fingerprint = self.model.module, self.model.meter, self.model.fingerprint
        self.backend = setup.kernels.backend.name
        optimizer = AdamW(
            False, setup.options.weight_decay, seed=setup.options.seed, kernels=setup.kernels.backend.kernels
        )
        self.trainables = Trainables(self.model, optimizer)
        self.progress = Progress()
        self.formats: tuple[Formats, ...] = setup.need.formats
        self.head_rows = setup.need.head_rows
        self.slowness = FIRST_GUESS
        self.after_s = 0.0
        self.last_step = setup.schedule.steps
        self.terms: dict[str, int] = {}
        self._base_bytes = self._planes_of_base()
        self.complete = False
        self.probe_flops = 0
        self._probe_work = self._probe_peak = 0
        self._values: dict[str, float] = {}

    def train(self, folder: RunFolder, outcome: Any) -> None:
        """All rounds. Raises: Interrupted after the step in which a signal came."""
        setup = self.setup
        self.folder, self.trainables.parked = folder, folder.parked
        speeds = setup.rates, of_profile(setup.resolved.profile)
        first = 0
        self.log.start_steps(setup.schedule.steps)
        with stopped_by_signals(self.progress):
            for index, steps in enumerate(setup.schedule.rounds):
                if index and self._out_of_time():
                    break
                values = self._importance(index)
                chosen = self._plan(index, first, values)
                if index == 0:
                    self._fix(chosen)
                self._record_plan(index, first, steps, chosen, values)
                self._predict(outcome, first, steps, chosen, speeds)
                self.trainables.select(chosen.selected)
                for note in self.model.notes:
                    self.log.fallback(note)
                self._train(index, first, steps, chosen)
                if chosen.peak_bytes == outcome.predicted_peak or not outcome.measured_terms:
                    outcome.measured_terms = self._held_terms() | self.terms
                first += steps
                position = Position(self.progress.step, index, self.meter.total)
                save_checkpoint(folder.path / "checkpoint", self.trainables, position)
                if self.progress.stop is not None:
                    raise interrupted(self.progress, setup.schedule.steps, folder)
        if self.progress.step < self.last_step:
            total = setup.schedule.steps
            self.log.fallback(f"the time budget ended training after step {self.progress.step} of {total}")
        self.complete = True

    def _out_of_time(self) -> bool:
        """Whether another round has no time, by the deadline or because all steps that the time allows are made."""
        left = self.setup.seconds_left
        late = left is not None and left <= self.after_s
        return late or self.progress.late or self.progress.step >= self.last_step

    def save(self, folder: RunFolder) -> None:
        """The patch: everything trained so far. Masters and states are freed; the model computes as before."""
        masters = self.trainables.masters()
        if masters:
            about = self.setup.source.name, __version__, self.setup.corpus.separator
            save_patch(folder.patch, masters, self.fingerprint, *about)
        del masters
        self.trainables.release()
        trim()

    @property
    def held_bytes(self) -> int:
        """What training has added to the base and evaluation must leave room for: the planes of trained tensors."""
        return sum(linear.added_bytes for linear in self.model.linears.values())

    def _importance(self, index: int) -> dict[str, float]:
        setup = self.setup
        if not setup.options.measures_importance:
            return {weight.name: float(weight.numel) for weight in setup.need.table.weights}
        draw = random.Random(f"{setup.options.seed}/probe/{index}")
        train, wanted = setup.corpus.train, setup.probes.rows * setup.probes.count
        rows = self._probe_rows()
        if rows == 0:
            self._probe_work = 0
            what = f"importance is not measured again in round {index + 1}"
            self.log.fallback(f"{what}: it does not fit beside what training holds")
            return self._values
        # Only rows that are trained on: others may be longer, and both budgets know the longest of these.
        pool = sorted({i for _, indices in setup.schedule.batches for i in indices})
        picked = [train[i] for i in draw.sample(pool, min(wanted, len(pool)))]
        picked += [train[draw.choice(pool)] for _ in range(wanted - len(picked))]
        batches = [
            collate(picked[start : start + rows], setup.pad_id, setup.options.max_length)
            for start in range(0, wanted, rows)
        ]
        spent = self.meter.total
        self._probe_work = setup.need.table.probe_work().total(batch.shape for batch in batches)
        values = importance(self.model, batches, self._layers())
        self.probe_flops += self.meter.total - spent
        self.model.inputs.clear()
        trim()
        self._values = values
        return values

    def _probe_rows(self) -> int:
        """Rows of a probe batch beside what is trained now; where not even two fit, that is put aside on disk first.

        0 when they do not fit even then, beside the planes of what was trained (never in the first round).
        """
        setup, held = self.setup, self._live_bytes()
        need, schedule = setup.need, setup.schedule
        rows = fitting_probe_rows(setup.probes.rows, need, schedule, setup.memory_bytes, held)
        while setup.probes.rows % rows:
            rows -= 2
        if held and need.probe_bytes(largest(schedule, rows), held) > setup.memory_bytes:
            self.trainables.select(())
            trim()
        peak = need.probe_bytes(largest(schedule, rows), self._live_bytes())
        if held and peak > setup.memory_bytes:
            return 0
        self._probe_peak = max(self._probe_peak, peak)
        return rows

    def _live_bytes(self) -> int:
        """What training holds now: masters, planes and states of live tensors, planes of resting ones."""
        weights = {weight.name: weight for weight in self._table().weights}
        live = sum(state_bytes(weights[name], False, self.formats[0]) for name in self.trainables.live)
        return live + sum(plane_bytes(weights[name]) for name in self.trainables.resting)

    def _table(self) -> CostTable:
        """The cost table with as much of the head as this run trains, once that is decided."""
        table, rows = self.setup.need.table, self.head_rows[0] if len(self.head_rows) == 1 else None
        return table if rows is None else table.with_head_rows(rows)

    def _layers(self) -> Any:
        from edgegt.architecture import layers_of

        return self.module.get_submodule(layers_of(self.module)[0])

    def _plan(self, index: int, first: int, values: dict[str, float]) -> Plan:
        setup = self.setup
        later = len(setup.schedule.rounds) - index - 1
        probing = setup.need.table.probe_work().total(setup.probes.shapes(setup.schedule))
        demoted = tuple(sorted({*self.trainables.resting, *self.trainables.live}))
        problem = replace(
            setup.need.problem(
                setup.options, setup.schedule.shapes[first:], values_of(values, setup.need.table),
                setup.flops - self.meter.total - later * probing, setup.memory_bytes, self._seconds(later),
            ),
            around=replace(setup.need.around, demoted=demoted), formats=self.formats, head_rows=self.head_rows,
        )  # fmt: skip
        self.problem = problem
        try:
            self.problem = self._within_time(problem, first)
            self._chosen = self._planned(self.problem, index)
        except InputError as error:
            if index == 0:
                raise
            self.log.fallback(f"round {index + 1} keeps the tensors of the round before: {error}")
        return self._chosen

    def _within_time(self, problem: Problem, first: int) -> Problem:
        """The problem; where its time allows no training of all steps, with the time of a cheap one, of fewer steps."""
        self.last_step = self.setup.schedule.steps
        if problem.seconds is None:
            return problem
        needed = CHEAP * smallest(problem).seconds
        if needed > problem.seconds:
            self.last_step = first + max(1, int(problem.steps * problem.seconds / needed))
            total = self.setup.schedule.steps
            self.log.fallback(f"the time budget allows about {self.last_step} of {total} steps: the rest is left out")
            # rho holds for the steps that are made; the problem is over all, so what they may cost is scaled up
            left = self._flops_of(self.last_step) - self.meter.total
            flops = left * problem.steps // (self.last_step - first)
            return replace(problem, seconds=needed, flops=min(problem.flops, flops))
        return problem

    def _flops_of(self, steps: int) -> int:
        """What the first steps of the run may spend."""
        setup = self.setup
        if steps == setup.schedule.steps:
            return setup.flops
        return int(setup.rho * setup.need.table.full_work().total(setup.schedule.shapes[:steps]))

    def _planned(self, problem: Problem, index: int) -> Plan:
        """The plan; where no tensor of measured importance fits, of any that does."""
        options = self.setup.options
        try:
            return plan(problem, options.strategy, options.seed + index)
        except BudgetError as error:
            if index > 0 or min(problem.values.values()) > 0:
                raise
            anything = {name: max(value, 1e-9) for name, value in problem.values.items()}
            found = plan(replace(problem, values=anything), options.strategy, options.seed + index)
            self.log.fallback(f"no tensor with a measured importance fits ({error}): what fits is trained")
            return found

    def _seconds(self, later: int) -> float | None:
        """What is left of the time budget for training, in predicted seconds: measured ones may be longer."""
        setup, left = self.setup, self.setup.seconds_left
        if left is None:
            return None
        probing = later * probe_seconds(setup.need, setup.schedule, setup.probes) / len(setup.schedule.rounds)
        return max(1e-3, (left - self.after_s) / self.slowness - probing)

    def _fix(self, chosen: Plan) -> None:
        """Number formats and the trained part of the head are decided once, in the first round."""
        rows = None
        if chosen.head_rows is not None:
            rows = torch.tensor(self.setup.corpus.used_tokens, dtype=torch.int64)
        self.trainables.configure(chosen.formats, rows)
        self.formats, self.head_rows = (chosen.formats,), (chosen.head_rows,)

    def _record_plan(self, index: int, first: int, steps: int, chosen: Plan, values: dict[str, float]) -> None:
        setup, table, problem = self.setup, self.setup.need.table, self.problem
        names = set(chosen.selected)
        shapes = Counter((shape.rows, shape.tokens, shape.kept, shape.labelled) for shape in problem.shapes)
        self.folder.write(f"plan-{index}.json", {
            "round": index, "first_step": first, "steps": steps, "strategy": chosen.strategy,
            "selected": list(chosen.selected), "recompute": list(chosen.recompute), "micro_batch": chosen.micro_batch,
            "accumulation": chosen.accumulation, "formats": asdict(chosen.formats),
            "head_rows": chosen.head_rows if self.model.head in names else None,
            "value": chosen.value, "optimality_gap": chosen.optimality_gap,
            "predicted": {"flops": chosen.flops, "flops_ratio": chosen.flops_ratio, "peak_bytes": chosen.peak_bytes,
                          "step_s": (chosen.seconds or 0.0) / problem.steps},
            "budget": {"flops": setup.flops, "memory_bytes": setup.memory_bytes, "seconds": setup.seconds},
            "memory": chosen.memory,
            "problem": {"shapes": [[*shape, count] for shape, count in sorted(shapes.items())],
                        "flops": problem.flops, "memory_bytes": problem.memory_bytes, "batch_size": problem.batch_size,
                        "vocabulary": problem.vocabulary, "floor_bytes": problem.around.floor_bytes,
                        "demoted": list(problem.around.demoted), "head_rows": list(problem.head_rows),
                        "formats": [asdict(formats) for formats in problem.formats]},
            "candidates": [{"name": w.name, "kind": w.kind, "block": w.block, "numel": w.numel,
                            "importance": values.get(w.name, 0.0), "selected": w.name in names}
                           for w in table.weights],
            "notes": list(chosen.notes),
        })  # fmt: skip
        for note in chosen.notes:
            self.log.fallback(note)
        blocks = sorted({w.block for w in table.weights if w.name in names and w.block < table.blocks})
        where = f"layers {blocks[0]}-{blocks[-1]}" if blocks else "no layer"
        head = " and the head" if self.model.head in names else ""
        if head and chosen.head_rows is not None:
            head = f" and {chosen.head_rows} rows of the head"
        self.log.say(
            f"round {index + 1}/{len(setup.schedule.rounds)}: training {len(names)} of {len(table.weights)} tensors "
            f"({where}{head}), {chosen.flops_ratio:.1%} of full FLOPs, {format_bytes(chosen.peak_bytes)} predicted peak"
        )

    def _planes_of_base(self) -> int:
        """Bytes of the int8 model as it was loaded, each tensor once."""
        held = {id(tensor): tensor.nbytes for tensor in self.model.vectors.values()}
        for module in self.module.modules():
            if isinstance(module, (Int8Linear, Int8Embedding)):
                held[id(module.weight.q)] = module.weight.nbytes
        return sum(held.values())

    def _held_terms(self) -> dict[str, int]:
        """What is held now, measured, by the names of the memory model."""
        live, states = self.trainables.live, self.trainables.optimizer.states.values()
        planes = {name: linear.added_bytes for name, linear in self.model.linears.items()}
        return {
            "base": self._base_bytes,
            "masters": sum(parameter.nbytes for name, parameter in live.items()),
            "planes": sum(planes[name] for name in live if name in planes),
            "demoted": sum(size for name, size in planes.items() if name not in live),
            "optimizer": sum(tensor.nbytes for state in states for tensor in state.tensors().values()),
        }

    def _predict(self, outcome: Any, first: int, steps: int, chosen: Plan, speeds: tuple[Rates, Rates]) -> None:
        setup, table = self.setup, self._table()
        mask = table.mask(chosen.selected)
        shapes = setup.schedule.shapes[first : min(first + steps, self.last_step)]
        steps = len(shapes)
        outcome.predicted_flops += table.train_work(mask, chosen.recompute).total(shapes) + self._probe_work
        evaluation = setup.need.evaluation_bytes(setup.evaluation_rows(0))
        outcome.predicted_peak = max(outcome.predicted_peak, evaluation, self._probe_peak)
        if chosen.peak_bytes > sum(outcome.memory_terms.values()):
            outcome.memory_terms = chosen.memory
        outcome.predicted_peak = max(outcome.predicted_peak, chosen.peak_bytes)
        totals, micro = Totals.of(shapes), sum(-(-shape.rows // chosen.micro_batch) for shape in shapes)
        self._expected_s, theirs = (
            speed.of_states(chosen.formats.states).run_s(table, mask, totals, steps, micro, chosen.recompute) / steps
            for speed in speeds
        )
        share = steps / (first + steps)
        outcome.predicted_step_s += share * (self._expected_s - outcome.predicted_step_s)
        outcome.device_step_s += share * (theirs - outcome.device_step_s)

    def _train(self, index: int, first: int, steps: int, chosen: Plan) -> None:
        setup, options = self.setup, self.setup.options
        batches = [
            (epoch, collate([setup.corpus.train[i] for i in indices], setup.pad_id, options.max_length))
            for epoch, indices in setup.schedule.batches[first : min(first + steps, self.last_step)]
        ]
        total, table = self.last_step, self._table()
        mask = table.mask(chosen.selected)
        work, kept = table.train_work(mask, chosen.recompute), table.saved_work(mask, chosen.recompute)
        recipe = Recipe(
            lambda step: schedule(options.schedule, setup.lr, step, total, options.warmup),
            options.max_grad_norm, total, self._flops_of(total), work.at, kept.at,
            setup.deadline(self.after_s),
        )  # fmt: skip
        parts = Parts(
            self.module, setup.device, self.trainables.live, self.trainables.step, self.model.inputs.clear,
            self.meter, setup.watch,
        )  # fmt: skip
        before = self.progress.train_s, self.progress.step
        with recomputed(self._layers(), chosen.recompute):
            train_round(parts, recipe, batches, chosen.micro_batch, index, self.progress, self.folder.metrics,
                        self.log.step)  # fmt: skip
        done = self.progress.step - before[1]
        if done:
            self.slowness = max(0.8, (self.progress.train_s - before[0]) / done / self._expected_s)
        self.terms["activations"] = self.progress.kept_bytes


def interrupted(progress: Progress, steps: int, folder: RunFolder) -> Interrupted:
    """What the user is told after a signal: how far the run came and where its work is."""
    name = signal.Signals(progress.stop or signal.SIGINT).name
    return Interrupted(
        f"stopped by {name} after step {progress.step} of {steps}; what was trained is in {folder.patch}",
        128 + (progress.stop or signal.SIGINT),
    )


@contextmanager
def stopped_by_signals(progress: Progress) -> Iterator[None]:
    """SIGINT and SIGTERM let the step finish and set `progress.stop`; only in the main thread."""

    def stop(number: int, _frame: FrameType | None) -> None:
        progress.stop = number

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
