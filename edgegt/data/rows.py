"""What a file becomes: rows to learn from, and those that could not be read. Needs no torch.

A row is a prompt and the completion to be learned, or a conversation, of which the assistant's turns are learned.
Prompt and completion are joined as given. Only where both sides lack whitespace at the seam (table columns such as
E2E's `mr` and `ref`) a newline goes between them, so that their words do not run together. `Row.prompt` stays the text
as given; `Row.context` is what the model reads.
"""

from __future__ import annotations

from dataclasses import dataclass

ASSISTANT = "assistant"
# The separator of conversations: the chat template, and no text, stands between a prompt and its answer.
BY_TEMPLATE = "chat template"


@dataclass(frozen=True)
class Turn:
    """What one side says. role: system, user, assistant or tool."""

    role: str
    text: str


@dataclass(frozen=True)
class Row:
    """One example as given. number: 1-based line (JSONL, text), table row with the header as 1, or place in a list.

    turns: of a conversation, up to the assistant's last; prompt is then what comes before its first answer, and
    completion that answer. references: every right answer, where there are several; completion is the first.
    """

    prompt: str
    completion: str
    number: int
    turns: tuple[Turn, ...] = ()
    references: tuple[str, ...] = ()

    @classmethod
    def of_turns(cls, turns: tuple[Turn, ...], number: int) -> Row:
        """A conversation, without what follows the last answer; an empty completion where there is no answer."""
        answers = [place for place, turn in enumerate(turns) if turn.role == ASSISTANT]
        if not answers:
            return cls("\n".join(turn.text for turn in turns), "", number, turns)
        before = "\n".join(turn.text for turn in turns[: answers[0]])
        return cls(before, turns[answers[0]].text, number, turns[: answers[-1] + 1])

    @property
    def separator(self) -> str:
        """A newline where prompt and completion would run together, else nothing; BY_TEMPLATE of a conversation."""
        if self.turns:
            return BY_TEMPLATE
        if not self.prompt or self.prompt[-1:].isspace() or self.completion[:1].isspace():
            return ""
        return "\n"

    @property
    def context(self) -> str:
        """What the model reads before the completion: the prompt and the separator. Not for conversations."""
        return self.prompt + self.separator

    @property
    def written(self) -> str:
        """All of its text, to look for broken characters in."""
        return "".join((self.prompt, self.completion, *(turn.text for turn in self.turns), *self.references))

    @property
    def key(self) -> str:
        """What decides the side of a split: all that is asked, but for case and spaces; else what is answered."""
        asked = " ".join(turn.text for turn in self.turns if turn.role != ASSISTANT) if self.turns else self.prompt
        return " ".join(asked.split()).casefold() or " ".join(self.completion.split()).casefold()


@dataclass(frozen=True)
class BadRow:
    """A row that was left out because it cannot be read. number: as in `Row`; reason: with little of the text."""

    number: int
    reason: str


@dataclass(frozen=True)
class Source:
    """The rows of one file, or of the files of one split.

    format: of the file; name: the file's name without its folder; dropped: number of rows without anything to learn,
    by reason; bad: the rows that could not be read, in the file's order; layout: which fields hold what.
    """

    rows: tuple[Row, ...]
    format: str
    name: str
    dropped: dict[str, int]
    bad: tuple[BadRow, ...] = ()
    layout: str = ""
