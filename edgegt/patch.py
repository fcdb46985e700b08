"""The patch: trained tensors in full precision, and what identifies the base they belong to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edgegt.errors import InputError
from edgegt.folder import write_tensors

if TYPE_CHECKING:
    import torch
    from torch import nn

    from edgegt.model import Int8Model
    from edgegt.quant import Int8Embedding, Int8Linear

FORMAT = "1"


def save_patch(
    path: Path, tensors: Mapping[str, torch.Tensor], fingerprint: str, model: str, version: str, separator: str = ""
) -> None:
    """Write the trained tensors (float32, by weight name) with the base's fingerprint, whole or not at all.

    separator: what stood between prompt and completion in training, so that the patch can be asked alike.
    """
    about = {"format": FORMAT, "fingerprint": fingerprint, "model": model, "edgegt": version, "separator": separator}
    write_tensors(path, {name: tensor.contiguous() for name, tensor in tensors.items()}, about)


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


def apply_patch(model: Int8Model, path: Path) -> dict[str, str]:
    """Put the trained tensors into the int8 model, as the two planes that training computed with; returns the metadata.

    An embedding that was trained whole goes to a tied head too, unless the patch has the head apart.
    Raises: InputError when the patch belongs to another base; nothing is changed then.
    """
    tensors, about = read_patch(path)
    if about["fingerprint"] != model.fingerprint:
        raise InputError(
            f"patch '{path}' was trained on another base ({about.get('model', '?')}, fingerprint "
            f"{about['fingerprint'][:12]}) than '{model.source.name}' ({model.fingerprint[:12]}): give that base "
            "with --model"
        )
    holders = {name: _holder(model, name) for name in tensors}
    for name, holder in holders.items():
        if holder is None:
            raise InputError(f"patch '{path}' has '{name}', which '{model.source.name}' does not: give the right base")
        shape, held = tuple(tensors[name].shape), _shape(holder)
        if held != shape:
            raise InputError(
                f"patch '{path}' has '{name}' as {shape}, '{model.source.name}' as {held}: "
                "take the patch from the run folder again"
            )
    for name, tensor in tensors.items():
        _put(holders[name], tensor.to(model.device))
    embedding = model.module.get_input_embeddings()
    if model.tied and model.head not in tensors and any(holder is embedding for holder in holders.values()):
        model.linears[model.head].restore(embedding.weight)
    return about


def _holder(model: Int8Model, name: str) -> Int8Linear | Int8Embedding | nn.Parameter | None:
    """What holds the tensor of this name: an int8 layer, an int8 embedding, or a float parameter; None for nothing."""
    from torch import nn

    from edgegt.quant import Int8Embedding

    if name in model.linears:
        return model.linears[name]
    owner, _, short = name.rpartition(".")
    try:
        module = model.module.get_submodule(owner)
    except AttributeError:
        return None
    if isinstance(module, Int8Embedding):
        return module if short == "weight" else None
    found = getattr(module, short, None)
    return found if isinstance(found, nn.Parameter) else None


def _shape(holder: Int8Linear | Int8Embedding | nn.Parameter) -> tuple[int, ...]:
    from torch import nn

    return tuple(holder.shape if isinstance(holder, nn.Parameter) else holder.weight.shape)


def _put(holder: Int8Linear | Int8Embedding | nn.Parameter | None, tensor: torch.Tensor) -> None:
    from edgegt.quant import Int8Embedding, Int8Linear, split_planes

    if isinstance(holder, Int8Linear):
        holder.restore(split_planes(tensor))
    elif isinstance(holder, Int8Embedding):
        holder.weight = split_planes(tensor)
    elif holder is not None:
        holder.data.copy_(tensor)
