"""Memory of large tensors on the CPU, used again within a step instead of given back and asked for anew.

Freed memory leaves the process (see `process`), which keeps peaks small and predictable; but each new tensor then costs
page faults, as much time as the arithmetic on it. What the layers of a step make is of few sizes that come again in
every layer, so it is lent from here: a block goes back when the tensor's storage dies, and the next tensor of that size
gets it. The pool never holds more than was lent at once: before it would, everything that is free leaves the process.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import numpy
import torch
from torch import Tensor

from edgegt.process import on_trim

SMALLEST_BYTES = 1 << 18  # what is smaller stays on the heap, see `process`
PAGE = 1 << 12


class Pool:
    """Blocks by size. held: bytes of all blocks; lent: of those in use; most: lent at once since the last trim."""

    def __init__(self) -> None:
        self.held = self.lent = self.most = 0
        self._free: dict[int, list[Any]] = {}
        self._out: dict[int, weakref.ref[Any]] = {}

    def empty(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialised contiguous tensor on the CPU."""
        nbytes = prod(shape) * dtype.itemsize
        if nbytes < SMALLEST_BYTES:
            return torch.empty(tuple(shape), dtype=dtype)
        size = -(-nbytes // PAGE) * PAGE
        free = self._free.get(size)
        if free:
            block = free.pop()
        else:
            if self.held + size > max(self.most, self.lent + size):
                self.drop()
            block = numpy.empty(size, dtype=numpy.uint8)
            self.held += size
        view = block[:nbytes]
        self.lent += size
        self.most = max(self.most, self.lent)
        self._out[id(view)] = weakref.ref(view, partial(self._back, id(view), block, size))
        return torch.from_numpy(view).view(dtype).view(tuple(shape))

    def drop(self) -> None:
        """Give everything that is free back to the system."""
        self.held -= sum(size * len(blocks) for size, blocks in self._free.items())
        self._free.clear()

    def trim(self) -> None:
        """The same between phases, after which other sizes will be wanted."""
        self.drop()
        self.most = self.lent

    def _back(self, key: int, block: Any, size: int, _: Any) -> None:
        del self._out[key]
        self.lent -= size
        self._free.setdefault(size, []).append(block)


POOL = Pool()
on_trim(POOL.trim)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As torch.empty; on the CPU from the pool."""
    return POOL.empty(shape, dtype) if device.type == "cpu" else torch.empty(tuple(shape), dtype=dtype, device=device)
