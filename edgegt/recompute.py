"""Layers whose forward runs again in backward: they keep their input instead of their activations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


@dataclass
class Inputs:
    """Bytes of the inputs that recomputed layers have kept, the largest of each."""

    by_layer: dict[int, int] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """Bytes of all layers together."""
        return sum(self.by_layer.values())


@contextmanager
def recomputed(layers: Sequence[Any], indices: Sequence[int]) -> Iterator[Inputs]:
    """Recompute these of the model's layers for a while; random state is not kept, since nothing is drawn."""
    chosen, inputs = [layers[index] for index in indices], Inputs()
    try:
        for index, layer in enumerate(chosen):
            layer.forward = _again(layer.forward, index, inputs)
        yield inputs
    finally:
        for layer in chosen:
            layer.__dict__.pop("forward", None)


def _again(forward: Any, index: int, inputs: Inputs) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if isinstance(hidden, torch.Tensor) and torch.is_grad_enabled():
            inputs.by_layer[index] = max(hidden.nbytes, inputs.by_layer.get(index, 0))
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run
