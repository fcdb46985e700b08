"""A conversation with a model: its turns, what of them still fits, and how each is asked.

A model that learned conversations, or nothing yet, is asked through the chat template with all that was said before.
One that learned prompts and completions gets each line as a prompt of its own, and so does an encoder-decoder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from edgegt.data import BY_TEMPLATE, Turn, asked
from edgegt.disk import append, fault, open_file
from edgegt.errors import InputError
from edgegt.log import Log
from edgegt.sampling import GENERATION_CONFIG, generation_defaults
from edgegt.subject import Subject
from edgegt.talk import NEW_TOKENS, Answer, Wanted, check_text, engine_of, own_words, prompt_ids, reply

# New tokens of an answer in a conversation, unless told.
CHAT_TOKENS = 512
# What a model without a chat template of its own would go on with.
_NEXT = "\nUser:"


class Conversation:
    """Turns with one model. `log` gets a line on everything that is done otherwise than one might expect.

    Raises: InputError for a model that says classes, and for a system text where it would be read by nothing.
    """

    def __init__(self, subject: Subject, wanted: Wanted, system: str = "", log: Log | None = None) -> None:
        if subject.labels:
            raise InputError("this model says the class of a text and writes none: ask it with `edgegt generate`")
        self.subject = subject
        self.log = log or Log()
        own = subject.trained or subject.at_home
        self.remembers = subject.start is None and (subject.separator == BY_TEMPLATE or not own)
        self.turns: list[Turn] = []
        self.system = ""
        self._forgotten = 0
        self._asked = 0
        ends: tuple[int, ...] = ()
        stops, defaults = wanted.stops, None
        if self.remembers:
            _, mark, notes = asked((Turn("user", "x"),), subject.tokenizer)
            for note in notes:
                self.log.fallback(note)
            ends = _mark_id(subject.tokenizer, mark)
            if not getattr(subject.tokenizer, "chat_template", None):
                stops = (*stops, _NEXT)
            defaults = generation_defaults(subject.directory).sampling
        elif subject.start is not None:
            self.log.say("each line is asked by itself, without what was said before: the model is an encoder-decoder")
        else:
            self.log.say("each line is asked by itself, without what was said before: so the model was trained")
        self.sampling = wanted.sampling(defaults)
        if defaults is not None and self.sampling != wanted.sampling():
            self.log.say(f"answers: {self.sampling.words()}, with what {GENERATION_CONFIG} of the model says")
        most = wanted.tokens or (CHAT_TOKENS if self.remembers else NEW_TOKENS)
        self.wanted = replace(wanted, tokens=most, stops=stops)
        self.engine = engine_of(subject, *ends)
        if system:
            self.set_system(system)

    def set_system(self, text: str) -> None:
        """Use this system text from now on; none if it is empty."""
        if not self.remembers:
            raise InputError("a system text would not be read: each line is asked by itself, as the model was trained")
        check_text(text, "the system text")
        self.system = text

    def reset(self) -> None:
        """Forget what was said; the system text stays."""
        self.turns, self._forgotten = [], 0

    def ask(self, text: str, say: Callable[[str], None]) -> Answer:
        """The answer, whose text `say` gets as it comes. A turn without an answer is not kept.

        Raises: InputError for an empty text, and for one that the template refuses or that has too many tokens.
        """
        if not text.strip():
            raise InputError("nothing was asked: give some text")
        check_text(text, "the line")
        turn, wanted = Turn("user", text), self.wanted
        ids = self._read(turn) if self.remembers else prompt_ids(self.subject, text)
        if self.remembers and self.engine.positions is not None:
            wanted = replace(wanted, tokens=min(wanted.tokens or CHAT_TOKENS, self.engine.positions - len(ids)))
        sampling = self.sampling
        if sampling.seed is not None:  # every answer draws otherwise
            sampling = replace(sampling, seed=(sampling.seed + self._asked) % 2**63)
        self._asked += 1
        answer = reply(self.engine, self.subject.tokenizer, ids, wanted, sampling, say)
        if answer.text:
            self.turns += [turn, Turn("assistant", answer.text)]
        return answer

    def save(self, path: Path) -> int:
        """Add what was said to a JSONL file that `edgegt run --data` reads; returns how many lines that took.

        Raises: InputError when nothing was said yet, DiskError when it cannot be written.
        """
        if not self.turns:
            raise InputError("nothing was said yet: there is nothing to save")
        rows = [json.dumps(row, ensure_ascii=False) for row in self._rows()]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open_file(path, append=True) as file:
                append(file, "".join(f"{row}\n" for row in rows).encode())
        except OSError as error:
            raise fault(path, error) from error
        return len(rows)

    def _rows(self) -> list[dict[str, object]]:
        """One row of messages, or a row per question where each was asked by itself."""
        if self.remembers:
            return [{"messages": [{"role": turn.role, "content": turn.text} for turn in self._heard(0)]}]
        sides = zip(self.turns[::2], self.turns[1::2], strict=True)
        if self.subject.separator == BY_TEMPLATE:
            return [{"messages": [{"role": one.role, "content": one.text} for one in pair]} for pair in sides]
        space = "" if self.subject.separator or self.subject.start is not None else " "
        return [{"prompt": own_words(self.subject, one.text), "completion": space + two.text} for one, two in sides]

    def _heard(self, first: int) -> list[Turn]:
        return [Turn("system", self.system)] * bool(self.system) + self.turns[first:]

    def _read(self, turn: Turn) -> Sequence[int]:
        """What the model reads of the conversation. Without room for an answer, it forgets half of what it can hold."""
        positions, tokenizer = self.engine.positions, self.subject.tokenizer
        ids, *_ = asked((*self._heard(self._forgotten), turn), tokenizer)
        if positions is None:
            return ids
        room = min(self.wanted.tokens or CHAT_TOKENS, positions // 4)
        first = self._forgotten
        if len(ids) > positions - room:
            while len(ids) > positions // 2 and first < len(self.turns):
                first += 2
                ids, *_ = asked((*self._heard(first), turn), tokenizer)
        if len(ids) >= positions:
            raise InputError(f"that takes {len(ids)} tokens, and the model knows {positions}: say it more shortly")
        if first > self._forgotten:
            self.log.say(f"note: the model knows {positions} tokens: the first {first} turns are no longer read")
            self._forgotten = first
        return ids


def _mark_id(tokenizer: object, mark: str) -> tuple[int, ...]:
    """The id of the token with which the chat template ends an answer, if it is a special one."""
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    return tuple(number for number, token in added.items() if str(token) == mark)
