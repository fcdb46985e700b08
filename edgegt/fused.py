"""Norms, gates and rotations of transformers' layers as one autograd node each.

Written operation by operation, a root-mean-square norm keeps two tensors for backward and makes six passes over memory,
a gated unit keeps four, and a rotation makes eight passes for q and k. Here each is one node that keeps its inputs (and
one number per row), computed by the compiled kernels where they are, else by torch's operations with the same result.

A family is not known by its name: a class or function is taken over only if it agrees with what is done here on random
numbers, once per class; of norms each one, since their classes have options. What does not agree stays as it is.
Instances are changed, never classes or modules, so that a model of transformers beside ours is untouched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from edgegt.native import Kernels, usable

AGREES = 1e-5
_WIDTH = 16
_ROTATION = "apply_rotary_pos_emb"
# What a class or function that is made or used in another way may say.
_FOREIGN = (TypeError, AttributeError, StopIteration, RuntimeError, ValueError, LookupError)


def fuse(model: nn.Module, kernels: Kernels | None = None) -> int:
    """Take over the norms, gated units and rotations of `model` that are understood; returns how many."""
    taken = 0
    for module in model.modules():
        forward = _forward_of(module, kernels)
        if forward is not None:
            module.forward = forward
            taken += 1
    return taken


def _forward_of(module: nn.Module, kernels: Kernels | None) -> Callable[..., Tensor] | None:
    """The fused forward of one module, None when it is not one of those that are understood."""
    kind: Any = type(module)
    if kind.__name__.endswith("RMSNorm"):
        form = _norm_form(module)
        return None if form is None else _norm_forward(module, *form, kernels)
    if {name for name, _ in module.named_children()} >= {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        act: Any = type(module.act_fn)
        return _gate_forward(module, kernels) if _is_gated(kind, act) else None
    if _ROTATION in getattr(getattr(kind.forward, "__code__", None), "co_names", ()):
        return _rotating_forward(module, kernels) if _rotates(kind.forward.__globals__[_ROTATION]) else None
    return None


class _RmsNorm(torch.autograd.Function):
    """y = x * rstd * (weight + offset); keeps x and rstd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offset: float, eps: float, kernels: Kernels | None) -> Tensor:
        x = x.contiguous()
        if kernels is not None and usable(x, weight):
            y, rstd = kernels.rms_norm(x, weight, offset, eps)
        else:
            rstd = (x.square().mean(-1) + eps).rsqrt_()
            y = x * rstd.unsqueeze(-1) * (weight + offset if offset else weight)
        ctx.save_for_backward(x, rstd.reshape(x.shape[:-1]), weight)
        ctx.offset, ctx.kernels = offset, kernels
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, rstd, weight = ctx.saved_tensors
        dy, dx, dweight = grads[0], None, None
        if ctx.needs_input_grad[0]:
            if ctx.kernels is not None and usable(x, weight, dy):
                dx = ctx.kernels.rms_norm_back(dy, x, weight, ctx.offset, rstd)
            else:
                up = dy * (weight + ctx.offset if ctx.offset else weight)
                share = (up * x).mean(-1, keepdim=True) * rstd.square().unsqueeze(-1)
                dx = up.addcmul_(share, x, value=-1).mul_(rstd.unsqueeze(-1))
        if ctx.needs_input_grad[1]:
            dweight = (dy * x).mul_(rstd.unsqueeze(-1)).reshape(-1, x.shape[-1]).sum(0)
        return dx, dweight, None, None, None


class _SiluMul(torch.autograd.Function):
    """y = silu(gate) * up; keeps both."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kernels: Kernels | None) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.kernels = kernels
        return kernels.silu_mul(gate, up) if kernels is not None and usable(gate, up) else silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        dy = grads[0]
        if ctx.kernels is not None and usable(gate, up, dy):
            return *ctx.kernels.silu_mul_back(dy, gate, up), None
        share = torch.sigmoid(gate)
        value = gate * share
        slope = share.addcmul_(value, 1 - share)
        return slope.mul_(up).mul_(dy), value.mul_(dy), None


class _Rotate(torch.autograd.Function):
    """x [B, H, T, D] turned by cosine and sine [B or 1, T, D]; keeps these."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor, kernels: Kernels | None) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        ctx.kernels = kernels
        return _turned(x, cosine, sine, kernels, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cosine, sine = ctx.saved_tensors
        return _turned(grads[0], cosine, sine, ctx.kernels, back=True), None, None, None


def _turned(x: Tensor, cosine: Tensor, sine: Tensor, kernels: Kernels | None, back: bool) -> Tensor:
    if kernels is not None and usable(x, cosine, sine):
        return kernels.rotate(x, cosine, sine, back)
    cosine, sine = cosine.unsqueeze(1), sine.unsqueeze(1)
    half = x.shape[-1] // 2
    turned = x * cosine
    if back:
        turned[..., :half] += x[..., half:] * sine[..., half:]
        turned[..., half:] -= x[..., :half] * sine[..., :half]
    else:
        turned[..., :half] -= x[..., half:] * sine[..., :half]
        turned[..., half:] += x[..., :half] * sine[..., half:]
    return turned


# rms_norm(x, weight, offset, eps, kernels), silu_mul(gate, up, kernels), rotate(x, cosine, sine, kernels)
rms_norm = cast(Callable[..., Tensor], _RmsNorm.apply)
silu_mul = cast(Callable[..., Tensor], _SiluMul.apply)
rotate = cast(Callable[..., Tensor], _Rotate.apply)


def _norm_forward(module: Any, offset: float, eps: str, kernels: Kernels | None) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return rms_norm(x, module.weight, offset, getattr(module, eps), kernels)

    return forward


def _gate_forward(module: Any, kernels: Kernels | None) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        y: Tensor = module.down_proj(silu_mul(module.gate_proj(x), module.up_proj(x), kernels))
        return y

    return forward


def _rotating_forward(module: nn.Module, kernels: Kernels | None) -> Callable[..., Tensor]:
    """The module's own forward, with the rotation it calls replaced in a copy of the names it sees."""
    theirs = type(module).forward

    def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **options: Any) -> tuple[Tensor, Tensor]:
        if more or options or cos.ndim != 3 or cos.shape[-1] != q.shape[-1]:  # GPT-NeoX turns a part of each head
            original: tuple[Tensor, Tensor] = theirs.__globals__[_ROTATION](q, k, cos, sin, *more, **options)
            return original
        return rotate(q, cos, sin, kernels), rotate(k, cos, sin, kernels)

    seen = {**theirs.__globals__, _ROTATION: turn}
    ours = FunctionType(theirs.__code__, seen, theirs.__name__, theirs.__defaults__, theirs.__closure__)
    ours.__kwdefaults__ = theirs.__kwdefaults__
    return MethodType(ours, module)


def _numbers(*shape: int) -> Tensor:
    """The same random numbers each time, whatever mode is active and without touching torch's generator."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), device="cpu")


def _agree(theirs: Tensor, ours: Tensor) -> bool:
    return theirs.shape == ours.shape and bool((theirs - ours).abs().max() <= AGREES * theirs.abs().max())


def _norm_form(module: nn.Module) -> tuple[float, str] | None:
    """(offset of the weight, name of its epsilon) if the module is a root-mean-square norm of its last dimension."""
    with unset_fake_temporarily(), torch.no_grad():
        try:
            norm: Any = copy.copy(module)
            width = norm.weight.numel()
            norm._parameters = {"weight": nn.Parameter(_numbers(width))}  # of the copy alone
            eps = next(name for name in ("variance_epsilon", "eps") if isinstance(getattr(norm, name, None), float))
            setattr(norm, eps, 0.5)  # large enough to be seen
            x = _numbers(3, width)
            theirs = type(module).forward(norm, x)
            forms = [(offset, rms_norm(x, norm.weight, offset, 0.5, None)) for offset in (0.0, 1.0)]
            return next(((offset, eps) for offset, ours in forms if _agree(theirs, ours)), None)
        except _FOREIGN:
            return None


@cache
def _is_gated(kind: type[nn.Module], act: type[nn.Module]) -> bool:
    """Whether the class computes down(silu(gate(x)) * up(x)) and nothing else."""
    with unset_fake_temporarily(), torch.no_grad():
        try:
            parts = [nn.Linear(_WIDTH, _WIDTH, bias=False, device="cpu") for _ in range(3)]
            for seed, part in enumerate(parts):
                part.weight.copy_(_numbers(_WIDTH + seed, _WIDTH)[:_WIDTH])
            gate, up, down = parts
            like = SimpleNamespace(gate_proj=gate, up_proj=up, down_proj=down, act_fn=act())
            x = _numbers(3, _WIDTH)
            return _agree(cast(Any, kind.forward)(like, x), down(silu_mul(gate(x), up(x), None)))
        except _FOREIGN:
            return False


@cache
def _rotates(theirs: Callable[..., tuple[Tensor, Tensor]]) -> bool:
    """Whether the function turns q and k [B, H, T, D] by halves."""
    with unset_fake_temporarily(), torch.no_grad():
        try:
            q, k, cos, sin = _numbers(2, 3, 5, 8), _numbers(2, 1, 5, 8), _numbers(2, 5, 8), _numbers(1, 2, 5, 8)[0]
            pairs = zip(theirs(q, k, cos, sin), (_turned(x, cos, sin, None, back=False) for x in (q, k)), strict=True)
            return all(_agree(*pair) for pair in pairs)
        except _FOREIGN:
            return False


def fused_parts(model: nn.Module) -> Iterator[str]:
    """Names of the modules that were taken over."""
    return (name for name, module in model.named_modules() if "forward" in module.__dict__)
