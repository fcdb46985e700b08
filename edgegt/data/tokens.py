"""Rows to token ids with an exact boundary between what is read and what is learned. Needs no torch.

Prompt and completion are tokenised apart and their ids concatenated, because the loss needs to know to the token where
the completion begins, and because at inference the prompt is tokenised alone: tokenised jointly, a token could span
both. The price is sentencepiece's dummy space: such a tokenizer begins every text with a space that is not there, and
would put one between the two halves. Completions are then tokenised behind an anchor character whose ids are cut off
again, so that decoding the concatenation gives the concatenated text (tested on three tokenizers).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from edgegt.data.read import Row
from edgegt.errors import InputError

KEPT_PROMPT = 16
ANCHORS = ("", "\n", "\x01", "=")
Ids = tuple[int, ...]


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    bos_token_id: Any
    eos_token_id: Any

    def __call__(self, text: list[str], *, add_special_tokens: bool, verbose: bool) -> Any: ...

    def decode(self, token_ids: list[int]) -> Any: ...


@dataclass(frozen=True)
class Example:
    """One row, or one piece of a long text, as ids: the prompt from BOS on, the completion to EOS unless it was cut."""

    prompt: Ids
    completion: Ids
    row: Row

    @property
    def inputs(self) -> Ids:
        """What the model reads: everything but the last token, which is only predicted."""
        return (self.prompt + self.completion)[:-1]

    @property
    def targets(self) -> Ids:
        """What is learned, predicted at the last `len(targets)` inputs: nothing predicts a text's very first token."""
        return self.completion if self.prompt else self.completion[1:]


@dataclass(frozen=True)
class TokenReport:
    """What became of the rows. cut: rows that lost tokens; longest, mean_tokens: inputs per example."""

    rows: int
    kept: int
    cut: int
    dropped: dict[str, int]
    supervised_tokens: int
    longest: int
    mean_tokens: float
    examples: int

    def line(self) -> str:
        """'4672 rows: 4670 kept, 12 of them cut, 2 dropped (no supervised token 2); 120,000 supervised tokens, ...'."""
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.dropped.items())
        dropped = f", {sum(self.dropped.values())} dropped ({reasons})" if self.dropped else ""
        pieces = f" in {self.examples} pieces" if self.examples > self.kept else ""
        rows = f"{self.rows} rows: {self.kept} kept{pieces}, {self.cut} of them cut{dropped}"
        lengths = f"{self.mean_tokens:.0f} tokens per example, at most {self.longest}"
        return f"{rows}; {self.supervised_tokens:,} supervised tokens; {lengths}"


def tokenize(rows: Sequence[Row], tokenizer: Tokenizer, max_length: int) -> tuple[list[Example], TokenReport]:
    """Examples of at most `max_length` inputs, in the order of the rows.

    Too long: the prompt loses its left (BOS and the last 16 tokens stay), then the completion its right and EOS; text
    without a prompt becomes consecutive pieces instead.
    Raises: InputError when nothing is left to learn, or the tokenizer has no end-of-text token.
    """
    if max_length < 2:
        raise InputError(f"--max-length {max_length} is too short: give at least 2 tokens, better 128")
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end-of-text token: set eos_token in the model's tokenizer_config.json")
    lead: Ids = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
    examples: list[Example] = []
    dropped: Counter[str] = Counter()
    cut = kept = 0
    for row, body, learned in _encoded(rows, tokenizer):
        # a text that spells out BOS or EOS itself does not get a second one
        prompt = body if lead and body[:1] == lead else lead + body
        completion = learned if learned[-1:] == (tokenizer.eos_token_id,) else (*learned, tokenizer.eos_token_id)
        if len(completion) == 1:
            dropped["no supervised token"] += 1
            continue
        kept += 1
        if row.prompt:
            example = _shortened(row, prompt, completion, len(lead), max_length)
            cut += len(example.prompt + example.completion) < len(prompt + completion)
            examples.append(example)
        else:
            examples += _pieces(row, lead, completion, max_length)
    if not examples:
        raise InputError(f"no supervised token in {len(rows)} row(s): give completions with text the tokenizer knows")
    lengths = [len(example.inputs) for example in examples]
    supervised = sum(len(example.targets) for example in examples)
    mean = sum(lengths) / len(lengths)
    report = TokenReport(len(rows), kept, cut, dict(dropped), supervised, max(lengths), mean, len(examples))
    return examples, report


def _shortened(row: Row, prompt: Ids, completion: Ids, lead: int, max_length: int) -> Example:
    """The row within `max_length` inputs. lead: how many ids of the prompt are BOS, which always stays."""
    room = max_length + 1 - lead
    body = prompt[lead:]
    least = min(KEPT_PROMPT, len(body), room // 2)
    body = body[len(body) - max(least, min(len(body), room - len(completion))) :]
    return Example(prompt[:lead] + body, completion[: room - len(body)], row)


def _pieces(row: Row, lead: Ids, ids: Ids, max_length: int) -> Iterator[Example]:
    """Consecutive pieces; a later one reads the last token of the one before, so that every token is learned once."""
    prompt, at = lead, 0
    while at < len(ids):
        end = at + max_length + 1 - len(prompt)
        yield Example(prompt, ids[at:end], row)
        prompt, at = (*lead, ids[min(end, len(ids)) - 1]), end


def _encoded(rows: Sequence[Row], tokenizer: Tokenizer) -> Iterator[tuple[Row, Ids, Ids]]:
    """Every row with the ids of its prompt and of its completion, without BOS and EOS."""
    prompts = iter(_encode(tokenizer, [row.context for row in rows if row.prompt]))
    after = iter(_continue(tokenizer, [row.completion for row in rows if row.prompt]))
    alone = iter(_encode(tokenizer, [row.completion for row in rows if not row.prompt]))
    for row in rows:
        yield (row, next(prompts), next(after)) if row.prompt else (row, (), next(alone))


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[Ids]:
    if not texts:
        return []
    # verbose=False: texts longer than the model's context are expected here and cut later
    return [tuple(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]


def _continue(tokenizer: Tokenizer, texts: list[str]) -> list[Ids]:
    """The ids of texts that follow another text, without a dummy space before them.

    The first anchor that a text does not merge with is used; the empty one wherever the tokenizer adds no space.
    """
    found: dict[int, Ids] = {}
    for anchor in (*(anchor for anchor in ANCHORS if _seamless(tokenizer, anchor)), ""):
        head = _encode(tokenizer, [anchor])[0] if anchor else ()
        pending = [index for index in range(len(texts)) if index not in found]
        for index, ids in zip(pending, _encode(tokenizer, [anchor + texts[index] for index in pending]), strict=True):
            if ids[: len(head)] == head:
                found[index] = ids[len(head) :]
    return [found[index] for index in range(len(texts))]


def _seamless(tokenizer: Tokenizer, anchor: str) -> bool:
    """Whether 'y', tokenised behind the anchor and put after 'x', reads 'xy'."""
    first, head, both = _encode(tokenizer, ["x", anchor, anchor + "y"])
    tail = both[len(head) :]
    return both[: len(head)] == head and str(tokenizer.decode(list(first + tail))).strip() == "xy"
