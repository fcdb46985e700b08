"""The compiled kernels as functions of torch tensors: contiguous float32 on the CPU, results allocated here."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from edgegt.errors import OutOfMemory

_P, _I, _N, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "quantize_rows": (_P, _P, _I, _I, _N, _P, _P, _N),
    "quantize_columns": (_P, _P, _I, _I, _P, _P, _N),
    "scale_product": (_P, _P, _P, _P, _P, _I, _I, _P, _N),
    "split_planes": (_P, _N, _I, _I, _P, _P, _P, _N),
    "adamw_8bit": (_P, _N, _P, _P, _P, _P, _P, _I, _F, _F, _F, _F, _F, _I, _N),
    "rms_norm": (_P, _P, _F, _F, _I, _I, _P, _P, _N),
    "rms_norm_back": (_P, _P, _P, _F, _P, _I, _I, _P, _N),
    "silu_mul": (_P, _P, _I, _P, _N),
    "silu_mul_back": (_P, _P, _P, _I, _P, _P, _N),
    "multiply": (_P, _N, _P, _P, _N, _P, _P, _I, _I, _I, _N, _P, _N),
    "attend": (_P, _P, _P, _P, _P, _I, _I, _I, _I, _I, _I, _F, _P, _P, _N),
    "attend_back": (_P, _P, _P, _P, _P, _I, _I, _I, _I, _I, _I, _F, _P, _P, _P, _P, _P, _P, _N),
    "rotate": (_P, _I, _I, _P, _P, _I, _I, _I, _I, _N, _P, _N),
}
_RESULTS = {"split_planes": _I, "multiply": _N, "attend": _N, "attend_back": _N}


# Fewer elements than these one thread has done before a second one is awake.
ALONE = 1 << 14


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
            function.restype = _RESULTS.get(name)
            self._functions[name] = function
        self.products = bool(library.products())

    def quantize_rows(self, x: Tensor, columns: Tensor | None = None, evenly: bool = False) -> tuple[Tensor, Tensor]:
        """(int8 [n, k], float32 scale [n]) of x [n, k], or of x * columns [k]; scale = absmax / 127."""
        x = x.contiguous()
        q, scale = torch.empty(x.shape, dtype=torch.int8), torch.empty(x.shape[0])
        columns = None if columns is None else columns.contiguous()
        self._call("quantize_rows", x, columns, *x.shape, int(evenly), q, scale, elements=x.numel())
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

    def multiply(self, q: Tensor, scale: Tensor, b: Tensor, columns: Tensor, low: Tensor | None = None) -> Tensor:
        """y [n, m] = scale[:, None] * (q (b + low / 254)^T) * columns of int8 q [n, k] and b, low [m, k]."""
        y = torch.empty(q.shape[0], b.shape[0])
        low = None if low is None else low.contiguous()
        factors, sizes = (scale, columns.contiguous()), (*y.shape, q.shape[1])
        self._with_room("multiply", q.contiguous(), 0, b.contiguous(), low, 0, *factors, *sizes, 0, y)
        return y

    def multiply_back(self, q: Tensor, scale: Tensor, b: Tensor) -> Tensor:
        """y [n, m] = scale[:, None] * (q b) of int8 q [n, k] and b [k, m]."""
        y = torch.empty(q.shape[0], b.shape[1])
        sizes = (*y.shape, q.shape[1])
        self._with_room("multiply", q.contiguous(), 0, b.contiguous(), None, 1, scale, None, *sizes, 0, y)
        return y

    def multiply_turned(self, q: Tensor, scale: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        """y [n, m] = scale[:, None] * (q^T b) of int8 q [k, n] and b [k, m]; added to `out` in place when given."""
        y = torch.empty(q.shape[1], b.shape[1]) if out is None else out
        sizes, add = (*y.shape, q.shape[0]), int(out is not None)
        self._with_room("multiply", q.contiguous(), 1, b.contiguous(), None, 1, scale, None, *sizes, add, y)
        return y

    def split_planes(self, master: Tensor, q: Tensor, low: Tensor, scale: Tensor) -> bool:
        """Fill the planes [n, k] and bfloat16 scales [n] of a float32 or bfloat16 master; whether it was finite."""
        half = int(master.dtype == torch.bfloat16)
        return int(self._call("split_planes", master, half, *master.shape, q, low, scale)) == 0

    def adamw_8bit(
        self, values: Tensor, gradient: Tensor, first: Tensor, second: Tensor, largest: tuple[Tensor, Tensor],
        rates: tuple[float, float, float, float, float], key: int,
    ) -> None:  # fmt: skip
        """One AdamW step on flat tensors, in place; see kernels.c. rates: lr, beta1, beta2, eps, weight decay * lr.

        values: float32, or bfloat16, which is rounded up or down at random, by `key`.
        """
        half, states = int(values.dtype == torch.bfloat16), (first, second, *largest)
        self._call("adamw_8bit", values, half, gradient, *states, values.numel(), *rates, key)

    def rms_norm(self, x: Tensor, weight: Tensor, offset: float, eps: float) -> tuple[Tensor, Tensor]:
        """(y, rstd): y = x * rstd * (weight + offset) over the last dimension, float32 rstd [rows]."""
        y, rstd = torch.empty(x.shape), torch.empty(x.numel() // x.shape[-1])
        self._call("rms_norm", x, weight, offset, eps, rstd.numel(), x.shape[-1], y, rstd, elements=x.numel())
        return y, rstd

    def rms_norm_back(self, dy: Tensor, x: Tensor, weight: Tensor, offset: float, rstd: Tensor) -> Tensor:
        """dx of rms_norm."""
        dx = torch.empty(x.shape)
        self._call("rms_norm_back", dy.contiguous(), x, weight, offset, rstd, rstd.numel(), x.shape[-1], dx)
        return dx

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up."""
        y = torch.empty(gate.shape)
        self._call("silu_mul", gate, up, gate.numel(), y, elements=gate.numel())
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
            size, int(back), y, elements=x.numel(),
        )  # fmt: skip
        return y.transpose(1, 2)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, window: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        """(out [B, T, H, D], logarithms of the sums [B, H, T]) of causal attention; see attention.c.

        q [B, H, T, D]; k, v [B, H or fewer, T, D]; starts: int64 [B], the first key of each row; window: 0 for none.
        """
        q, k, v = map(_with_adjacent_elements, (q, k, v))
        rows, heads, tokens, size = q.shape
        out, sums = torch.empty(rows, tokens, heads, size), torch.empty(rows, heads, tokens)
        sizes = (rows, heads, k.shape[1], tokens, size, window)
        self._with_room("attend", q, k, v, _strides(q, k, v), starts, *sizes, scale, out, sums)
        return out, sums

    def attend_back(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, starts: Tensor, window: int,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """The gradients to q, k and v, of their shapes, from dout [B, T, H, D] and what `attend` gave."""
        dout, (q, k, v) = dout.contiguous(), map(_with_adjacent_elements, (q, k, v))
        rows, heads, tokens, size = q.shape
        dq, dk, dv = (torch.empty(rows, tokens, x.shape[1], size) for x in (q, k, v))
        sizes = (rows, heads, k.shape[1], tokens, size, window)
        self._with_room("attend_back", q, k, v, _strides(q, k, v), starts, *sizes, scale, dout, out, sums, dq, dk, dv)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)

    def _with_room(self, name: str, *arguments: Any) -> None:
        """Call what needs memory of its own. Raises: OutOfMemory when there is none."""
        if not self._call(name, *arguments):
            raise OutOfMemory(f"no memory is left for '{name}': end other programs, or give a lower --memory")

    def _call(self, name: str, *arguments: Any, elements: int = ALONE) -> Any:
        """Call with the addresses of tensors; they outlive the call, since the caller holds them.

        elements: how many are worked on, where it may be so few that no second thread is worth waking.
        """
        words = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]
        return self._functions[name](*words, 1 if elements < ALONE else torch.get_num_threads())


def _with_adjacent_elements(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> Any:
    """Of each tensor [B, H, T, D] those of rows, heads and tokens, as the kernels read them."""
    found = [stride for tensor in tensors for stride in tensor.stride()[:3]]
    return (ctypes.c_int64 * len(found))(*found)
