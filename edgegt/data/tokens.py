"""Rows to token ids with an exact boundary between what is read and what is learned. Needs no torch.

Prompt and completion are tokenised apart and their ids concatenated, because the loss needs to know to the token where
the completion begins, and because at inference the prompt is tokenised alone: tokenised jointly, a token could span
both. The price is sentencepiece's dummy space: such a tokenizer begins every text with a space that is not there, and
would put one between the two halves. Completions are then tokenised behind an anchor character whose ids are cut off
again, so that decoding the concatenation gives the concatenated text (tested on three tokenizers).

A conversation is tokenised likewise, piece by piece (see `chat`). Its completion begins with the first answer and ends
with the last; the gaps in between are read and not learned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from edgegt.data.chat import ChatTemplate, Piece, Refused
from edgegt.data.examples import Example, Ids, Tokenizer, encode
from edgegt.data.formats import SKIP
from edgegt.data.pairs import NO_PROMPT, pairs, within
from edgegt.data.rows import ASSISTANT, Row, Turn
from edgegt.errors import InputError

KEPT_PROMPT = 16
_ANSWER = "x"  # stands for the answer that is still to come
_REFUSED = "refused by the chat template"
ANCHORS = ("", "\n", "\x01", "=")


@dataclass(frozen=True)
class TokenReport:
    """What became of the rows. cut: rows that lost tokens; longest, mean_tokens: inputs per example.

    notes: what was done otherwise than the data say.
    """

    rows: int
    kept: int
    cut: int
    dropped: dict[str, int]
    supervised_tokens: int
    longest: int
    mean_tokens: float
    examples: int
    notes: tuple[str, ...] = ()

    def line(self) -> str:
        """'4672 rows: 4670 kept, 12 of them cut, 2 dropped (no supervised token 2); 120,000 supervised tokens, ...'."""
        reasons = ", ".join(f"{reason} {count}" for reason, count in self.dropped.items())
        dropped = f", {sum(self.dropped.values())} dropped ({reasons})" if self.dropped else ""
        pieces = f" in {self.examples} pieces" if self.examples > self.kept else ""
        rows = f"{self.rows} rows: {self.kept} kept{pieces}, {self.cut} of them cut{dropped}"
        lengths = f"{self.mean_tokens:.0f} tokens per example, at most {self.longest}"
        return f"{rows}; {self.supervised_tokens:,} supervised tokens; {lengths}"


def tokenize(
    rows: Sequence[Row], tokenizer: Tokenizer, max_length: int, skip_bad: bool = False, start: int | None = None
) -> tuple[list[Example], TokenReport]:
    """Examples of at most `max_length` inputs, in the order of the rows.

    Too long: the prompt loses its left (BOS and the last 16 tokens stay), then the completion its right and EOS; text
    without a prompt becomes consecutive pieces instead. skip_bad: drop conversations that the chat template refuses.
    start: of an encoder-decoder, what its decoder begins with (see `pairs`).
    Raises: InputError when nothing is left to learn, or the tokenizer has no end-of-text token.
    """
    if max_length < 2:
        raise InputError(f"--max-length {max_length} is too short: give at least 2 tokens, better 128")
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end-of-text token: set eos_token in the model's tokenizer_config.json")
    lead: Ids = () if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
    dropped: Counter[str] = Counter()
    notes: dict[str, int] = {}
    examples: list[Example] = []
    kept: set[int] = set()
    cut: set[int] = set()
    if start is not None:
        chats = _chats(rows, tokenizer, skip_bad, dropped, notes)
        found = pairs(rows, tokenizer, start, chats, dropped)
    else:
        found = _encoded(rows, tokenizer, lead, skip_bad, dropped, notes)
    nothing = 1 if start is None else len(encode(tokenizer, [""], special=True)[0])
    for place, whole in found:
        if len(whole.completion) <= nothing:
            dropped["no supervised token"] += 1
            continue
        kept.add(place)
        if start is not None:
            examples.append(within(whole, max_length))
            if examples[-1].length < whole.length:
                cut.add(place)
        elif whole.row.prompt or whole.row.turns:
            first = len(lead) if whole.prompt[: len(lead)] == lead else 0
            examples.append(_shortened(whole, first, max_length))
            if len(examples[-1].inputs) < len(whole.inputs):
                cut.add(place)
        else:
            examples += _pieces(whole.row, lead, whole.completion, max_length)
    if not examples and dropped[_REFUSED]:
        raise InputError(f"the model's chat template refuses all of {len(rows)} conversation(s): use another --format")
    if not examples and dropped[NO_PROMPT]:
        raise InputError(
            f"none of {len(rows)} row(s) has a prompt for the encoder: name both sides with --columns "
            "prompt=...,completion=..., or give a decoder-only model, which learns plain text"
        )
    if not examples:
        raise InputError(f"no supervised token in {len(rows)} row(s): give completions with text the tokenizer knows")
    lengths = [len(example.inputs) for example in examples]
    supervised = sum(example.supervised for example in examples)
    mean = sum(lengths) / len(lengths)
    said = tuple(f"{note} ({count} of {len(rows)} rows)" if count else note for note, count in notes.items())
    report = TokenReport(
        len(rows), len(kept), len(cut), dict(dropped), supervised, max(lengths), mean, len(examples), said
    )
    return examples, report


def asked(turns: Sequence[Turn], tokenizer: Tokenizer) -> tuple[Ids, str, tuple[str, ...]]:
    """What a decoder-only model reads before its next answer in a conversation, token by token as in training.

    Also the mark that the template ends an answer with ('' for none), and what is done otherwise than was said.
    Raises: InputError when the chat template refuses the turns.
    """
    try:
        template = ChatTemplate(tokenizer)
        pieces = template.examples(Row.of_turns((*turns, Turn(ASSISTANT, _ANSWER)), 1))[-1]
    except Refused as error:
        raise InputError(f"{str(error).rpartition(':')[0]}: say it otherwise, or begin anew with /reset") from error
    bos = () if template.own or tokenizer.bos_token_id is None else (tokenizer.bos_token_id,)
    read = sum(_continue(tokenizer, [piece.text for piece in pieces[1:-1]]), encode(tokenizer, [pieces[0].text])[0])
    notes = tuple(note for note in template.notes if not note.startswith("end of text"))
    return bos + read, pieces[-1].text.strip().removeprefix(_ANSWER).strip(), notes


def _shortened(whole: Example, lead: int, max_length: int) -> Example:
    """The row within `max_length` inputs. lead: how many ids of the prompt are BOS, which always stays.

    A conversation's prompt makes room for the first answer only: its later turns go before its beginning does.
    """
    room = max_length + 1 - lead
    body = whole.prompt[lead:]
    least = min(KEPT_PROMPT, len(body), room // 2)
    wanted = whole.gaps[0][0] if whole.gaps else len(whole.completion)
    body = body[len(body) - max(least, min(len(body), room - wanted)) :]
    end = min(len(whole.completion), room - len(body))
    gaps = tuple(gap for gap in whole.gaps if gap[1] < end)
    if len(gaps) < len(whole.gaps):
        end = min(end, whole.gaps[len(gaps)][0])  # what would end in a gap ends with the answer before it
    return Example(whole.prompt[:lead] + body, whole.completion[:end], whole.row, gaps)


def _pieces(row: Row, lead: Ids, ids: Ids, max_length: int) -> Iterator[Example]:
    """Consecutive pieces; a later one reads the last token of the one before, so that every token is learned once."""
    prompt, at = lead, 0
    while at < len(ids):
        end = at + max_length + 1 - len(prompt)
        yield Example(prompt, ids[at:end], row)
        prompt, at = (*lead, ids[min(end, len(ids)) - 1]), end


def _encoded(
    rows: Sequence[Row], tokenizer: Tokenizer, lead: Ids, skip_bad: bool, dropped: Counter[str], notes: dict[str, int]
) -> Iterator[tuple[int, Example]]:  # fmt: skip
    """Every row by its place, whole, with BOS and EOS; a conversation may come as several examples.

    A text that spells out BOS or EOS itself does not get a second one.
    """
    texts = _texts([row for row in rows if not row.turns], tokenizer)
    own = bool(getattr(tokenizer, "chat_template", None))
    yield from _conversations(rows, tokenizer, _chats(rows, tokenizer, skip_bad, dropped, notes), () if own else lead)
    for place, row in enumerate(rows):
        if not row.turns:
            body, learned = next(texts)
            prompt = body if lead and body[:1] == lead else lead + body
            yield place, Example(prompt, _ended(learned, tokenizer), row)


def _ended(ids: Ids, tokenizer: Tokenizer) -> Ids:
    return ids if ids[-1:] == (tokenizer.eos_token_id,) else (*ids, tokenizer.eos_token_id)


def _chats(
    rows: Sequence[Row], tokenizer: Tokenizer, skip_bad: bool, dropped: Counter[str], notes: dict[str, int]
) -> list[tuple[int, tuple[Piece, ...]]]:  # fmt: skip
    """The examples of every conversation in pieces of text, each with the place of its row."""
    if not any(row.turns for row in rows):
        return []
    template = ChatTemplate(tokenizer)
    planned: list[tuple[int, tuple[Piece, ...]]] = []
    for place, row in enumerate(rows):
        try:
            planned += [(place, pieces) for pieces in template.examples(row)] if row.turns else []
        except Refused as error:
            if not skip_bad:
                raise InputError(f"row {row.number}: {error}, {SKIP}") from error
            dropped[_REFUSED] += 1
    notes.update(template.notes)
    return planned


def _conversations(
    rows: Sequence[Row], tokenizer: Tokenizer, planned: Sequence[tuple[int, tuple[Piece, ...]]], lead: Ids
) -> Iterator[tuple[int, Example]]:  # fmt: skip
    heads = iter(encode(tokenizer, [pieces[0].text for _, pieces in planned]))
    later = iter(_continue(tokenizer, [piece.text for _, pieces in planned for piece in pieces[1:]]))
    for place, pieces in planned:
        prompt = lead + next(heads)
        ids: Ids = ()
        gaps: list[tuple[int, int]] = []
        for piece in pieces[1:]:
            found = next(later)
            if found and not piece.learned:
                gaps.append((len(ids), len(ids) + len(found)))
            ids += found
        yield place, Example(prompt, _ended(ids, tokenizer), rows[place], tuple(gaps))


def _texts(rows: Sequence[Row], tokenizer: Tokenizer) -> Iterator[tuple[Ids, Ids]]:
    """Of every row the ids of its prompt and of its completion, without BOS and EOS."""
    prompts = iter(encode(tokenizer, [row.context for row in rows if row.prompt]))
    after = iter(_continue(tokenizer, [row.completion for row in rows if row.prompt]))
    alone = iter(encode(tokenizer, [row.completion for row in rows if not row.prompt]))
    for row in rows:
        yield (next(prompts), next(after)) if row.prompt else ((), next(alone))


def _continue(tokenizer: Tokenizer, texts: list[str]) -> list[Ids]:
    """The ids of texts that follow another text, without a dummy space before them.

    The first anchor that a text does not merge with is used; the empty one wherever the tokenizer adds no space.
    """
    found: dict[int, Ids] = {}
    for anchor in (*(anchor for anchor in ANCHORS if _seamless(tokenizer, anchor)), ""):
        head = encode(tokenizer, [anchor])[0] if anchor else ()
        pending = [index for index in range(len(texts)) if index not in found]
        for index, ids in zip(pending, encode(tokenizer, [anchor + texts[index] for index in pending]), strict=True):
            if ids[: len(head)] == head:
                found[index] = ids[len(head) :]
    return [found[index] for index in range(len(texts))]


def _seamless(tokenizer: Tokenizer, anchor: str) -> bool:
    """Whether 'y', tokenised behind the anchor and put after 'x', reads 'xy'."""
    first, head, both = encode(tokenizer, ["x", anchor, anchor + "y"])
    tail = both[len(head) :]
    return both[: len(head)] == head and str(tokenizer.decode(list(first + tail))).strip() == "xy"
