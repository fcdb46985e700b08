"""The engine of PyTorch: a loaded int8 model with its keys and values, for the loop in `decoding`."""

from __future__ import annotations

import os.path
from collections.abc import Sequence
from typing import Any, cast

import torch

from edgegt.architecture import decoder_start, is_encoder_decoder, positions_of


class TorchEngine:
    """A transformers model that writes. eos: ids that end an answer, as in `decoding.Engine`.

    forced: the id that every answer of an encoder-decoder must begin with.
    """

    def __init__(self, module: Any, eos: Sequence[int], device: torch.device, forced: int | None = None) -> None:
        self.module = module
        self.device = device
        self.eos = tuple(eos)
        self.positions = positions_of(module.config)
        self.start = decoder_start(module.config)
        self.forced = forced
        self.reused = 0
        self._read: list[int] = []
        self._cache: Any = None
        self._encoded: Any = None

    def prefill(self, ids: Sequence[int]) -> torch.Tensor:
        """As `decoding.Engine`."""
        if self.start is not None:
            return self._encode(ids)
        known = len(os.path.commonprefix([self._read, list(ids[:-1])]))  # noqa: RUF071
        if not self._crop(len(self._read) - known):
            known = 0
        if known == 0:
            self._cache = empty_cache(self.module.config)
        self._read, self.reused = list(ids[:known]), known
        return self._forward(ids[known:])

    def step(self, token: int) -> torch.Tensor:
        """As `decoding.Engine`."""
        return self._forward((token,))

    def _encode(self, ids: Sequence[int]) -> torch.Tensor:
        same = self._encoded is not None and self._encoded[0] == tuple(ids)
        self.reused = len(ids) if same else 0
        if not same:
            self._encoded = None
            with torch.no_grad():
                states = self.module.get_encoder()(input_ids=self._tensor(ids))
            self._encoded = (tuple(ids), states)
        self._read, self._cache = [], empty_cache(self.module.config)
        assert self.start is not None
        logits = self._forward((self.start,))
        if self.forced is not None:  # as some models for summaries and translation demand
            logits = torch.full_like(logits, -torch.inf).index_fill_(0, self._tensor([self.forced])[0], 0)
        return logits

    @torch.no_grad()
    def _forward(self, ids: Sequence[int]) -> torch.Tensor:
        """The logits after these ids, which follow what was read. Broken off, nothing counts as read."""
        read, self._read = self._read, []
        cache = self._cache
        inputs: dict[str, Any] = {"input_ids": self._tensor(ids), "logits_to_keep": 1}
        if self.start is not None:
            inputs = {"decoder_input_ids": self._tensor(ids), "encoder_outputs": self._encoded[1]}
        found = self.module(**inputs, past_key_values=cache, use_cache=True, return_dict=True).logits
        self._read = [*read, *ids]
        return cast(torch.Tensor, found[0, -1].to(torch.float32))

    def _crop(self, count: int) -> bool:
        """Forget the last `count` ids; False where the cache cannot: of a sliding window that is full."""
        if self._cache is None:
            return False
        for layer in self._cache.layers:
            full = getattr(layer, "is_sliding", False) and layer.get_seq_length() >= layer.sliding_window
            if count and (full or not getattr(layer, "is_croppable", False)):
                return False
        if count:
            self._cache.crop(-count)
        return True

    def _tensor(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor([list(ids)], device=self.device)


def empty_cache(config: Any) -> Any:
    """A cache that grows, by the kinds of a decoder's layers.

    That of `generate` has an encoder's number of layers, whatever its decoder's is.
    """
    from transformers import DynamicCache, EncoderDecoderCache

    if is_encoder_decoder(config):
        return EncoderDecoderCache(DynamicCache(), DynamicCache())
    return DynamicCache(config=config)
