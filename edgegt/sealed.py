"""Sealed tensor files: safetensors with a checksum over every byte, written and read one tensor at a time.

The format is safetensors' own (an 8-byte length, a JSON header, the tensors' bytes), so that its library reads them.
The library's `save_file` takes all tensors in one call and knows no checksum; here each is fetched when its turn comes,
and may change as soon as it is on the disk. Neither makes a second copy. The metadata's `sha256` is the SHA-256 of
the file with 64 zeros in its own place, so that no byte can change unseen.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from edgegt.disk import replacing, write_all
from edgegt.errors import InputError
from edgegt.units import format_text

if TYPE_CHECKING:
    import torch

SEAL = "sha256"
_EMPTY = "0" * 64
_PART = 1 << 20
_LARGEST_HEADER = 1 << 27
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
# What safetensors calls the dtypes that are written here.
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


class DamagedFile(InputError):
    """A sealed file that is not there or is not what was written."""


@dataclass(frozen=True)
class Item:
    """One tensor to write: `get` is called when its turn comes, and must give this dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    get: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> Item:
        """A tensor that exists; it is read when its turn comes, and not copied (from a GPU: alone)."""
        return cls(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)


def write_sealed(
    path: Path, items: Sequence[Item], about: Mapping[str, str], written: Callable[[str], None] = lambda name: None
) -> str:
    """Write the tensors in this order, whole or not at all; returns the seal. written: called for each one on disk.

    Raises: DiskError when it cannot be written.
    """
    header = _header(items, about)
    digest = hashlib.sha256(header)
    needed = len(header) + sum(_size(item) for item in items)
    with replacing(path, needed) as file:
        write_all(file, header)
        for item in items:
            for part in _parts(item.get()):
                digest.update(part)
                write_all(file, part)
            written(item.name)
        seal = digest.hexdigest()
        file.seek(header.index(_place_of_seal(_EMPTY)) + len(_place_of_seal("")))
        write_all(file, seal.encode())
    return seal


@dataclass(frozen=True)
class Sealed:
    """A sealed file whose every byte was checked. about: its metadata; seal: its checksum."""

    path: Path
    about: dict[str, str]
    seal: str
    entries: dict[str, tuple[str, tuple[int, ...], int]] = field(repr=False)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, in memory of its own. Raises: KeyError; InputError when the file changed since."""
        import torch

        kind, shape, start = self.entries[name]
        found = torch.empty(shape, dtype=getattr(torch, DTYPES[kind]))
        if found.numel():
            with self.path.open("rb") as file:
                file.seek(start)
                flat = found.view(-1).view(torch.uint8).numpy().data
                if file.readinto(flat) != flat.nbytes:
                    raise _damaged(self.path, "it became shorter")
        return found


def read_sealed(path: Path) -> Sealed:
    """Open a sealed file and check every byte of it. Raises: DamagedFile, or InputError when it cannot be read."""
    try:
        with path.open("rb") as file:
            header = _read_header(path, file)
            found = _sealed(path, header, path.stat().st_size)
            digest = hashlib.sha256(header.replace(found.seal.encode(), _EMPTY.encode()))
            while part := file.read(_PART):
                digest.update(part)
    except FileNotFoundError as error:
        raise DamagedFile(f"'{path}' does not exist") from error
    except OSError as error:
        raise InputError(f"'{path}' cannot be read ({error.strerror}): check the disk and the permissions") from error
    if digest.hexdigest() != found.seal:
        raise _damaged(path, "its checksum does not match")
    return found


def _size(item: Item) -> int:
    return math.prod(item.shape) * item.dtype.itemsize


def _place_of_seal(seal: str) -> bytes:
    return f'"{SEAL}":"{seal}'.encode()


def _header(items: Sequence[Item], about: Mapping[str, str]) -> bytes:
    kinds = {name: kind for kind, name in DTYPES.items()}
    tree: dict[str, Any] = {"__metadata__": {SEAL: _EMPTY, **about}}
    start = 0
    for item in items:
        end = start + _size(item)
        kind = kinds[str(item.dtype).removeprefix("torch.")]
        tree[item.name] = {"dtype": kind, "shape": list(item.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _parts(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, a part at a time, without a copy where it is contiguous on the CPU."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
    for start in range(0, data.nbytes, _PART):
        yield data[start : start + _PART]


def _read_header(path: Path, file: BinaryIO) -> bytes:
    length = file.read(8)
    count = int.from_bytes(length, "little")
    if len(length) < 8 or not 2 <= count <= min(_LARGEST_HEADER, path.stat().st_size):
        raise _damaged(path, "it is no safetensors file")
    text = file.read(count)
    if len(text) < count:
        raise _damaged(path, "it ends within its header")
    return length + text


def _sealed(path: Path, header: bytes, size: int) -> Sealed:
    """What the header says, held against the file's size. Raises: InputError."""
    try:
        tree = json.loads(header[8:].decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "its header is not JSON") from error
    about = tree.pop("__metadata__", None) if isinstance(tree, dict) else None
    if not isinstance(about, dict) or not all(isinstance(value, str) for value in about.values()):
        raise _damaged(path, "its header has no metadata")
    seal = about.pop(SEAL, "")
    if not re.fullmatch("[0-9a-f]{64}", seal) or header.count(_place_of_seal(seal)) != 1:
        raise _damaged(path, "it has no checksum")
    entries: dict[str, tuple[str, tuple[int, ...], int]] = {}
    end = 0
    for name, entry in tree.items():
        kind, shape, length = _entry(path, name, entry, end)
        entries[name] = kind, shape, len(header) + end
        end += length
    if len(header) + end != size:
        raise _damaged(path, f"it has {size} bytes and its header speaks of {len(header) + end}")
    return Sealed(path, about, seal, entries)


def _entry(path: Path, name: str, entry: Any, start: int) -> tuple[str, tuple[int, ...], int]:
    """Dtype, shape and length in bytes of a tensor that begins at `start`, as we write them: in the file's order."""
    problem = _damaged(path, f"its header is wrong about '{format_text(name)}'")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise problem
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in _BYTES or not isinstance(shape, list) or len(shape) > 8:
        raise problem
    if not all(type(number) is int and 0 <= number < 1 << 48 for number in shape):
        raise problem
    length = math.prod(shape) * _BYTES[kind]
    if offsets != [start, start + length]:
        raise problem
    return kind, tuple(shape), length


def _damaged(path: Path, why: str) -> DamagedFile:
    return DamagedFile(f"'{path}' is damaged ({why})")
