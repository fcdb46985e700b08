"""The base store: a model on disk in int8, one safetensors file per block, made once and then memory-mapped.

It replaces quantising at every start. The float tensors are read one by one, so the float model never exists as a
whole: the peak is 2**23 float elements of a tensor beside its int8 form. A matrix becomes `<name>.q` (int8, [out, in])
and `<name>.scale` (bfloat16, [out]); a norm or bias stays float32. Stores live in the user's cache under the model's
fingerprint.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgegt.errors import InputError
from edgegt.process import trim
from edgegt.source import Source

FORMAT = 1
PART_ELEMENTS = 2**23
WHOLE = 1 << 62
_OUR_FOLDER = re.compile(r"[0-9a-f]{32}(\.\d+\.partial)?")
_OUR_FILES = ("backend.json", "fingerprints.json")


@dataclass(frozen=True)
class Entry:
    """One tensor of the model: its name in the model and in the source, its block, and how it is kept.

    more: stored tensors whose rows follow; of experts, each with two dimensions or with those of a stack.
    rows: how many the config says there are; 0 where that is not compared.
    """

    name: str
    stored_as: str
    block: int
    int8: bool
    transposed: bool
    more: tuple[str, ...] = ()
    rows: int = 0

    @property
    def pieces(self) -> tuple[str, ...]:
        """The stored tensors that it is made of, in the order of their rows."""
        return (self.stored_as, *self.more)

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of its tensors in the store."""
        return (f"{self.name}.q", f"{self.name}.scale") if self.int8 else (self.name,)


@dataclass(frozen=True)
class BaseStore:
    """A finished store: reads tensors by name, memory-mapped."""

    directory: Path
    files: dict[str, str]
    _handles: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def tensor(self, key: str) -> Any:
        """The tensor `key` ('<name>.q', '<name>.scale' or a float '<name>'), mapped from disk.

        One mapping per file: a mapping of its own for each tensor would count its neighbours' pages again.
        Raises: InputError when the file is damaged.
        """
        from safetensors import SafetensorError, safe_open

        file = self.files[key]
        try:
            if file not in self._handles:
                self._handles[file] = safe_open(str(self.directory / file), framework="pt")
            return self._handles[file].get_tensor(key)
        except SafetensorError as error:
            remedy = "`edgegt cache clear`, and it is made again"
            raise InputError(f"the int8 base '{self.directory / file}' is damaged ({error}): {remedy}") from error

    def release(self, keys: Iterable[str]) -> None:
        """Take the files of these tensors out of memory, as soon as nobody holds a tensor of them either."""
        for file in {self.files[key] for key in keys}:
            self._handles.pop(file, None)


def base_store(source: Source, identity: str, entries: Iterable[Entry], cache: Path) -> BaseStore:
    """The store of this model, made now if the cache does not have it. Raises: InputError when it cannot be written."""
    from safetensors import SafetensorError

    members = list(entries)
    folder = cache / "base" / identity[:32]
    found = _finished(folder, members)
    if found is not None:
        return found
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        files = _write(source, members, partial)
        tree = {"format": FORMAT, "model": source.name, "fingerprint": identity, "files": files}
        (partial / "manifest.json").write_text(json.dumps(tree), encoding="utf-8")
        return _put_in_place(partial, folder, members)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not isinstance(error, (OSError, SafetensorError)):
            raise
        raise InputError(
            f"the int8 base could not be written to '{folder}' ({getattr(error, 'strerror', None) or error}): "
            "free space there (`edgegt cache clear`) or set EDGEGT_CACHE to another disk"
        ) from error


def _finished(folder: Path, entries: list[Entry]) -> BaseStore | None:
    """The store in this folder, or None when it is not there or lacks anything."""
    tree = _manifest(folder / "manifest.json")
    files = tree.get("files")
    if tree.get("format") != FORMAT or not isinstance(files, dict):
        return None
    keys = [key for entry in entries for key in entry.keys]
    if not all(isinstance(files.get(key), str) and (folder / files[key]).is_file() for key in keys):
        return None
    return BaseStore(folder, files)


def _manifest(path: Path) -> dict[str, Any]:
    """A store's manifest; empty when it cannot be read."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _put_in_place(partial: Path, folder: Path, entries: list[Entry]) -> BaseStore:
    """Move a new store to its place; where another process was faster, its store is used."""
    try:
        partial.replace(folder)
    except OSError:
        found = _finished(folder, entries)
        if found is not None:
            shutil.rmtree(partial, ignore_errors=True)
            return found
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)
    done = _finished(folder, entries)
    assert done is not None
    return done


def _write(source: Source, entries: Iterable[Entry], folder: Path) -> dict[str, str]:
    from safetensors.torch import save_file

    blocks: dict[int, list[Entry]] = {}
    for entry in entries:
        blocks.setdefault(entry.block, []).append(entry)
    files: dict[str, str] = {}
    for block, members in sorted(blocks.items()):
        tensors: dict[str, Any] = {}
        for entry in members:
            tensors.update(_converted(source, entry))
        file = "below.safetensors" if block < 0 else f"block-{block:03d}.safetensors"
        save_file(tensors, str(folder / file))
        files.update(dict.fromkeys(tensors, file))
        tensors.clear()
        trim()
    return files


def _converted(source: Source, entry: Entry) -> dict[str, Any]:
    import torch

    from edgegt.quant import quantize_rows

    _check_rows(source, entry)
    q = scales = None
    first = 0
    whole = not entry.int8 or entry.transposed
    for stored, tensor in _parts(source, entry.pieces, WHOLE if whole else PART_ELEMENTS):
        if not tensor.is_floating_point():
            problem = f"'{stored}' is stored as {tensor.dtype}"
            raise InputError(f"{problem}: give the float model, not a quantised one")
        if not entry.int8:
            return {entry.name: tensor.to(torch.float32).clone()}
        tensor = tensor.flatten(0, 1) if tensor.ndim == 3 else tensor
        try:
            part = quantize_rows(tensor.t().contiguous() if entry.transposed else tensor)
        except InputError as error:
            raise InputError(f"'{stored}' cannot be used: {error}") from error
        rows = part.shape[0]
        if q is None or scales is None:
            count = rows if entry.transposed else sum(source.rows(piece) for piece in entry.pieces)
            q = torch.empty(count, part.shape[1], dtype=torch.int8)
            scales = torch.empty(count, dtype=part.scale.dtype)
        q[first : first + rows], scales[first : first + rows] = part.q, part.scale
        first += rows
    return {f"{entry.name}.q": q, f"{entry.name}.scale": scales}


def _check_rows(source: Source, entry: Entry) -> None:
    """Raises: InputError when the files have more or fewer experts, or larger or smaller ones, than the config says."""
    there = sum(source.rows(piece) for piece in entry.pieces) if entry.rows else 0
    if there != entry.rows:
        raise InputError(
            f"the model in '{source.directory}' has {there} rows of '{entry.name}' in {len(entry.pieces)} tensors, its "
            f"config {entry.rows}: fetch the model again"
        )


def _parts(source: Source, pieces: Iterable[str], elements: int) -> Iterator[tuple[str, Any]]:
    """Parts of these stored tensors, by rows, each with the name of its tensor."""
    for name in pieces:
        for tensor in source.row_parts(name, elements):
            yield name, tensor


@dataclass(frozen=True)
class CachedBase:
    """A store in the cache, for `edgegt cache`."""

    directory: Path
    model: str
    fingerprint: str
    size_bytes: int


def list_cache(cache: Path) -> list[CachedBase]:
    """The finished stores in the cache, by model name."""
    found = []
    for folder in _our_folders(cache):
        tree = _manifest(folder / "manifest.json")
        if isinstance(tree.get("model"), str) and isinstance(tree.get("fingerprint"), str):
            found.append(CachedBase(folder, tree["model"], tree["fingerprint"], _size(folder)))
    return sorted(found, key=lambda base: base.model)


def clear_cache(cache: Path) -> int:
    """Delete what edgegt keeps in the cache, and nothing else that may lie there; returns the bytes freed.

    Runs that are reading a store keep their mapping.
    """
    freed = 0
    for folder in _our_folders(cache):
        freed += _size(folder)
        shutil.rmtree(folder, ignore_errors=True)
    for file in (cache / name for name in _OUR_FILES):
        if file.is_file():
            freed += file.stat().st_size
            file.unlink()
    return freed


def _our_folders(cache: Path) -> list[Path]:
    """Finished and half-made stores: folders named by a fingerprint."""
    paths = sorted((cache / "base").glob("*"))
    return [path for path in paths if _OUR_FOLDER.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
