"""Weights in 8 or 16 bits: one int8 plane with a scale per row, and a second plane for what training must not lose.

    w = scale * (q + low / 254)        q, low: int8 [out, in]; scale: bfloat16 [out]; low absent in a frozen weight

The scale is the row's largest magnitude / 127, rounded *up* to bfloat16, and q is computed with the rounded scale, so
that |q| <= 127 always holds and the scale costs two bytes. One plane's error is at most scale / 2 per element, about
0.8 % of a Gaussian row (42 dB); both planes' at most scale / 508 (90 dB). A weight on the int8 grid absorbs small
updates (6 % of the energy of an update of 1e-4 rms survives); in two planes more than 90 % does.
All functions work in row chunks, so that temporaries stay near 2 MiB whatever the size of the tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from edgegt.errors import InputError, NotFinite

CHUNK_ELEMENTS = 2**18
SMALLEST_SCALE = 2.0**-100
LOW_STEPS = 254


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """w = scale * (q + low / 254). q, low: int8 [out, in]; scale: bfloat16 [out]. q may be memory-mapped."""

    q: Tensor
    scale: Tensor
    low: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """[out, in]."""
        return self.q.shape

    @property
    def device(self) -> torch.device:
        """Where the planes live."""
        return self.q.device

    @property
    def dtype(self) -> torch.dtype:
        """The type it acts in (model code asks a layer's weight for it)."""
        return torch.float32

    @property
    def nbytes(self) -> int:
        """Bytes of the planes and the scales."""
        planes = 1 if self.low is None else 2
        return planes * self.q.numel() + self.scale.numel() * self.scale.element_size()


def quantize_rows(w: Tensor, chunk_rows: int | None = None) -> Int8Weight:
    """One int8 plane of a float tensor [out, in], by the largest magnitude per row.

    chunk_rows: rows per step; by default as many as fit in 1 MiB of float32.
    Raises: InputError when the tensor is not a float matrix or holds a value that is not finite.
    """
    return _split(w, chunk_rows, low=False)


def split_planes(w: Tensor, chunk_rows: int | None = None) -> Int8Weight:
    """Two int8 planes (16 bits) of a float tensor [out, in]. Raises as quantize_rows."""
    return _split(w, chunk_rows, low=True)


def refresh_planes(weight: Int8Weight, master: Tensor, chunk_rows: int | None = None) -> None:
    """Recompute the planes and scales of `weight` in place from its float master [out, in].

    Raises: NotFinite when the master holds a value that is not finite (training diverged).
    """
    if master.shape != weight.shape:
        raise ValueError(f"master is {tuple(master.shape)}, the planes are {tuple(weight.shape)}")
    _fill(weight, master.detach(), chunk_rows)
    check_planes(_finite(weight.scale))


def check_planes(finite: bool) -> None:
    """Raises: NotFinite when refreshed planes are of a master that is not finite."""
    if not finite:
        raise NotFinite("a trained tensor holds NaN or infinity")


def dequantize(weight: Int8Weight, out: Tensor | None = None) -> Tensor:
    """The float32 tensor [out, in] that the planes stand for, written into `out` when given."""
    result = torch.empty(weight.shape, dtype=torch.float32, device=weight.device) if out is None else out
    for rows in row_chunks(weight.q):
        part = result[rows]
        part.copy_(weight.q[rows])
        if weight.low is not None:
            part.add_(weight.low[rows].to(torch.float32), alpha=1 / LOW_STEPS)
        part.mul_(weight.scale[rows].to(torch.float32).unsqueeze(1))
    return result


def row_chunks(matrix: Tensor, chunk_rows: int | None = None, elements: int = CHUNK_ELEMENTS) -> Iterator[slice]:
    """Row slices of a matrix, each of `chunk_rows` rows or of at most `elements` elements (at least one row)."""
    step = chunk_rows or max(1, elements // max(1, matrix.shape[1]))
    for start in range(0, matrix.shape[0], step):
        yield slice(start, min(start + step, matrix.shape[0]))


def absmax(matrix: Tensor) -> Tensor:
    """The largest magnitude of each row, float32 [rows], without a temporary of the matrix' size. NaN propagates."""
    return torch.maximum(matrix.amax(1), matrix.amin(1).neg_()).to(torch.float32)


def _split(w: Tensor, chunk_rows: int | None, low: bool) -> Int8Weight:
    if w.ndim != 2 or w.numel() == 0 or not w.is_floating_point():
        raise InputError(
            f"cannot quantise a {w.dtype} tensor of shape {tuple(w.shape)}: a float matrix [out, in] is needed;"
            " leave other tensors in float"
        )
    weight = Int8Weight(
        q=torch.empty(w.shape, dtype=torch.int8, device=w.device),
        scale=torch.empty(w.shape[0], dtype=torch.bfloat16, device=w.device),
        low=torch.empty(w.shape, dtype=torch.int8, device=w.device) if low else None,
    )
    _fill(weight, w.detach(), chunk_rows)
    if not _finite(weight.scale):
        row = int((~torch.isfinite(weight.scale)).nonzero()[0])
        raise InputError(f"row {row} of a weight holds NaN or infinity, int8 needs finite values: use another model")
    return weight


def _fill(weight: Int8Weight, w: Tensor, chunk_rows: int | None) -> None:
    for rows in row_chunks(w, chunk_rows):
        part = w[rows].to(torch.float32)
        scale = _round_up(absmax(part).div_(127).clamp_min_(SMALLEST_SCALE))
        weight.scale[rows] = scale
        ratio = part / scale.to(torch.float32).unsqueeze(1)
        whole = ratio.round()
        weight.q[rows] = whole
        if weight.low is not None:
            weight.low[rows] = ratio.sub_(whole).mul_(LOW_STEPS).round_()


def _round_up(value: Tensor) -> Tensor:
    """The smallest bfloat16 not below a positive float32: the next bit pattern where rounding went down."""
    rounded = value.to(torch.bfloat16)
    short = rounded.to(torch.float32) < value
    return (rounded.view(torch.int16) + short.to(torch.int16)).view(torch.bfloat16)


def _finite(scale: Tensor) -> bool:
    return bool(torch.isfinite(scale).all())
