"""Attention of transformers' models: counted, and causal attention as one autograd node that skips what is masked.

Batches are padded on the left, so that what a query may see is a range of keys: from the first token of its row, or of
its sliding window, to itself. A mask of that form is recognised by its values, once per forward, and then nothing
outside the range is computed, keys and values that heads share are not copied, and no mask is kept for backward. Any
other mask, dropout, a bias of positions, and a device without the compiled kernels go through torch's own kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from edgegt.native import Kernels, usable

ATTENTION = "edgegt"
CAUSAL_NODE = "_CausalAttentionBackward"  # as autograd calls it
_CAUSAL = "causal_attention"
MULTIPLE = 4


@dataclass(frozen=True, eq=False)
class Seen:
    """What queries see: keys from max(start of the row, query - window + 1) to the query. starts: int64 [B].

    window: 0 when there is none.
    """

    starts: Tensor
    window: int = 0


def register_attention() -> str:
    """Make transformers' models run their attention through the function here; returns the name to ask for."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, _additive_mask)
    return ATTENTION


def use_causal(model: nn.Module, kernels: Kernels | None) -> None:
    """Let the model's attention use the causal node. kernels: None in a trace, where nothing is computed."""
    for module in model.modules():
        module.__dict__[_CAUSAL] = kernels  # not a parameter, buffer or submodule


def seen_of(mask: Tensor) -> Seen | None:
    """The ranges that a boolean mask [B, 1, T, T] stands for, None when it has another form.

    What padding queries see does not matter. Of a fake mask (a trace) the form is taken for granted.
    """
    rows, _, queries, keys = mask.shape
    if queries != keys or mask.device.type != "cpu":
        return None
    if isinstance(mask, FakeTensor):
        return Seen(torch.zeros(rows, dtype=torch.int64))
    at = torch.arange(keys)
    sees_itself = mask[:, 0].diagonal(dim1=1, dim2=2)
    starts = torch.where(sees_itself.any(1), sees_itself.to(torch.uint8).argmax(1), keys)
    last = mask[:, 0, -1].sum(1)
    window = int(last.max()) if bool((last < keys - starts).any()) else 0
    expected = (at <= at[:, None]) & (at > at[:, None] - (window or keys)) & (at >= starts[:, None, None])
    differs = (mask[:, 0] != expected) & (at[:, None] >= starts[:, None, None])
    return None if bool(differs.any()) else Seen(starts, window)


class _CausalAttention(torch.autograd.Function):
    """out [B, T, H, D] of q [B, H, T, D] and k, v [B, H or fewer, T, D]; keeps these, out and one number per query."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, seen: Seen, scale: float, kernels: Kernels | None) -> Tensor:
        if kernels is None:
            out, sums = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]), q.new_empty(q.shape[:3])
        else:
            out, sums = kernels.attend(q, k, v, seen.starts, seen.window, scale)
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.seen, ctx.scale, ctx.kernels = seen, scale, kernels
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, sums = ctx.saved_tensors
        seen: Seen = ctx.seen
        found = ctx.kernels.attend_back(grads[0], q, k, v, out, sums, seen.starts, seen.window, ctx.scale)
        return *found, None, None, None


# causal_attention(q, k, v, seen, scale, kernels)
causal_attention = cast(Callable[..., Tensor], _CausalAttention.apply)


def disagreement(kernels: Kernels) -> float:
    """The largest relative error of the kernels' output and gradients against the plain products in float64."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 70, 16), (2, 2, 70, 16), (2, 2, 70, 16), (2, 70, 4, 16))
    *exact, dout = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes)
    seen, at = Seen(torch.tensor([0, 9]), 50), torch.arange(70)
    shut = (at > at[:, None]) | (at <= at[:, None] - seen.window) | (at < seen.starts[:, None, None])
    dout *= (at >= seen.starts[:, None])[..., None, None]
    with torch.enable_grad():
        q, k, v = (tensor.requires_grad_() for tensor in exact)
        scores = (q @ k.repeat_interleave(2, 1).transpose(2, 3) * 0.25).masked_fill(shut.unsqueeze(1), -1e9)
        expected = (scores.softmax(-1) @ v.repeat_interleave(2, 1)).transpose(1, 2)
        operands = [tensor.detach().float().requires_grad_() for tensor in exact]
        out = causal_attention(*operands, seen, 0.25, kernels)
        found = torch.autograd.grad(out, operands, dout.float())
        pairs = [*zip(found, torch.autograd.grad(expected, exact, dout), strict=True)]
    live = dout.abs().sum((2, 3)) > 0
    pairs.append((out.detach()[live], expected.detach()[live]))
    return max(float((ours - theirs).norm() / theirs.norm()) for ours, theirs in pairs)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    seen = _seen_here(module, query, key, value, mask, options)
    if options.get("softcap"):
        out = _capped_attention(query, key, value, mask, float(options["softcap"]), options.get("scaling"))
    elif seen is not None:
        scale = options.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
        out = causal_attention(query, key, value, seen, scale, getattr(module, _CAUSAL))
    else:
        out, _ = sdpa_attention_forward(module, query, key, value, mask, **options)
    meter = getattr(module, "flop_meter", None)
    if meter is not None:
        product = 2 * prod(query.shape[:-1]) * key.shape[-2] * query.shape[-1]
        meter.add("attention", 2 * product)
        if out.requires_grad:
            needed = [query.requires_grad, key.requires_grad, value.requires_grad]
            back = product * (sum(needed) + (needed[0] or needed[1]))
            out.register_hook(lambda gradient: meter.add("attention_back", back))
    return out, None


def _seen_here(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, options: dict[str, Any]
) -> Seen | None:
    """What the queries of this call see, None where the causal node does not do."""
    if not hasattr(module, _CAUSAL) or not usable(query, key, value) or query.shape[-1] % MULTIPLE:
        return None
    if key.shape != value.shape or query.shape[2:] != key.shape[2:]:
        return None
    if any(options.get(name) for name in ("softcap", "dropout", "output_attentions")):
        return None
    if any(options.get(name) is not None for name in ("position_bias", "cache", "s_aux")):
        return None
    causal = options.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        return None
    if mask is not None:
        return cast("Seen | None", getattr(mask, "seen", None))
    return Seen(torch.zeros(query.shape[0], dtype=torch.int64))


def _additive_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' mask with 0 where attention goes and the most negative number elsewhere, and what it lets see.

    Of a boolean mask torch's kernel makes a float copy in every layer, and keeps it for backward.
    """
    from transformers.masking_utils import sdpa_mask

    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    if mask is None or mask.dtype != torch.bool:
        return mask
    least = torch.finfo(torch.float32).min
    additive: Any = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, least)
    additive.seen = seen_of(mask)
    return cast(Tensor, additive)


def _capped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Any, cap: float, scaling: float | None
) -> Tensor:
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
