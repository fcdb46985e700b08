"""The int8 experts of a mixture: each multiplies only the tokens that its router sent it.

    y[s]   = x[t] W1_e^T                       `spread`: s runs over pairs of a token t and one of its experts e
    out[t] = sum_s share[s] gate(y[s]) W2_e^T  `combine`

The stacked weight [experts, out, in] is one int8 matrix [experts * out, in], so that masters, planes, patches and
optimizer states are those of any linear. Pairs are sorted by expert, and one expert runs at a time: nothing of the size
of all pairs exists but y, and in backward its gradient. Rows of experts without tokens get a gradient of zero.
The gradient of a share needs what its expert gave, which is kept in int8: one byte per element.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from edgegt.quant.backend import Backend
from edgegt.quant.linear import InputCache, Int8Linear, Meter
from edgegt.quant.weight import Int8Weight

Gate = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Routing:
    """Pairs of a token and an expert, sorted by expert, then by token. tokens: int64 [S]; count: of tokens.

    parts: the experts that saw tokens, and their places among the pairs.
    """

    tokens: Tensor
    count: int
    parts: tuple[tuple[int, slice], ...]

    @classmethod
    def of(cls, experts: Tensor, number: int) -> tuple[Routing, Tensor]:
        """The routing of int64 experts [n, k] out of `number`, and the order int64 [S] that sorts flat [n * k]."""
        flat = experts.reshape(-1)
        order = flat.argsort(stable=True)
        parts, start = [], 0
        for expert, pairs in enumerate(torch.bincount(flat, minlength=number).tolist()):
            if pairs:
                parts.append((expert, slice(start, start + pairs)))
            start += pairs
        return cls(order // experts.shape[1], experts.shape[0], tuple(parts)), order

    def first_half(self, part: slice) -> int:
        """How many pairs of this part have a token of the first half of all."""
        return int((self.tokens[part] < self.count // 2).sum())


class Int8Experts(Int8Linear):
    """The weight of all experts, int8 [experts * out, in]: trained as any int8 linear, for `spread` or `combine`."""

    def __init__(
        self,
        weight: Int8Weight,
        *,
        experts: int,
        backend: Backend,
        inputs: InputCache,
        name: str = "",
        meter: Meter | None = None,
    ) -> None:
        super().__init__(weight, backend=backend, inputs=inputs, name=name, meter=meter)
        self.experts = experts
        self.width = weight.shape[0] // experts

    def of_expert(self, expert: int, q: Tensor, scale: Tensor) -> Tensor:
        """y, float32 [n, out], of one expert's quantised input: int8 [n, in] and float32 scale [n]."""
        return self._planes(q, scale, self._part(expert), "forward")

    def back_of_expert(self, expert: int, dy: Tensor) -> Tensor:
        """dx, float32 [n, in], of one expert's dy [n, out]."""
        weight = self._part(expert)
        return self._back(dy, weight.scale.to(torch.float32), weight, "dx", False)

    def add_gradient(self, expert: int, dy: Tensor, q: Tensor, scale: Tensor, dw: Tensor) -> None:
        """Add one expert's weight gradient to its rows of dw, float32 [experts * out, in]."""
        self._count("dw", *dy.shape)
        self.backend.weight_gradient(dy, q, scale, dw[self._rows(expert)])

    def _rows(self, expert: int) -> slice:
        return slice(expert * self.width, (expert + 1) * self.width)

    def _part(self, expert: int) -> Int8Weight:
        rows, whole = self._rows(expert), self.weight
        return Int8Weight(whole.q[rows], whole.scale[rows], None if whole.low is None else whole.low[rows])


def spread(x: Tensor, layer: Int8Experts, routing: Routing) -> Tensor:
    """y, float32 [S, out], of x [n, in]: the first product of every pair's expert."""
    q, scale = layer.inputs.quantize(x, layer.backend)
    master = layer.master if torch.is_grad_enabled() else None
    if layer.probe is not None and torch.is_grad_enabled() and not x.requires_grad:
        master = nn.Parameter(torch.empty(0, device=x.device))  # as in Int8Linear
    return _spread(x, master, q, scale, layer, routing)


def combine(y: Tensor, share: Tensor, layer: Int8Experts, routing: Routing, gate: Gate) -> Tensor:
    """out, float32 [n, out], of y [S, ...]: gate, the second product, and their sum over a token's pairs by share [S].

    gate: y of any number of pairs to the input of the second product; differentiated again in backward.
    """
    master = layer.master if torch.is_grad_enabled() else None
    return _combine(y, master, share, layer, routing, gate)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, master: Tensor | None, q: Tensor, scale: Tensor, layer: Int8Experts, routing: Routing
    ) -> Tensor:
        ctx.layer, ctx.count, ctx.parts, ctx.probe = layer, routing.count, routing.parts, layer.probe
        ctx.shape, ctx.dtype = x.shape, x.dtype
        trained = layer.probe is not None or (master is not None and master.requires_grad)
        ctx.save_for_backward(routing.tokens, *((q, scale) if trained else (None, None)))
        y = torch.empty(routing.tokens.shape[0], layer.width, device=x.device)
        for expert, part in routing.parts:
            tokens = routing.tokens[part]
            y[part] = layer.of_expert(expert, q[tokens], scale[tokens])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layer, (all_tokens, q, scale) = ctx.layer, ctx.saved_tensors
        routing = Routing(all_tokens, ctx.count, ctx.parts)
        dx = torch.zeros(ctx.shape, device=grads[0].device) if ctx.needs_input_grad[0] else None
        dw = _no_gradient(layer) if ctx.needs_input_grad[1] and ctx.probe is None else None
        for expert, part in routing.parts:
            tokens, dy = routing.tokens[part], grads[0][part]
            if q is not None:
                _weigh(ctx, routing, (expert, part), dy, (q[tokens], scale[tokens]), dw)
            if dx is not None:
                dx.index_add_(0, tokens, layer.back_of_expert(expert, dy))
        return None if dx is None else dx.to(ctx.dtype), dw, None, None, None, None


class _Combine(torch.autograd.Function):
    """Keeps y where its gradient is needed, the input of a trained weight in int8, and for the shares the output."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, master: Tensor | None, share: Tensor, layer: Int8Experts, routing: Routing, gate: Gate
    ) -> Tensor:
        ctx.layer, ctx.count, ctx.parts, ctx.probe, ctx.gate = layer, routing.count, routing.parts, layer.probe, gate
        trained = layer.probe is not None or (master is not None and master.requires_grad)
        needs_y, needs_share = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        read = _room(y.shape[0], layer.in_features, y.device) if trained else None
        made = _room(y.shape[0], layer.width, y.device) if needs_share else None
        out = torch.zeros(routing.count, layer.width, device=y.device)
        for expert, part in routing.parts:
            q, scale = layer.backend.quantize_tokens(gate(y[part]))
            if read is not None:
                read[0][part], read[1][part] = q, scale
            z = layer.of_expert(expert, q, scale)
            if made is not None:
                made[0][part], made[1][part] = layer.backend.quantize_tokens(z)
            out.index_add_(0, routing.tokens[part], z.mul_(share[part, None]))
        kept = (y if needs_y else None, share if needs_y or trained else None)
        ctx.save_for_backward(routing.tokens, *kept, *(read or (None, None)), *(made or (None, None)))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layer, (tokens, y, share, q, scale, made, made_scale) = ctx.layer, ctx.saved_tensors
        routing = Routing(tokens, ctx.count, ctx.parts)
        dy = None if y is None else torch.empty_like(y)
        dshare = None if made is None else torch.empty_like(made_scale)
        dw = _no_gradient(layer) if ctx.needs_input_grad[1] and ctx.probe is None else None
        for expert, part in routing.parts:
            dz = grads[0][routing.tokens[part]]
            if dshare is not None:
                dshare[part] = (dz * made[part]).sum(1).mul_(made_scale[part])
            if share is None:
                continue
            dz.mul_(share[part, None])
            if q is not None:
                _weigh(ctx, routing, (expert, part), dz, (q[part], scale[part]), dw)
            if dy is not None:
                dy[part] = _through(ctx.gate, y[part], layer.back_of_expert(expert, dz))
        return dy, dw, dshare, None, None, None


def _room(pairs: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """int8 [S, width] and float32 scales [S], to be filled part by part."""
    return torch.empty(pairs, width, dtype=torch.int8, device=device), torch.empty(pairs, device=device)


def _weigh(
    ctx: Any, routing: Routing, at: tuple[int, slice], dy: Tensor, read: tuple[Tensor, Tensor], dw: Tensor | None
) -> None:
    """One expert's part of the weight gradient: to the probe where there is one, else to its rows of dw."""
    expert, part = at
    if ctx.probe is not None:
        ctx.probe(ctx.layer.name, dy, *read, routing.first_half(part))
    elif dw is not None:
        ctx.layer.add_gradient(expert, dy, *read, dw)


def _no_gradient(layer: Int8Experts) -> Tensor:
    return torch.zeros(layer.weight.shape, device=layer.weight.device)


def _through(gate: Gate, y: Tensor, dh: Tensor) -> Tensor:
    """The gradient to y of gate(y), of that to its result."""
    with torch.enable_grad():
        leaf = y.detach().requires_grad_()
        return torch.autograd.grad(gate(leaf), leaf, dh)[0]


_spread = cast(Callable[..., Tensor], _Spread.apply)
_combine = cast(Callable[..., Tensor], _Combine.apply)
