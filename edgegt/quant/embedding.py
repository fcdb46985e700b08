"""The int8 embedding: rows of a table that may be the one a tied head multiplies with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgegt.quant.weight import LOW_STEPS, Int8Weight


class Int8Embedding(nn.Module):
    """Rows of an int8 table [vocabulary, width] as float32; the table may be the object a tied head holds."""

    def __init__(self, weight: Int8Weight, padding_idx: int | None = None, embed_scale: float | None = None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.weight = weight
        self.padding_idx = padding_idx
        self.embed_scale = embed_scale

    def forward(self, ids: Tensor) -> Tensor:
        """float32 [..., width] of ids [...]; a padding id reads its row like any other. No gradient to the table."""
        flat = ids.reshape(-1)
        rows = self.weight.q.index_select(0, flat).to(torch.float32)
        if self.weight.low is not None:
            rows.add_(self.weight.low.index_select(0, flat).to(torch.float32), alpha=1 / LOW_STEPS)
        scale = self.weight.scale.index_select(0, flat).to(torch.float32)
        rows.mul_((scale if self.embed_scale is None else scale.mul_(self.embed_scale)).unsqueeze(1))
        return rows.reshape(*ids.shape, self.embedding_dim)
