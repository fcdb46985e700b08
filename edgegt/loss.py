"""The loss of a batch: cross-entropy summed over its supervised tokens, with the head on the kept positions only.

Of an int8 model the head runs on the supervised positions, chunk by chunk (`head`); a float model in full fine-tuning
computes its own logits of all kept positions, as transformers does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cross_entropy

from edgegt.data import Batch
from edgegt.data.batches import IGNORE
from edgegt.head import head_loss, last_hidden
from edgegt.quant import Int8Linear


def supervised_loss(model: Any, batch: Batch, device: torch.device, factor: float = 1.0) -> torch.Tensor:
    """Sum of the cross-entropy over the batch's supervised tokens, in nats, times `factor`: 1 / their number.

    Summing lets micro-batches of one step be normalised together by all tokens of the step. For classification: over
    the rows.
    """
    if batch.classes:
        labels = batch.labels.to(device).reshape(-1)
        return cross_entropy(class_logits(model, batch, device), labels, reduction="sum") * factor
    if isinstance(model.get_output_embeddings(), Int8Linear):
        return head_loss(model, kept_hidden(model, batch, device), batch.labels, factor=factor)
    fewer = {"logits_to_keep": batch.shape.kept} if batch.decoder_input_ids is None else {}
    logits = model(**_inputs(batch, device), **fewer).logits
    labels = batch.labels.to(device).reshape(-1)
    logits = logits.reshape(-1, logits.shape[-1]).float()
    return cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum") * factor


def class_logits(model: Any, batch: Batch, device: torch.device) -> torch.Tensor:
    """float32 [rows, classes]; a decoder says them at the last token of a row, as transformers does."""
    inputs = _inputs(batch, device)
    if batch.right:
        del inputs["position_ids"], inputs["use_cache"]
    logits: torch.Tensor = model(**inputs).logits
    return logits.float()


def kept_hidden(model: Any, batch: Batch, device: torch.device) -> torch.Tensor:
    """What the head reads, [rows, kept, in]: the output on the batch's last positions, or on the decoder's."""
    return last_hidden(model, **_inputs(batch, device))[:, -batch.shape.kept :]


def _inputs(batch: Batch, device: torch.device) -> dict[str, Any]:
    inputs = {
        "input_ids": batch.input_ids.to(device), "attention_mask": batch.attention_mask.to(device), "use_cache": False,
    }  # fmt: skip
    if batch.decoder_input_ids is None:
        return inputs | {"position_ids": batch.position_ids.to(device)}
    return inputs | {"decoder_input_ids": batch.decoder_input_ids.to(device)}
