"""How fast this machine is at what a step does, measured in a fraction of a second, and step times predicted from it.

A profile's rates are peaks; the share of them that small-batch training reaches is stated here and not measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from edgegt.cost import BatchShape, CostTable
from edgegt.profile import Profile

if TYPE_CHECKING:
    import torch

    from edgegt.quant import Backend

UTILISATION = 0.3
_PASSES_OVER_ACTIVATIONS = 6
_OPERATIONS_PER_BLOCK = 400


@dataclass(frozen=True)
class Speed:
    """Rates in FLOP/s of int8 linears (quantising included) and float32 products, bytes/s, optimizer elements/s."""

    int8: float
    float32: float
    bandwidth: float
    optimizer: float
    overhead_s: float = 0.0

    def step_s(self, table: CostTable, mask: int, shape: BatchShape, micro_batches: int = 1) -> float:
        """Predicted seconds of one optimizer step on a batch of this shape with the weights in `mask` trained."""
        trained = [weight for bit, weight in enumerate(table.weights) if mask >> bit & 1]
        work = table.train_work(mask)
        dw = sum(weight.dw.at(shape) for weight in trained)
        attention = shape.rows * work.pair * shape.tokens**2
        second_plane = sum(weight.dw.at(shape) for weight in trained)
        int8 = max(0, work.at(shape) - dw - attention) + second_plane
        everything = (1 << len(table.weights)) - 1
        moved = _PASSES_OVER_ACTIVATIONS * table.saved_work(everything).at(shape) / 2
        elements = sum(weight.numel for weight in trained)
        return (
            int8 / self.int8
            + (dw + attention) / self.float32
            + moved / self.bandwidth
            + elements / self.optimizer
            + self.overhead_s * micro_batches * table.blocks
        )

    def full_step_s(self, table: CostTable, shape: BatchShape) -> float:
        """Predicted seconds of one step of full fine-tuning, all of it in float."""
        moved = 4 * table.saved_work((1 << len(table.weights)) - 1).at(shape)
        return (
            table.full_work().at(shape) / self.float32
            + _PASSES_OVER_ACTIVATIONS * moved / self.bandwidth
            + table.parameters / self.optimizer
            + self.overhead_s * table.blocks
        )


def of_profile(profile: Profile) -> Speed:
    """The rates of a device's profile at the utilisation that small batches reach (30 % of peak, not measured)."""
    fast = UTILISATION * profile.rate("int8")
    return Speed(
        int8=fast,
        float32=UTILISATION * profile.rate("bf16"),
        bandwidth=0.7 * profile.power.bandwidth_bytes_per_s,
        optimizer=0.7 * profile.power.bandwidth_bytes_per_s / 24,
        overhead_s=1e-3,
    )


def of_machine(backend: Backend, device: torch.device, width: int, tokens: int, eight_bit: bool) -> Speed:
    """Measured here, at the model's width and the batch's tokens; about 0.3 s."""
    import torch

    from edgegt.optimizer import AdamW

    generator = torch.Generator().manual_seed(0)
    tokens, width = min(tokens, 512), min(width, 1024)
    x = torch.randn(tokens, width, generator=generator).to(device)
    q = torch.randint(-127, 128, (2 * width, width), generator=generator, dtype=torch.int8).to(device)
    scale = torch.rand(2 * width, generator=generator).to(device)
    flops = 2 * tokens * width * 2 * width

    def int8() -> None:
        rows, row_scale = backend.quantize_tokens(x)
        backend.product(rows, row_scale, q, scale)

    wide = q.to(torch.float32)
    large = torch.randn(1 << 21, generator=generator).to(device)
    target, few = torch.empty_like(large), torch.ones(64, device=device)
    optimizer, vector = AdamW(eight_bit), large[: 1 << 18].clone()
    return Speed(
        int8=flops / _seconds(int8, device),
        float32=flops / _seconds(lambda: x @ wide.t(), device),
        bandwidth=2 * 4 * large.numel() / _seconds(lambda: torch.mul(large, 1.5, out=target), device),
        optimizer=vector.numel() / _seconds(lambda: optimizer.update("speed", vector, vector, 1e-9), device),
        overhead_s=_OPERATIONS_PER_BLOCK * _seconds(lambda: [few + few for _ in range(100)], device) / 100,
    )


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    import torch

    def once() -> float:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    first = once()
    return median(once() for _ in range(max(3, min(9, int(0.05 / max(first, 1e-6))))))
