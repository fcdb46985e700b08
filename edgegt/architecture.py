"""What the trace and the loader both need to know about a transformers model, told by its modules, not its family."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from edgegt.errors import InputError


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a matrix product with a weight: nn.Linear, or GPT-2's Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def is_transposed(module: nn.Module) -> bool:
    """Whether the module stores its weight as [in, out], as GPT-2's Conv1D does."""
    return type(module).__name__ == "Conv1D"


def is_lookup(module: nn.Module) -> bool:
    """Whether the module is a plain embedding (its rows may be scaled by a constant); learned positions are not."""
    return type(module) is nn.Embedding or hasattr(module, "embed_scale")


def is_int8(module: nn.Module, parameter: Any) -> bool:
    """Whether the base keeps this parameter in int8: matrices of linears and plain embeddings."""
    return parameter.ndim == 2 and (is_linear(module) or is_lookup(module))


def layers_of(model: nn.Module) -> tuple[str, int]:
    """Name and length of the module list that holds the model's layers (the longest one)."""
    lists = [(len(module), name) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise InputError(f"{type(model).__name__} has no list of layers: only transformer language models can be tuned")
    count, name = max(lists)
    return name, count


def block_of(name: str, layers: str, blocks: int, head: str) -> int:
    """Index of the layer that the weight belongs to; -1 below the layers, `blocks` above them."""
    match = re.match(re.escape(layers) + r"\.(\d+)\.", name)
    if match:
        return int(match[1])
    return blocks if name == head or "emb" not in name else -1


def head_name(model: Any) -> str:
    """Name of the output layer's weight."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is head:
            return f"{name}.weight"
    raise InputError(f"{type(model).__name__} has no output layer: give a causal language model")
