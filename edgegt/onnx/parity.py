"""An exported model against PyTorch: the same tokens through both, with padding, a prefill and steps after it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from edgegt.onnx.float_model import FloatModel
from edgegt.onnx.forms import takes_positions
from edgegt.onnx.runtime import OnnxModel

# Tokens of each row, how many of them are prefilled together, and how many of the first row are padding.
TOKENS, PREFILLED, PADDING = 24, 16, 5
# What float32 may differ by; more means that the graph computes something else.
ALLOWED = 1e-3


@dataclass(frozen=True)
class Parity:
    """error: of the logits, relative in the 2-norm; same: at how many of `positions` the likeliest token is one."""

    error: float
    same: int
    positions: int

    def line(self) -> str:
        """For people."""
        return (
            f"logits differ from PyTorch's in float32 by {self.error:.1e} of their norm; the likeliest token is the "
            f"same at {self.same} of {self.positions} positions"
        )


@dataclass(frozen=True)
class Reference:
    """Tokens, and PyTorch's logits after each. read, mask: of an encoder-decoder what its encoder reads."""

    ids: torch.Tensor
    mask: torch.Tensor
    read: torch.Tensor | None
    logits: torch.Tensor


@torch.no_grad()
def reference(model: FloatModel) -> Reference:
    """What PyTorch makes of random tokens, the same every time; the module must have its values (`load`)."""
    draw, config = torch.Generator().manual_seed(0), model.module.config
    known = config.get_text_config().vocab_size
    ids, read = (torch.randint(0, known, (2, TOKENS), generator=draw) for _ in range(2))
    mask = torch.ones_like(ids)
    if config.is_encoder_decoder:
        mask[0, -PADDING:] = 0
        logits = model.module(input_ids=read, attention_mask=mask, decoder_input_ids=ids).logits
        return Reference(ids, mask, read, logits)
    mask[0, :PADDING] = 0
    where = {"position_ids": _positions(mask)} if takes_positions(model.module) else {}
    return Reference(ids, mask, None, model.module(input_ids=ids, attention_mask=mask, **where).logits)


def compare(folder: Path, expected: Reference) -> Parity:
    """The files in this folder against the reference: a prefill, then step by step."""
    model, ids, mask = OnnxModel(folder), expected.ids.numpy(), expected.mask.numpy()
    past = model.empty(len(ids)) if expected.read is None else model.read(expected.read.numpy(), mask)
    positions = _positions(expected.mask).numpy()
    found, start = [], 0
    for end in (PREFILLED, *range(PREFILLED + 1, TOKENS + 1)):
        here = slice(start, end)
        if expected.read is None:
            logits, past = model.forward(ids[:, here], mask[:, :end], positions[:, here], past)
        else:
            logits, past = model.forward(ids[:, here], mask, None, past)
        found.append(logits.copy())
        start = end
    counts = expected.mask.bool() if expected.read is None else torch.ones_like(expected.mask).bool()
    ours, right = torch.from_numpy(np.concatenate(found, axis=1))[counts], expected.logits[counts]
    same = int((ours.argmax(-1) == right.argmax(-1)).sum())
    return Parity(float((ours - right).norm() / right.norm()), same, len(right))


def _positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)
