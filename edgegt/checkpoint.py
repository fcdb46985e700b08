"""Checkpoints: all that an exact resume needs, as one sealed file, written while training goes on.

No second copy is made: a thread writes tensor after tensor, and the training waits only where it would change one that
is not written yet. Tensors at rest lie beside it in files of their own, named with their checksums. The last two
checkpoints are kept, and earlier ones that they name; what none of them names is deleted.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgegt.disk import remove_halves
from edgegt.errors import InputError
from edgegt.sealed import DamagedFile, Item, Sealed, read_sealed, write_sealed
from edgegt.units import format_text

if TYPE_CHECKING:
    import torch

FORMAT = "2"
KEPT = 2
PARKED = "parked"
DAMAGED = ".damaged"
_STATE = "state"
_NAME = "state-{:06d}.safetensors"


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was read and checked. state: everything but tensors; number: its place in the order."""

    number: int
    state: dict[str, Any]
    sealed: Sealed

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """What was saved of one trained tensor, by key."""
        prefix = f"{name}|"
        keys = [key for key in self.sealed.entries if key.startswith(prefix)]
        return {key.removeprefix(prefix): self.sealed.tensor(key) for key in keys}


class Checkpoints:
    """The checkpoints in one folder. before_sealing: called before a new one takes its name (to synchronise logs)."""

    def __init__(self, folder: Path, before_sealing: Callable[[], None] = lambda: None) -> None:
        self.folder = folder
        self.last_step = -1
        self._before_sealing = before_sealing
        self._number = max((number for number, _ in self._files()), default=0)
        self._named: dict[int, tuple[set[str], set[int]]] = {}
        self._thread: threading.Thread | None = None
        self._left: set[str] = set()
        self._changed = threading.Condition()
        self._error: BaseException | None = None

    @property
    def next_number(self) -> int:
        """The number of the checkpoint that is begun next."""
        return self._number + 1

    def begin(self, step: int, state: Mapping[str, Any], tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Start to write a checkpoint of these tensors, in this order, after the one before is done.

        state: must have 'resting': {name: [file, checksum]}; may have 'keeps': numbers of checkpoints that stay as long
        as this one does. Raises: DiskError of the one before.
        """
        self.finish()
        self._number += 1
        number = self._number
        self._named[number] = {str(place[0]) for place in state["resting"].values()}, {*state.get("keeps", ())}
        items = [Item.of(f"{name}|{key}", value) for name, parts in tensors.items() for key, value in parts.items()]
        ends = {f"{name}|{list(parts)[-1]}": name for name, parts in tensors.items() if parts}
        self._left = set(ends.values())
        about = {"format": FORMAT, _STATE: json.dumps({**state, "step": step})}

        def written(key: str) -> None:
            if key in ends:
                with self._changed:
                    self._left.discard(ends[key])
                    self._changed.notify_all()

        def write() -> None:
            try:
                self._before_sealing()
                write_sealed(self.folder / _NAME.format(number), items, about, written)
                self.last_step = step
                self._tidy()
            except BaseException as error:  # handed over to whoever waits
                self._error = error
            finally:
                items.clear()
                with self._changed:
                    self._left.clear()
                    self._changed.notify_all()

        # Not a daemon: a process that ends while it writes waits for the file, instead of ending inside of torch.
        thread = threading.Thread(target=write, name="checkpoint")
        try:
            thread.start()
        except RuntimeError:  # no thread can be had: the training waits instead
            write()
            return
        self._thread = thread

    def wait_for(self, name: str) -> None:
        """Return when this tensor may change."""
        if name in self._left:
            with self._changed:
                self._changed.wait_for(lambda: name not in self._left)

    def check(self) -> None:
        """Raises: DiskError when the last checkpoint could not be written; returns at once."""
        if self._error is not None:
            self.finish()

    def finish(self) -> None:
        """Return when the checkpoint is on the disk. Raises: DiskError when it could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def any(self) -> bool:
        """Whether there is a checkpoint at all."""
        return bool(self._files())

    def newest(self, say: Callable[[str], None]) -> Saved | None:
        """The newest checkpoint that is whole; None without one. Damaged ones are said, and put aside.

        Raises: InputError for one that this version, or this user, cannot read.
        """
        remove_halves(self.folder)
        remove_halves(self.folder / PARKED)
        for number, path in sorted(self._files(), reverse=True):
            try:
                saved = self._read(number, path)
            except DamagedFile as error:
                say(f"{error}: the checkpoint before it is used")
                with suppress(OSError):
                    path.replace(path.with_name(path.name + DAMAGED))
                continue
            self.last_step = int(saved.state["step"])
            return saved
        return None

    def of(self, number: int) -> Saved:
        """The checkpoint with this number. Raises: InputError when it is not there or not whole."""
        return self._read(number, self.folder / _NAME.format(number))

    def lost(self) -> bool:
        """Whether there were checkpoints and none is left that is whole."""
        return not self.any() and any(self.folder.glob(f"*{DAMAGED}"))

    def remove(self) -> None:
        """Delete all checkpoints: the run is finished, and its patch holds what it trained."""
        self.finish()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self, number: int, path: Path) -> Saved:
        sealed = read_sealed(path)
        if sealed.about.get("format") != FORMAT:
            found = format_text(sealed.about.get("format"))
            remedy = "go on with the version that wrote it"
            raise InputError(f"'{path}' has the format {found}, and this version reads {FORMAT}: {remedy}")
        try:
            state = json.loads(sealed.about[_STATE])
            files = {str(place[0]): str(place[1]) for place in state["resting"].values()}
            keeps = {int(other) for other in state.get("keeps", ())}
            int(state["step"])
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise DamagedFile(f"'{path}' holds no state of a run ({error})") from error
        for file, seal in files.items():
            if Path(file).name != file:
                raise DamagedFile(f"'{path}' names a file outside its folder ('{format_text(file)}')")
            if read_sealed(self.folder / PARKED / file).seal != seal:
                raise DamagedFile(f"'{self.folder / PARKED / file}' is not the file that belongs to '{path}'")
        self._named[number] = set(files), keeps
        return Saved(number, state, sealed)

    def _files(self) -> list[tuple[int, Path]]:
        found = []
        for path in self.folder.glob(_NAME.replace("{:06d}", "*")):
            digits = path.name.removeprefix("state-").removesuffix(".safetensors")
            if digits.isdecimal():
                found.append((int(digits), path))
        return found

    def _tidy(self) -> None:
        """Delete all but the newest checkpoints and those they keep, and parked tensors that none of them names."""
        files = dict(self._files())
        newest = sorted(files)[-KEPT:]
        kept = {*newest}.union(*(self._named_by(number)[1] for number in newest)) & {*files}
        for number in {*files} - kept:
            files[number].unlink(missing_ok=True)
        named = {file for number in kept for file in self._named_by(number)[0]}
        for path in (self.folder / PARKED).glob("*.safetensors"):
            if path.name not in named:
                path.unlink(missing_ok=True)

    def _named_by(self, number: int) -> tuple[set[str], set[int]]:
        """The files and the checkpoints that a checkpoint needs."""
        if number not in self._named:
            try:
                self._read(number, self.folder / _NAME.format(number))
            except InputError:
                self._named[number] = set(), set()
        return self._named[number]
