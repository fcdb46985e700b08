"""How much the loss would fall if a tensor were updated once, measured without updating anything.

For a micro-batch in halves A and B, AdamW's first step along sign(g_A) lowers the loss on B by lr sum g_B sign(g_A):

    I_k = 1/2 (sum g_B sign g_A + sum g_A sign g_B)          (per unit of learning rate)

which is GreenTrainer's first-order importance (arXiv 2309.13192, section 3.2) without the noise that |g| of one batch
carries. Gradients of int8 linears are formed in row chunks inside their backward, reduced to this number and dropped;
blocks are recomputed. Weights, optimizer and random state are left exactly as found.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from edgegt.data import Batch
from edgegt.loss import supervised_loss
from edgegt.model import Int8Model

_CHUNK_ELEMENTS = 1 << 18


class _Probe:
    """Receives (dy, x) of each linear during backward and adds to its importance. Rows of the first half are A."""

    def __init__(self, model: Int8Model) -> None:
        self.model = model
        self.sums: dict[str, float] = defaultdict(float)

    def __call__(self, name: str, dy: torch.Tensor, q: torch.Tensor, scale: torch.Tensor) -> None:
        half = dy.shape[0] // 2
        self.model.meter.add("probe_dw", 2 * dy.shape[0] * dy.shape[1] * q.shape[1])
        left = [q[part].to(torch.float32).mul_(scale[part, None]) for part in (slice(half), slice(half, None))]
        rows = max(1, _CHUNK_ELEMENTS // q.shape[1])
        total = torch.zeros((), device=dy.device)
        for start in range(0, dy.shape[1], rows):
            part = slice(start, start + rows)
            g_a, g_b = dy[:half, part].t() @ left[0], dy[half:, part].t() @ left[1]
            total += (g_a * g_b.sign()).sum() + (g_b * g_a.sign()).sum()
        self.sums[name] += float(total)


def importance(model: Int8Model, batches: Sequence[Batch], layers: Any) -> dict[str, float]:
    """Importance of every linear, head, norm and bias from these batches (even rows each; an even number of batches).

    layers: the model's list of blocks, which are recomputed in backward. Vectors use consecutive batches as A and B.
    """
    probe = _Probe(model)
    vectors: dict[str, float] = defaultdict(float)
    before: dict[str, torch.Tensor] = {}
    with _probing(model, probe, layers):
        for index, batch in enumerate(batches):
            loss = supervised_loss(model.module, batch, model.device)
            (loss / batch.supervised).backward()
            for name, parameter in model.vectors.items():
                gradient, parameter.grad = parameter.grad, None
                if gradient is None:
                    continue
                if index % 2 == 0:
                    before[name] = gradient
                else:
                    g_a, g_b = before.pop(name), gradient
                    vectors[name] += float((g_a * g_b.sign()).sum() + (g_b * g_a.sign()).sum())
    # Halves of a batch hold half of its tokens, so their gradients of its mean are half of those of their own means.
    found = {name: value / len(batches) for name, value in probe.sums.items()}
    found |= {name: value / len(batches) for name, value in vectors.items()}
    return {name: max(0.0, found.get(name, 0.0)) for name in (*model.linears, *model.vectors)}


@contextmanager
def _probing(model: Int8Model, probe: _Probe, layers: Any) -> Iterator[None]:
    trained = {name: p.requires_grad for name, p in model.vectors.items()}
    forwards = [layer.forward for layer in layers]
    state = torch.get_rng_state()
    try:
        for linear in model.linears.values():
            linear.probe = probe
        for parameter in model.vectors.values():
            parameter.requires_grad_(True)
        for layer, forward in zip(layers, forwards, strict=True):
            layer.forward = _recomputed(forward)
        yield
    finally:
        for linear in model.linears.values():
            linear.probe = None
        for name, parameter in model.vectors.items():
            parameter.requires_grad_(trained[name])
            parameter.grad = None
        for layer in layers:
            del layer.forward
        torch.set_rng_state(state)


def _recomputed(forward: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run
