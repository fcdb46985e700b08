"""Trained output rows of an int8 layer whose other rows stay frozen.

A head has as many rows as the vocabulary, and fine-tuning moves those of the tokens that occur. Only these get a master
and two planes of their own; the frozen plane, which may be mapped and shared with a tied embedding, is never written:

    y[:, rows] = x W_rows^T                    in place of what the frozen rows gave
    dx         = dy' W + dy[:, rows] W_rows    dy' is dy with the columns `rows` zero
    dw         = dy[:, rows]^T x

dy' is never made: dx quantises dy times the scales of W, and there the scales of `rows` are zero. So dy is neither
changed nor copied, its quantisation leaves these columns out exactly, and only [n, rows] is gathered.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgegt.quant.weight import Int8Weight, split_planes


@dataclass(frozen=True, eq=False)
class TrainedRows:
    """Output rows that act in planes of their own. index: sorted int64 [R]; weight: two planes [R, in]."""

    index: Tensor
    weight: Int8Weight

    @classmethod
    def of(cls, index: Tensor, values: Tensor, shape: torch.Size) -> TrainedRows:
        """The rows `index` [R] of a layer [out, in] with these float values [R, in].

        Raises: ValueError when the index is not one of such a layer or does not fit the values.
        """
        wrong = index_fault(index, shape[0])
        if wrong:
            raise ValueError(f"trained rows: {wrong}")
        if values.shape != (len(index), shape[1]):
            raise ValueError(f"trained rows: values are {tuple(values.shape)}, not {(len(index), shape[1])}")
        return cls(index.to(values.device), split_planes(values))

    @property
    def nbytes(self) -> int:
        """Bytes of planes, scales and index."""
        return self.weight.nbytes + self.index.numel() * self.index.element_size()

    def columns(self, dy: Tensor) -> Tensor:
        """A copy [n, R] of these columns of dy [n, out]."""
        return dy.index_select(1, self.index)

    def replace_in(self, y: Tensor, part: Tensor) -> None:
        """Write part [n, R] over these columns of y [n, out]."""
        y.index_copy_(1, self.index, part)

    def without(self, scale: Tensor) -> Tensor:
        """scale [out] with zeros at these rows, in place."""
        return scale.index_fill_(0, self.index, 0)


def index_fault(index: Tensor, out: int) -> str | None:
    """What keeps a tensor from being an index of rows of a layer with `out` rows; None when nothing does."""
    if index.dtype != torch.int64 or index.ndim != 1 or index.numel() == 0:
        return f"the index is {index.dtype} {tuple(index.shape)}, not int64 of one dimension and at least one row"
    if bool((index[1:] <= index[:-1]).any()):
        return "the index is not sorted, or names a row twice"
    first, last = int(index[0]), int(index[-1])
    return None if first >= 0 and last < out else f"the index goes from {first} to {last}, the rows from 0 to {out - 1}"
