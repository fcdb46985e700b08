"""The base store: a model on disk in int8, one safetensors file per block, made once and then memory-mapped.

It replaces quantising at every start. The float tensors are read one by one, so the float model never exists as a
whole: the peak is one float tensor. A matrix becomes `<name>.q` (int8, [out, in]) and `<name>.scale` (bfloat16,
[out]); a norm or bias stays float32. Stores live in the user's cache under the model's fingerprint.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgegt.errors import InputError
from edgegt.source import Source

FORMAT = 1


def cache_dir() -> Path:
    """Where edgegt keeps what it can make again: $EDGEGT_CACHE, else the user's cache folder."""
    given = os.environ.get("EDGEGT_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else base / "edgegt"


@dataclass(frozen=True)
class Entry:
    """One tensor of the model: its name in the model and in the source, its block, and how it is kept."""

    name: str
    stored_as: str
    block: int
    int8: bool
    transposed: bool


@dataclass(frozen=True)
class BaseStore:
    """A finished store: reads tensors by name, memory-mapped."""

    directory: Path
    files: dict[str, str]
    _handles: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def tensor(self, key: str) -> Any:
        """The tensor `key` ('<name>.q', '<name>.scale' or a float '<name>'), mapped from disk.

        One mapping per file: a mapping of its own for each tensor would count its neighbours' pages again.
        """
        from safetensors import safe_open

        file = self.files[key]
        if file not in self._handles:
            self._handles[file] = safe_open(str(self.directory / file), framework="pt")
        return self._handles[file].get_tensor(key)


def base_store(source: Source, identity: str, entries: Iterable[Entry], cache: Path) -> BaseStore:
    """The store of this model, made now if the cache does not have it."""
    folder = cache / "base" / identity[:32]
    manifest = folder / "manifest.json"
    if manifest.is_file():
        tree = json.loads(manifest.read_text(encoding="utf-8"))
        if tree.get("format") == FORMAT and all((folder / name).is_file() for name in set(tree["files"].values())):
            return BaseStore(folder, tree["files"])
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        files = _write(source, entries, partial)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise InputError(
            f"the int8 base could not be written to '{folder}' ({error.strerror or error}): "
            "free space there (`edgegt cache clear`) or set EDGEGT_CACHE to another disk"
        ) from error
    tree = {"format": FORMAT, "model": source.name, "fingerprint": identity, "files": files}
    (partial / "manifest.json").write_text(json.dumps(tree), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)
    return BaseStore(folder, files)


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
    return files


def _converted(source: Source, entry: Entry) -> dict[str, Any]:
    import torch

    from edgegt.quant import quantize_rows

    tensor = source.tensor(entry.stored_as)
    if not tensor.is_floating_point():
        raise InputError(f"'{entry.stored_as}' is stored as {tensor.dtype}: give the float model, not a quantised one")
    if not entry.int8:
        return {entry.name: tensor.to(torch.float32).clone()}
    try:
        weight = quantize_rows(tensor.t().contiguous() if entry.transposed else tensor)
    except InputError as error:
        raise InputError(f"'{entry.stored_as}' cannot be used: {error}") from error
    return {f"{entry.name}.q": weight.q, f"{entry.name}.scale": weight.scale}


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
    for manifest in sorted((cache / "base").glob("*/manifest.json")):
        tree = json.loads(manifest.read_text(encoding="utf-8"))
        size = sum(path.stat().st_size for path in manifest.parent.iterdir())
        found.append(CachedBase(manifest.parent, tree["model"], tree["fingerprint"], size))
    return sorted(found, key=lambda base: base.model)


def clear_cache(cache: Path) -> int:
    """Delete every store; returns the bytes freed. Runs that are reading one keep their mapping."""
    freed = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) if cache.is_dir() else 0
    for name in ("base",):
        shutil.rmtree(cache / name, ignore_errors=True)
    for file in cache.glob("*.json"):
        file.unlink()
    return freed
