"""A model in training: int8 with a few tensors in float, over rounds of importance, plan, promotion and steps."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any

from edgegt.budget import fitting_probe_rows, largest
from edgegt.checkpoint import Position, save_checkpoint
from edgegt.data import collate
from edgegt.errors import InputError, Interrupted
from edgegt.folder import RunFolder
from edgegt.importance import importance
from edgegt.log import Log
from edgegt.memory import plane_bytes, state_bytes
from edgegt.model import load_int8
from edgegt.optimizer import AdamW, schedule
from edgegt.patch import save_patch
from edgegt.planner import Plan, Problem, plan
from edgegt.prepare import Setup
from edgegt.process import trim
from edgegt.selection import Trainables
from edgegt.speed import Speed, of_machine, of_profile
from edgegt.store import cache_dir
from edgegt.train import Parts, Progress, Recipe, train_round
from edgegt.units import format_bytes
from edgegt.value import values_of
from edgegt.version import __version__


class Int8Trainee:
    """The int8 model of one run and its trained tensors."""

    def __init__(self, setup: Setup, log: Log) -> None:
        self.setup, self.log = setup, log
        self.model = load_int8(setup.config, setup.source, cache_dir(), setup.kernels.backend, setup.device)
        self.module, self.meter, self.fingerprint = self.model.module, self.model.meter, self.model.fingerprint
        self.backend = setup.kernels.backend.name
        optimizer = AdamW(setup.need.eight_bit, setup.options.weight_decay)
        self.trainables = Trainables(self.model, optimizer)
        self.progress = Progress()
        self.complete = False
        self.probe_flops = 0
        self._probe_work = self._probe_peak = 0

    def train(self, folder: RunFolder, outcome: Any) -> None:
        """All rounds. Raises: Interrupted after the step in which a signal came."""
        setup = self.setup
        self.folder, self.trainables.parked = folder, folder.parked
        speeds = self._speed(), of_profile(setup.resolved.profile)
        first = 0
        self.log.start_steps(setup.schedule.steps)
        with stopped_by_signals(self.progress):
            for index, steps in enumerate(setup.schedule.rounds):
                values = self._importance(index)
                chosen = self._plan(index, first, values)
                self._record_plan(index, first, steps, chosen, values, speeds[0])
                self._predict(outcome, first, steps, chosen, speeds)
                self.trainables.select(chosen.selected)
                for note in self.model.notes:
                    self.log.fallback(note)
                self._train(index, first, steps, chosen)
                first += steps
                position = Position(self.progress.step, index, self.meter.total)
                save_checkpoint(folder.path / "checkpoint", self.trainables, position)
                if self.progress.stop is not None:
                    raise interrupted(self.progress, setup.schedule.steps, folder)
        self.complete = True

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
        return sum(linear.weight.nbytes for linear in self.model.linears.values() if linear.weight.low is not None)

    def _importance(self, index: int) -> dict[str, float]:
        setup = self.setup
        if setup.options.strategy != "greentrainer":
            return {weight.name: float(weight.numel) for weight in setup.need.table.weights}
        draw = random.Random(f"{setup.options.seed}/probe/{index}")
        train, wanted = setup.corpus.train, setup.probes.rows * setup.probes.count
        rows = self._probe_rows()
        picked = [train[i] for i in draw.sample(range(len(train)), min(wanted, len(train)))]
        picked += [draw.choice(train) for _ in range(wanted - len(picked))]
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
        return values

    def _probe_rows(self) -> int:
        """Rows of a probe batch beside what is trained now; where not even two fit, that is put aside on disk first."""
        setup, held = self.setup, self._live_bytes()
        need, schedule = setup.need, setup.schedule
        rows = fitting_probe_rows(setup.probes.rows, need, schedule, setup.memory_bytes, held)
        while setup.probes.rows % rows:
            rows -= 2
        if held and need.probe_bytes(largest(schedule, rows), held) > setup.memory_bytes:
            self.trainables.select(())
        self._probe_peak = need.probe_bytes(largest(schedule, rows), self._live_bytes())
        return rows

    def _live_bytes(self) -> int:
        """What training holds now: masters, planes and states of live tensors, planes of resting ones."""
        weights = {weight.name: weight for weight in self.setup.need.table.weights}
        live = sum(state_bytes(weights[name], False, self.setup.need.eight_bit) for name in self.trainables.live)
        return live + sum(plane_bytes(weights[name]) for name in self.trainables.resting)

    def _layers(self) -> Any:
        from edgegt.architecture import layers_of

        return self.module.get_submodule(layers_of(self.module)[0])

    def _plan(self, index: int, first: int, values: dict[str, float]) -> Plan:
        setup = self.setup
        later = len(setup.schedule.rounds) - index - 1
        probing = setup.need.table.probe_work().total(setup.probes.shapes(setup.schedule))
        problem = Problem(
            table=setup.need.table,
            values=values_of(values, setup.need.table),
            shapes=setup.schedule.shapes[first:],
            flops=setup.flops - self.meter.total - later * probing,
            memory_bytes=setup.memory_bytes,
            around=replace(setup.need.around, demoted=tuple({*self.trainables.resting, *self.trainables.live})),
            vocabulary=setup.need.vocabulary,
            batch_size=setup.options.batch_size,
        )
        try:
            self._chosen = plan(problem, setup.options.strategy, setup.options.seed + index)
        except InputError as error:
            if index == 0:
                raise
            self.log.fallback(f"round {index + 1} keeps the tensors of the round before: {error}")
        return self._chosen

    def _record_plan(
        self, index: int, first: int, steps: int, chosen: Plan, values: dict[str, float], speed: Speed
    ) -> None:
        setup, table = self.setup, self.setup.need.table
        names = set(chosen.selected)
        shape = largest(setup.schedule, setup.options.batch_size)
        self.folder.write(f"plan-{index}.json", {
            "round": index, "first_step": first, "steps": steps, "strategy": chosen.strategy,
            "selected": list(chosen.selected), "recompute": [], "micro_batch": chosen.micro_batch,
            "accumulation": chosen.accumulation, "value": chosen.value, "optimality_gap": chosen.optimality_gap,
            "predicted": {"flops": chosen.flops, "flops_ratio": chosen.flops_ratio, "peak_bytes": chosen.peak_bytes,
                          "step_s": speed.step_s(table, table.mask(names), shape, chosen.accumulation)},
            "budget": {"flops": setup.flops, "memory_bytes": setup.memory_bytes}, "memory": chosen.memory,
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
        self.log.say(
            f"round {index + 1}/{len(setup.schedule.rounds)}: training {len(names)} of {len(table.weights)} tensors "
            f"({where}{head}), {chosen.flops_ratio:.1%} of full FLOPs, {format_bytes(chosen.peak_bytes)} predicted peak"
        )

    def _predict(self, outcome: Any, first: int, steps: int, chosen: Plan, speeds: tuple[Speed, Speed]) -> None:
        setup, table = self.setup, self.setup.need.table
        mask = table.mask(chosen.selected)
        shapes = setup.schedule.shapes[first : first + steps]
        outcome.predicted_flops += table.train_work(mask).total(shapes) + self._probe_work
        evaluation = setup.need.evaluation_bytes(setup.evaluation_rows(0))
        outcome.predicted_peak = max(outcome.predicted_peak, evaluation, self._probe_peak)
        if chosen.peak_bytes > sum(outcome.memory_terms.values()):
            outcome.memory_terms = chosen.memory
        outcome.predicted_peak = max(outcome.predicted_peak, chosen.peak_bytes)
        typical = shapes[len(shapes) // 2]
        mine, theirs = (speed.step_s(table, mask, typical, chosen.accumulation) for speed in speeds)
        share = steps / (first + steps)
        outcome.predicted_step_s += share * (mine - outcome.predicted_step_s)
        outcome.device_step_s += share * (theirs - outcome.device_step_s)

    def _train(self, index: int, first: int, steps: int, chosen: Plan) -> None:
        setup, options = self.setup, self.setup.options
        batches = [
            (epoch, collate([setup.corpus.train[i] for i in indices], setup.pad_id, options.max_length))
            for epoch, indices in setup.schedule.batches[first : first + steps]
        ]
        total = setup.schedule.steps
        work = setup.need.table.train_work(setup.need.table.mask(chosen.selected))
        recipe = Recipe(
            lambda step: schedule(options.schedule, setup.lr, step, total, options.warmup),
            options.max_grad_norm, total, setup.flops, work.at,
        )  # fmt: skip
        parts = Parts(
            self.module, setup.device, self.trainables.live, self.trainables.step, self.model.inputs.clear,
            self.meter, setup.watch,
        )  # fmt: skip
        train_round(parts, recipe, batches, chosen.micro_batch, index, self.progress, self.folder.metrics,
                    self.log.step)  # fmt: skip

    def _speed(self) -> Speed:
        table = self.setup.need.table
        width = max(weight.shape[1] for weight in table.weights if weight.kind == "head")
        shape = largest(self.setup.schedule, self.setup.options.batch_size)
        tokens = shape.rows * shape.tokens
        return of_machine(self.setup.kernels.backend, self.setup.device, width, tokens, self.setup.need.eight_bit)


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
