"""Conversations as the model's own chat template writes them, cut into what is read and what is learned.

A template is a program: where an answer begins and ends is found by rendering the conversation up to it. An answer
begins where the template's generation prompt ends, or at its own first character where the template has none. It ends
with the end-of-text token that the template puts behind it, else with the first special token there, else with its last
character. What the template puts between an answer's end and the next answer is read, and not learned.

Where a template writes earlier answers otherwise than the last one (Qwen3 drops their reasoning), each answer becomes
an example of its own, with its history as the model will see it. Without a template, PLAIN is used.
"""

from __future__ import annotations

import os.path
from collections import Counter
from dataclasses import dataclass
from typing import Any

from edgegt.data.rows import ASSISTANT, Row, Turn
from edgegt.errors import InputError
from edgegt.units import format_text

# Readable, and known to no model: for one without a template of its own.
PLAIN = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ message.content }}\n\n"
    "{% else %}{{ message.role | capitalize }}: {{ message.content | trim }}"
    "{{ eos_token if message.role == 'assistant' else '' }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
_THOUGHT = "</think>"
_PROBE = Turn(ASSISTANT, "As7sist")


class Refused(InputError):
    """A conversation that the template cannot write without losing some of it."""


@dataclass(frozen=True)
class Piece:
    """A stretch of a rendered conversation. learned: it is an answer with its end."""

    text: str
    learned: bool


class ChatTemplate:
    """The template of a tokenizer, or PLAIN. notes: what was done otherwise than the data say, and how often."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.own = bool(getattr(tokenizer, "chat_template", None))
        self.notes: Counter[str] = Counter()
        self.end = str(tokenizer.eos_token)
        added = getattr(tokenizer, "added_tokens_decoder", None) or {}
        special = {str(token) for token in added.values() if getattr(token, "special", True)}
        self.marks = sorted(special - {self.end}, key=len, reverse=True)
        self.keeps_system = self._keeps_system()
        self.opening = self._opening()
        if not self.own:
            self.notes["the model has no chat template: a plain one is used (User: ..., Assistant: ...)"] = 0
        elif "strftime_now" in str(tokenizer.chat_template):
            self.notes["the chat template may write today's date: on another day the same rows are other tokens"] = 0

    def examples(self, row: Row) -> list[tuple[Piece, ...]]:
        """The row's conversation in pieces, or one example per answer. Raises: Refused, in one line without the row."""
        turns = self._with_system(row.turns)
        places = [place for place, turn in enumerate(turns) if turn.role == ASSISTANT]
        full = self._render(turns)
        each: list[tuple[str, tuple[int, int]]] = []
        apart = False
        for place in places:
            last = place == places[-1]
            text = full if last else self._render(turns[: place + 1])
            # PLAIN, Phi-3 and others end a conversation with a token that no answer within it has
            shared = text if last else _shared(text, full)
            begin, stop = self._answer(text, turns, place)
            apart = apart or len(shared) < stop
            each.append((text, (begin, self._closed(text if len(shared) < stop else shared, stop))))
        if apart:
            self.notes["each answer is an example of its own: the chat template changes earlier turns"] += 1
            return [self._pieces(text, [span]) for text, span in each]
        return [self._pieces(full, [span for _, span in each])]

    def _pieces(self, text: str, spans: list[tuple[int, int]]) -> tuple[Piece, ...]:
        pieces, at = [], 0
        for begin, stop in spans:
            pieces += [Piece(text[at:begin], False), Piece(text[begin:stop], True)]
            at = stop
        if not pieces[-1].text.endswith(self.end):
            self.notes["end of text is put after the last answer, which the chat template does not do"] += 1
        return tuple(pieces)

    def _answer(self, text: str, turns: tuple[Turn, ...], place: int) -> tuple[int, int]:
        """Where the answer at `place` begins in the text that ends with it, and where its own characters end."""
        head = self._head(turns[:place], True)
        prompted = self.opening != "" and head.endswith(self.opening) and text.startswith(head)
        if not prompted:
            head = self._head(turns[:place], False)
        begin = len(head)
        if not text.startswith(head):
            raise Refused("the chat template changes what was said when an answer follows: use another --format")
        self._check_heard(text[:begin], turns[:place])
        said = turns[place].text.strip()
        said = said.rpartition(_THOUGHT)[2].strip() or said
        at = text.find(said, self._behind_header(text, turns[:place], begin))
        if at < 0:
            raise Refused(f"the chat template changes or drops turn {place + 1} (assistant): leave the row out")
        if not prompted and text[begin:at].strip():
            begin = at
        return begin, at + len(said)

    def _behind_header(self, text: str, turns: tuple[Turn, ...], begin: int) -> int:
        """Where the words of an answer after these turns can begin: a short one may occur in its header too."""
        header = self._render((*turns, _PROBE)).partition(_PROBE.text)[0]
        return len(header) if text.startswith(header) else begin

    def _closed(self, text: str, stop: int) -> int:
        """Where the end of the answer ends: behind the end-of-text token, or the first special one."""
        at = text.find(self.end, stop)
        if at >= 0:
            return at + len(self.end)
        found = [(place, -len(mark)) for mark in self.marks if (place := text.find(mark, stop)) >= 0]
        return min(found)[0] - min(found)[1] if found else stop

    def _check_heard(self, text: str, turns: tuple[Turn, ...]) -> None:
        at = 0
        for place, turn in enumerate(turns, start=1):
            if turn.role != ASSISTANT:
                found = text.find(turn.text.strip(), at)
                if found < 0:
                    raise Refused(f"the chat template changes or drops turn {place} ({turn.role}): leave the row out")
                at = found + len(turn.text.strip())

    def _with_system(self, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
        """The turns, with a system text before the first user turn's where the template would drop it."""
        if self.keeps_system or not turns or turns[0].role != "system":
            return turns
        if len(turns) < 2 or turns[1].role != "user":
            raise Refused("the chat template drops system turns, and no user turn follows to take the text: add one")
        self.notes["system texts are put before the first user turn: the chat template drops system turns"] += 1
        return (Turn("user", f"{turns[0].text}\n\n{turns[1].text}"), *turns[2:])

    def _keeps_system(self) -> bool:
        probe = (Turn("system", "Sys7tem"), Turn("user", "Us7er"), _PROBE)
        try:
            return "Sys7tem" in self._render(probe)
        except Refused:
            return False

    def _opening(self) -> str:
        """The end of what the template puts before an answer when asked for one; nothing where it does not know how."""
        probe = (Turn("user", "Us7er"),)
        plain, prompted = self._head(probe, False), self._head(probe, True)
        return prompted[len(_shared(plain, prompted)) :]

    def _head(self, turns: tuple[Turn, ...], prompted: bool) -> str:
        """What comes before an answer; nothing where the template cannot begin with one."""
        try:
            return self._render(turns, prompted)
        except Refused:
            return ""

    def _render(self, turns: tuple[Turn, ...], prompted: bool = False) -> str:
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        template = None if self.own else PLAIN
        try:
            text = self.tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=prompted
            )
        except Exception as error:  # a template raises whatever it likes
            line = format_text((str(error).splitlines() or [type(error).__name__])[0], 100)
            raise Refused(f"the chat template refuses the conversation ({line}): correct or delete the row") from error
        return str(text)


def _shared(one: str, other: str) -> str:
    """How two texts begin alike."""
    return os.path.commonprefix([one, other])  # noqa: RUF071
