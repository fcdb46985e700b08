"""What a run does about steps that went wrong: leave one out, go back to the last checkpoint, give up with a reason."""

from __future__ import annotations

from typing import Protocol

from edgegt.checkpoint import Saved
from edgegt.errors import EdgegtError
from edgegt.keeper import Keeper, Kept
from edgegt.train import Dropped, Progress

# Steps that are dropped one after the other before the run goes back; a single one is a bad batch.
MOST_IN_A_ROW = 5


class Recoverable(Kept, Protocol):
    """A model in training that can be put back to a checkpoint."""

    progress: Progress

    def restore(self, saved: Saved) -> None:
        """Be as the checkpoint says."""


def leave_out(trainee: Recoverable, keeper: Keeper, error: Dropped) -> None:
    """Drop the step at hand. After MOST_IN_A_ROW of them: back to the last checkpoint with half the rate, once.

    A step that had changed some tensors before it failed is taken back: the steps since the last checkpoint are
    repeated without it. Raises: EdgegtError when half the rate does not help.
    """
    progress, step = trainee.progress, trainee.progress.step
    progress.dropped.add(step)
    keeper.record({"kind": "nan", "text": f"step {step + 1} is left out: {error.reason}"})
    keeper.log.say(f"note: step {step + 1} is left out: {error.reason}")
    progress.step = step + 1
    dropped, row = set(progress.dropped), progress.dropped_in_a_row
    if row < MOST_IN_A_ROW:
        if error.torn:
            go_back(trainee, keeper, "to take back what it had changed")
            progress.dropped = dropped
        return
    if progress.lr_scale < 1:
        raise EdgegtError(
            f"{row} steps in a row up to step {step + 1} were not finite, with half the learning rate too "
            f"({error.reason}): look at the rows of these steps, or give a lower --lr"
        )
    go_back(trainee, keeper, f"because {row} steps in a row were not finite; the learning rate is halved")
    progress.dropped = {number for number in dropped if number < progress.step}
    progress.lr_scale /= 2
    keeper.log.fallback(f"{row} steps in a row up to step {step + 1} were not finite: the learning rate is halved")
    keeper.save()


def go_back(trainee: Recoverable, keeper: Keeper, why: str) -> None:
    """Put the run back to its last checkpoint. Raises: EdgegtError when there is none."""
    step = trainee.progress.step
    keeper.checkpoints.finish()
    saved = keeper.checkpoints.newest(keeper.log.fallback)
    if saved is None:
        raise EdgegtError(f"there is no checkpoint to go back to {why}: run again")
    trainee.restore(saved)
    keeper.back_to(saved.state)
    text = f"back from step {step} to step {trainee.progress.step} {why}"
    keeper.record({"kind": "rollback", "text": text})
    keeper.log.say(f"note: {text}")
