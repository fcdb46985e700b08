"""How fast this machine is at the pieces of a step, measured in about a second on small tensors of the model's width.

The pieces are what a step runs: int8 linears with their quantising, weight gradients, attention, the elementwise part
of a Llama layer, the loss, one slice of the optimizer, and a layer so small that only its dispatch takes time. Results
are allocated anew each time, as in a step, because fresh memory costs as much as the arithmetic on it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING

from edgegt.memory import SMALL_TENSOR
from edgegt.process import trim
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
LOGITS = 1 << 20
UPDATED = 1 << 18
TINY = 16
# Larger tensors get memory of their own each time (see `process`), smaller ones reuse what is there.
MAPPED_BYTES = 1 << 18
# A Llama layer in units of its width: feed-forward, keys and values; the norms, rotary inputs and gates in it.
_FFN, _KV = 8 / 3, 1 / 3
# Float tensors it keeps (norms 4, q and the output 2, keys and values, 3 of the feed-forward) and int8 inputs.
_KEPT = 4 + 2 + 2 * _KV + 3 * _FFN + (3 + _FFN) / 4
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
    small = partial(seconds_of, device=device, budget_s=piece_s)
    large = partial(small, fresh=device.type == "cpu")
    width = max(TINY, min(width, WIDEST))
    most = max(1, min(tokens, MOST_TOKENS))
    layer = large if 4 * width * most >= MAPPED_BYTES else small
    int8, int8_back, dw, float32 = _products(backend, device, width, most, layer)
    forward, backward = _elementwise(device, width, max(1, min(tokens, ACTIVATIONS // width)), layer)
    least = _update(device, TINY, SMALL_TENSOR, eight_bit, small)
    update = _update(device, width, UPDATED, eight_bit, large)
    return Rates(
        int8=int8,
        int8_back=int8_back,
        dw=dw,
        attention=_attention(device, width, min(length, most), head_size, max(1, most // length), layer),
        float32=float32,
        forward_bytes=forward,
        backward_bytes=backward,
        logits=_loss(device, large),
        optimizer=UPDATED / max(update - least, update / 2),
        optimizer_float32=UPDATED / _update(device, width, UPDATED, False, large),
        dispatch_s=_dispatch(backend, device, small),
        update_s=least,
    )


_Timer = Callable[[Callable[[], object]], float]


def _products(
    backend: Backend, device: torch.device, width: int, tokens: int, time_of: _Timer
) -> tuple[float, float, float, float]:
    """FLOP/s of an int8 linear [2 width, width], of dx through it, of its dw, and of the same product in float32."""
    import torch

    from edgegt.quant.linear import weight_gradient

    out = 2 * width
    x, dy = _random(tokens, width, device=device), _random(tokens, out, device=device)
    weight = _random(out, width, device=device).mul_(40).clamp_(-127, 127)
    q, scale = weight.to(torch.int8), torch.ones(out, device=device)
    rows, row_scale = backend.quantize_tokens(x)
    flops = 2 * tokens * width * out
    return (
        flops / time_of(lambda: backend.product(*backend.quantize_tokens(x), q, scale)),
        flops / time_of(lambda: backend.product_back(*backend.quantize_tokens(dy, scale), q)),
        flops / time_of(lambda: weight_gradient(dy, rows, row_scale)),
        flops / time_of(lambda: x @ weight.t()),
    )


def _attention(device: torch.device, width: int, length: int, head_size: int, rows: int, time_of: _Timer) -> float:
    """FLOP/s of masked attention forward and backward: two products, and two for each of them."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    heads = max(1, width // head_size)
    operands = [_random(rows, heads, length, head_size, device=device).requires_grad_() for _ in range(3)]
    mask = torch.ones(rows, 1, length, length, dtype=torch.bool, device=device).tril_()
    dy = torch.ones(rows, heads, length, head_size, device=device)

    def run() -> None:
        q, k, v = operands
        torch.autograd.grad(scaled_dot_product_attention(q, k, v, attn_mask=mask), operands, dy)

    return 6 * 2 * rows * heads * length**2 * head_size / time_of(run)


def _elementwise(device: torch.device, width: int, tokens: int, time_of: _Timer) -> tuple[float, float]:
    """Kept bytes/s of the elementwise work of a layer, forward and backward: norms and residuals, rotary, gates."""
    forward = backward = 0.0
    pieces: tuple[tuple[Callable[..., Tensor], int, int, float], ...] = (
        (_norm, 2, 1, 2.0),
        (_rotary, 1, 1, 1 + _KV),
        (_gate, 2, 2, _FFN / 2),
    )
    for piece, count, wide, times in pieces:
        inputs = [_random(tokens, wide * width, device=device).requires_grad_() for _ in range(count)]
        ahead = time_of(partial(piece, *inputs))
        both = time_of(partial(_there_and_back, piece, inputs))
        forward += times * ahead
        backward += times * max(both - ahead, ahead / 2)
    kept = 4 * tokens * width * _KEPT
    return kept / forward, kept / backward


def _norm(x: Tensor, residual: Tensor) -> Tensor:
    """Root-mean-square norm of a sum."""
    import torch

    x = x + residual
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * x.new_ones(x.shape[-1])


def _rotary(x: Tensor) -> Tensor:
    """Rotary embedding, by halves."""
    import torch

    half = x.shape[-1] // 2
    turn = x.new_ones(x.shape[-1])
    return x * turn + torch.cat((-x[..., half:], x[..., :half]), -1) * turn


def _gate(gate: Tensor, up: Tensor) -> Tensor:
    """A gated unit without its products."""
    from torch.nn.functional import silu

    return silu(gate) * up


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


def _update(device: torch.device, width: int, elements: int, eight_bit: bool, time_of: _Timer) -> float:
    """Seconds of what one trained tensor costs at a step: norm of its gradient, AdamW, its planes."""
    from edgegt.optimizer import AdamW, clip
    from edgegt.quant import refresh_planes, split_planes

    optimizer, master = AdamW(eight_bit), _random(elements // width, width, device=device)
    gradient, planes = master.clone(), split_planes(master)

    def run() -> None:
        clip(gradient, 1.0)
        optimizer.update("piece", master, gradient, 1e-9)
        refresh_planes(planes, master)

    return time_of(run)


def _dispatch(backend: Backend, device: torch.device, time_of: _Timer) -> float:
    """Seconds of a layer forward and backward with a width and a row of 16."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from edgegt.quant import InputCache, Int8Linear, quantize_rows

    inputs = InputCache()
    weight = quantize_rows(torch.eye(TINY, device=device))
    linears = [Int8Linear(weight, backend=backend, inputs=inputs) for _ in range(_LINEARS)]
    x = _random(1, 1, TINY, TINY, device=device).requires_grad_()

    def run() -> None:
        q, k, v, o, gate, up, down = linears
        h = _norm(x, x)
        h = x + o(scaled_dot_product_attention(_rotary(q(h)), _rotary(k(h)), v(h), is_causal=True))
        y = _norm(h, h)
        y = h + down(_gate(gate(y), up(y)))
        torch.autograd.grad(y, x, torch.ones_like(y))

    return time_of(run)


def _random(*shape: int, device: torch.device) -> Tensor:
    """Normal numbers, the same each time, from a generator of their own."""
    import torch

    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device)


def seconds_of(run: Callable[[], object], device: torch.device, budget_s: float, fresh: bool = False) -> float:
    """Mean of 3 to 200 runs within the budget, after one that warms up.

    The mean and not the median, because a step waits for other programs as the pieces do. fresh: give freed memory
    back before each run, so that what it allocates is new whatever holes the heap happens to have.
    """
    import torch

    def once() -> float:
        if fresh:
            trim()
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    spent = [once() for _ in range(3)]
    spent += [once() for _ in range(min(200, int(budget_s / max(fmean(spent), 1e-6))) - len(spent))]
    return fmean(spent)
