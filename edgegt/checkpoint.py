"""A checkpoint at the end of every round and when the run is stopped: live masters, their optimizer states, the step.

Tensors trained in earlier rounds lie beside it, as demotion left them. It is written whole or not at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgegt.folder import write_tensors
from edgegt.selection import Trainables

FORMAT = "1"


@dataclass(frozen=True)
class Position:
    """Where the run is: optimizer steps done, round, FLOPs spent."""

    step: int
    round: int
    flops: int


def save_checkpoint(folder: Path, trainables: Trainables, position: Position) -> Path:
    """Write `state.safetensors`: '<name>|master', '<name>|<state>' and, of a head, '<name>|rows' for live tensors."""
    tensors = {f"{name}|{key}": value for name in trainables.live for key, value in trainables.tensors(name).items()}
    about = {"format": FORMAT, "step": str(position.step), "round": str(position.round), "flops": str(position.flops)}
    path = folder / "state.safetensors"
    write_tensors(path, tensors, about)
    return path
