"""How much the loss would fall if a tensor were updated once, measured without updating anything.

For a micro-batch in halves A and B, AdamW's first step along sign(g_A) lowers the loss on B by lr sum g_B sign(g_A):

    I_k = 1/2 (sum g_B sign g_A + sum g_A sign g_B)          (per unit of learning rate)

which is GreenTrainer's first-order importance (arXiv 2309.13192, section 3.2) without the noise that |g| of one batch
carries. Gradients of int8 linears are formed in row chunks inside their backward, reduced to this number and dropped;
blocks are recomputed. The head's logits never exist at once: its loss goes over chunks of positions and keeps their
logsumexp, then the statistic goes over chunks of vocabulary and computes their logits once more, for all positions.
Weights, optimizer and random state are left exactly as found.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from edgegt.chunks import HEAD_CHUNK_ELEMENTS
from edgegt.data import Batch
from edgegt.data.batches import IGNORE
from edgegt.head import head_loss, logit_map
from edgegt.loss import kept_hidden, supervised_loss
from edgegt.model import Int8Model
from edgegt.quant import Int8Linear, Int8Weight
from edgegt.recompute import recomputed

_CHUNK_ELEMENTS = 1 << 18


class _Probe:
    """Receives (dy, x) of each linear during backward and adds to its importance. Rows of the first half are A."""

    def __init__(self, model: Int8Model) -> None:
        self.model = model
        self.sums: dict[str, float] = defaultdict(float)

    def __call__(
        self, name: str, dy: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, half: int | None = None
    ) -> None:
        half = dy.shape[0] // 2 if half is None else half
        self.model.meter.add("probe_dw", 2 * dy.shape[0] * dy.shape[1] * q.shape[1])
        left = [q[part].to(torch.float32).mul_(scale[part, None]) for part in (slice(half), slice(half, None))]
        rows = max(1, _CHUNK_ELEMENTS // q.shape[1])
        total = torch.zeros((), device=dy.device)
        for start in range(0, dy.shape[1], rows):
            part = slice(start, start + rows)
            g_a, g_b = dy[:half, part].t() @ left[0], dy[half:, part].t() @ left[1]
            total += agreement(g_a, g_b)
        self.sums[name] += float(total)


def importance(
    model: Int8Model, batches: Sequence[Batch], layers: Any, head_rows: torch.Tensor | None = None
) -> dict[str, float]:
    """Importance of every linear, head, norm and bias from these batches (even rows each; an even number of batches).

    layers: the model's list of blocks, which are recomputed in backward. Vectors use consecutive batches as A and B.
    head_rows: sorted int64 indices of the head's rows that can be trained; all by default.
    """
    probe = _Probe(model)
    vectors: dict[str, float] = defaultdict(float)
    before: dict[str, torch.Tensor] = {}
    with _probing(model, probe, layers):
        for index, batch in enumerate(batches):
            if batch.classes:
                supervised_loss(model.module, batch, model.device, 1 / batch.supervised).backward()
            else:
                hidden = kept_hidden(model.module, batch, model.device)
                seen = _Seen.of(model, hidden, batch)
                loss = head_loss(model.module, hidden, batch.labels, seen.lse)
                del hidden
                (loss / batch.supervised).backward()
                probe.sums[model.head] += _head_statistic(model, seen, head_rows) / batch.supervised
            for parameter in model.fresh.values():
                parameter.grad = None
            for name, parameter in model.vectors.items():
                gradient, parameter.grad = parameter.grad, None
                if gradient is None:
                    continue
                if index % 2 == 0:
                    before[name] = gradient
                else:
                    g_a, g_b = before.pop(name), gradient
                    vectors[name] += float(agreement(g_a, g_b))
    # Halves of a batch hold half of its tokens, so their gradients of its mean are half of those of their own means.
    found = {name: value / len(batches) for name, value in probe.sums.items()}
    found |= {name: value / len(batches) for name, value in vectors.items()}
    return {name: max(0.0, found.get(name, 0.0)) for name in (*model.linears, *model.vectors)}


def agreement(g_a: torch.Tensor, g_b: torch.Tensor) -> torch.Tensor:
    """sum g_A sign(g_B) + sum g_B sign(g_A): twice the importance that both gradients of one tensor say."""
    return (g_a * g_b.sign()).sum() + (g_b * g_a.sign()).sum()


@dataclass(frozen=True, eq=False)
class _Seen:
    """What the head reads of one batch's labelled positions. half: how many of them are in A.

    q, scale: int8 [n, in] and float32 [n]; lse: float32 [n], filled by the loss; labels: int64 [n].
    """

    q: torch.Tensor
    scale: torch.Tensor
    lse: torch.Tensor
    labels: torch.Tensor
    half: int

    @classmethod
    def of(cls, model: Int8Model, hidden: torch.Tensor, batch: Batch) -> _Seen:
        labelled = batch.labels != IGNORE
        at = labelled.reshape(-1).nonzero().squeeze(1).to(model.device)
        read = hidden.detach().reshape(-1, hidden.shape[-1]).index_select(0, at)
        q, scale = model.linears[model.head].backend.quantize_tokens(read)
        half = int(labelled[: batch.shape.rows // 2].sum())
        return cls(q, scale, torch.empty_like(scale), batch.labels[labelled].to(model.device), half)


def _head_statistic(model: Int8Model, seen: _Seen, head_rows: torch.Tensor | None) -> float:
    """The statistic of the head for the loss summed over tokens, a chunk of its rows at a time."""
    head, change = model.linears[model.head], logit_map(model.module)
    n, width = seen.q.shape
    x = seen.q.to(torch.float32).mul_(seen.scale[:, None])
    total = torch.zeros((), device=model.device)
    for planes, rows, ids in _row_groups(head, head_rows):
        step = max(1, min(_CHUNK_ELEMENTS // width, HEAD_CHUNK_ELEMENTS // max(1, n)))
        for part in (slice(start, start + step) for start in range(0, rows.shape[0], step)):
            logits = _some_rows(model, planes, rows[part], ids[part]).logits(seen.q, seen.scale)
            mapped, tanh = change.apply(logits)
            gradient = mapped.sub_(seen.lse[:, None]).exp_().sub_((seen.labels[:, None] == ids[part]).to(torch.float32))
            gradient = change.back_(gradient, tanh)
            model.meter.add("probe_dw", 2 * gradient.numel() * width)
            total += agreement(gradient[: seen.half].t() @ x[: seen.half], gradient[seen.half :].t() @ x[seen.half :])
    return float(total)


def _row_groups(
    head: Int8Linear, head_rows: torch.Tensor | None
) -> Iterator[tuple[Int8Weight, torch.Tensor, torch.Tensor]]:
    """Planes, row numbers in them and the vocabulary ids they stand for: rows with planes of their own come apart."""
    device = head.weight.device
    ids = torch.arange(head.out_features, device=device) if head_rows is None else head_rows.to(device)
    if head.rows is not None:
        apart = torch.isin(ids, head.rows.index)
        yield head.rows.weight, torch.searchsorted(head.rows.index, ids[apart]), ids[apart]
        ids = ids[~apart]
    yield head.weight, ids, ids


def _some_rows(model: Int8Model, planes: Int8Weight, rows: torch.Tensor, ids: torch.Tensor) -> Int8Linear:
    head = model.linears[model.head]
    low = None if planes.low is None else planes.low.index_select(0, rows)
    weight = Int8Weight(planes.q.index_select(0, rows), planes.scale.index_select(0, rows), low)
    bias = None if head.bias is None else head.bias.detach().index_select(0, ids)
    return Int8Linear(weight, bias, backend=head.backend, inputs=head.inputs, meter=model.meter)


@contextmanager
def _probing(model: Int8Model, probe: _Probe, layers: Any) -> Iterator[None]:
    trained = {name: p.requires_grad for name, p in model.vectors.items()}
    head_master = model.linears[model.head].master if model.head else None
    state = torch.get_rng_state()
    try:
        for linear in model.linears.values():
            linear.probe = probe
        for parameter in model.vectors.values():
            parameter.requires_grad_(True)
        if head_master is not None:
            head_master.requires_grad_(False)  # its gradient would be formed whole
        with recomputed(layers, range(len(layers))):
            yield
    finally:
        for linear in model.linears.values():
            linear.probe = None
        for name, parameter in model.vectors.items():
            parameter.requires_grad_(trained[name])
            parameter.grad = None
        if head_master is not None:
            head_master.requires_grad_(True)
        torch.set_rng_state(state)
