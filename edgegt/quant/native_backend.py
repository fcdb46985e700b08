"""int8 products and everything around them in C (`edgegt.native`): CPUs with a compiler.

Where the processor has a dot product of small integers (AVX512-VNNI, AVX-VNNI, aarch64's dotprod, and AVX2's of 16-bit
numbers) the products are our own, scaled before they leave the registers; torch's write 32-bit sums that are read
again, and on AVX2 alone they take fifty times as long. Elsewhere torch's are scaled in one pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgegt.cache import cache_dir
from edgegt.native import Kernels, library, usable
from edgegt.quant.backend import quantize_tokens
from edgegt.quant.torch_backend import TorchBackend, int_mm
from edgegt.quant.weight import Int8Weight, check_planes, refresh_planes


class NativeBackend(TorchBackend):
    """Compiled products, quantising and scaling. Raises: EdgegtError when they cannot be compiled here."""

    name = "native"

    def __init__(self) -> None:
        self.compiled = self.kernels = Kernels(library(cache_dir()))

    def quantize_tokens(self, x: Tensor, columns: Tensor | None = None, evenly: bool = False) -> tuple[Tensor, Tensor]:
        """(int8 [n, k], float32 scale [n]) of x [n, k], or of x * columns."""
        if not usable(x) or (columns is not None and not usable(columns)):
            return quantize_tokens(x, columns, evenly)
        return self.compiled.quantize_rows(x, columns, evenly)

    def product(
        self, q: Tensor, scale: Tensor, weight_q: Tensor, weight_scale: Tensor, low: Tensor | None = None
    ) -> Tensor:
        """y = x W^T, float32 [n, out], from q [n, k] and weight_q [out, k]."""
        if self.compiled.products:
            return self.compiled.multiply(q, scale, weight_q, weight_scale, low)
        more = None if low is None else int_mm(q, low.t())
        return self.compiled.scale_product(int_mm(q, weight_q.t()), more, scale, weight_scale, None)

    def product_back(self, q: Tensor, scale: Tensor, weight_q: Tensor) -> Tensor:
        """dx = dy W, float32 [n, k], from q [n, out] and weight_q [out, k]."""
        if self.compiled.products:
            return self.compiled.multiply_back(q, scale, weight_q)
        return self.compiled.scale_product(int_mm(q, weight_q), None, scale, None, None)

    def weight_gradient(self, dy: Tensor, q: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
        """As TorchBackend."""
        if not self.compiled.products:
            return super().weight_gradient(dy, q, scale, out)
        columns, column_scale = self.quantize_columns(dy, scale)
        return self.compiled.multiply_turned(columns, column_scale, q, out)

    def quantize_columns(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """As backend.quantize_columns."""
        return self.compiled.quantize_columns(x.to(torch.float32), tokens)

    def scaled(self, product: Tensor, scale: Tensor) -> Tensor:
        """scale[:, None] * product as float32, in the memory of the int32 product."""
        return self.compiled.scale_product(product, None, scale, None, None)

    def refresh(self, weight: Int8Weight, master: Tensor) -> None:
        """As weight.refresh_planes."""
        kept = master.dtype == torch.bfloat16 and master.device.type == "cpu"
        if weight.low is None or not (kept or usable(master)):
            refresh_planes(weight, master)
        else:
            check_planes(self.compiled.split_planes(master.contiguous(), weight.q, weight.low, weight.scale))
