"""What is done in processes of their own: a job as it is handed over, and how many steps each contender makes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

MEASURE, TUNE, TRAIN = "measure", "tune", "train"
# Steps that are made to be timed, after WARM_UP more; where seconds are a budget, and where they are an estimate.
WARM_UP, TIMED, TIMED_ROUGHLY = 2, 30, 3


@dataclass(frozen=True)
class Job:
    """One process. kind: what it is for; of TUNE the validation rows take the place of those held out.

    options: of a run. listed: of full fine-tuning, for how many times its steps the FLOPs are listed. timed: how many
    steps are made in a measurement, the first WARM_UP not counted.
    """

    kind: str
    contender: str
    seed: int
    options: dict[str, Any]
    rho: float | None = None
    rows: int | None = None
    metrics: tuple[str, ...] = ()
    answers: int | None = None
    listed: float = 1.0
    timed: int = 1

    @property
    def name(self) -> str:
        """'train-edgegt-0.5-seed0', which is also the name of its files."""
        lr = f"-lr{self.options['lr']:.3g}" if self.kind == TUNE else ""
        rho = "" if self.rho is None else f"-{self.rho:g}"
        return f"{self.kind}-{self.contender}{rho}{lr}-seed{self.seed}"

    def to_json(self) -> dict[str, Any]:
        """A plain dict, as JSON gives it back."""
        return {**asdict(self), "metrics": list(self.metrics)}

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Job:
        """The job that `to_json` gave."""
        return cls(**{**tree, "metrics": tuple(tree["metrics"])})


@dataclass(frozen=True)
class Full:
    """What full fine-tuning costs with one seed: its steps, and the FLOPs of the first 1, 2, ... steps and beyond."""

    steps: int
    per_epoch: int
    flops: tuple[int, ...]
    default_lr: float
    seconds_per_flop: float | None

    def at(self, steps: int) -> float:
        """FLOPs of so many steps; beyond what is listed, as many as on average."""
        if steps <= len(self.flops):
            return float(self.flops[steps - 1]) if steps else 0.0
        return self.flops[-1] * steps / len(self.flops)

    def steps_within(self, flops: float) -> int:
        """How many steps come nearest to so many FLOPs, at least 1."""
        if flops >= self.flops[-1]:
            return max(1, round(flops * len(self.flops) / self.flops[-1]))
        below = bisect_right(self.flops, flops)
        return max(1, below + (self.at(below + 1) - flops < flops - self.at(below)))


@dataclass(frozen=True)
class Pace:
    """What a contender costs. ratio, once: FLOPs, of full fine-tuning's on the same steps, and beside all steps.

    seconds_per_flop: of a FLOP of full fine-tuning on the same steps; once_s: seconds beside all steps.
    """

    ratio: float
    once: float = 0.0
    seconds_per_flop: float | None = None
    once_s: float = 0.0

    def of_share(self, share: float) -> Pace:
        """Of a run with that share of the steps, which measures importance on as much fewer rows."""
        return replace(self, once=share * self.once, once_s=share * self.once_s)


def steps_of(equal: str, steps: int, full: Full, pace: Pace) -> int:
    """How many steps a contender makes where full fine-tuning makes `steps` and both may spend as much."""
    if equal == "steps":
        return steps
    if equal == "flops":
        return full.steps_within((full.at(steps) - pace.once) / pace.ratio)
    assert full.seconds_per_flop is not None and pace.seconds_per_flop is not None
    return full.steps_within((full.seconds_per_flop * full.at(steps) - pace.once_s) / pace.seconds_per_flop)


def seconds_of(steps: int, full: Full, pace: Pace) -> float:
    """Seconds of training that so many steps should take; 0 where nothing was timed."""
    return pace.once_s + (pace.seconds_per_flop or 0.0) * full.at(steps)


def cumulated(values: Sequence[int]) -> tuple[int, ...]:
    """The sums of the first 1, 2, ... values."""
    total, found = 0, []
    for value in values:
        total += value
        found.append(total)
    return tuple(found)
