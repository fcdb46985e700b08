"""Held-out loss, greedy answers and exact match, on the same rows before and after."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from edgegt.architecture import is_encoder_decoder, positions_of
from edgegt.data import Example, Row, collate
from edgegt.decoding import LEAST_TOKENS
from edgegt.engine import empty_cache
from edgegt.loss import class_logits, supervised_loss
from edgegt.sampling import Defaults


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


@torch.no_grad()
def classified(
    model: Any, examples: Sequence[Example], pad_id: int, batch_size: int, device: torch.device
) -> dict[str, Any]:
    """Mean loss per row, the share of rows whose class is right, and F1 as a mean over classes, both from 0 to 1."""
    total, pairs = 0.0, []
    for part, logits in _logits(model, examples, pad_id, batch_size, device):
        right = torch.tensor([example.label for example in part], device=device)
        total += float(torch.nn.functional.cross_entropy(logits, right, reduction="sum"))
        pairs += list(zip(right.tolist(), logits.argmax(1).tolist(), strict=True))
    count = len(pairs)
    accuracy = sum(right == said for right, said in pairs) / count
    return {
        "loss": total / count, "accuracy": accuracy, "macro_f1": macro_f1(pairs), "rows": count,
    }  # fmt: skip


def macro_f1(pairs: Sequence[tuple[int, int]]) -> float:
    """The mean of F1, 2 tp / (2 tp + fp + fn), over the classes that occur; pairs: (right, said)."""
    classes = sorted({one for pair in pairs for one in pair})
    scores = []
    for one in classes:
        hits = sum(right == said == one for right, said in pairs)
        named = sum((right == one) + (said == one) for right, said in pairs)
        scores.append(2 * hits / named)
    return sum(scores) / len(scores)


@torch.no_grad()
def says(
    model: Any, examples: Sequence[Example], labels: Sequence[str], pad_id: int, batch_size: int, device: torch.device
) -> list[str]:
    """The label that the model gives to each text."""
    said = {
        id(example): labels[place]
        for part, logits in _logits(model, examples, pad_id, batch_size, device)
        for example, place in zip(part, logits.argmax(1).tolist(), strict=True)
    }
    return [said[id(example)] for example in examples]


def _logits(
    model: Any, examples: Sequence[Example], pad_id: int, batch_size: int, device: torch.device
) -> Iterator[tuple[Sequence[Example], torch.Tensor]]:
    ordered = sorted(examples, key=lambda example: example.length)
    for start in range(0, len(ordered), batch_size):
        part = ordered[start : start + batch_size]
        yield part, class_logits(model, collate(part, pad_id), device)


def score_words(before: Mapping[str, Any], after: Mapping[str, Any] | None = None) -> str:
    """', accuracy 50.0% -> 98.0%, macro-F1 ...' of a classification's numbers, else nothing."""
    said = ""
    for key, name in (("accuracy", "accuracy"), ("macro_f1", "macro-F1")):
        if key in before:
            said += f", {name} {before[key]:.1%}"
            said += f" -> {after[key]:.1%}" if after and key in after else ""
    return said


@torch.no_grad()
def answer(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], new_tokens: int, batch_size: int,
    device: torch.device, defaults: Defaults | None = None,
) -> list[str]:  # fmt: skip
    """The greedy continuation of each prompt (token ids), as text, until the end of text or `new_tokens`.

    defaults: what the model's files say of ids that end an answer, or begin it.

    Of an encoder-decoder the answer to it. Prompts are padded on the left, an encoder's on the right.

    A model that knows fewer positions answers more shortly (from LEAST_TOKENS on), and reads the prompt's end only; an
    encoder its beginning and its last token, as in training (`data.pairs`).
    """
    positions, pairs, defaults = positions_of(model.config), is_encoder_decoder(model.config), defaults or Defaults()
    ends = list(dict.fromkeys((tokenizer.eos_token_id, *defaults.eos)))
    if positions is not None and pairs:
        new_tokens = min(new_tokens, positions - 1)
        prompts = [one if len(one) <= positions else (*one[: positions - 1], one[-1]) for one in prompts]
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
        own = {"past_key_values": empty_cache(model.config), "forced_bos_token_id": defaults.first} if pairs else {}
        out = model.generate(
            input_ids=ids.to(device), attention_mask=mask.to(device), max_new_tokens=new_tokens, do_sample=False,
            eos_token_id=ends, pad_token_id=pad, **own,
        )  # fmt: skip
        texts = tokenizer.batch_decode(out if pairs else out[:, width:], skip_special_tokens=True)
        for index, text in zip(part, texts, strict=True):
            answers[index] = text
    return answers


def exact_match(answers: Sequence[str], rows: Sequence[Row]) -> float:
    """Share of answers that equal their reference, or one of several, surrounding white space aside."""
    same = 0
    for text, row in zip(answers, rows, strict=True):
        same += text.strip() in {one.strip() for one in (row.completion, *row.references)}
    return same / len(rows)
