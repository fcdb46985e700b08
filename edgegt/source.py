"""The pretrained model as it lies on disk: config, tokenizer and float tensors, read one at a time.

A model is a directory with config.json and safetensors, or a hub id where the network is allowed. No pickle is
loaded and no remote code is run. The fingerprint is the SHA-256 of the config and of every weight file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgegt.errors import InputError

_SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
_HUB_FILES = (*_SMALL_FILES, "*.safetensors")


@dataclass(frozen=True)
class Source:
    """A model directory: where each float tensor lies, and the config as a dict."""

    directory: Path
    name: str
    files: dict[str, Path]

    def tensor(self, name: str) -> Any:
        """One tensor as stored (memory-mapped, any float dtype).

        Raises: KeyError when no file has it, InputError when its file is damaged.
        """
        from safetensors import SafetensorError, safe_open

        path = self.files[name]
        try:
            with safe_open(str(path), framework="pt") as handle:
                return handle.get_tensor(name)
        except SafetensorError as error:
            raise InputError(f"{path}: '{name}' cannot be read ({error}): fetch the model again") from error

    def rows(self, name: str) -> int:
        """Rows of one tensor, without reading it: 1 of a scalar, of a stack those of all in it. Raises: as `tensor`."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(self.files[name]), framework="pt") as handle:
                shape = handle.get_slice(name).get_shape()
        except SafetensorError as error:
            raise InputError(f"{self.files[name]}: '{name}' cannot be read ({error}): fetch the model again") from error
        return math.prod(shape[: max(1, len(shape) - 1)])

    def joined(self, names: Sequence[str], rows: Any = None) -> Any:
        """The rows of these matrices one after another, float32, read one at a time. rows: int64, only these of them.

        Raises: as `tensor`.
        """
        import torch

        counts, result, first = [self.rows(name) for name in names], None, 0
        for name, count in zip(names, counts, strict=True):
            tensor, here = self.tensor(name), slice(first, first + count)
            if result is None:
                result = torch.empty(sum(counts) if rows is None else len(rows), tensor.shape[1])
            if rows is not None:
                inside = (rows.cpu() >= first) & (rows.cpu() < first + count)
                here, tensor = inside, tensor[rows.cpu()[inside] - first]
            result[here] = tensor.to(torch.float32)
            first += count
        return result

    def row_parts(self, name: str, elements: int) -> Iterator[Any]:
        """One tensor as stored, `elements` or fewer at a time by rows (at least one); pages read before are let go.

        Raises: as `tensor`.
        """
        from safetensors import SafetensorError, safe_open

        path, start, rows = self.files[name], 0, 1
        while start < rows:
            try:
                with safe_open(str(path), framework="pt") as handle:
                    whole = handle.get_slice(name)
                    shape = whole.get_shape()
                    rows = shape[0] if shape else 1
                    step = max(1, elements * rows // max(1, math.prod(shape)))
                    part = whole[start : start + step] if step < rows else handle.get_tensor(name)
            except SafetensorError as error:
                raise InputError(f"{path}: '{name}' cannot be read ({error}): fetch the model again") from error
            yield part
            start += step


def locate(model: str, weights: bool = True) -> Path:
    """The directory of a model given as a path or a hub id.

    weights: whether its weights are needed; without them only config and tokenizer are fetched from the hub.
    Raises: InputError when there is no such directory and the hub does not have or may not be asked for it.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    files = list(_HUB_FILES if weights else _SMALL_FILES)

    def fetch() -> str:
        from huggingface_hub import snapshot_download

        # A pattern's * crosses slashes: without the second list, copies of the weights in subfolders would come too.
        return str(snapshot_download(model, allow_patterns=files, ignore_patterns=["*/*"]))

    return _from_hub(model, fetch)


def _from_hub(model: str, fetch: Callable[[], str]) -> Path:
    path = Path(model).expanduser()
    looks_like_id = model.count("/") == 1 and not model.startswith((".", "/", "~")) and not path.parent.is_dir()
    if not looks_like_id:
        remedy = "give a folder with config.json and safetensors, or a hub id"
        raise InputError(f"model '{model}' is not a directory: {remedy}")
    try:
        return Path(fetch())
    except Exception as error:
        offline = os.environ.get("HF_HUB_OFFLINE")
        why = "HF_HUB_OFFLINE is set and it is not in the cache" if offline else _first_line(error)[:160]
        raise InputError(f"model '{model}' could not be fetched ({why}): give a local folder instead") from error


def read_config(model: str, *, for_run: bool = True) -> Any:
    """The transformers config of a model directory, a hub id, or a path to a config.json alone.

    for_run: refuse what can be planned but not trained: language models inside larger ones.
    Raises: InputError for a missing or malformed config, or an architecture that transformers does not know.
    """
    config_file = _config_file(model)
    config = _parsed(config_file)
    kind = config.model_type
    if for_run and getattr(config, "text_config", None) is not None:
        raise InputError(
            f"{config_file}: '{kind}' holds its language model among others, which edgegt plans but does not train "
            "yet: give a text-only model"
        )
    return config


def _parsed(config_file: Path) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        tree = json.loads(config_file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{config_file}: not valid JSON ({error}): fetch the model again") from error
    if not isinstance(tree, dict):
        raise InputError(f"{config_file}: not a JSON object: fetch the model again")
    try:
        kind = tree.pop("model_type")
        return AutoConfig.for_model(kind, **tree)
    except StrictDataclassError as error:
        said = " ".join(str(error).split())[:200]
        raise InputError(f"{config_file}: {said}: correct the file or fetch the model again") from error
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        found = tree.get("architectures")
        named = found if isinstance(found, list) and found else [_first_line(error)[:80]]
        raise InputError(
            f"{config_file}: architecture '{named[0]}' is unknown to this version of transformers: "
            "give a decoder-only model with a known model_type, or update transformers"
        ) from error


def _config_file(model: str) -> Path:
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".json":
        return path

    def fetch() -> str:
        from huggingface_hub import hf_hub_download

        return str(hf_hub_download(model, "config.json"))

    config_file = path / "config.json" if path.is_dir() else _from_hub(model, fetch)
    if not config_file.is_file():
        raise InputError(f"'{config_file.parent}' has no config.json: give the folder of a Hugging Face model")
    return config_file


def open_source(model: str) -> Source:
    """The float tensors of a model. Raises: InputError when the folder has no safetensors."""
    folder = locate(model)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = {name: folder / file for name, file in _weight_map(index).items()}
    else:
        files = {name: path for path in sorted(folder.glob("*.safetensors")) for name in _names(path)}
    if not files:
        other = sorted(path.name for path in folder.glob("*.bin"))
        why = f" ({other[0]} is a pickle and is not loaded)" if other else ""
        raise InputError(f"'{folder}' has no safetensors{why}: save the model with save_pretrained() once")
    missing = sorted({str(path) for path in files.values() if not path.is_file()})
    if missing:
        raise InputError(f"{missing[0]} is named in {index.name} and is not there: fetch the model again")
    local = Path(model).expanduser().is_dir()
    return Source(folder, folder.resolve().name if local else model.rpartition("/")[2], files)


def stored_names(model: str) -> frozenset[str] | None:
    """Names of the tensors that a model's files have; None where there is only a config. Raises: as `open_source`."""
    folder = Path(model).expanduser()
    if not folder.is_dir() or not any(folder.glob("*.safetensors*")):
        return None
    return frozenset(open_source(model).files)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        mapping = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{index}: no readable 'weight_map' ({error}): fetch the model again") from error
    if not isinstance(mapping, dict) or not all(isinstance(file, str) for file in mapping.values()):
        raise InputError(f"{index}: 'weight_map' does not give a file for each tensor: fetch the model again")
    return mapping


def fingerprint(source: Source, memo: Path) -> str:
    """SHA-256 over config and weights, remembered in `memo` by path, size and time so that it is computed once."""
    paths = [source.directory / "config.json", *sorted(set(source.files.values()))]
    key = "|".join(f"{p.resolve()}:{p.stat().st_size}:{p.stat().st_mtime_ns}" for p in paths)
    try:
        known: dict[str, str] = json.loads(memo.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        known = {}
    if key not in known:
        digest = hashlib.sha256()
        for path in paths:
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
        known[key] = digest.hexdigest()
        memo.parent.mkdir(parents=True, exist_ok=True)
        partial = memo.with_suffix(f".{os.getpid()}.tmp")
        partial.write_text(json.dumps(known), encoding="utf-8")
        partial.replace(memo)
    return known[key]


def _names(path: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as handle:
            return list(handle.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error}): fetch the model again") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def load_tokenizer(directory: Path, writes: bool = True) -> Any:
    """The model's own tokenizer. writes: it must have an end-of-text token, which a BERT's has not.

    Raises: InputError when the folder has none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise InputError(
            f"'{directory}' has no usable tokenizer ({_first_line(error)[:120]}): add tokenizer.json to it"
        ) from error
    if writes and tokenizer.eos_token_id is None:
        remedy = "set eos_token in tokenizer_config.json"
        raise InputError(f"the tokenizer in '{directory}' has no end-of-text token: {remedy}")
    return tokenizer
