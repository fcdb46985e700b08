"""int8 products by plain torch (`torch._int_mm`): the backend that is always there.

On CPU the product is exact for every shape and 3 to 5 times as fast as float32 where the processor has int8 dot
products (AVX512-VNNI). On CUDA it needs more than 16 rows and multiples of 8 elsewhere: operands are padded with zeros,
which change no sum, and the result is cropped. There the second operand is made column-major as well, because not every
GPU multiplies a row-major one (pytorch issues 169956, 169961): dx copies its weight for the time of the product.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from edgegt.native import Kernels
from edgegt.quant.backend import quantize_columns, quantize_tokens, scale_product
from edgegt.quant.weight import LOW_STEPS, Int8Weight, refresh_planes, row_chunks

PART_ELEMENTS = 2**21
CUDA_ROWS = 32
CUDA_MULTIPLE = 8


class TorchBackend:
    """`torch._int_mm` with the scales applied in place."""

    name = "torch"
    kernels: Kernels | None = None

    def quantize_tokens(self, x: Tensor, columns: Tensor | None = None, evenly: bool = False) -> tuple[Tensor, Tensor]:
        """(int8 [n, k], float32 scale [n]) of x [n, k], or of x * columns."""
        return quantize_tokens(x, columns, evenly)

    def product(
        self, q: Tensor, scale: Tensor, weight_q: Tensor, weight_scale: Tensor, low: Tensor | None = None
    ) -> Tensor:
        """y = x W^T, float32 [n, out], from q [n, k] and weight_q [out, k]."""
        y = scale_product(int_mm(q, weight_q.t()), scale, weight_scale)
        return y if low is None else y.add_(scale_product(int_mm(q, low.t()), scale, weight_scale / LOW_STEPS))

    def product_back(self, q: Tensor, scale: Tensor, weight_q: Tensor) -> Tensor:
        """dx = dy W, float32 [n, k], from q [n, out] and weight_q [out, k]."""
        return scale_product(int_mm(q, weight_q), scale)

    def weight_gradient(self, dy: Tensor, q: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
        """dw = dy^T x, float32 [out, k], as a product of integers: x keeps its own, dy gets one scale per column.

        Added to `out` it is formed a part of its rows at a time.
        """
        columns, column_scale = self.quantize_columns(dy, scale)
        if out is None:
            return self.scaled(int_mm(turned(columns), q), column_scale)
        for rows in row_chunks(out, elements=PART_ELEMENTS):
            out[rows] += self.scaled(int_mm(turned(columns[:, rows]), q), column_scale[rows])
        return out

    def quantize_columns(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """As backend.quantize_columns."""
        return quantize_columns(x, tokens)

    def scaled(self, product: Tensor, scale: Tensor) -> Tensor:
        """scale[:, None] * product as float32, in the memory of the int32 product."""
        return scale_product(product, scale)

    def refresh(self, weight: Int8Weight, master: Tensor) -> None:
        """As weight.refresh_planes."""
        refresh_planes(weight, master)


def turned(q: Tensor) -> Tensor:
    """q^T without a copy. A matrix of one column becomes a row with a row's strides: CPU's product needs them."""
    return q.reshape(q.shape[1], q.shape[0]) if 1 in q.shape else q.t()


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """The int32 product of two int8 matrices, padded where the device asks for it."""
    if 0 in (*a.shape, *b.shape):
        return torch.zeros(a.shape[0], b.shape[1], dtype=torch.int32, device=a.device)
    return padded_int_mm(a, b) if a.device.type == "cuda" else torch._int_mm(a, b)


def padded_int_mm(a: Tensor, b: Tensor) -> Tensor:
    """`torch._int_mm` of operands as CUDA wants them, cropped: at least 32 rows, multiples of 8, b column-major."""
    rows, inner, columns = a.shape[0], a.shape[1], b.shape[1]
    more_rows = max(0, CUDA_ROWS - rows)
    more_inner = -inner % CUDA_MULTIPLE
    more_columns = -columns % CUDA_MULTIPLE
    if more_rows or more_inner:
        a = pad(a, (0, more_inner, 0, more_rows))
    columns_of_b = b.t()
    if more_inner or more_columns:
        columns_of_b = pad(columns_of_b, (0, more_inner, 0, more_columns))
    product = torch._int_mm(a.contiguous(), columns_of_b.contiguous().t())
    return product[:rows, :columns].contiguous() if more_rows or more_columns else product
