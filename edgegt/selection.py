"""Which tensors are trained now: promotion to a float master, the step, and demotion with nothing lost.

A promoted linear computes with two int8 planes (16 bits) of its master. When it is demoted its master and optimizer
states go to disk and the planes stay, so the model computes bit for bit what it did. Selected again, it continues from
that master and those states. Of the head, some rows may be trained alone; they are one tensor [rows, in] then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from edgegt.errors import EdgegtError, InputError
from edgegt.memory import Formats
from edgegt.model import Int8Model
from edgegt.optimizer import AdamW, Moments
from edgegt.patch import rows_name
from edgegt.sealed import Item, Sealed, read_sealed, write_sealed

MASTER, ROWS = "master", "rows"
_MASTERS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Resting:
    """A demoted tensor on disk: its file, and the checksum that the file must have."""

    path: Path
    seal: str


class Trainables:
    """The trained tensors of one model, by name. parked: the folder that demoted ones go to.

    The weights that the model's files lack are live from the first selection on.

    before_update: called with a tensor's name before it changes; before_selection: before any is promoted or demoted.
    A checkpoint that is being written makes them wait.
    """

    def __init__(self, model: Int8Model, optimizer: AdamW, parked: Path | None = None) -> None:
        self.model = model
        self.optimizer = optimizer
        self.parked = parked
        self.live: dict[str, nn.Parameter] = {}
        self.resting: dict[str, Resting] = {}
        self.before_update: Callable[[str], None] = lambda name: None
        self.before_selection: Callable[[], None] = lambda: None
        self.formats = Formats(states="8-bit" if optimizer.eight_bit else "float32")
        self.head_rows: torch.Tensor | None = None

    def configure(self, formats: Formats, head_rows: torch.Tensor | None = None) -> None:
        """Choose number formats, and the rows of the head (sorted int64 [R]) that are trained when it is selected.

        head_rows: None for all of them. Raises: RuntimeError once something was selected.
        """
        if self.live or self.resting:
            raise RuntimeError("tensors were selected already: choose formats before the first selection")
        self.formats, self.head_rows = formats, head_rows
        self.optimizer.eight_bit = formats.states == "8-bit"

    def select(self, names: Iterable[str]) -> None:
        """Make exactly these tensors trainable. Raises: KeyError for a name that cannot be trained."""
        wanted = [*names, *self.model.fresh]
        self.before_selection()
        for name in [name for name in self.live if name not in wanted]:
            self._demote(name)
        for name in wanted:
            if name not in self.live:
                self._promote(name)

    def step(self, name: str, gradient: torch.Tensor, lr: float) -> None:
        """One optimizer step of one tensor, and its planes after it."""
        self.before_update(name)
        self.optimizer.update(name, self.live[name].data, gradient, lr)
        if name in self.model.linears:
            self.model.linears[name].refresh()

    def masters(self) -> dict[str, torch.Tensor]:
        """Every tensor trained so far, float32 on the CPU, all at once (see `items`)."""
        return {name: item.get() for name, item in self.items().items()}

    def items(self) -> dict[str, Item]:
        """Every tensor trained so far, to be fetched one at a time: live ones from memory, resting ones from disk.

        float32 on the CPU; with a head of which only rows were trained comes '<name>|rows', their int64 index (see
        `patch`). Raises: EdgegtError when a file is damaged.
        """
        found: dict[str, Item] = {}
        for name in sorted({*self.resting, *self.live}):
            if name in self.resting:
                shapes = {key: entry[1] for key, entry in self._opened(self.resting[name]).entries.items()}
            else:
                shapes = {key: tuple(value.shape) for key, value in self._kept(name).items()}
            found[name] = Item(name, torch.float32, shapes[MASTER], partial(self._fetch, name, MASTER))
            if ROWS in shapes:
                named = rows_name(name)
                found[named] = Item(named, torch.int64, shapes[ROWS], partial(self._fetch, name, ROWS))
        return found

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """What continues the live tensor `name`, as it is held: 'master', 'rows' of a head, and optimizer states.

        A matrix that was not updated yet has nothing: it begins from the pretrained model.
        """
        state = self.optimizer.states.get(name)
        if state is None and name in self.model.linears:
            return {}
        return self._kept(name) | (state.tensors() if state else {})

    def places(self) -> dict[str, list[str]]:
        """Of each resting tensor the name of its file and the checksum."""
        return {name: [place.path.name, place.seal] for name, place in self.resting.items()}

    def at_places(self, places: Mapping[str, Sequence[str]]) -> dict[str, Resting]:
        """The resting tensors of which `places` told."""
        assert self.parked is not None
        return {name: Resting(self.parked / file, seal) for name, (file, seal) in places.items()}

    def restore(
        self, live: Iterable[str], saved: Callable[[str], Mapping[str, torch.Tensor]],
        resting: Mapping[str, Resting] | None = None,
    ) -> None:  # fmt: skip
        """Put back live tensors, from what `tensors` gave of each (`saved`, called one at a time), and resting ones.

        Whatever was selected since is put back too. Raises: EdgegtError when a file is damaged.
        """
        names, places = list(live), dict(resting or {})
        for name in {*self.live, *self.resting} - {*names, *places}:
            self.model.reset(name)
            self.optimizer.states.pop(name, None)
        for name, place in places.items():
            if self.resting.get(name) != place:
                self._wake(name, self._read(place))
                self._rest(name)
        self.live.clear()
        self.resting = places
        for name in names:
            self._wake(name, {key: value.to(self.model.device) for key, value in saved(name).items()})

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
        self._wake(name, self._read(resting) if resting else {})

    def _wake(self, name: str, saved: Mapping[str, torch.Tensor]) -> None:
        """Make a tensor live: with what was saved of it, else as the pretrained model has it."""
        if name in self.model.linears:
            parameter = self._promote_linear(name, saved)
        else:
            parameter = self.model.float_parameter(name)
            parameter.requires_grad_(True)
            if MASTER in saved:
                parameter.data.copy_(saved[MASTER])
        self.live[name] = parameter
        self.optimizer.states.pop(name, None)
        if "first" in saved:
            self.optimizer.states[name] = Moments.from_tensors(saved)

    def _promote_linear(self, name: str, saved: Mapping[str, torch.Tensor]) -> nn.Parameter:
        linear = self.model.linears[name]
        rows = saved.get(ROWS) if saved else self._rows_of(name)
        master = saved[MASTER] if saved else self.model.original(name, rows).to(_MASTERS[self.formats.master])
        if rows is None:
            linear.promote(master)
        else:
            linear.promote_rows(master, rows)
        assert linear.master is not None
        return linear.master

    def _rows_of(self, name: str) -> torch.Tensor | None:
        if name != self.model.head or self.head_rows is None:
            return None
        return self.head_rows.to(self.model.device)

    def _kept(self, name: str) -> dict[str, torch.Tensor]:
        """The master of a live tensor, and its rows if it has some only."""
        kept = {MASTER: self.live[name].detach()}
        linear = self.model.linears.get(name)
        return kept if linear is None or linear.rows is None else kept | {ROWS: linear.rows.index}

    def _demote(self, name: str) -> None:
        tensors = self.tensors(name) or self._kept(name)
        assert self.parked is not None
        # A name of its own for every state, because earlier checkpoints speak of earlier ones.
        short, state = hashlib.sha256(name.encode()).hexdigest()[:16], self.optimizer.states.get(name)
        path = self.parked / f"{short}-{state.step if state else 0}.safetensors"
        seal = write_sealed(path, [Item.of(key, value) for key, value in tensors.items()], {"name": name})
        self._rest(name)
        self.resting[name] = Resting(path, seal)

    def _rest(self, name: str) -> None:
        """Freeze a live tensor as it is."""
        parameter = self.live.pop(name)
        self.optimizer.states.pop(name, None)
        parameter.grad = None
        if name in self.model.linears:
            self.model.linears[name].demote()
        else:
            parameter.requires_grad_(False)

    def _fetch(self, name: str, key: str) -> torch.Tensor:
        """The master (in float32) or the rows of a trained tensor, on the CPU."""
        resting = self.resting.get(name)
        found = self._opened(resting).tensor(key) if resting else self._kept(name)[key].cpu()
        return found.to(torch.float32) if key == MASTER else found

    def _opened(self, resting: Resting) -> Sealed:
        try:
            found = read_sealed(resting.path)
        except InputError as error:
            raise EdgegtError(f"{error}: what was trained of it is lost, run again") from error
        if found.seal != resting.seal:
            raise EdgegtError(f"'{resting.path}' is not the file that was written: run again")
        return found

    def _read(self, resting: Resting) -> dict[str, torch.Tensor]:
        found = self._opened(resting)
        return {key: found.tensor(key).to(self.model.device) for key in found.entries}
