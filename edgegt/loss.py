"""The loss of a batch: cross-entropy summed over its supervised tokens, with the head on the kept positions only."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cross_entropy

from edgegt.data import Batch

IGNORED = -100


def supervised_loss(model: Any, batch: Batch, device: torch.device) -> torch.Tensor:
    """Sum of the cross-entropy over the batch's supervised tokens, in nats; divide by their number for the mean.

    Summing lets micro-batches of one step be normalised together by all tokens of the step.
    """
    logits = model(
        input_ids=batch.input_ids.to(device),
        attention_mask=batch.attention_mask.to(device),
        position_ids=batch.position_ids.to(device),
        logits_to_keep=batch.shape.kept,
        use_cache=False,
    ).logits
    labels = batch.labels.to(device).reshape(-1)
    return cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), labels, ignore_index=IGNORED, reduction="sum")
