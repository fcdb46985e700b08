"""The memory guard: the process holds itself to its budget, and steps back when less is left than it counts on.

Between two steps it compares what the plan will still ask for with what the machine has left (MemAvailable and the
control group's limit, or what a GPU reports), and the measured peak with the budget. It never tries an allocation to
see whether it works: on boards with unified memory that ends in a reset.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from edgegt.units import MIB, format_bytes
from edgegt.watch import MemoryWatch

# Left to others, beside what the plan asks for; and how often the machine is asked.
RESERVE_BYTES = 48 * MIB
EVERY_S = 0.2
# After an allocation failed: what the next plan may use of what the one that failed would have added.
LESS = 0.7


class StepBack(Exception):
    """Training must go on with less memory. torn: the step was broken off after it had changed some tensors.

    guess: nobody knows how much is left; the smallest plan is worth a try where none fits into `budget_bytes`.
    must: it cannot go on as it is where nothing smaller can be trained.
    """

    def __init__(
        self, reason: str, budget_bytes: int, torn: bool = False, guess: bool = False, must: bool = True
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.budget_bytes = budget_bytes
        self.torn = torn
        self.guess = guess
        self.must = must


@dataclass
class MemoryGuard:
    """Watches one run. available: bytes that can be had now beside what the process holds."""

    watch: MemoryWatch
    budget_bytes: int
    available: Callable[[], int]
    clock: Callable[[], float] = time.monotonic
    _next: float = 0.0
    _pardoned: int = 0

    def check(self, planned_bytes: int) -> None:
        """Between two steps, whose peak is planned as `planned_bytes`. Raises: StepBack when that will not be there."""
        if self.clock() < self._next:
            return
        self._next = self.clock() + EVERY_S
        held, there = self.watch.now(), self.available()
        if planned_bytes - held > there - RESERVE_BYTES:
            left = max(0, held + there - RESERVE_BYTES)
            raise StepBack(
                f"the machine has {format_bytes(there)} of memory left, and the plan asks for "
                f"{format_bytes(max(0, planned_bytes - held))} more",
                min(self.budget_bytes, left),
            )
        peak = self.watch.peak()
        over = peak - max(self.budget_bytes, self._pardoned)
        if over > 0:
            self._pardoned = peak
            raise StepBack(
                f"the process used {format_bytes(peak)}, which is {format_bytes(over)} above its budget",
                min(self.budget_bytes, planned_bytes) - over, guess=True, must=False,
            )  # fmt: skip

    def failed(self, reason: str, planned_bytes: int, torn: bool) -> StepBack:
        """What an allocation that failed means for the run: the next plan may use less than the one that failed."""
        held = self.watch.now()
        less = min(held + int(LESS * max(0, planned_bytes - held)), planned_bytes - 1)
        left = max(0, held + self.available() - RESERVE_BYTES)
        return StepBack(f"memory could not be had ({reason})", min(less, left), torn, guess=True)

    def begin(self) -> None:
        """Training begins, with what was done before it: whatever that took is not its fault."""
        self._pardoned = self.watch.peak()

    def lower(self, budget_bytes: int) -> None:
        """From now on this is the budget, and the peak is measured anew."""
        self.budget_bytes = budget_bytes
        self._next = 0.0
        self.watch.restart_peak()
        self._pardoned = self.watch.peak()  # all there is, where a peak cannot be measured anew
