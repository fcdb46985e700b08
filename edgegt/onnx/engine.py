"""The engine of ONNX files: onnxruntime with the keys and values of what was read, for the loop in `decoding`."""

from __future__ import annotations

import os.path
from collections.abc import Sequence

import numpy as np
import torch

from edgegt.onnx.runtime import OnnxModel, Past


class OnnxEngine:
    """ONNX files that write, for the loop in `decoding`; forced: the id that every answer must begin with."""

    def __init__(
        self, model: OnnxModel, eos: Sequence[int], positions: int | None, start: int | None, forced: int | None = None
    ) -> None:
        self.model = model
        self.eos = tuple(eos)
        self.positions = positions
        self.start = start
        self.forced = forced
        self.reused = 0
        self._read: list[int] = []
        self._past = Past()
        self._encoded: tuple[tuple[int, ...], Past] | None = None

    def prefill(self, ids: Sequence[int]) -> torch.Tensor:
        """As `decoding.Engine`."""
        if self.start is not None:
            return self._encode(tuple(ids))
        known = len(os.path.commonprefix([self._read, list(ids[:-1])]))  # noqa: RUF071
        past = self.model.empty(1) if known == 0 else self._past
        self._past = past if known in (0, len(self._read)) else past.first(known)
        self._read, self.reused = list(ids[:known]), known
        return self._forward(ids[known:])

    def step(self, token: int) -> torch.Tensor:
        """As `decoding.Engine`."""
        return self._forward((token,))

    def _encode(self, ids: tuple[int, ...]) -> torch.Tensor:
        same = self._encoded is not None and self._encoded[0] == ids
        self.reused = len(ids) if same else 0
        if self._encoded is None or not same:
            row = np.array([ids], dtype=np.int64)
            self._encoded = ids, self.model.read(row, np.ones_like(row))
        self._read, self._past = [], self._encoded[1]
        assert self.start is not None
        logits = self._forward((self.start,))
        return (
            logits
            if self.forced is None
            else torch.full_like(logits, -torch.inf).index_fill_(0, torch.tensor(self.forced), 0)
        )

    def _forward(self, ids: Sequence[int]) -> torch.Tensor:
        read, self._read = self._read, []
        row = np.array([list(ids)], dtype=np.int64)
        before, after = len(read), len(read) + len(ids)
        if self._encoded is not None and self.start is not None:
            mask, positions = np.ones((1, len(self._encoded[0])), dtype=np.int64), None
        else:
            mask, positions = np.ones((1, after), dtype=np.int64), np.arange(before, after, dtype=np.int64)[None]
        logits, self._past = self.model.forward(row, mask, positions, self._past)
        self._read = [*read, *ids]
        return torch.from_numpy(logits[0, -1].copy())
