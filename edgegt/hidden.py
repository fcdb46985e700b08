"""Hidden states of rows on disk: files of whole batches, each complete and checked, or not there.

A state [tokens, width] is kept in 16 bits with one power of two per token, or in 8 bits with one scale per token. A row
is known by its key (see `key_of`), never by its place in the data, so that nothing that changed can be read. Reading
goes through the system's file cache without mapping it: resident memory stays what the batch takes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from edgegt.disk import remove_halves
from edgegt.errors import EdgegtError
from edgegt.sealed import DTYPES, DamagedFile, Item, Sealed, read_sealed, write_sealed

FORMAT = "1"
CODES = {"float16": torch.float16, "int8": torch.int8}
# Of the largest number of a token: in float16 its exponent, so that small numbers keep theirs too; in int8 its code.
_EXPONENT, _LARGEST = 8, 127
_NAME = "rows-{:06d}.safetensors"


def identity_of(*parts: object) -> str:
    """A digest of everything that the states depend on beside a row's tokens."""
    return hashlib.sha256(json.dumps([FORMAT, *parts]).encode()).hexdigest()


def key_of(identity: str, tokens: Sequence[int]) -> str:
    """What a row's state is known by: changed by any change of what it depends on."""
    return hashlib.blake2b(repr(tuple(tokens)).encode(), digest_size=16, key=identity[:64].encode()).hexdigest()


def encode(states: Tensor, code: str) -> tuple[Tensor, Tensor]:
    """Codes [n, width] and float32 scale [n] of float32 states [n, width]. Raises: EdgegtError if not finite."""
    largest = states.abs().amax(1)
    if not bool(largest.isfinite().all()):
        raise EdgegtError("hidden states are not all finite")
    if code == "int8":
        scale = largest.div(_LARGEST).clamp_min_(torch.finfo(torch.float32).tiny)
        return states.div(scale[:, None]).round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8), scale
    scale = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent.clamp_min(-100) - _EXPONENT)
    return states.div(scale[:, None]).to(torch.float16), scale


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """float32 [n, width] of what `encode` gave."""
    return codes.to(torch.float32).mul_(scale[:, None])


@dataclass(frozen=True)
class Place:
    """Where a row's state is: file, byte of its first code and of its first scale, and its tokens."""

    path: Path
    codes: int
    scale: int
    tokens: int


class HiddenStore:
    """The states of one identity in one folder. hits, read_bytes: rows read so far, and what was read of the disk."""

    def __init__(self, folder: Path, identity: str, width: int, code: str = "float16") -> None:
        self.folder, self.identity, self.width, self.code = folder, identity, width, code
        self.places: dict[str, Place] = {}
        self.hits = self.read_bytes = 0
        self._number_bytes = CODES[code].itemsize
        remove_halves(folder)

    def open(self, number: int, batches: Sequence[Sequence[tuple[str, int]]]) -> dict[str, int] | None:
        """Find a file's rows (key and tokens, batch by batch). Returns the facts it was written with.

        None where it is not whole, or another's: it is deleted.
        """
        path = self.folder / _NAME.format(number)
        try:
            sealed = read_sealed(path)
            facts: dict[str, int] = json.loads(sealed.about["facts"])
            if sealed.about.get("digest") != self._digest(batches):
                raise DamagedFile(str(path))
            self._place(sealed, batches)
        except (DamagedFile, KeyError, ValueError, TypeError):
            with suppress(OSError):
                path.unlink(missing_ok=True)
            return None
        return facts

    def write(
        self, number: int, batches: Sequence[Sequence[tuple[str, int]]], states: Iterable[Tensor],
        facts: Mapping[str, int],
    ) -> None:  # fmt: skip
        """Write a file of batches, whole or not at all. states: of each its rows' one after another, [tokens, width].

        Raises: DiskError when it cannot be written; EdgegtError for states that are not finite.
        """
        items = []
        for index, state in enumerate(states):
            codes, scale = encode(state, self.code)
            items += [Item.of(f"codes-{index}", codes), Item.of(f"scale-{index}", scale)]
        path = self.folder / _NAME.format(number)
        about = {"format": FORMAT, "digest": self._digest(batches), "facts": json.dumps(facts)}
        write_sealed(path, items, about)
        self._place(_opened(path, items), batches)

    def missing(self, keys: Sequence[str]) -> list[int]:
        """The positions of those that are not kept."""
        return [index for index, key in enumerate(keys) if key not in self.places]

    def read(self, key: str) -> Tensor:
        """A row's state, float32 [tokens, width]. Raises: KeyError; EdgegtError when the file is gone or was cut."""
        place = self.places[key]
        codes = torch.empty((place.tokens, self.width), dtype=CODES[self.code])
        scale = torch.empty(place.tokens, dtype=torch.float32)
        try:
            with place.path.open("rb", buffering=0) as file:
                for tensor, start in ((codes, place.codes), (scale, place.scale)):
                    file.seek(start)
                    if file.readinto(tensor.view(-1).view(torch.uint8).numpy().data) != tensor.nbytes:
                        raise OSError("it became shorter")
        except OSError as error:
            raise EdgegtError(f"kept hidden states cannot be read from '{place.path}' ({error})") from error
        self.hits += 1
        self.read_bytes += codes.nbytes + scale.nbytes
        return decode(codes, scale)

    @property
    def nbytes(self) -> int:
        """Bytes of its files."""
        return sum(path.stat().st_size for path in self.folder.glob("*") if path.is_file())

    def remove(self) -> None:
        """Delete all of it."""
        self.places.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _digest(self, batches: Sequence[Sequence[tuple[str, int]]]) -> str:
        return identity_of(self.identity, self.width, self.code, [list(map(list, batch)) for batch in batches])

    def _place(self, sealed: Sealed, batches: Sequence[Sequence[tuple[str, int]]]) -> None:
        for index, batch in enumerate(batches):
            codes, scale = (sealed.entries[f"{name}-{index}"] for name in ("codes", "scale"))
            total = sum(tokens for _, tokens in batch)
            wanted = str(CODES[self.code]).removeprefix("torch.")
            if DTYPES[codes[0]] != wanted or codes[1] != (total, self.width) or scale[1] != (total,):
                raise DamagedFile(f"'{sealed.path}' has states of another shape")
            at = 0
            for key, tokens in batch:
                start = codes[2] + at * self.width * self._number_bytes
                self.places[key] = Place(sealed.path, start, scale[2] + 4 * at, tokens)
                at += tokens


def _opened(path: Path, items: Sequence[Item]) -> Sealed:
    """What `read_sealed` would say of a file that was just written, without reading it again."""
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
    entries, kinds = {}, {name: kind for kind, name in DTYPES.items()}
    for item in items:
        entries[item.name] = kinds[str(item.dtype).removeprefix("torch.")], item.shape, start
        start += item.get().nbytes
    return Sealed(path, {}, "", entries)
