"""The float model that ONNX files are made from: its architecture, and each of its tensors with what was trained.

Matrices are memory that nobody has touched until `load`, so that a model larger than memory can be traced.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from edgegt.architecture import is_experts, is_linear, is_lookup, untie_head
from edgegt.errors import InputError
from edgegt.model import outline
from edgegt.patch import Patch
from edgegt.pretrained import Pretrained


@dataclass(frozen=True)
class FloatModel:
    """module: transformers' own, in eval mode; its vectors have their values, its matrices have none yet."""

    base: Pretrained
    patch: Patch | None
    module: Any

    def value(self, name: str) -> torch.Tensor:
        """A parameter in float32, as the module holds it. Raises: InputError when no file has it."""
        held = self.base.value(name) if (trained := self._trained(name)) is None else self._with_training(trained)
        held = held.to(torch.float32)
        return held.t() if name in self.base.transposed else held

    def load(self) -> None:
        """Give every matrix its values."""
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                if parameter.ndim >= 2:
                    parameter.copy_(self.value(name))

    def matrices(self) -> dict[str, bool]:
        """The linears' matrices and the token embedding, by every name; whether the module holds them as [in, out]."""
        embedding = self.module.get_input_embeddings().weight
        parts = self.module.named_modules(remove_duplicate=False)
        return {
            f"{path}.weight": f"{path}.weight" in self.base.transposed
            for path, module in parts
            if is_linear(module) or (is_lookup(module) and module.weight is embedding)
        }

    @property
    def parameters(self) -> int:
        """Numbers in the model."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    def _trained(self, name: str) -> str | None:
        """The name by which the patch has this parameter."""
        if self.patch is None:
            return None
        base, names = self.base, self.patch.names
        known = [name, *self.base.aliases.get(name, ())]
        if base.tied and base.head in names and name != base.head:
            known = [one for one in known if one != base.head]
        return next((one for one in known if one in names), None)

    def _with_training(self, name: str) -> torch.Tensor:
        assert self.patch is not None
        rows, values = self.patch.rows(name), self.patch.values(name)
        if rows is None:
            return values
        whole = self.base.value(name).to(torch.float32, copy=True)
        whole[rows] = values.to(torch.float32)
        return whole


def float_model(base: Pretrained, patch: Patch | None) -> FloatModel:
    """The architecture of this base and patch. Raises: InputError for one that cannot be exported."""
    module, head, tied = outline(base.config, base.source, "eager")
    if any(is_experts(part) for part in module.modules()):
        raise InputError(f"'{base.source.name}' is a mixture of experts, which is not exported to ONNX: use --to hf")
    if tied and patch is not None and head in patch.names:
        untie_head(module)
    model = FloatModel(base, patch, module.eval().requires_grad_(False))
    made: dict[int, nn.Parameter] = {}
    for path, part in list(module.named_modules()):
        for short, parameter in list(part.named_parameters(recurse=False)):
            if id(parameter) not in made:
                name = f"{path}.{short}"
                real = torch.empty(parameter.shape) if parameter.ndim >= 2 else model.value(name).clone()
                made[id(parameter)] = nn.Parameter(real, requires_grad=False)
            setattr(part, short, made[id(parameter)])
    if any(buffer.is_meta for buffer in module.buffers()):
        raise InputError(
            f"{type(module).__name__} computes from tables that no file has: it cannot be exported to ONNX"
        )
    return model
