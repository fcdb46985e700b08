"""SIGINT and SIGTERM: the step at hand is finished and saved, and the user is told how to go on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from edgegt.errors import Interrupted
from edgegt.keeper import Keeper
from edgegt.train import Progress


def end_if_asked(progress: Progress, steps: int, keeper: Keeper) -> None:
    """Raises: Interrupted, with what was trained saved, when a signal asked to stop."""
    if progress.stop is not None:
        keeper.save(wait=True)
        raise interrupted(progress, steps, keeper)


def interrupted(progress: Progress, steps: int, keeper: Keeper) -> Interrupted:
    """What the user is told after a signal: how far the run came, and how it goes on."""
    name, last = signal.Signals(progress.stop or signal.SIGINT).name, keeper.checkpoints.last_step
    saved = "all of it is saved" if last == progress.step else f"saved up to step {last}"
    return Interrupted(
        f"stopped by {name} after step {progress.step} of {steps}, {saved}: "
        f"`edgegt run --resume {keeper.folder.path}` goes on",
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
