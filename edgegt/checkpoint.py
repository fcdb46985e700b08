"""A checkpoint at the end of every round and when the run is stopped: live masters, their optimizer states, the step.

Tensors trained in earlier rounds lie beside it, as demotion left them. It is written whole or not at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

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
    """Write `state.safetensors`: '<name>|master' and '<name>|<state>' for each live tensor."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in trainables.live.items():
        tensors[f"{name}|master"] = parameter.detach().cpu().contiguous()
        state = trainables.optimizer.states.get(name)
        for key, value in (state.tensors() if state else {}).items():
            tensors[f"{name}|{key}"] = value.cpu().contiguous()
    about = {"format": FORMAT, "step": str(position.step), "round": str(position.round), "flops": str(position.flops)}
    path = folder / "state.safetensors"
    write_tensors(path, tensors, about)
    return path
