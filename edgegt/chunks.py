"""How many positions the head works on at once: what its code and the memory model must agree on."""

from __future__ import annotations

HEAD_CHUNK_ELEMENTS = 2**22
SMALLEST_CHUNK = 16
TRAINED_SHARE = 16


def chunk_elements(trained: int = 0) -> int:
    """Logits per chunk: 2**22 (16 MiB in float32), or a sixteenth of the elements of the head that are trained.

    Each chunk reads the whole head and adds to the whole of its gradient; beside a large one more logits weigh little.
    """
    return max(HEAD_CHUNK_ELEMENTS, trained // TRAINED_SHARE)


def chunk_positions(vocabulary: int, n: int, trained: int = 0) -> int:
    """Positions per chunk of `n`: `chunk_elements` rounded up, not below 16 positions; at least 1."""
    return max(1, min(n, max(SMALLEST_CHUNK, -(-chunk_elements(trained) // vocabulary))))
