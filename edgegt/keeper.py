"""Between two steps: is a checkpoint due, is the machine cool, powered and roomy enough, and what happened.

One keeper belongs to one run. It knows when; what a checkpoint holds is the trainee's to say.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edgegt.checkpoint import Checkpoints
from edgegt.disk import Lines, read_lines, write_text
from edgegt.folder import RunFolder
from edgegt.guard import MemoryGuard
from edgegt.log import Log
from edgegt.options import RunOptions
from edgegt.pacing import Pacer
from edgegt.sensors import Reading, Sensors
from edgegt.tensorboard import Scalars
from edgegt.watch import MemoryWatch

if TYPE_CHECKING:
    import torch


class Kept(Protocol):
    """What is kept: a model in training."""

    progress: Any

    def state(self) -> dict[str, Any]:
        """Everything but tensors that an exact resume needs."""

    def tensors(self) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """The live tensors, in the order in which a step changes them."""


class Stops(Protocol):
    """What watches whether more steps help (see `stopping`)."""

    def after_step(self) -> None:
        """Measure where it is due."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Be as the checkpoint with this state says."""

    def knows(self, line: Mapping[str, Any]) -> bool:
        """Whether a line of metrics.jsonl is no measurement of its own that it does not know."""

    def expect(self, evaluation_s: float) -> float:
        """The evaluation before training took so long; returns the seconds of one measurement."""

    def seconds_ahead(self) -> float:
        """What it will take before training ends."""

    def finish(self) -> None:
        """Training ended: go back to the best."""

    def facts(self) -> dict[str, Any]:
        """What run.json says of it."""


@dataclass(frozen=True)
class Machine:
    """Where a run hears of its surroundings; None: from the system. available: bytes that can be had now."""

    sensors: Sensors | None = None
    available: Callable[[], int] | None = None
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


class Metrics(Lines):
    """metrics.jsonl, and the same as scalars where they are wanted."""

    def __init__(self, path: Path, scalars: Scalars | None) -> None:
        super().__init__(path)
        self.scalars = scalars

    def add(self, tree: dict[str, Any]) -> None:
        """Append one line. Raises: DiskError, for the line and not for its scalars."""
        super().add(tree)
        if self.scalars is not None:
            self.scalars.add(tree)

    def close(self) -> None:
        """Close both; more lines open them again."""
        super().close()
        if self.scalars is not None:
            self.scalars.close()


class Keeper:
    """Keeps one run. common: what every checkpoint holds beside the trainee's state; started: by time.perf_counter."""

    def __init__(
        self, folder: RunFolder, options: RunOptions, sensors: Sensors, ceiling_c: float | None, watch: MemoryWatch,
        budget_bytes: int, machine: Machine, log: Log, common: dict[str, Any], started: float,
        scalars: Scalars | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.log, self.common = folder, log, common
        self.metrics, self.events = Metrics(folder.metrics, scalars), Lines(folder.events)
        self.checkpoints = Checkpoints(folder.checkpoints, self.metrics.synchronise)
        self.guard = MemoryGuard(watch, budget_bytes, machine.available or watch.available, machine.clock)
        self.kept: Kept | None = None
        self.stops: Stops | None = None
        self.sessions: list[dict[str, Any]] = []
        self.power_mode = sensors.power_mode()
        self._started = started
        self._every_steps, self._every_s = options.checkpoint_interval
        self._saved_at, self._saved_step = time.perf_counter(), 0
        self._reading: Reading | None = None
        self.pacer = Pacer(
            sensors, ceiling_c, options.min_battery, options.only_on_mains, log.say, self.record,
            self._stopped, machine.clock, machine.sleep,
        )  # fmt: skip

    def record(self, event: dict[str, Any]) -> None:
        """Note what happened (kind, text and facts) in events.jsonl."""
        step = self.kept.progress.step if self.kept is not None else 0
        at_s = round(time.perf_counter() - self._started, 3)
        self.events.add({"at_s": at_s, "step": step, **event})

    def save(self, wait: bool = False) -> None:
        """Begin a checkpoint of what is trained now; wait: until it is on the disk. Raises: DiskError.

        None is begun while steps are dropped one after the other: what makes losses infinite is no place to go back to.
        """
        assert self.kept is not None
        if self.kept.progress.dropped_in_a_row and self.checkpoints.any():
            self.checkpoints.finish()
            return
        step = self.kept.progress.step
        spent_s = time.perf_counter() - self._started
        facts = {
            "seconds_spent": spent_s, "fallbacks": list(self.log.fallbacks), "sessions": self.sessions,
            "peak_bytes": self.guard.watch.peak_ever(), "paused_s": self.pacer.paused_s,
        }  # fmt: skip
        state = {**self.common, **facts, **self.kept.state(), **(self.stops.state() if self.stops else {})}
        self.checkpoints.begin(step, state, self.kept.tensors())
        self._saved_at, self._saved_step = time.perf_counter(), step
        if wait:
            self.checkpoints.finish()

    def resumed(self, state: Mapping[str, Any]) -> None:
        """The run goes on from a checkpoint with this state: the logs are cut to it. Raises: DiskError."""
        step = int(state["step"])
        self.back_to(state)
        self.guard.watch.remember(state["peak_bytes"])
        self.pacer.paused_s += state["paused_s"]
        self._saved_step = self.checkpoints.last_step = step
        self.record({"kind": "resume", "text": f"the run goes on after step {step}"})

    def after_step(self, planned_bytes: int, step_s: float) -> None:
        """What is due after a step. Raises: StepBack when memory runs short; DiskError when the disk is full."""
        assert self.kept is not None
        self.checkpoints.check()
        if self.stops is not None:
            self.stops.after_step()
        if self._stopped():
            return
        if self._due():
            self.save()
        self._reading = self.pacer.between_steps(step_s, lambda: self.save(wait=True)) or self._reading
        self.guard.check(planned_bytes)

    def facts(self) -> dict[str, float]:
        """What the sensors said last, for one line of metrics.jsonl."""
        reading, self._reading = self._reading, None
        if reading is None:
            return {}
        names = ("temperature_c", "power_w", "throttled", "battery_percent")
        return {name: value for name in names if (value := getattr(reading, name)) is not None}

    def trained(self) -> None:
        """Training ended: the run goes on with the best that was measured. Raises: DiskError."""
        if self.stops is not None:
            self.stops.finish()

    def expect(self, evaluation_s: float) -> float:
        """Evaluation takes so long: what `trained` will take."""
        return self.stops.expect(evaluation_s) if self.stops else 0.0

    def seconds_ahead(self) -> float:
        """What will be done between the steps that are left, as far as it is known."""
        return self.stops.seconds_ahead() if self.stops else 0.0

    def back_to(self, state: Mapping[str, Any]) -> None:
        """Leave out of metrics.jsonl what came after this state, and lines that were torn. Raises: DiskError."""
        step, stops = int(state["step"]), self.stops
        if stops is not None:
            stops.restore(state)
        self.metrics.close()
        if self.metrics.scalars is not None:
            self.metrics.scalars.cut(step)
        path = self.folder.metrics
        if not path.is_file():
            return
        lines = [line for line in read_lines(path) if line.get("step", step + 1) <= step]
        lines = [line for line in lines if stops is None or stops.knows(line)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        if text.encode() != path.read_bytes():
            write_text(path, text)

    def close(self) -> None:
        """Close the logs; a checkpoint that is being written is finished. Raises: DiskError."""
        try:
            self.checkpoints.finish()
        finally:
            self.metrics.close()
            self.events.close()

    def _due(self) -> bool:
        assert self.kept is not None
        if self._every_steps is not None:
            return bool(self.kept.progress.step - self._saved_step >= self._every_steps)
        assert self._every_s is not None
        return time.perf_counter() - self._saved_at >= self._every_s

    def _stopped(self) -> bool:
        return self.kept is not None and self.kept.progress.stop is not None
