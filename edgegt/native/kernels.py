"""The compiled kernels as functions of torch tensors: contiguous float32 on the CPU, results allocated here."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

_P, _I, _N, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "quantize_rows": (_P, _P, _I, _I, _N, _P, _P, _N),
    "quantize_columns": (_P, _P, _I, _I, _P, _P, _N),
    "scale_product": (_P, _P, _P, _P, _P, _I, _I, _P, _N),
    "split_planes": (_P, _I, _I, _P, _P, _P, _N),
    "adamw_8bit": (_P, _P, _P, _P, _P, _P, _I, _F, _F, _F, _F, _F, _I, _N),
    "rms_norm": (_P, _P, _F, _F, _I, _I, _P, _P, _N),
    "rms_norm_back": (_P, _P, _P, _F, _P, _I, _I, _P, _N),
    "silu_mul": (_P, _P, _I, _P, _N),
    "silu_mul_back": (_P, _P, _P, _I, _P, _P, _N),
    "multiply": (_P, _N, _P, _P, _N, _P, _P, _I, _I, _I, _N, _P, _N),
    "rotate": (_P, _I, _I, _P, _P, _I, _I, _I, _I, _N, _P, _N),
}


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels take these: float32 on the CPU, with data."""
    return all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)


class Kernels:
    """The functions of one compiled library, on torch's number of threads.

    products: whether `multiply` knows this processor's dot products of int8.
    """

    def __init__(self, library: Any) -> None:
        self._functions = {}
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes = arguments
            function.restype = {"split_planes": _I, "multiply": _N}.get(name)
            self._functions[name] = function
        self.products = bool(library.products())

    def quantize_rows(self, x: Tensor, columns: Tensor | None = None, evenly: bool = False) -> tuple[Tensor, Tensor]:
        """(int8 [n, k], float32 scale [n]) of x [n, k], or of x * columns [k]; scale = absmax / 127."""
        x = x.contiguous()
        q, scale = torch.empty(x.shape, dtype=torch.int8), torch.empty(x.shape[0])
        columns = None if columns is None else columns.contiguous()
        self._call("quantize_rows", x, columns, *x.shape, int(evenly), q, scale)
        return q, scale

    def quantize_columns(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(int8 [n, k], float32 scale [k]) of x [n, k] * tokens[:, None], one scale per column."""
        x = x.contiguous()
        q, scale = torch.empty(x.shape, dtype=torch.int8), torch.empty(x.shape[1])
        self._call("quantize_columns", x, tokens.contiguous(), *x.shape, q, scale)
        return q, scale

    def scale_product(
        self, high: Tensor, low: Tensor | None, rows: Tensor, columns: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """rows[:, None] * (high + low / 254) * columns + bias as float32, in the memory of int32 `high` [n, m]."""
        y = torch.empty(0, dtype=torch.float32)
        y.set_(high.untyped_storage(), high.storage_offset(), high.shape, high.stride())
        self._call("scale_product", high, low, rows, columns, bias, *high.shape, y)
        return y

    def multiply(
        self, q: Tensor, scale: Tensor, b: Tensor, columns: Tensor, low: Tensor | None = None
    ) -> Tensor:
        """y [n, m] = scale[:, None] * (q (b + low / 254)^T) * columns of int8 q [n, k] and b, low [m, k]."""
        y = torch.empty(q.shape[0], b.shape[0])
        low = None if low is None else low.contiguous()
        self._multiply(q.contiguous(), 0, b.contiguous(), low, 0, scale, columns.contiguous(), *y.shape, q.shape[1], 0, y)
        return y

    def multiply_back(self, q: Tensor, scale: Tensor, b: Tensor) -> Tensor:
        """y [n, m] = scale[:, None] * (q b) of int8 q [n, k] and b [k, m]."""
        y = torch.empty(q.shape[0], b.shape[1])
        self._multiply(q.contiguous(), 0, b.contiguous(), None, 1, scale, None, *y.shape, q.shape[1], 0, y)
        return y

    def multiply_turned(self, q: Tensor, scale: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        """y [n, m] = scale[:, None] * (q^T b) of int8 q [k, n] and b [k, m]; added to `out` in place when given."""
        y = torch.empty(q.shape[1], b.shape[1]) if out is None else out
        add = int(out is not None)
        self._multiply(q.contiguous(), 1, b.contiguous(), None, 1, scale, None, *y.shape, q.shape[0], add, y)
        return y

    def split_planes(self, master: Tensor, q: Tensor, low: Tensor, scale: Tensor) -> bool:
        """Fill the planes [n, k] and bfloat16 scales [n] of a master; whether all of it was finite."""
        return int(self._call("split_planes", master, *master.shape, q, low, scale)) == 0

    def adamw_8bit(
        self, values: Tensor, gradient: Tensor, first: Tensor, second: Tensor, largest: tuple[Tensor, Tensor],
        rates: tuple[float, float, float, float, float], key: int,
    ) -> None:  # fmt: skip
        """One AdamW step on flat tensors, in place; see kernels.c. rates: lr, beta1, beta2, eps, weight decay * lr."""
        self._call("adamw_8bit", values, gradient, first, second, *largest, values.numel(), *rates, key)

    def rms_norm(self, x: Tensor, weight: Tensor, offset: float, eps: float) -> tuple[Tensor, Tensor]:
        """(y, rstd): y = x * rstd * (weight + offset) over the last dimension, float32 rstd [rows]."""
        y, rstd = torch.empty(x.shape), torch.empty(x.numel() // x.shape[-1])
        self._call("rms_norm", x, weight, offset, eps, rstd.numel(), x.shape[-1], y, rstd)
        return y, rstd

    def rms_norm_back(self, dy: Tensor, x: Tensor, weight: Tensor, offset: float, rstd: Tensor) -> Tensor:
        """dx of rms_norm."""
        dx = torch.empty(x.shape)
        self._call("rms_norm_back", dy.contiguous(), x, weight, offset, rstd, rstd.numel(), x.shape[-1], dx)
        return dx

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up."""
        y = torch.empty(gate.shape)
        self._call("silu_mul", gate, up, gate.numel(), y)
        return y

    def silu_mul_back(self, dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients to gate and up."""
        dgate, dup = torch.empty(gate.shape), torch.empty(up.shape)
        self._call("silu_mul_back", dy.contiguous(), gate, up, gate.numel(), dgate, dup)
        return dgate, dup

    def rotate(self, x: Tensor, cosine: Tensor, sine: Tensor, back: bool = False) -> Tensor:
        """x * cos + rotate_half(x) * sin, or with `back` its transpose.

        x [B, H, T, D] in the memory order [B, T, H, D] where it is so; cosine, sine [B or 1, T, D]; y like x.
        """
        rows, heads, tokens, size = x.shape
        laid = x.transpose(1, 2)
        if laid.stride(3) != 1 or laid.stride(0) != tokens * laid.stride(1):
            laid = laid.contiguous()
        step = laid.stride(1 if tokens > 1 else 0)  # the stride of a dimension of one element may be any number
        y = torch.empty(rows, tokens, heads, size)
        angles = cosine.shape[0] * tokens
        self._call(
            "rotate", laid, step, laid.stride(2), cosine.contiguous(), sine.contiguous(), angles, rows * tokens, heads,
            size, int(back), y,
        )  # fmt: skip
        return y.transpose(1, 2)

    def _multiply(self, *arguments: Any) -> None:
        if not self._call("multiply", *arguments):
            raise MemoryError("no memory for a product of int8 matrices")

    def _call(self, name: str, *arguments: Any) -> Any:
        """Call with the addresses of tensors; they outlive the call, since the caller holds them."""
        words = (argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments)
        return self._functions[name](*words, torch.get_num_threads())
