"""Early stopping: the loss on some held-out rows after every epoch, and the run ends with the best that was measured.

The best is a checkpoint that stays as long as later ones name it. Going back to it takes its tensors and nothing else,
so that steps, FLOPs and seconds are those that were made. What was measured is known to every checkpoint, so that a run
that goes on measures the same. Where the disk or the memory has no room, the run goes on without, and says so.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

from edgegt.budget import rows_that_fit
from edgegt.checkpoint import Saved
from edgegt.cost import BatchShape, Work
from edgegt.data import Example, shape_of
from edgegt.disk import DiskError
from edgegt.errors import InputError, is_out_of_memory
from edgegt.evaluate import classified, held_out_loss
from edgegt.flops import FlopMeter
from edgegt.job import Corpus, spread
from edgegt.keeper import Keeper, Kept
from edgegt.log import Log
from edgegt.prepare import Setup
from edgegt.process import trim
from edgegt.rounds import Predicted
from edgegt.units import format_bytes

# All measurements together, of the forward passes of training; rows of one at least and at most, and labels at least: a
# class or a single word says little of its row.
SHARE = 0.05
ROWS = (8, 512)
LABELS = 64
# With fewer that are held out, nothing is decided by them.
HANDFUL = 5
# Measurements in a row that are no better than the best, after which training ends.
PATIENCE = 2
LEAST_EPOCHS = 2
_WITHOUT = "the run goes on without early stopping"


class Stoppable(Kept, Protocol):
    """A model in training that can be measured and put back."""

    setup: Setup
    module: Any
    meter: FlopMeter
    predicted: Predicted

    @property
    def standing_bytes(self) -> int:
        """What training holds between two steps beside the base, as planned."""

    def put_back(self, saved: Saved) -> None:
        """Have the trained tensors of a checkpoint, and nothing else of it."""


class Measured(NamedTuple):
    """A measurement after a step. checkpoint: the one that holds what was measured, 0 for none."""

    step: int
    loss: float
    checkpoint: int = 0


class Stopping:
    """Early stopping of one run. rows: what is measured; overlaps: whether the evaluation reports on these rows too."""

    def __init__(self, trainee: Stoppable, keeper: Keeper, log: Log, rows: Sequence[Example], overlaps: bool) -> None:
        self.trainee, self.keeper, self.log = trainee, keeper, log
        self.rows, self.overlaps = rows, overlaps
        self.steps = trainee.setup.schedule.steps
        self.per_epoch = steps_per_epoch(trainee.setup)
        self.measured: list[Measured] = []
        self.best: Measured | None = None
        self.off = self.put_back = False
        self.seen = 0  # epochs
        self.seconds = self._each_s = 0.0

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it: `keeps` is for the checkpoints, see there."""
        found = {
            "measured": self.measured, "best": self.best, "off": self.off, "seen": self.seen, "seconds": self.seconds,
            "each_s": self._each_s,
        }  # fmt: skip
        return {"stopping": found, "keeps": [] if self.best is None else [self.best.checkpoint]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Be as the checkpoint with this state says."""
        tree = state["stopping"]
        self.measured = [Measured(*entry) for entry in tree["measured"]]
        self.best = None if tree["best"] is None else Measured(*tree["best"])
        self.off, self.seen, self.seconds, self._each_s = tree["off"], tree["seen"], tree["seconds"], tree["each_s"]

    def knows(self, line: Mapping[str, Any]) -> bool:
        """Whether a line of metrics.jsonl is no measurement of its own that it does not know."""
        return "held_out_loss" not in line or any(one.step == line["step"] for one in self.measured)

    def expect(self, evaluation_s: float) -> float:
        """The evaluation before training took so long; returns the seconds of one measurement, at most."""
        self._each_s = evaluation_s * len(self.rows) / len(self.trainee.setup.corpus.held_out)
        return self._each_s

    def seconds_ahead(self) -> float:
        """What the measurements before the last step will take."""
        return 0.0 if self.off else self._each_s * ((self.steps - 1) // self.per_epoch - self.seen)

    def after_step(self) -> None:
        """Measure at the end of an epoch, keep what is best, and end training where it got worse too often."""
        step = self.trainee.progress.step
        if self.off or step >= self.steps or step // self.per_epoch <= self.seen:
            return
        self.seen = step // self.per_epoch
        loss = self._measure()
        if loss is None:
            return
        if self.best is None or loss < self.best.loss:
            self._keep(step, loss)
            return
        self.measured.append(Measured(step, loss))
        if sum(one.step > self.best.step for one in self.measured) >= PATIENCE:
            self.trainee.progress.enough = True
            self.log.say(
                f"the held-out loss was no better than after {self._epoch(self.best.step)} {PATIENCE} times in a row: "
                f"training ends after {self._epoch(step)}; with --no-early-stopping it goes on"
            )

    def finish(self) -> None:
        """At the end of training: measure it, and go back to the best where that is not the end."""
        step, best = self.trainee.progress.step, self.best
        if self.off or best is None:
            return
        last = self.measured[-1]
        if last.step != step:
            loss = self._measure()
            if loss is None:
                self.log.fallback("the end of training is kept, and it is not known whether it is the best")
                return
            last = Measured(step, loss)
            self.measured.append(last)
        if last.loss < best.loss or last.step == best.step:
            self.best = last
            return
        try:
            self.keeper.checkpoints.finish()
            saved = self.keeper.checkpoints.of(best.checkpoint)
        except (DiskError, InputError) as error:
            self.log.fallback(f"{self._epoch(best.step)} was the best and cannot be had, the end is kept: {error}")
            return
        self.trainee.put_back(saved)
        self.put_back = True
        end = f"{best.loss:.3f} against {last.loss:.3f} at the end"
        text = f"{self._epoch(best.step)} was the best: {end}; kept"
        self.keeper.record({"kind": "best", "text": text})
        self.log.say(text)

    def facts(self) -> dict[str, Any]:
        """What run.json says of it. put_back: whether the run ended with the best, which was not its end."""
        pairs = [(one.step / self.per_epoch, _finite(one.loss)) for one in self.measured]
        best = self.best
        return {
            "rows": len(self.rows), "overlaps": self.overlaps, "seconds": self.seconds,
            "epochs": [epoch for epoch, _ in pairs], "losses": [loss for _, loss in pairs],
            "best_epoch": best and best.step / self.per_epoch, "best_loss": best and _finite(best.loss),
            "stopped": self.trainee.progress.enough, "put_back": self.put_back,
        }  # fmt: skip

    def _epoch(self, step: int) -> str:
        """'epoch 3 of 6'."""
        return f"epoch {step / self.per_epoch:.3g} of {self.steps / self.per_epoch:.3g}"

    def _measure(self) -> float | None:
        """The loss on the rows, in the log and in metrics.jsonl; None where there is no memory for it."""
        setup, step = self.trainee.setup, self.trainee.progress.step
        began, rows = time.perf_counter(), self._rows_together()
        if rows == 0:
            self.log.fallback("a held-out loss was left out: measuring it does not fit beside what training holds")
            return None
        measure = classified if setup.corpus.labels else held_out_loss
        try:
            with self.trainee.meter.off(), _whole(self.trainee):
                loss = float(measure(self.trainee.module, self.rows, setup.pad_id, rows, setup.device)["loss"])
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.log.fallback("a held-out loss was left out: memory could not be had")
            return None
        finally:
            trim()
        loss = loss if math.isfinite(loss) else math.inf
        self._each_s = time.perf_counter() - began
        self.seconds += self._each_s
        self.keeper.metrics.add({
            "step": step, "epoch": round(step / self.per_epoch, 4), "held_out_loss": _finite(loss),
            "held_out_rows": len(self.rows), "held_out_s": self._each_s,
        })  # fmt: skip
        self.log.say(f"{self._epoch(step)}: loss {loss:.3f} on {len(self.rows)} held-out rows")
        return loss

    def _rows_together(self) -> int:
        """Rows measured at a time: as many as stay below the peak that is predicted anyway; 0 when not one fits."""
        trainee, setup = self.trainee, self.trainee.setup
        need, held, predicted = setup.need, trainee.standing_bytes, trainee.predicted
        least = need.evaluation_bytes(1, held)
        if least > setup.memory_bytes:
            return 0
        limit = max(least, min(predicted.peak, setup.memory_bytes))
        rows = rows_that_fit(
            lambda rows: need.evaluation_bytes(rows, held), min(32, setup.options.batch_size, len(self.rows)), limit
        )
        predicted.peak = max(predicted.peak, need.evaluation_bytes(rows, held))
        return rows

    def _keep(self, step: int, loss: float) -> None:
        """Have the best on the disk before the next step, in a checkpoint of its own."""
        checkpoints, before = self.keeper.checkpoints, self.best
        checkpoints.finish()
        self.best = Measured(step, loss, checkpoints.next_number)
        self.measured.append(self.best)
        try:
            self._check_room()
            self.keeper.save(wait=True)
        except DiskError as error:
            self.best, self.off = None, True
            self.log.fallback(f"{_WITHOUT}, {'the best' if before is None else 'a better one'} cannot be kept: {error}")

    def _check_room(self) -> None:
        """Raises: DiskError where this checkpoint and the next one have no room: the best takes that of one more."""
        parts = self.trainee.tensors().values()
        needed = 2 * sum(tensor.nbytes for tensors in parts for tensor in tensors.values())
        free = shutil.disk_usage(self.keeper.folder.path).free
        if free < needed:
            raise DiskError(f"{format_bytes(needed)} are needed for it and {format_bytes(free)} are free")


@contextmanager
def _whole(trainee: Any) -> Iterator[None]:
    """With all layers of the model running, where kept hidden states stand for some in training."""
    if hasattr(trainee, "prefix"):
        with trainee.prefix.unused():
            yield
    else:
        yield


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


def steps_per_epoch(setup: Setup) -> int:
    """Steps of one pass over the training rows."""
    return math.ceil(len(setup.corpus.train) / setup.options.batch_size)


def stopping_of(trainee: Stoppable, keeper: Keeper, log: Log) -> Stopping | None:
    """Early stopping of this run; None where it is not wanted, or the run is too short to stop."""
    setup = trainee.setup
    steps, per_epoch = setup.schedule.steps, steps_per_epoch(setup)
    if not setup.options.early_stopping or steps < LEAST_EPOCHS * per_epoch:
        return None
    held = len(setup.corpus.held_out)
    if held < HANDFUL:
        log.fallback(
            f"no early stopping with fewer than {HANDFUL} held-out rows, and {held} are: all epochs are trained"
        )
        return None
    count = rows_measured(setup.need.table.forward, setup.schedule.shapes, setup.corpus, math.ceil(steps / per_epoch))
    apart = len(setup.corpus.spare) >= count
    rows = spread(setup.corpus.spare if apart else setup.corpus.held_out, count)
    return Stopping(trainee, keeper, log, rows, overlaps=not apart)


def rows_measured(forward: Work, shapes: Sequence[BatchShape], corpus: Corpus, times: int) -> int:
    """Rows that may be measured this many times within SHARE of the forward passes of training; the few at least."""
    held = corpus.held_out
    each = sum(forward.at(shape_of([example])) for example in held) / len(held)
    within = int(SHARE * forward.total(shapes) / times / each)
    labelled = math.ceil(LABELS * len(held) / sum(example.supervised for example in held))
    return min(max(within, ROWS[0], labelled), ROWS[1], max(len(held), len(corpus.spare)))
