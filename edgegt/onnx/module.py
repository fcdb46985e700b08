"""ONNX files called like a transformers model, so that held-out rows are evaluated by the same code."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from edgegt.onnx.runtime import OnnxModel


class OnnxModule:
    """config: transformers' of the model. Computes on the CPU, and keeps no past."""

    def __init__(self, model: OnnxModel, config: Any) -> None:
        self.model = model
        self.config = config

    def get_output_embeddings(self) -> None:
        """There is no module of the head."""

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None, use_cache: bool = False, logits_to_keep: int = 0,
    ) -> Any:  # fmt: skip
        """An object with logits, float32 [rows, positions, vocabulary], of all positions or of the last ones."""
        mask = _array(attention_mask)
        if decoder_input_ids is not None:
            past, ids, positions = self.model.read(_array(input_ids), mask), _array(decoder_input_ids), None
        else:
            past, ids = self.model.empty(len(input_ids)), _array(input_ids)
            positions = None if position_ids is None else _array(position_ids)
        logits, _ = self.model.forward(ids, mask, positions, past)
        return SimpleNamespace(logits=torch.from_numpy(logits[:, -logits_to_keep:]))


def _array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return tensor.cpu().numpy()
