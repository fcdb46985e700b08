"""Rows for an encoder-decoder: the encoder reads the prompt, the decoder learns the answer. Needs no torch.

Both sides get the tokens that the model's own tokenizer puts around a text (T5: end-of-text behind both), as in its
pretraining. A conversation becomes one example per answer, with what was said before on the encoder's side.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from edgegt.data.chat import Piece
from edgegt.data.examples import Example, Ids, Tokenizer, encode
from edgegt.data.rows import Row

NO_PROMPT = "no prompt for the encoder"


def pairs(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    start: int,
    chats: Sequence[tuple[int, tuple[Piece, ...]]],
    dropped: Counter[str],
) -> Iterator[tuple[int, Example]]:
    """Every row by its place, whole. chats: the conversations in pieces, each with the place of its row."""
    sides = [*_answers(chats, tokenizer)]
    for place, row in enumerate(rows):
        if not row.turns and row.prompt.strip():
            sides.append((place, row.prompt, row.completion))
        elif not row.turns:
            dropped[NO_PROMPT] += 1
    read = encode(tokenizer, [asked for _, asked, _ in sides], special=True)
    learned = encode(tokenizer, [answer for *_, answer in sides], special=True)
    for (place, *_), prompt, ids in zip(sides, read, learned, strict=True):
        yield place, Example(prompt, _ended(ids, tokenizer), rows[place], start=start)


def within(whole: Example, max_length: int) -> Example:
    """The example with at most `max_length` tokens on each side; both lose their right.

    The encoder's side keeps its last token, which ends it; an answer that is cut has no end to learn.
    """
    prompt, completion = whole.prompt, whole.completion
    if len(prompt) > max_length:
        prompt = (*prompt[: max_length - 1], prompt[-1])
    return replace(whole, prompt=prompt, completion=completion[:max_length])


def _answers(chats: Sequence[tuple[int, tuple[Piece, ...]]], tokenizer: Any) -> Iterator[tuple[int, str, str]]:
    """(place of the row, what was said before, the answer) for every answer; end-of-text is left to the tokenizer."""
    end = str(tokenizer.eos_token)
    for place, pieces in chats:
        before = ""
        for piece in pieces:
            text = piece.text.replace(end, "")
            if piece.learned:
                yield place, before, text.strip()
            before += text


def _ended(ids: Ids, tokenizer: Tokenizer) -> Ids:
    return ids if ids[-1:] == (tokenizer.eos_token_id,) else (*ids, tokenizer.eos_token_id)
