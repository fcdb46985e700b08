"""One example as token ids: what is read and what is learned. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from edgegt.data.rows import Row

IGNORE = -100
Ids = tuple[int, ...]


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    bos_token_id: Any
    eos_token_id: Any

    def __call__(self, text: list[str], *, add_special_tokens: bool, verbose: bool) -> Any: ...

    def decode(self, token_ids: list[int]) -> Any: ...


@dataclass(frozen=True)
class Example:
    """One row, or one piece of a long text, as ids: the prompt from BOS on, the completion to EOS unless it was cut.

    gaps: ranges (first, end) of the completion that are read and not learned: what stands between two answers.
    start: of an encoder-decoder, what its decoder begins with; the prompt is then all that its encoder reads.
    label: for classification, the number of the class; the prompt is then all that is read. right: padded on the right.
    """

    prompt: Ids
    completion: Ids
    row: Row
    gaps: tuple[tuple[int, int], ...] = ()
    start: int | None = None
    label: int | None = None
    right: bool = False

    @property
    def inputs(self) -> Ids:
        """What the model reads: everything but the last token, which is only predicted; what the encoder reads."""
        whole = self.start is not None or self.label is not None
        return self.prompt if whole else (self.prompt + self.completion)[:-1]

    @property
    def decoder_inputs(self) -> Ids:
        """What an encoder-decoder's decoder reads; nothing of a decoder-only model."""
        return () if self.start is None else (self.start, *self.completion[:-1])

    @property
    def length(self) -> int:
        """How many tokens are read."""
        return len(self.inputs) + len(self.decoder_inputs)

    @property
    def targets(self) -> Ids:
        """What is learned, predicted at the last `len(targets)` inputs, IGNORE in gaps.

        Nothing predicts a text's very first token. For classification: the class.
        """
        if self.label is not None:
            return (self.label,)
        found = self.completion
        for first, end in self.gaps:
            found = found[:first] + (IGNORE,) * (end - first) + found[end:]
        return found if self.prompt or self.start is not None else found[1:]

    @property
    def supervised(self) -> int:
        """How many tokens are learned; one class."""
        if self.label is not None:
            return 1
        gaps = sum(end - first for first, end in self.gaps)
        return len(self.completion) - gaps - (not self.prompt and self.start is None)


def encode(tokenizer: Tokenizer, texts: list[str], special: bool = False) -> list[Ids]:
    """The ids of each text. special: with the tokens that the tokenizer itself puts around a text."""
    if not texts:
        return []
    # verbose=False: texts longer than the model's context are expected here and cut later
    return [tuple(ids) for ids in tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]]
