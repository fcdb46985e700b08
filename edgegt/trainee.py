"""A model in training: int8 with a few tensors in float, over rounds of importance, plan, promotion and steps."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from edgegt.architecture import all_layers
from edgegt.budget import fitting_probe_rows, largest
from edgegt.cache import cache_dir
from edgegt.checkpoint import Saved
from edgegt.data import Batch, collate, matched
from edgegt.errors import EdgegtError, InputError, is_out_of_memory
from edgegt.frozen import FOLDER, FrozenPrefix, NotKept
from edgegt.guard import StepBack
from edgegt.held import added_bytes, base_bytes, held_terms, planned_bytes
from edgegt.importance import importance
from edgegt.keeper import Keeper
from edgegt.log import Log
from edgegt.model import load_int8
from edgegt.optimizer import AdamW, schedule
from edgegt.patch import save_patch
from edgegt.planner import Plan
from edgegt.prepare import Setup
from edgegt.process import trim
from edgegt.rates import of_profile
from edgegt.recompute import recomputed
from edgegt.recovery import go_back, leave_out
from edgegt.rounds import Predicted, Rounds, Standing
from edgegt.selection import Trainables
from edgegt.signals import end_if_asked, stopped_by_signals
from edgegt.train import Dropped, NoRoom, Parts, Progress, Recipe, train_round
from edgegt.units import format_bytes
from edgegt.version import __version__


class Int8Trainee:
    """The int8 model of one run and its trained tensors. index, first: the round at hand, and its first step."""

    def __init__(self, setup: Setup, log: Log, keeper: Keeper) -> None:
        self.setup, self.log, self.keeper = setup, log, keeper
        kernels, streams = setup.kernels.backend, setup.need.streams
        self.model = load_int8(setup.config, setup.source, cache_dir(), kernels, setup.device, streams)
        self.module, self.meter, self.fingerprint = self.model.module, self.model.meter, self.model.fingerprint
        self.backend = setup.kernels.backend.name
        optimizer = AdamW(
            False, setup.options.weight_decay, seed=setup.options.seed, kernels=setup.kernels.backend.kernels
        )
        self.trainables = Trainables(self.model, optimizer, keeper.folder.parked)
        self.trainables.before_update = keeper.checkpoints.wait_for
        self.trainables.before_selection = keeper.checkpoints.finish
        self.progress, self.predicted = Progress(), Predicted()
        self.rounds = Rounds(setup, log)
        self.prefix = FrozenPrefix(
            self.model, setup.need.table, keeper.checkpoints.folder / FOLDER, setup.need.rows, setup.corpus.train,
            setup.pad_id, self.backend,
        )  # fmt: skip
        self.index = self.first = 0
        self.chosen: Plan | None = None
        self.after_s = 0.0
        self.complete = False
        self.probe_flops = 0
        self._before: Plan | None = None
        self._expected_s = 0.0
        self._base_bytes = base_bytes(self.model)
        self._probe_work = self._probe_peak = 0
        self._values: dict[str, float] = {}

    def train(self) -> None:
        """All rounds that are left. Raises: Interrupted after the step in which a signal came."""
        self.log.start_steps(self.setup.schedule.steps)
        with stopped_by_signals(self.progress):
            while self.index < len(self.rounds.lengths):
                if self.chosen is None:
                    if self.index and self._out_of_time():
                        break
                    self._begin_round()
                if not self._train_round():
                    continue  # something went wrong and was dealt with: from where the run is now
                end_if_asked(self.progress, self.setup.schedule.steps, self.keeper)
                self._end_round()
        end_if_asked(self.progress, self.setup.schedule.steps, self.keeper)  # it came after the last step
        if self.progress.step < self.rounds.last_step and not self.progress.enough:
            total = self.setup.schedule.steps
            self.log.fallback(f"the time budget ended training after step {self.progress.step} of {total}")
        self.complete = True

    def save(self) -> None:
        """The patch: everything trained so far. Masters and states are freed; the model computes as before."""
        self.keeper.checkpoints.finish()
        trained = self.trainables.items()
        if trained:
            about = self.setup.source.name, __version__, self.setup.corpus.separator, self.model.labels
            save_patch(self.keeper.folder.patch, trained, self.fingerprint, *about)
        self.trainables.release()
        trim()

    @property
    def held_bytes(self) -> int:
        """What training has added to the base and evaluation must leave room for: the planes of trained tensors."""
        return added_bytes(self.model)

    def state(self) -> dict[str, Any]:
        """Everything but tensors that an exact resume needs."""
        return {
            "round": self.index, "first": self.first, "rounds": self.rounds.state(),
            "plan": None if self.chosen is None else self.chosen.to_json(),
            "before": None if self._before is None else self._before.to_json(),
            "progress": self.progress.to_json(), "predicted": asdict(self.predicted), "expected_s": self._expected_s,
            "values": self._values, "probe_flops": self.probe_flops, "flops_by_kind": dict(self.meter.by_kind),
            "memory_bytes": self.setup.memory_bytes, "limit_bytes": self.keeper.guard.budget_bytes,
            "live": list(self.trainables.live), "prefix": self.prefix.state(),
            "resting": self.trainables.places(),
        }  # fmt: skip

    def tensors(self) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """The live tensors, in the order in which a step changes them."""
        return {name: self.trainables.tensors(name) for name in reversed(self.trainables.live)}

    def restore(self, saved: Saved) -> None:
        """Be as the checkpoint says, bit for bit. Raises: EdgegtError when a file is damaged."""
        state = saved.state
        self.index, self.first = state["round"], state["first"]
        self.rounds.restore(state["rounds"])
        self.chosen = None if state["plan"] is None else Plan.from_json(state["plan"])
        self._before = None if state["before"] is None else Plan.from_json(state["before"])
        self.progress.restore(state["progress"])
        self.predicted = Predicted(**state["predicted"])
        self._expected_s, self._values, self.probe_flops = state["expected_s"], state["values"], state["probe_flops"]
        self.meter.by_kind.clear()
        self.meter.by_kind.update(state["flops_by_kind"])
        if not self.trainables.live and not self.trainables.resting and self._before is not None:
            self._configure(self._before)
        self.put_back(saved)
        self.prefix.restore(state.get("prefix", {}))
        self.rounds.tidy(self.keeper.folder, self.index - (self.chosen is None))
        if state["memory_bytes"] < self.setup.memory_bytes:
            self._lower(state["memory_bytes"], state["limit_bytes"])

    def put_back(self, saved: Saved) -> None:
        """Have the trained tensors of a checkpoint, and nothing else of it. Raises: EdgegtError."""
        resting = self.trainables.at_places(saved.state["resting"])
        self.trainables.restore(saved.state["live"], saved.tensors, resting)

    def _out_of_time(self) -> bool:
        """Whether another round has no time, by the deadline or because all steps that are allowed or help are made."""
        left = self.setup.seconds_left
        late = left is not None and left <= self.after_s
        return late or self.progress.late or self.progress.enough or self.progress.step >= self.rounds.last_step

    def _begin_round(self) -> None:
        self._importance()
        at = self._standing()
        chosen = self.rounds.plan(at, self._values, self._before)
        if self._before is None:
            self.rounds.fix(chosen)
            self._configure(chosen)
        self._go_on_with(chosen, at)

    def _end_round(self) -> None:
        assert self.chosen is not None
        if self.chosen.peak_bytes == self.predicted.peak or not self.predicted.measured_terms:
            more = {"base": self._base_bytes - self.model.spared_bytes, "activations": self.progress.kept_bytes}
            self.predicted.measured_terms = held_terms(self.trainables) | more
        self.first += self.rounds.lengths[self.index]
        self.index += 1
        self.chosen = None
        self.keeper.save()

    def _go_on_with(self, chosen: Plan, at: Standing) -> None:
        """Record a plan, select its tensors and keep that decision, before the first step by it."""
        if at.index > self.index:  # within a round: the rest of it is one of its own
            self.rounds.cut(self.keeper.folder, self.index, at.step - self.first)
            self.first, self.index = at.step, at.index
        steps = self.rounds.lengths[self.index]
        self.rounds.record(self.keeper.folder, at, steps, chosen, self._values, self.model.head)
        self._predict(steps, chosen)
        self.trainables.select(chosen.selected)
        for note in self.model.notes:
            self.log.fallback(note)
        self.chosen = self._before = chosen
        self.keeper.save(wait=at.index == 0)

    def _configure(self, chosen: Plan) -> None:
        rows = None
        if chosen.head_rows is not None:
            rows = torch.tensor(self.setup.corpus.used_tokens, dtype=torch.int64)
        self.trainables.configure(chosen.formats, rows)

    def _standing(self) -> Standing:
        later, after_s = len(self.rounds.lengths) - self.index - 1, self.after_s + self.keeper.seconds_ahead()
        trained = tuple(sorted({*self.trainables.resting, *self.trainables.live} - {*self.model.fresh}))
        before = self._before
        cached = (before.boundary, before.cache_first) if before and before.boundary and self.rounds.keeping else None
        return Standing(self.index, self.progress.step, self.meter.total, trained, later, after_s, cached)

    def _step_back(self, back: StepBack) -> None:
        """Go on with less memory: the rest of the round gets a smaller plan. Raises: EdgegtError when none fits."""
        if back.torn:
            go_back(self, self.keeper, "to take back a step that was broken off")
        self.keeper.checkpoints.finish()
        done, before = self.progress.step - self.first, self.chosen
        if before is None or done >= min(self.rounds.lengths[self.index], self.rounds.last_step - self.first):
            if back.must:  # else the next plan's own peak says what it needs
                self._stepped_back(back, "what comes has less", back.budget_bytes)
            return
        at = replace(self._standing(), index=self.index + (1 if done else 0))
        chosen, budget = self._smaller(back, at, before)
        if chosen is None:
            self.log.fallback(f"{back.reason}, and nothing smaller can be trained")
            return
        self.predicted.flops -= self._flops_left(before)
        was, now = (
            f"{len(plan.selected)} tensors, {plan.micro_batch} rows, {len(plan.recompute)} layers recomputed"
            for plan in (before, chosen)
        )
        self._stepped_back(back, f"the run steps back from {was} to {now}", budget)
        self._go_on_with(chosen, at)
        trim()
        self.keeper.guard.lower(self.keeper.guard.budget_bytes)

    def _smaller(self, back: StepBack, at: Standing, before: Plan) -> tuple[Plan | None, int]:
        """A smaller plan and the budget that it is for; None where there is none and the run need not stop."""
        budget = back.budget_bytes
        held = self.setup
        try:
            if back.guess and budget < (least := self.rounds.least_bytes(at, self._values)) < before.peak_bytes:
                budget = least
            self.setup = self.rounds.setup = replace(self.setup, memory_bytes=budget)
            return self.rounds.smaller(at, self._values, before), budget
        except InputError as error:
            self.setup = self.rounds.setup = held
            if not back.must:
                return None, budget
            left = format_bytes(budget)
            raise EdgegtError(
                f"{back.reason}: the run cannot go on with the {left} that are left for it ({error})"
            ) from error

    def _stepped_back(self, back: StepBack, what: str, budget_bytes: int) -> None:
        """Say, record and obey it: less for the plans, and where memory is really gone for the process too."""
        text = f"{back.reason}: {what}, within {format_bytes(budget_bytes)}"
        self.log.fallback(text)
        self.keeper.record({"kind": "memory", "text": text, "budget_bytes": budget_bytes})
        self._lower(budget_bytes, budget_bytes if back.must else self.keeper.guard.budget_bytes)

    def _lower(self, budget_bytes: int, limit_bytes: int) -> None:
        """From now on plans get `budget_bytes`, and the process holds itself to `limit_bytes`."""
        self.setup = self.rounds.setup = replace(self.setup, memory_bytes=budget_bytes)
        trim()
        self.setup.watch.hold(limit_bytes)
        self.keeper.guard.lower(limit_bytes)

    def _flops_left(self, chosen: Plan) -> int:
        """What the rest of the round was predicted to cost."""
        return self.rounds.flops_left(self.progress.step, self.first + self.rounds.lengths[self.index], chosen)

    def _importance(self) -> None:
        """Measure what each tensor is worth now; without memory for it, what it was worth before counts."""
        self._probe_work = 0
        try:
            self._measure_importance()
            return
        except Exception as error:
            if not self._values or not is_out_of_memory(error):
                raise
        self.model.inputs.clear()
        trim()
        self.log.fallback(f"importance is not measured again in round {self.index + 1}: memory could not be had")

    def _measure_importance(self) -> None:
        setup = self.setup
        if not setup.options.measures_importance:
            self._values = {weight.name: float(weight.numel) for weight in setup.need.table.weights}
            return
        draw = random.Random(f"{setup.options.seed}/probe/{self.index}")
        train, wanted = setup.corpus.train, setup.probes.rows * setup.probes.count
        rows = self._probe_rows()
        if rows == 0:
            what = f"importance is not measured again in round {self.index + 1}"
            self.log.fallback(f"{what}: it does not fit beside what training holds")
            return
        # Only rows that are trained on: others may be longer, and both budgets know the longest of these.
        pool = sorted({i for _, indices in setup.schedule.batches for i in indices})
        if setup.corpus.labels:
            picked = [train[i] for i in matched(train, pool, rows, wanted // rows, draw)]
        else:
            picked = [train[i] for i in draw.sample(pool, min(wanted, len(pool)))]
            picked += [train[draw.choice(pool)] for _ in range(wanted - len(picked))]
        batches = [collate(picked[start : start + rows], setup.pad_id) for start in range(0, wanted, rows)]
        spent = self.meter.total
        self._probe_work = setup.need.table.probe_work().total(batch.shape for batch in batches)
        self._values = importance(self.model, batches, all_layers(self.module))
        self.probe_flops += self.meter.total - spent
        self.model.inputs.clear()
        trim()

    def _probe_rows(self) -> int:
        """Rows of a probe batch beside what is trained now; where not even two fit, that is put aside on disk first.

        0 when they do not fit even then, beside the planes of what was trained (never in the first round).
        """
        setup, held = self.setup, self.standing_bytes
        need, schedule = setup.need, setup.schedule
        rows = fitting_probe_rows(setup.probes.rows, need, schedule, setup.memory_bytes, held)
        while setup.probes.rows % rows:
            rows -= 2
        if held and need.probe_bytes(largest(schedule, rows), held) > setup.memory_bytes:
            self.trainables.select(())
            trim()
        peak = need.probe_bytes(largest(schedule, rows), self.standing_bytes)
        if held and peak > setup.memory_bytes:
            return 0
        self._probe_peak = max(self._probe_peak, peak)
        return rows

    @property
    def standing_bytes(self) -> int:
        """What training holds between two steps beside the base, as planned."""
        return planned_bytes(self.trainables, self.rounds.table(), self.rounds.formats[0])

    def _predict(self, steps: int, chosen: Plan) -> None:
        speeds = self.setup.rates, of_profile(self.setup.resolved.profile)
        self._expected_s = self.rounds.predict(
            self.predicted, self.progress.step, steps, chosen, speeds, self._probe_work
        )
        self.predicted.peak = max(self.predicted.peak, self._probe_peak)
        self._probe_work = 0

    def _train_round(self) -> bool:
        """The steps that are left of the round; False when something went wrong, and was dealt with."""
        chosen = self.chosen
        assert chosen is not None
        setup, options, total = self.setup, self.setup.options, self.rounds.last_step
        table = self.rounds.table()
        mask = table.mask(chosen.selected)
        work, kept = table.train_work(mask, chosen.recompute), table.saved_work(mask, chosen.recompute)
        recipe = Recipe(
            lambda step: schedule(options.schedule, setup.lr, step, total, options.warmup),
            options.max_grad_norm, total, self.rounds.flops_of(total),
            lambda batch: self.prefix.cost(batch, work.at(batch.shape)), kept.at, setup.deadline(self.after_s),
        )  # fmt: skip
        parts = Parts(
            self.module, setup.device, self.trainables.live, self.trainables.step, self.model.inputs.clear,
            self.meter, setup.watch, lambda: {**self.keeper.facts(), **self.prefix.step_facts()},
        )  # fmt: skip
        before = self.progress.train_s, self.progress.step
        self.keeper.guard.begin()
        try:
            if not self.prefix.ready(chosen, self.trainables.resting, lambda: self.progress.stop is not None):
                return True  # it was asked to stop
            with recomputed(all_layers(self.module), chosen.recompute), self.prefix.used():
                train_round(
                    parts, recipe, self._batches(), chosen.micro_batch, self.index, self.progress, self.keeper.metrics,
                    self._after_step, fused=chosen.micro_batch >= max(shape.rows for shape in setup.schedule.shapes),
                )  # fmt: skip
        except NotKept as error:
            self._go_on_without(str(error), chosen)
        except Dropped as error:
            leave_out(self, self.keeper, error)
        except NoRoom as error:
            self._step_back(self.keeper.guard.failed(error.reason, chosen.peak_bytes, error.torn))
        except StepBack as back:
            self._step_back(back)
        else:
            done = self.progress.step - before[1]
            if done:
                self.rounds.slowness = max(0.8, (self.progress.train_s - before[0]) / done / self._expected_s)
            return True
        return False

    def _go_on_without(self, why: str, before: Plan) -> None:
        """Keep no hidden states any more: the rest of the round gets another plan. Raises: EdgegtError."""
        self.rounds.keeping = False
        self.prefix.remove()
        self.log.fallback(f"no hidden states are kept: {why}")
        at = replace(self._standing(), index=self.index + (self.progress.step > self.first))
        try:
            chosen = self.rounds.plan(at, self._values, None)
        except InputError as error:
            raise EdgegtError(f"without kept hidden states ({why}) the run cannot go on: {error}") from error
        self.predicted.flops -= self._flops_left(before) + before.cached.get("fill_flops", 0)
        self._go_on_with(chosen, at)

    def _after_step(self, entry: dict[str, Any]) -> None:
        self.log.step(entry)
        assert self.chosen is not None
        self.keeper.after_step(self.chosen.peak_bytes, entry["step_s"])

    def _batches(self) -> Iterator[tuple[float, Batch]]:
        """The batches that are left of the round, each made when its step comes."""
        setup = self.setup
        end = min(self.first + self.rounds.lengths[self.index], self.rounds.last_step)
        for epoch, indices in setup.schedule.batches[self.progress.step : end]:
            rows = [setup.corpus.train[i] for i in indices]
            yield epoch, collate(rows, setup.pad_id)
