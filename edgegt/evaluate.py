"""Held-out loss, greedy answers and exact match, on the same rows before and after."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from edgegt.architecture import is_encoder_decoder, positions_of
from edgegt.data import Example, Row, collate
from edgegt.loss import supervised_loss


@torch.no_grad()
def held_out_loss(
    model: Any, examples: Sequence[Example], pad_id: int, batch_size: int, device: torch.device
) -> dict[str, Any]:
    """Mean loss per supervised token, its perplexity, and how many tokens and rows it is the mean of.

    The head works on chunks of positions, as in training. The perplexity of a loss of 50 and more is None, because JSON
    has no infinity.
    """
    total, tokens = 0.0, 0
    ordered = sorted(examples, key=lambda example: example.length)
    for start in range(0, len(ordered), batch_size):
        batch = collate(ordered[start : start + batch_size], pad_id)
        total += float(supervised_loss(model, batch, device))
        tokens += batch.supervised
    loss = total / tokens
    perplexity = math.exp(loss) if loss < 50 else None
    return {"loss": loss, "perplexity": perplexity, "tokens": tokens, "rows": len(examples)}


LEAST_TOKENS = 16


@torch.no_grad()
def answer(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], new_tokens: int, batch_size: int, device: torch.device
) -> list[str]:
    """The greedy continuation of each prompt (token ids), as text, until the end of text or `new_tokens`.

    Of an encoder-decoder the answer to it. Prompts are padded on the left, an encoder's on the right.

    A model that knows fewer positions answers more shortly (from LEAST_TOKENS on), and reads the prompt's end only.
    """
    positions, pairs = positions_of(model.config), is_encoder_decoder(model.config)
    if positions is not None and pairs:
        new_tokens = min(new_tokens, positions - 1)
    elif positions is not None:
        longest = max(len(prompt) for prompt in prompts)
        new_tokens = min(new_tokens, max(LEAST_TOKENS, positions - longest), positions - 1)
        prompts = [prompt[-(positions - new_tokens) :] for prompt in prompts]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        width = max(len(prompts[index]) for index in part)
        ids = torch.full((len(part), width), pad)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(part):
            first = 0 if pairs else width - len(prompts[index])
            ids[row, first : first + len(prompts[index])] = torch.tensor(prompts[index])
            mask[row, first : first + len(prompts[index])] = 1
        cache = {"past_key_values": _pair_cache()} if pairs else {}
        out = model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), max_new_tokens=new_tokens, do_sample=False,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=pad, **cache,
        )  # fmt: skip
        texts = tokenizer.batch_decode(out if pairs else out[:, width:], skip_special_tokens=True)
        for index, text in zip(part, texts, strict=True):
            answers[index] = text
    return answers


def _pair_cache() -> Any:
    """An empty cache that grows: that of `generate` has the encoder's number of layers, whatever the decoder's is."""
    from transformers import DynamicCache, EncoderDecoderCache

    return EncoderDecoderCache(DynamicCache(), DynamicCache())


def exact_match(answers: Sequence[str], rows: Sequence[Row]) -> float:
    """Share of answers that equal their reference, or one of several, surrounding white space aside."""
    same = 0
    for text, row in zip(answers, rows, strict=True):
        same += text.strip() in {one.strip() for one in (row.completion, *row.references)}
    return same / len(rows)
