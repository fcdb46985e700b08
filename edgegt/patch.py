"""The patch: trained tensors in full precision, and what identifies the base they belong to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edgegt.errors import InputError

if TYPE_CHECKING:
    import torch

    from edgegt.model import Int8Model

FORMAT = "1"


def save_patch(path: Path, tensors: Mapping[str, torch.Tensor], fingerprint: str, model: str, version: str) -> None:
    """Write the trained tensors (float32, by weight name) with the base's fingerprint, whole or not at all."""
    from safetensors.torch import save_file

    about = {"format": FORMAT, "fingerprint": fingerprint, "model": model, "edgegt": version}
    partial = path.with_name(f".{path.name}.tmp")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(partial), metadata=about)
    partial.replace(path)


def read_patch(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a patch. Raises: InputError when it is missing, damaged or not a patch."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InputError(f"patch '{path}' does not exist: give the patch.safetensors of a run folder")
    try:
        with safe_open(str(path), framework="pt") as handle:
            about = dict(handle.metadata() or {})
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"patch '{path}' is damaged ({error}): take it from the run folder again") from error
    if about.get("format") != FORMAT or "fingerprint" not in about:
        found = json.dumps(about)[:80]
        raise InputError(f"'{path}' is not an edgegt patch (metadata {found}): give a patch.safetensors")
    return tensors, about


def apply_patch(model: Int8Model, path: Path) -> None:
    """Put the trained tensors into the int8 model, as the two planes that training computed with.

    Raises: InputError when the patch belongs to another base.
    """
    from edgegt.quant import split_planes

    tensors, about = read_patch(path)
    if about["fingerprint"] != model.fingerprint:
        raise InputError(
            f"patch '{path}' was trained on another base ({about.get('model', '?')}, fingerprint "
            f"{about['fingerprint'][:12]}) than '{model.source.name}' ({model.fingerprint[:12]}): give that base "
            "with --model"
        )
    for name, tensor in tensors.items():
        held = model.linears[name].weight if name in model.linears else model.vectors.get(name)
        if held is not None and held.shape != tensor.shape:
            raise InputError(
                f"patch '{path}' has '{name}' as {tuple(tensor.shape)}, '{model.source.name}' as {tuple(held.shape)}: "
                "take the patch from the run folder again"
            )
    for name, tensor in tensors.items():
        if name in model.linears:
            model.linears[name].restore(split_planes(tensor.to(model.device)))
        elif name in model.vectors:
            model.vectors[name].data.copy_(tensor)
        else:
            raise InputError(f"patch '{path}' has '{name}', which '{model.source.name}' does not: give the right base")
