"""The plans of a run's rounds: made from importance and from what is left of every budget, predicted, and recorded.

A round is what is trained with one plan. Where memory runs short a round is cut in two: the rest gets a smaller plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from edgegt.budget import probe_seconds
from edgegt.cost import CostTable, Totals
from edgegt.errors import BudgetError, InputError
from edgegt.folder import RunFolder
from edgegt.log import Log
from edgegt.memory import Formats
from edgegt.planner import Plan, Problem, plan, smallest
from edgegt.prefix import Caching
from edgegt.prepare import Setup
from edgegt.rates import Rates
from edgegt.units import format_bytes
from edgegt.value import values_of

# Predicted steps were 0.77 to 1.27 times the measured ones; before the first step is measured the cautious end counts.
FIRST_GUESS = 1.3
# Where time is too short for all steps: what a plan that is still worth making takes, of the cheapest one's seconds.
CHEAP = 1.15


@dataclass(frozen=True)
class Standing:
    """Where a plan begins. step: the first it is for; spent: FLOPs so far; trained: names of tensors with planes.

    later: rounds after this one; after_s: seconds to keep for what comes after training.
    cached: boundary and first step of the hidden states on the disk, if any.
    """

    index: int
    step: int
    spent: int
    trained: tuple[str, ...]
    later: int
    after_s: float
    cached: tuple[int, int] | None = None


@dataclass
class Predicted:
    """What was predicted of the run so far, for its record. measured_terms: by the names of memory_terms."""

    peak: int = 0
    flops: int = 0
    step_s: float = 0.0
    device_step_s: float = 0.0
    memory_terms: dict[str, int] = field(default_factory=dict)
    measured_terms: dict[str, int] = field(default_factory=dict)


class Rounds:
    """Plans one run. lengths: steps of its rounds; formats and head_rows are one each once the first plan is fixed.

    keeping: whether hidden states can be kept.
    """

    def __init__(self, setup: Setup, log: Log) -> None:
        self.setup, self.log = setup, log
        self.lengths = list(setup.schedule.rounds)
        self.formats: tuple[Formats, ...] = setup.need.formats
        self.head_rows = setup.need.head_rows
        self.slowness = FIRST_GUESS
        self.last_step = setup.schedule.steps
        self.problem: Problem | None = None
        self.keeping = setup.need.rows is not None

    def state(self) -> dict[str, Any]:
        """What a resumed run needs of it."""
        return {
            "lengths": self.lengths, "formats": [asdict(formats) for formats in self.formats],
            "head_rows": list(self.head_rows), "slowness": self.slowness, "last_step": self.last_step,
            "keeping": self.keeping,
        }  # fmt: skip

    def restore(self, tree: Mapping[str, Any]) -> None:
        """Be where `state` was."""
        self.lengths, self.slowness, self.last_step = list(tree["lengths"]), tree["slowness"], tree["last_step"]
        self.formats = tuple(Formats(**formats) for formats in tree["formats"])
        self.head_rows = tuple(tree["head_rows"])
        self.keeping = self.keeping and tree.get("keeping", True)

    def table(self) -> CostTable:
        """The cost table with as much of the head as this run trains, once that is decided."""
        table, rows = self.setup.need.table, self.head_rows[0] if len(self.head_rows) == 1 else None
        return table if rows is None else table.with_head_rows(rows)

    def plan(self, at: Standing, values: Mapping[str, float], before: Plan | None) -> Plan:
        """The plan of a round; where none can be made, the one of the round before. Raises: InputError without one."""
        self.problem = problem = self._problem(at, values)
        try:
            self.problem = self._within_time(problem, at)
            return self._planned(self.problem, at.index)
        except InputError as error:
            if before is None:
                raise
            self.log.fallback(f"round {at.index + 1} keeps the tensors of the round before: {error}")
        return before if self.keeping else replace(before, boundary=0, cached={})

    def smaller(self, at: Standing, values: Mapping[str, float], before: Plan) -> Plan:
        """A plan for less memory: the same tensors, if smaller micro-batches or recomputation suffice, else fewer.

        Raises: InputError (BudgetError) when nothing can be trained with so little.
        """
        seed, strategy = self.setup.options.seed + at.index, self.setup.options.strategy
        problem = self.problem = self._rest(at, values)
        same = replace(problem, values={name: problem.values.get(name) or 1e-9 for name in before.selected})
        try:
            found = plan(same, strategy, seed)
        except InputError:
            found = None
        if found is not None and set(found.selected) == set(before.selected):
            return found
        return plan(problem, strategy, seed)

    def least_bytes(self, at: Standing, values: Mapping[str, float]) -> int:
        """The least peak with which anything can be trained from here on."""
        return smallest(self._rest(at, values)).memory_bytes

    def cut(self, folder: RunFolder, index: int, done: int) -> None:
        """End round `index` after `done` steps; the rest of it becomes a round of its own. Raises: DiskError."""
        self.lengths[index : index + 1] = [done, self.lengths[index] - done]
        self.tidy(folder, index)

    def tidy(self, folder: RunFolder, index: int) -> None:
        """Have the recorded plans say what holds now: none after round `index`, and its length. Raises: DiskError."""
        for path in folder.path.glob("plan-*.json"):
            number = path.stem.removeprefix("plan-")
            if number.isdecimal() and int(number) > index:
                path.unlink(missing_ok=True)
        name = f"plan-{index}.json"
        with suppress(InputError):  # not made yet, or damaged: nothing but the report reads it
            recorded = folder.read(name)
            if recorded.get("steps") != self.lengths[index]:
                folder.write(name, {**recorded, "steps": self.lengths[index]})

    def fix(self, chosen: Plan) -> None:
        """Number formats and the trained part of the head are decided once, in the first round."""
        self.formats, self.head_rows = (chosen.formats,), (chosen.head_rows,)

    def flops_of(self, steps: int) -> int:
        """What the first steps of the run may spend."""
        setup = self.setup
        if steps == setup.schedule.steps:
            return setup.flops
        return int(setup.rho * setup.need.table.full_work().total(setup.schedule.shapes[:steps]))

    def predict(
        self, predicted: Predicted, first: int, steps: int, chosen: Plan, speeds: tuple[Rates, Rates], probe: int
    ) -> float:
        """Add a round to what is predicted of the run; returns its seconds per step on this machine. probe: FLOPs."""
        setup = self.setup
        shapes = setup.schedule.shapes[first : min(first + steps, self.last_step)]
        predicted.flops += self.flops_left(first, first + steps, chosen) + chosen.cached.get("fill_flops", 0) + probe
        evaluation = setup.need.evaluation_bytes(setup.evaluation_rows(0))
        if chosen.peak_bytes > sum(predicted.memory_terms.values()):
            predicted.memory_terms = chosen.memory
        predicted.peak = max(predicted.peak, evaluation, chosen.peak_bytes)
        totals, micro = Totals.of(shapes), sum(-(-shape.rows // chosen.micro_batch) for shape in shapes)
        here, theirs = (
            self._run_s(speed.of_states(chosen.formats.states), first, chosen, totals, len(shapes), micro)
            / max(1, len(shapes))
            for speed in speeds
        )
        share = len(shapes) / max(1, first + len(shapes))
        predicted.step_s += share * (here - predicted.step_s)
        predicted.device_step_s += share * (theirs - predicted.device_step_s)
        return here

    def flops_left(self, first: int, end: int, chosen: Plan) -> int:
        """What the steps from `first` to `end` cost with this plan, without making hidden states."""
        table, end = self.table(), min(end, self.last_step)
        work = table.train_work(table.mask(chosen.selected), chosen.recompute)
        return work.total(self.setup.schedule.shapes[first:end]) - table.below(chosen.boundary).over(
            self._skipped(first, end, chosen)
        )

    def _skipped(self, first: int, end: int, chosen: Plan) -> Totals:
        """The rows, in the shapes of their batches, for which the layers below the plan's boundary do not run."""
        rows = self.setup.need.rows
        if rows is None or not chosen.boundary:
            return Totals.of(())
        return rows.footing(first, end, chosen.cache_first).skipped

    def _run_s(self, rates: Rates, first: int, chosen: Plan, totals: Totals, steps: int, micro: int) -> float:
        """Predicted seconds of `steps` steps from `first` on."""
        table = self.table()
        whole = rates.run_s(table, table.mask(chosen.selected), totals, steps, micro, chosen.recompute)
        skipped = self._skipped(first, first + steps, chosen)
        saved = rates.skipped_s(table, chosen.boundary, skipped)
        return whole - saved - rates.skipped_dispatch_s(chosen.boundary, skipped, totals, micro)

    def record(
        self, folder: RunFolder, at: Standing, steps: int, chosen: Plan, values: Mapping[str, float], head: str
    ) -> None:
        """Write plan-<index>.json, and say what is trained. head: the name of the head."""
        setup, table, problem = self.setup, self.setup.need.table, self.problem
        assert problem is not None
        names = set(chosen.selected)
        shapes = Counter((shape.rows, shape.tokens, shape.kept, shape.labelled) for shape in problem.shapes)
        folder.write(f"plan-{at.index}.json", {
            "round": at.index, "first_step": at.step, "steps": steps, "strategy": chosen.strategy,
            "selected": list(chosen.selected), "recompute": list(chosen.recompute), "micro_batch": chosen.micro_batch,
            "accumulation": chosen.accumulation, "formats": asdict(chosen.formats),
            "head_rows": chosen.head_rows if head in names else None,
            "value": chosen.value, "optimality_gap": chosen.optimality_gap,
            "predicted": {"flops": chosen.flops, "flops_ratio": chosen.flops_ratio, "peak_bytes": chosen.peak_bytes,
                          "step_s": (chosen.seconds or 0.0) / problem.steps},
            "budget": {"flops": setup.flops, "memory_bytes": setup.memory_bytes, "seconds": setup.seconds},
            "memory": chosen.memory,
            "problem": {"shapes": [[*shape, count] for shape, count in sorted(shapes.items())],
                        "flops": problem.flops, "memory_bytes": problem.memory_bytes, "batch_size": problem.batch_size,
                        "vocabulary": problem.vocabulary, "floor_bytes": problem.around.floor_bytes,
                        "demoted": list(problem.around.demoted), "head_rows": list(problem.head_rows),
                        "formats": [asdict(formats) for formats in problem.formats],
                        "caching": problem.caching.to_json() if problem.caching else None, "streams": problem.streams},
            "candidates": [{"name": w.name, "kind": w.kind, "block": w.block, "numel": w.numel,
                            "importance": values.get(w.name, 0.0), "selected": w.name in names}
                           for w in table.weights],
            "notes": list(chosen.notes), "boundary": chosen.boundary, "cache": chosen.cached,
        })  # fmt: skip
        for note in chosen.notes:
            self.log.fallback(note)
        blocks = sorted({w.block for w in table.weights if w.name in names and w.block < table.blocks})
        where = f"layers {blocks[0]}-{blocks[-1]}" if blocks else "no layer"
        more = " and the head" if head in names else ""
        if more and chosen.head_rows is not None:
            more = f" and {chosen.head_rows} rows of the head"
        self.log.say(
            f"round {at.index + 1}/{len(self.lengths)}: training {len(names)} of {len(table.weights)} tensors "
            f"({where}{more}), {chosen.flops_ratio:.1%} of full FLOPs, {format_bytes(chosen.peak_bytes)} predicted peak"
        )
        if chosen.boundary:
            size, rows = format_bytes(chosen.cached["bytes"]), chosen.cached["rows"]
            self.log.say(f"hidden states of {rows} rows are kept below layer {chosen.boundary}: at most {size}")
        elif self.keeping and setup.options.cache == "on":
            self.log.fallback(
                f"round {at.index + 1}: no hidden states are kept: what is trained leaves no layer for it"
            )

    def _rest(self, at: Standing, values: Mapping[str, float]) -> Problem:
        """The steps that will be made from here on, under FLOPs and memory; a deadline ends them in any case."""
        problem = self._problem(at, values)
        if problem.seconds is None:
            return problem
        probing = self.setup.flops - at.spent - problem.flops
        return replace(
            problem, seconds=None, shapes=self.setup.schedule.shapes[at.step : self.last_step],
            flops=self.flops_of(self.last_step) - at.spent - probing,
            caching=self._caching(at, self.last_step),
        )  # fmt: skip

    def _problem(self, at: Standing, values: Mapping[str, float]) -> Problem:
        setup = self.setup
        probing = setup.need.table.probe_work().total(setup.probes.shapes(setup.schedule))
        return replace(
            setup.need.problem(
                setup.options, setup.schedule.shapes[at.step :], values_of(dict(values), setup.need.table),
                setup.flops - at.spent - at.later * probing, setup.memory_bytes, self._seconds(at),
            ),
            around=replace(setup.need.around, demoted=at.trained), formats=self.formats, head_rows=self.head_rows,
            caching=self._caching(at, None),
        )  # fmt: skip

    def _caching(self, at: Standing, end: int | None) -> Caching | None:
        rows = self.setup.need.rows
        return rows.caching(at.step, end, at.cached) if rows and self.keeping else None

    def _within_time(self, problem: Problem, at: Standing) -> Problem:
        """The problem; where its time allows no training of all steps, with the time of a cheap one, of fewer steps."""
        self.last_step = self.setup.schedule.steps
        if problem.seconds is None:
            return problem
        needed = CHEAP * smallest(problem).seconds
        if needed > problem.seconds:
            self.last_step = at.step + max(1, int(problem.steps * problem.seconds / needed))
            total = self.setup.schedule.steps
            self.log.fallback(f"the time budget allows about {self.last_step} of {total} steps: the rest is left out")
            # rho holds for the steps that are made; the problem is over all, so what they may cost is scaled up
            left = self.flops_of(self.last_step) - at.spent
            flops = left * problem.steps // (self.last_step - at.step)
            return replace(problem, seconds=needed, flops=min(problem.flops, flops))
        return problem

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

    def _seconds(self, at: Standing) -> float | None:
        """What is left of the time budget for training, in predicted seconds: measured ones may be longer."""
        setup, left = self.setup, self.setup.seconds_left
        if left is None:
            return None
        probing = at.later * probe_seconds(setup.need, setup.schedule, setup.probes) / len(setup.schedule.rounds)
        return max(1e-3, (left - at.after_s) / self.slowness - probing)
