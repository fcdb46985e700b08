"""`edgegt generate`, and what `edgegt chat` shares with it: a prompt as training saw it, and its answer as it comes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

from edgegt import home
from edgegt.errors import InputError
from edgegt.log import Log
from edgegt.sampling import Sampling, generation_defaults
from edgegt.subject import Subject, load_subject

if TYPE_CHECKING:
    from edgegt.decoding import Engine

# New tokens of an answer, unless told.
NEW_TOKENS = 64
END, LENGTH, INTERRUPTED = "end", "length", "interrupted"


@dataclass(frozen=True)
class Wanted:
    """What the user asked of answers: new tokens at most, numbers of `Sampling` by name, texts that end an answer.

    Raises: InputError for what is out of range.
    """

    tokens: int | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    stops: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens < 1:
            raise InputError(f"--tokens {self.tokens} is out of range: give a positive whole number")
        if "" in self.stops:
            raise InputError("--stop '' would end every answer at once: give a text")
        for text in self.stops:
            check_text(text, "--stop")
        self.sampling()

    def sampling(self, defaults: Sampling | None = None) -> Sampling:
        """The defaults (or the likeliest token) with what the user gave."""
        return (defaults or Sampling()).with_flags(self.flags)

    def check_unused(self) -> None:
        """Raises: InputError when something was asked that a classification has no use for."""
        given = [name for name, value in self.flags.items() if value is not None]
        given = ["tokens"] * (self.tokens is not None) + given + ["stop"] * bool(self.stops)
        if given:
            flag = f"--{given[0].replace('_', '-')}"
            raise InputError(f"{flag} is for answers in words, and this is a classification: leave it out")


@dataclass(frozen=True)
class Answer:
    """tokens: made, with the one that ended it; seconds: with the reading of the prompt; tokens_per_s: without it.

    stopped: 'end' (of text, or a text of --stop), 'length', or 'interrupted' (Ctrl-C).
    """

    text: str
    tokens: int
    prompt_tokens: int
    stopped: str
    seconds: float
    tokens_per_s: float


def nowhere(text: str) -> None:
    """Show nothing while an answer comes."""


def generate_text(
    run: str | None, model: str | None, patch: str | None, prompt: str, tokens: int | None, onnx: str | None = None
) -> str:
    """The greedy answer to one prompt, of 64 tokens at most unless told; of a classifier the label of the text."""
    wanted = Wanted(tokens)
    subject = load_subject(run, model, patch, onnx)
    if subject.labels:
        wanted.check_unused()
        return label_of(subject, prompt)
    answer = generate(subject, prompt, wanted, nowhere)
    if answer.stopped == INTERRUPTED:
        raise KeyboardInterrupt
    return answer.text


def generate(subject: Subject, prompt: str, wanted: Wanted, say: Callable[[str], None]) -> Answer:
    """The answer to one prompt; `say` gets its text as it comes. Greedy unless `wanted` says otherwise."""
    engine = engine_of(subject)
    return reply(engine, subject.tokenizer, prompt_ids(subject, prompt), wanted, wanted.sampling(), say)


def reply(
    engine: Engine,
    tokenizer: Any,
    ids: Sequence[int],
    wanted: Wanted,
    sampling: Sampling,
    say: Callable[[str], None],
) -> Answer:
    """The answer of an engine to a prompt of ids, cut to its positions, which one line says. Ctrl-C ends it."""
    from edgegt.decoding import decode, fit
    from edgegt.detokenize import Detokenizer

    read, most = fit(engine, ids, wanted.tokens or NEW_TOKENS)
    if len(read) < len(ids):
        part = "last" if engine.start is None else "first"
        Log().say(
            f"note: the prompt has {len(ids)} tokens, and the {part} {len(read)} are read: the model knows no more"
        )
    words, made, stopped = Detokenizer(tokenizer, wanted.stops), 0, LENGTH
    began = first = perf_counter()
    try:
        for token in decode(engine, read, most, sampling):
            made += 1
            first = perf_counter() if made == 1 else first
            if token not in engine.eos and (more := words.push(token)):
                say(more)
            if token in engine.eos or words.ended:
                stopped = END
                break
    except KeyboardInterrupt:
        stopped = INTERRUPTED
    now = perf_counter()
    if rest := words.finish():
        say(rest)
    rate = (made - 1) / (now - first) if made > 1 else made / (now - began)
    return Answer(words.text, made, len(read), END if words.ended else stopped, now - began, rate)


def engine_of(subject: Subject, *ends: int) -> Engine:
    """What answers for a model that writes. ends: ids that end an answer, beside the model's own."""
    from edgegt.engine import TorchEngine
    from edgegt.onnx.engine import OnnxEngine
    from edgegt.onnx.module import OnnxModule

    defaults = generation_defaults(subject.directory)
    stops = tuple(dict.fromkeys((subject.tokenizer.eos_token_id, *defaults.eos, *ends)))
    if isinstance(subject.module, OnnxModule):
        return OnnxEngine(subject.module.model, stops, subject.positions, subject.start, defaults.first)
    return TorchEngine(subject.module, stops, subject.device, defaults.first)


def check_text(text: str, name: str) -> None:
    """Raises: InputError when bytes came in that are no text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{name} is no text in UTF-8 (from character {error.start + 1} on): convert it") from error


def own_words(subject: Subject, prompt: str) -> str:
    """The prompt as the data would have it: the home assistant's ends with an arrow."""
    return home.as_prompt(prompt) if subject.at_home else prompt


def prompt_ids(subject: Subject, prompt: str) -> tuple[int, ...]:
    """The prompt as training saw it, with the separator before a completion. Raises: InputError when it is empty."""
    from edgegt.data import BY_TEMPLATE, Row, Turn, tokenize

    check_text(prompt, "the prompt")
    if subject.start is not None and not prompt.strip():
        raise InputError("the prompt is empty: give some text")
    prompt = own_words(subject, prompt)
    if subject.separator == BY_TEMPLATE:
        row = Row.of_turns((Turn("user", prompt), Turn("assistant", "x")), 1)
    else:
        apart = prompt[-1:].isspace() or not prompt or subject.start is not None
        separator = "" if apart else subject.separator
        row = Row(prompt + separator, " x", 1)  # the completion is cut off again
    ids = tokenize([row], subject.tokenizer, 1 << 20, start=subject.start)[0][0].prompt
    if not ids:
        raise InputError("the prompt is empty: give some text")
    return ids


def label_of(subject: Subject, text: str) -> str:
    """The class that a classifier finds a text to be of."""
    from edgegt.data import Row, labelled
    from edgegt.evaluate import says
    from edgegt.prepare import pad_of

    check_text(text, "the text")
    if not text.strip():
        raise InputError("the text is empty: give one whose class is to be said")
    assert subject.reading is not None
    row, most = Row(text, subject.labels[0], 1), subject.positions or 1 << 20
    examples, _ = labelled([row], subject.tokenizer, most, subject.labels, subject.reading)
    return says(subject.module, examples, subject.labels, pad_of(subject.tokenizer), 1, subject.device)[0]
