"""Layers whose forward runs again in backward: they keep their input instead of their activations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch.utils.checkpoint import checkpoint


@contextmanager
def recomputed(layers: Sequence[Any], indices: Sequence[int]) -> Iterator[None]:
    """Recompute these of the model's layers for a while; random state is not kept, since nothing is drawn."""
    chosen = [layers[index] for index in indices]
    before = [layer.__dict__.get("forward") for layer in chosen]
    try:
        for layer in chosen:
            layer.forward = _again(layer.forward)
        yield
    finally:
        for layer, own in zip(chosen, before, strict=True):
            layer.__dict__.pop("forward", None)
            if own is not None:
                layer.forward = own


def _again(forward: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run
