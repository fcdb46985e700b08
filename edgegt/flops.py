"""FLOPs counted while they are executed, from the shapes at hand and independently of the cost table.

Int8 linears report to the meter themselves. Attention and float linears are counted here: their forward when it runs,
their backward when a gradient arrives. One multiply-accumulate is 2 FLOPs; attention counts as two products forward
and two for each of them backward, whichever kernel runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import nn

ATTENTION = "edgegt"

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


def register_attention() -> str:
    """Make transformers' models run its SDPA attention through a counting function; returns the name to ask for."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION, _counted_attention)
    AttentionMaskInterface.register(ATTENTION, _additive_mask)
    return ATTENTION


def _additive_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """transformers' mask with 0 where attention goes and the most negative number elsewhere.

    Of a boolean mask torch's kernel makes a float copy in every layer, and keeps it for backward.
    """
    from transformers.masking_utils import sdpa_mask

    mask: torch.Tensor | None = sdpa_mask(*args, **kwargs)
    if mask is None or mask.dtype != torch.bool:
        return mask
    least = torch.finfo(torch.float32).min
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, least)


def attach(model: nn.Module, meter: FlopMeter) -> None:
    """Give every module of the model the meter, and count its float linears."""
    for module in model.modules():
        module.__dict__["flop_meter"] = meter  # not a parameter, buffer or submodule
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            module.register_forward_hook(_count_linear)
        own = type(module).__name__.endswith("Attention") and not getattr(model, "_supports_attention_backend", False)
        if own and any(hasattr(part, "in_features") for part in module.children()):
            module.register_forward_hook(_count_own_attention)


def _counted_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if options.get("softcap"):
        out = _capped_attention(query, key, value, mask, float(options["softcap"]), options.get("scaling"))
    else:
        out, _ = sdpa_attention_forward(module, query, key, value, mask, **options)
    meter: FlopMeter | None = getattr(module, "flop_meter", None)
    if meter is not None:
        product = 2 * prod(query.shape[:-1]) * key.shape[-2] * query.shape[-1]
        meter.add("attention", 2 * product)
        if out.requires_grad:
            needed = [query.requires_grad, key.requires_grad, value.requires_grad]
            back = product * (sum(needed) + (needed[0] or needed[1]))
            out.register_hook(lambda gradient: meter.add("attention_back", back))
    return out, None


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


def _capped_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, cap: float, scaling: float | None
) -> torch.Tensor:
    """Attention whose scores are capped, cap tanh(s / cap) (Gemma 2), which torch's kernel does not know.

    query [B, H, T, D], key and value [B, H or fewer, S, D], mask boolean or additive; the result is [B, T, H, D].
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = torch.tanh(scores / cap) * cap
    if mask is None:
        queries, keys = scores.shape[-2:]
        mask = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).tril_(keys - queries)
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask[..., : scores.shape[-1]], torch.finfo(scores.dtype).min)
    else:
        scores = scores + mask[..., : scores.shape[-1]]
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous()


def _count_linear(module: Any, inputs: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
    meter: FlopMeter = module.flop_meter
    product = 2 * out.numel() * inputs[0].shape[-1]
    meter.add("forward", product)
    if out.requires_grad:
        dx, dw = int(inputs[0].requires_grad), int(module.weight.requires_grad)

        def count(gradient: torch.Tensor) -> None:
            meter.add("dx", dx * product)
            meter.add("dw", dw * product)

        out.register_hook(count)
