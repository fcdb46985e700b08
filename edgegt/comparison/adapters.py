"""PEFT's adapters on a float model, as a good user would set them up.

lora        rank 8 on all linears but the head (alpha 16, no dropout)
lora-head   the same, and the head itself, with weights of its own where it was tied
prefix      keys and values of 20 virtual tokens before every layer
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from edgegt.architecture import is_head_tied, untie_head

RANK, ALPHA, VIRTUAL_TOKENS = 8, 16, 20


def lora(model: Any) -> Any:
    """Adapters on all linears but the head."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    with without_old_names():
        return get_peft_model(model, config)


def lora_head(model: Any) -> Any:
    """Adapters, and the head trained whole; a tied one would take the gradient down to the embedding."""
    if is_head_tied(model):
        untie_head(model)
    adapted = lora(model)
    model.get_output_embeddings().weight.requires_grad_(True)
    return adapted


def prefix(model: Any) -> Any:
    """Keys and values of virtual tokens before every layer."""
    from peft import PrefixTuningConfig, get_peft_model

    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL_TOKENS)
    with without_old_names():
        return get_peft_model(model, config)


@contextmanager
def without_old_names() -> Iterator[None]:
    """PEFT asks transformers for attributes by names that it will drop, which warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


class Prefixed(nn.Module):
    """A model with a trained prefix. PEFT's own forward drops the positions, which rows padded on the left need."""

    def __init__(self, adapted: Any) -> None:
        super().__init__()
        self.adapted = adapted

    @property
    def config(self) -> Any:
        return self.adapted.config

    def get_output_embeddings(self) -> Any:
        """The head."""
        return self.adapted.get_base_model().get_output_embeddings()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, **more: Any
    ) -> Any:  # fmt: skip
        """The model's output for rows that have the prefix before them."""
        return self.adapted.get_base_model()(
            input_ids=input_ids, attention_mask=_longer(attention_mask, 1), position_ids=position_ids + VIRTUAL_TOKENS,
            past_key_values=self._prompt(len(input_ids)), **more,
        )  # fmt: skip

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **more: Any) -> torch.Tensor:
        """What the model writes, [rows, T + new]: the prefix stands for tokens that are cached already."""
        found: torch.Tensor = self.adapted.get_base_model().generate(
            input_ids=_longer(input_ids, int(more.get("pad_token_id") or 0)),
            attention_mask=_longer(attention_mask, 1), past_key_values=self._prompt(len(input_ids)), **more,
        )  # fmt: skip
        return found[:, VIRTUAL_TOKENS:]

    def _prompt(self, rows: int) -> Any:
        return self.adapted.get_prompt(rows)


def _longer(tokens: torch.Tensor, value: int) -> torch.Tensor:
    """[rows, T] with a column of `value` for each virtual token before it."""
    return torch.cat([tokens.new_full((len(tokens), VIRTUAL_TOKENS), value), tokens], 1)


PEERS: dict[str, Callable[[Any], Any]] = {
    "lora": lora,
    "lora-head": lora_head,
    "prefix": lambda model: Prefixed(prefix(model)),
}
