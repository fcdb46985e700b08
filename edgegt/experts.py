"""Mixtures of experts of transformers' models: stacked weights, one product for the tokens that an expert was sent.

transformers marks the modules that hold the experts and lets their forward be replaced. Here it is replaced on each
instance: by int8 products (`quant.experts`) in a model in training, and in a trace by one node per product, whose
counts need no routing: every token goes to the same number of experts, whichever they are.
A family is not known by its name: the module's own forward has to agree with what is done here, on random numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from edgegt.architecture import is_experts
from edgegt.errors import InputError
from edgegt.fused import silu_mul
from edgegt.native import Kernels
from edgegt.quant import Int8Experts, Routing, combine, spread

EXPERTS_NODE = "_TracedExpertsBackward"  # as autograd calls it
AGREES = 1e-5
_FOREIGN = (TypeError, AttributeError, RuntimeError, ValueError, LookupError)


def use_experts(model: nn.Module, kernels: Kernels | None = None) -> None:
    """Let the model's experts run here. Raises: InputError when they compute something else than is known here."""
    for name, module in model.named_modules():
        if is_experts(module):
            _check(name, module)
            module.forward = MethodType(_forward_with(_gate_of(module, kernels)), module)


def stacked_names(module: Any) -> tuple[str, str]:
    """The names of the first and the second weight of a module with experts."""
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


def _forward_with(gate: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def forward(self: Any, hidden: Tensor, experts: Tensor, shares: Tensor) -> Tensor:
        """Of hidden [n, in] with int64 experts [n, k] and float shares [n, k]: the sum by shares, [n, in]."""
        first, second = (getattr(self, name) for name in stacked_names(self))
        if isinstance(first, Int8Experts):
            routing, order = Routing.of(experts, first.experts)
            y = spread(hidden, first, routing)
            return combine(y, shares.reshape(-1)[order], second, routing, gate)
        if not isinstance(hidden, FakeTensor):
            raise InputError("experts in float are transformers' own matter: only a trace or an int8 model comes here")
        order = experts.reshape(-1).argsort(stable=True)
        tokens = order // experts.shape[1]
        count = hidden.shape[0]
        y = _traced(hidden, first, None, tokens, count)
        return _traced(y, second, shares.reshape(-1)[order], tokens, count)

    return forward


class _TracedExperts(torch.autograd.Function):
    """The shapes of `spread` and, with a share, of `combine`: saves what either may keep, and carries its counts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, share: Tensor | None, tokens: Tensor, count: int) -> Tensor:
        pairs, (_, out, width) = tokens.shape[0], weight.shape
        ctx.flops = 2 * pairs * out * width
        if share is None:
            ctx.inputs, ctx.between = 1, 4 * out * (pairs // count)
            ctx.save_for_backward(tokens, x)
            return x.new_empty(pairs, out)
        ctx.inputs, ctx.between = pairs // count, 4 * x.shape[1] * (pairs // count)
        made = x.new_empty(pairs, out, dtype=torch.int8), x.new_empty(pairs)
        ctx.save_for_backward(tokens, x, share, *made)
        return x.new_empty(count, out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError("a trace has no gradients")


def _traced(x: Tensor, weight: Tensor, share: Tensor | None, tokens: Tensor, count: int) -> Tensor:
    return cast(Callable[..., Tensor], _TracedExperts.apply)(x, weight, share, tokens, count)


def _gate_of(module: Any, kernels: Kernels | None) -> Callable[[Tensor], Tensor]:
    """What is between the two products: of y [n, 2 inner] or, without a gate, [n, inner]."""
    if not module.has_gate:
        return cast(Callable[[Tensor], Tensor], module.act_fn)

    def fused(y: Tensor) -> Tensor:
        gate, up = y.chunk(2, -1)
        return silu_mul(gate, up, kernels)

    with unset_fake_temporarily(), torch.no_grad():
        y = _numbers(5, 16)
        same = _agree(module._apply_gate(y), fused(y))
    return fused if same else cast(Callable[[Tensor], Tensor], module._apply_gate)


def _check(name: str, module: Any) -> None:
    """Raises: InputError when the module's own forward does something else than is done here."""
    marks = {"a bias": module.has_bias, "weights laid the other way": module.is_transposed}
    marks |= {"a norm after each expert": module.has_post_expert_norm}
    found = next((what for what, there in marks.items() if there), None)
    if found is None and not _computes_the_same(module):
        found = "a form of their own"
    if found is not None:
        raise InputError(
            f"the experts '{name}' have {found}, which edgegt does not know: give a model whose experts are as "
            "Mixtral's or Qwen's"
        )


def _computes_the_same(module: Any) -> bool:
    with unset_fake_temporarily(), torch.no_grad():
        try:
            like, inner = copy.copy(module), 6
            first, second = stacked_names(module)
            rows = 2 * inner if module.has_gate else inner
            weights = _numbers(3, rows, 4), _numbers(3, 4, inner)
            like._parameters = dict(zip((first, second), map(nn.Parameter, weights), strict=True))  # of the copy alone
            like.num_experts = 3
            x, experts, shares = _numbers(5, 4), torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0], [0, 1]]), _numbers(5, 2)
            theirs = type(module).forward.__wrapped__(like, x, experts, shares)
            return _agree(theirs, _plain(module, *weights, x, experts, shares))
        except _FOREIGN:
            return False


def _plain(module: Any, first: Tensor, second: Tensor, x: Tensor, experts: Tensor, shares: Tensor) -> Tensor:
    """What experts are taken to compute, pair by pair."""
    gate = module._apply_gate if module.has_gate else module.act_fn
    rows = []
    for token, chosen, share in zip(x, experts.tolist(), shares, strict=True):
        made = [gate(token @ first[expert].t()) @ second[expert].t() for expert in chosen]
        rows.append((torch.stack(made) * share[:, None]).sum(0))
    return torch.stack(rows)


def _numbers(*shape: int) -> Tensor:
    """The same random numbers each time, without touching torch's generator."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), device="cpu")


def _agree(theirs: Tensor, ours: Tensor) -> bool:
    return theirs.shape == ours.shape and bool((theirs - ours).abs().max() <= AGREES * theirs.abs().max())
