"""How fast this machine is at the pieces of a step, measured in about a second on small tensors of the model's width.

The pieces are what a step runs: int8 linears with their quantising, weight gradients, attention, the elementwise part
of a Llama layer, the loss, one slice of the optimizer, and a layer so small that only its dispatch takes time. Memory
comes from where a step's does (`pool`): on fresh memory the same pieces take up to twice as long.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

from edgegt.memory import SMALL_TENSOR
from edgegt.rates import Rates, of_profile

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from edgegt.quant import Backend

__all__ = ["Rates", "Speed", "of_machine", "of_profile"]

Speed = Rates
PIECE_S = 0.06
WIDEST = 1024
MOST_TOKENS = 512
ACTIVATIONS = 1 << 19
LOGITS = 1 << 19
UPDATED = 1 << 18
TINY = 16
# A Llama layer in units of its width: feed-forward, keys and values; the norms, rotary inputs and gates in it.
_FFN, _KV = 8 / 3, 1 / 3
# Float tensors it keeps (norms 2, q and the output 2, keys and values, 2 of the feed-forward) and int8 inputs.
_KEPT = 2 + 2 + 2 * _KV + 2 * _FFN + (3 + _FFN) / 4
_LINEARS = 7


def of_machine(
    backend: Backend,
    device: torch.device,
    width: int,
    tokens: int,
    eight_bit: bool,
    *,
    head_size: int = 64,
    length: int = 256,
    piece_s: float = PIECE_S,
) -> Rates:
    """Measured here in about a second and 40 MiB, at the model's width and the batch's tokens, drawing nothing.

    head_size: of attention; length: tokens of a row. piece_s: seconds to spend on each of the pieces.
    """
    piece = partial(seconds_of, device=device, budget_s=piece_s)
    kernels = backend.kernels
    width = max(TINY, min(width, WIDEST))
    most = max(1, min(tokens, MOST_TOKENS))
    int8, int8_back, dw, float32 = _products(backend, device, width, most, piece)
    forward, backward = _elementwise(kernels, device, width, max(1, min(tokens, ACTIVATIONS // width)), piece)
    least = _update(backend, device, TINY, SMALL_TENSOR, eight_bit, piece)
    update = _update(backend, device, width, UPDATED, eight_bit, piece)
    return Rates(
        int8=int8,
        int8_back=int8_back,
        dw=dw,
        attention=_attention(backend, device, width, min(length, most), head_size, max(1, most // length), piece),
        float32=float32,
        forward_bytes=forward,
        backward_bytes=backward,
        logits=_loss(device, piece),
        optimizer=UPDATED / max(update - least, update / 2),
        optimizer_float32=UPDATED / _update(backend, device, width, UPDATED, False, piece),
        dispatch_s=_dispatch(backend, device, piece),
        update_s=least,
    )


_Timer = Callable[[Callable[[], object]], float]


def _products(
    backend: Backend, device: torch.device, width: int, tokens: int, time_of: _Timer
) -> tuple[float, float, float, float]:
    """FLOP/s of an int8 linear [2 width, width], of dx through it, of its dw, and of the same product in float32."""
    import torch

    out = 2 * width
    x, dy = _random(tokens, width, device=device), _random(tokens, out, device=device)
    weight = _random(out, width, device=device).mul_(40).clamp_(-127, 127)
    q, scale = weight.to(torch.int8), torch.ones(out, device=device)
    rows, row_scale = backend.quantize_tokens(x)
    flops = 2 * tokens * width * out
    return (
        flops / time_of(lambda: backend.product(*backend.quantize_tokens(x), q, scale)),
        flops / time_of(lambda: backend.product_back(*backend.quantize_tokens(dy, scale), q)),
        flops / time_of(lambda: backend.weight_gradient(dy, rows, row_scale)),
        flops / time_of(lambda: x @ weight.t()),
    )


def _attention(
    backend: Backend, device: torch.device, width: int, length: int, head_size: int, rows: int, time_of: _Timer
) -> float:
    """FLOP/s of masked attention forward and backward: two products, and two for each of them, masked or not."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from edgegt.attention import MULTIPLE, Seen, causal_attention

    heads = max(1, width // head_size)
    operands = [_random(rows, length, heads, head_size, device=device).requires_grad_() for _ in range(3)]
    mask = torch.ones(rows, 1, length, length, dtype=torch.bool, device=device).tril_()
    dy = torch.ones(rows, length, heads, head_size, device=device)
    seen = Seen(torch.zeros(rows, dtype=torch.int64, device=device))

    def run() -> None:
        q, k, v = (operand.transpose(1, 2) for operand in operands)
        if backend.kernels is None or head_size % MULTIPLE:
            out = scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
        else:
            out = causal_attention(q, k, v, seen, head_size**-0.5, backend.kernels)
        torch.autograd.grad(out, operands, dy)

    return 6 * 2 * rows * heads * length**2 * head_size / time_of(run)


def _elementwise(kernels: Any, device: torch.device, width: int, tokens: int, time_of: _Timer) -> tuple[float, float]:
    """Kept bytes/s of the elementwise work of a layer, forward and backward: norms and residuals, rotary, gates."""
    forward = backward = 0.0
    for piece, count, wide, times in _pieces(kernels):
        inputs = [_random(tokens, wide * width, device=device).requires_grad_() for _ in range(count)]
        ahead = time_of(partial(piece, *inputs))
        both = time_of(partial(_there_and_back, piece, inputs))
        forward += times * ahead
        backward += times * max(both - ahead, ahead / 2)
    kept = 4 * tokens * width * _KEPT
    return kept / forward, kept / backward


def _pieces(kernels: Any) -> tuple[tuple[Callable[..., Tensor], int, int, float], ...]:
    """(function, its inputs, their width, how often): a norm of a sum, a rotation, a gated unit; as layers run them."""
    import torch

    from edgegt.fused import rms_norm, rotate, silu_mul

    def norm(x: Tensor, residual: Tensor) -> Tensor:
        return rms_norm(x + residual, torch.ones(x.shape[-1], device=x.device), 0.0, 1e-6, kernels)

    def turn(x: Tensor) -> Tensor:
        angles = torch.ones(1, *x.shape, device=x.device)
        return rotate(x[None, None], angles, angles, kernels)

    def gate(x: Tensor, up: Tensor) -> Tensor:
        return silu_mul(x, up, kernels)

    return (norm, 2, 1, 2.0), (turn, 1, 1, 1 + _KV), (gate, 2, 2, _FFN / 2)


def _there_and_back(piece: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    import torch

    y = piece(*inputs)
    torch.autograd.grad(y, inputs, torch.ones_like(y))


def _loss(device: torch.device, time_of: _Timer) -> float:
    """Logits/s through the scaling of the head's product, cross-entropy, and back."""
    import torch
    from torch.nn.functional import cross_entropy

    logits = _random(LOGITS >> 14, 1 << 14, device=device)
    labels = torch.zeros(logits.shape[0], dtype=torch.long, device=device)

    def run() -> None:
        scores = (logits * 1.0).requires_grad_()
        torch.autograd.grad(cross_entropy(scores, labels, reduction="sum"), scores)

    return logits.numel() / time_of(run)


def _update(
    backend: Backend, device: torch.device, width: int, elements: int, eight_bit: bool, time_of: _Timer
) -> float:
    """Seconds of what one trained tensor costs at a step: norm of its gradient, AdamW, its planes."""
    from edgegt.optimizer import AdamW, clip
    from edgegt.quant import split_planes

    optimizer, master = AdamW(eight_bit, kernels=backend.kernels), _random(elements // width, width, device=device)
    gradient, planes = master.clone(), split_planes(master)

    def run() -> None:
        clip(gradient, 1.0)
        optimizer.update("piece", master, gradient, 1e-9)
        backend.refresh(planes, master)

    return time_of(run)


def _dispatch(backend: Backend, device: torch.device, time_of: _Timer) -> float:
    """Seconds of a layer forward and backward with a width and a row of 16."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from edgegt.quant import InputCache, Int8Linear, quantize_rows

    inputs = InputCache()
    weight = quantize_rows(torch.eye(TINY, device=device))
    linears = [Int8Linear(weight, backend=backend, inputs=inputs) for _ in range(_LINEARS)]
    x = _random(TINY, TINY, device=device).requires_grad_()
    (norm, *_), (turn, *_), (gated, *_) = _pieces(backend.kernels)

    def run() -> None:
        q, k, v, o, gate, up, down = linears
        h = norm(x, x)
        h = x + o(scaled_dot_product_attention(turn(q(h)), turn(k(h)), v(h)[None, None], is_causal=True))
        y = norm(h, h)
        y = h + down(gated(gate(y), up(y)))
        torch.autograd.grad(y, x, torch.ones_like(y))

    return time_of(run)


def _random(*shape: int, device: torch.device) -> Tensor:
    """Normal numbers, the same each time, from a generator of their own."""
    import torch

    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device)


def seconds_of(run: Callable[[], object], device: torch.device, budget_s: float) -> float:
    """Mean of 3 to 200 runs within the budget, after one that warms up.

    The mean and not the median, because a step waits for other programs as the pieces do.
    """
    import torch

    def once() -> float:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    spent = [once() for _ in range(3)]
    spent += [once() for _ in range(min(200, int(budget_s / max(fmean(spent), 1e-6))) - len(spent))]
    return fmean(spent)
