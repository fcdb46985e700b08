"""Which tensors are trained now: promotion to a float32 master, the step, and demotion with nothing lost.

A promoted linear computes with two int8 planes (16 bits) of its master. When it is demoted its master and optimizer
states go to disk and the planes stay, so the model computes bit for bit what it did. Selected again, it continues from
that master and those states.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from edgegt.errors import EdgegtError
from edgegt.folder import write_tensors
from edgegt.model import Int8Model
from edgegt.optimizer import AdamW, Moments


class Trainables:
    """The trained tensors of one model, by name. parked: the folder that demoted ones go to."""

    def __init__(self, model: Int8Model, optimizer: AdamW, parked: Path | None = None) -> None:
        self.model = model
        self.optimizer = optimizer
        self.parked = parked
        self.live: dict[str, nn.Parameter] = {}
        self.resting: dict[str, Path] = {}

    def select(self, names: Iterable[str]) -> None:
        """Make exactly these tensors trainable. Raises: KeyError for a name that cannot be trained."""
        wanted = list(names)
        for name in [name for name in self.live if name not in wanted]:
            self._demote(name)
        for name in wanted:
            if name not in self.live:
                self._promote(name)

    def step(self, name: str, gradient: torch.Tensor, lr: float) -> None:
        """One optimizer step of one tensor, and its planes after it."""
        self.optimizer.update(name, self.live[name].data, gradient, lr)
        if name in self.model.linears:
            self.model.linears[name].refresh()

    def masters(self) -> dict[str, torch.Tensor]:
        """Every tensor trained so far, float32 on the CPU: live ones from memory, resting ones from disk."""
        found = {name: self._read(path)["master"] for name, path in self.resting.items()}
        found |= {name: parameter.detach().cpu() for name, parameter in self.live.items()}
        return dict(sorted(found.items()))

    def release(self) -> None:
        """End training: drop masters and optimizer states, and keep the function as it is."""
        for name in self.live:
            if name in self.model.linears:
                self.model.linears[name].demote()
            else:
                self.live[name].requires_grad_(False)
        self.live.clear()
        self.optimizer.states.clear()

    def _promote(self, name: str) -> None:
        resting = self.resting.pop(name, None)
        saved = self._read(resting) if resting else None
        if name in self.model.linears:
            master = saved["master"].to(self.model.device) if saved else self.model.original(name)
            self.model.linears[name].promote(master)
            parameter = self.model.linears[name].master
            assert parameter is not None
        else:
            parameter = self.model.vectors[name]
            parameter.requires_grad_(True)
        self.live[name] = parameter
        if saved and "first" in saved:
            states = {key: value.to(self.model.device) for key, value in saved.items() if key != "master"}
            self.optimizer.states[name] = Moments.from_tensors(states)

    def _demote(self, name: str) -> None:
        parameter = self.live.pop(name)
        state = self.optimizer.states.pop(name, None)
        tensors = {"master": parameter.detach().cpu().contiguous()}
        tensors |= {key: value.cpu().contiguous() for key, value in (state.tensors() if state else {}).items()}
        assert self.parked is not None
        path = self.parked / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.safetensors"
        write_tensors(path, tensors, {"name": name})
        self.resting[name] = path
        parameter.grad = None
        if name in self.model.linears:
            self.model.linears[name].demote()
        else:
            parameter.requires_grad_(False)

    @staticmethod
    def _read(path: Path) -> dict[str, torch.Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(str(path))
        except SafetensorError as error:
            raise EdgegtError(f"'{path}' is damaged ({error}): run again") from error
