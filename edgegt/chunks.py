"""How many positions the head works on at once: what its code and the memory model must agree on."""

from __future__ import annotations

HEAD_CHUNK_ELEMENTS = 2**22
SMALLEST_CHUNK = 16


def chunk_positions(vocabulary: int, n: int) -> int:
    """Positions per chunk of `n`: 2**22 logits (16 MiB in float32) rounded up, not below 16 positions; at least 1."""
    return max(1, min(n, max(SMALLEST_CHUNK, -(-HEAD_CHUNK_ELEMENTS // vocabulary))))
