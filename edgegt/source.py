"""The pretrained model as it lies on disk: config, tokenizer and float tensors, read one at a time.

A model is a directory with config.json and safetensors, or a hub id where the network is allowed. No pickle is
loaded and no remote code is run. The fingerprint is the SHA-256 of the config and of every weight file.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgegt.errors import InputError

_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


@dataclass(frozen=True)
class Source:
    """A model directory: where each float tensor lies, and the config as a dict."""

    directory: Path
    name: str
    files: dict[str, Path]

    def tensor(self, name: str) -> Any:
        """One tensor as stored (memory-mapped, any float dtype). Raises KeyError when it is not there."""
        from safetensors import safe_open

        with safe_open(str(self.files[name]), framework="pt") as handle:
            return handle.get_tensor(name)


def locate(model: str) -> Path:
    """The directory of a model given as a path or a hub id.

    Raises: InputError when there is no such directory and the hub does not have or may not be asked for it.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    looks_like_id = model.count("/") == 1 and not model.startswith((".", "/", "~")) and not path.parent.is_dir()
    if not looks_like_id:
        remedy = "give a folder with config.json and safetensors, or a hub id"
        raise InputError(f"model '{model}' is not a directory: {remedy}")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model, allow_patterns=list(_HUB_FILES)))
    except Exception as error:
        offline = os.environ.get("HF_HUB_OFFLINE")
        why = "HF_HUB_OFFLINE is set and it is not in the cache" if offline else str(error).splitlines()[0][:160]
        raise InputError(f"model '{model}' could not be fetched ({why}): give a local folder instead") from error


def read_config(model: str) -> Any:
    """The transformers config of a model directory, a hub id, or a path to a config.json alone.

    Raises: InputError for a missing or malformed config, or an architecture that transformers does not know.
    """
    from transformers import AutoConfig

    path = Path(model).expanduser()
    folder = path.parent if path.is_file() and path.suffix == ".json" else locate(model)
    config_file = path if path.is_file() and path.suffix == ".json" else folder / "config.json"
    if not config_file.is_file():
        raise InputError(f"'{folder}' has no config.json: give the folder of a Hugging Face model")
    try:
        tree = json.loads(config_file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{config_file}: not valid JSON ({error}): fetch the model again") from error
    if not isinstance(tree, dict):
        raise InputError(f"{config_file}: not a JSON object: fetch the model again")
    try:
        kind = tree.pop("model_type")
        config = AutoConfig.for_model(kind, **tree)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        named = tree.get("architectures") or [str(error).splitlines()[0][:80]]
        raise InputError(
            f"{config_file}: architecture '{named[0]}' is unknown to this version of transformers: "
            "give a decoder-only model with a known model_type, or update transformers"
        ) from error
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{config_file}: '{config.model_type}' is an encoder-decoder: give a decoder-only model")
    return config


def open_source(model: str) -> Source:
    """The float tensors of a model. Raises: InputError when the folder has no safetensors."""
    folder = locate(model)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        mapping = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {name: folder / file for name, file in mapping.items()}
    else:
        files = {name: path for path in sorted(folder.glob("*.safetensors")) for name in _names(path)}
    if not files:
        other = sorted(path.name for path in folder.glob("*.bin"))
        why = f" ({other[0]} is a pickle and is not loaded)" if other else ""
        raise InputError(f"'{folder}' has no safetensors{why}: save the model with save_pretrained() once")
    missing = sorted({str(path) for path in files.values() if not path.is_file()})
    if missing:
        raise InputError(f"{missing[0]} is named in {index.name} and is not there: fetch the model again")
    return Source(folder, folder.resolve().name, files)


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


def load_tokenizer(directory: Path) -> Any:
    """The model's own tokenizer. Raises: InputError when the folder has none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:
        raise InputError(
            f"'{directory}' has no usable tokenizer ({str(error).splitlines()[0][:120]}): add tokenizer.json to it"
        ) from error
    if tokenizer.eos_token_id is None:
        remedy = "set eos_token in tokenizer_config.json"
        raise InputError(f"the tokenizer in '{directory}' has no end-of-text token: {remedy}")
    return tokenizer
