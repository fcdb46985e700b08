"""FLOPs counted while they are executed, from the shapes at hand and independently of the cost table.

Int8 linears, int8 experts and attention report to the meter themselves. Float linears, routers, float experts, and
attention that an architecture keeps to itself, are counted here: their forward when it runs, their backward when a
gradient arrives. One multiply-accumulate is 2 FLOPs; attention counts as two products forward and two for each of them
backward, whichever kernel runs, and whatever part of them a mask makes superfluous.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from edgegt.architecture import is_experts, is_linear, is_router

# Integer work for the second int8 plane of a trained weight is arithmetic of the number format, not of the model.
_NOT_MODEL_FLOPS = ("low_plane",)


class FlopMeter:
    """Sums FLOPs by kind. `total` is what counts against the budget."""

    def __init__(self) -> None:
        self.by_kind: Counter[str] = Counter()
        self._counting = True

    def add(self, kind: str, flops: int) -> None:
        """Count `flops` that have just been executed."""
        if self._counting:
            self.by_kind[kind] += flops

    @contextmanager
    def off(self) -> Iterator[None]:
        """Count nothing for a while: evaluation is not training."""
        self._counting = False
        try:
            yield
        finally:
            self._counting = True

    @property
    def total(self) -> int:
        return sum(count for kind, count in self.by_kind.items() if kind not in _NOT_MODEL_FLOPS)


def attach(model: nn.Module, meter: FlopMeter) -> None:
    """Give every module of the model the meter, and count its float linears."""
    for module in model.modules():
        module.__dict__["flop_meter"] = meter  # not a parameter, buffer or submodule
        if is_linear(module):
            module.register_forward_hook(_count_linear)
        elif is_experts(module):
            module.register_forward_hook(_count_experts, with_kwargs=True)
        elif any(is_router(module, parameter) for parameter in module.parameters(recurse=False)):
            module.register_forward_hook(_count_router)
        own = type(module).__name__.endswith("Attention") and not _replaceable(model, module)
        if own and any(hasattr(part, "in_features") for part in module.children()):
            module.register_forward_hook(_count_own_attention)


def _replaceable(model: nn.Module, module: nn.Module) -> bool:
    """Whether the attention of this module is the function that the config names; T5's is, and its class is silent."""
    names = inspect.unwrap(type(module).forward).__code__.co_names
    return bool(getattr(model, "_supports_attention_backend", False)) or "ALL_ATTENTION_FUNCTIONS" in names


def _count_own_attention(module: Any, inputs: tuple[torch.Tensor, ...], outputs: Any) -> None:
    """Count attention that an architecture does not let be replaced (BLOOM, Falcon), from its input's shape."""
    meter: FlopMeter = module.flop_meter
    hidden, out = inputs[0], outputs[0] if isinstance(outputs, tuple) else outputs
    product = 2 * hidden.shape[0] * hidden.shape[1] ** 2 * hidden.shape[2]
    meter.add("attention", 2 * product)
    *into, _ = [part for part in module.children() if hasattr(part, "in_features")]
    reached = hidden.requires_grad or any(p.requires_grad for part in into for p in part.parameters())
    if out.requires_grad and reached:
        out.register_hook(lambda gradient: meter.add("attention_back", 4 * product))


def _count_linear(module: Any, inputs: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
    product = 2 * out.numel() * inputs[0].shape[-1]
    _count(module.flop_meter, product, out, inputs[0].requires_grad, module.weight.requires_grad)


def _count_router(module: Any, inputs: tuple[torch.Tensor, ...], out: Any) -> None:
    """A module that multiplies by a matrix of its own, whose product is the first tensor that it returns."""
    matrix = next(parameter for parameter in module.parameters(recurse=False) if is_router(module, parameter))
    product = 2 * inputs[0].numel() * matrix.shape[0]
    logits = out if isinstance(out, torch.Tensor) else out[0]
    _count(module.flop_meter, product, logits, inputs[0].requires_grad, matrix.requires_grad)


def _count_experts(module: Any, inputs: tuple[Any, ...], named: dict[str, Any], out: torch.Tensor) -> None:
    """Float experts, in the order of their products; int8 ones count themselves and have no such parameters."""
    hidden, experts, *_ = (*inputs, *named.values())
    reached: bool = hidden.requires_grad
    for weight in (parameter for parameter in module.parameters(recurse=False) if parameter.ndim == 3):
        product = 2 * experts.numel() * weight.shape[1] * weight.shape[2]
        _count(module.flop_meter, product, out, reached, weight.requires_grad)
        reached = reached or weight.requires_grad


def _count(meter: FlopMeter, product: int, out: torch.Tensor, dx: bool, dw: bool) -> None:
    """Count a product now, and its gradients to input and weight, where asked for, when one arrives at `out`."""
    meter.add("forward", product)
    if out.requires_grad:

        def count(gradient: torch.Tensor) -> None:
            meter.add("dx", dx * product)
            meter.add("dw", dw * product)

        out.register_hook(count)
