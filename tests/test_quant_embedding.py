"""The int8 embedding against the dequantised table."""

from __future__ import annotations

import pytest
import torch

from edgegt.quant import Int8Embedding, dequantize, quantize_rows, split_planes


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def test_embedding_reads_dequantised_rows(device: torch.device) -> None:
    w = torch.randn(50, 24, device=device)
    ids = torch.tensor([[0, 49, 7], [7, 0, 0]], device=device)
    for weight in (quantize_rows(w), split_planes(w)):
        rows = Int8Embedding(weight, padding_idx=0)(ids)
        assert rows.dtype == torch.float32 and not rows.requires_grad
        assert torch.allclose(rows, dequantize(weight)[ids], rtol=1e-6)
    scaled = Int8Embedding(weight, embed_scale=4.5)(ids)
    assert torch.allclose(scaled, 4.5 * dequantize(weight)[ids], rtol=1e-6)
