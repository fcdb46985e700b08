"""int8 products by bitsandbytes: its own CUDA kernels, and on CPU its operators.

bitsandbytes is imported only when this backend is constructed. Its wheels import on machines where their kernels fail
(Jetson: bitsandbytes #1930, #1941), so construction proves nothing and `backend.check` runs the kernels.
The fused `int8_scaled_mm` is not used: its epilogue makes three float temporaries of the output's size and is wrong by
1.8e-5; the same kernel underneath, `int8_linear_matmul`, with our in-place epilogue is exact and smaller.
Its statistics are absmax, not absmax / 127. Its CUDA quantiser takes float16 only, in which gradients underflow:
there the shared one is used.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from edgegt.native import Kernels
from edgegt.quant.backend import TOKEN_ELEMENTS, quantize_columns, quantize_tokens, scale_product
from edgegt.quant.weight import LOW_STEPS, Int8Weight, refresh_planes, row_chunks


class BitsandbytesBackend:
    """bitsandbytes' int8 operators. Raises what its import raises, when it is absent or broken."""

    name = "bitsandbytes"
    kernels: Kernels | None = None

    def __init__(self) -> None:
        importlib.import_module("bitsandbytes")
        operators: Any = torch.ops.bitsandbytes
        self._quantize = operators.int8_vectorwise_quant
        self._matmul = operators.int8_linear_matmul

    def quantize_tokens(self, x: Tensor, columns: Tensor | None = None, evenly: bool = False) -> tuple[Tensor, Tensor]:
        """(int8 [n, k], float32 scale [n]) of x [n, k], or of x * columns."""
        if evenly or x.device.type != "cpu":
            return quantize_tokens(x, columns, evenly)
        q = torch.empty(x.shape, dtype=torch.int8)
        scale = torch.empty(x.shape[0], dtype=torch.float32)
        for rows in row_chunks(x, elements=TOKEN_ELEMENTS):
            part = x[rows].to(torch.float32)
            q[rows], scale[rows], _ = self._quantize(part if columns is None else part * columns)
        return q, scale.div_(127)

    def product(
        self, q: Tensor, scale: Tensor, weight_q: Tensor, weight_scale: Tensor, low: Tensor | None = None
    ) -> Tensor:
        """y = x W^T, float32 [n, out], from q [n, k] and weight_q [out, k]."""
        y = scale_product(self._product(q, weight_q), scale, weight_scale)
        return y if low is None else y.add_(scale_product(self._product(q, low), scale, weight_scale / LOW_STEPS))

    def product_back(self, q: Tensor, scale: Tensor, weight_q: Tensor) -> Tensor:
        """dx = dy W, float32 [n, k], from q [n, out] and weight_q [out, k] (transposed by a copy off the CPU)."""
        transposed = weight_q.t() if q.device.type == "cpu" else weight_q.t().contiguous()
        return scale_product(self._product(q, transposed), scale)

    def weight_gradient(self, dy: Tensor, q: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
        """dw = dy^T x, float32 [out, k], as a product of integers; both operands are transposed by a copy."""
        columns, column_scale = quantize_columns(dy, scale)
        dw = scale_product(self._product(columns.t().contiguous(), q.t().contiguous()), column_scale)
        return dw if out is None else out.add_(dw)

    def refresh(self, weight: Int8Weight, master: Tensor) -> None:
        """As weight.refresh_planes."""
        refresh_planes(weight, master)

    def _product(self, q: Tensor, weight_q: Tensor) -> Tensor:
        if 0 in (*q.shape, *weight_q.shape):
            return torch.zeros(q.shape[0], weight_q.shape[0], dtype=torch.int32, device=q.device)
        product: Tensor = self._matmul(q, weight_q)
        return product
