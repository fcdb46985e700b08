"""A finished model in use: evaluation and text from a run folder, or from a base with a patch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgegt import home
from edgegt.errors import InputError
from edgegt.folder import RunFolder
from edgegt.log import Log
from edgegt.metrics import asks, parse_metrics, score
from edgegt.options import DATA_FORMATS, RunOptions
from edgegt.units import format_text

if TYPE_CHECKING:
    from edgegt.data import Example, Reading

# Of `edgegt eval --metrics`: rows that are answered unless told, and new tokens of an answer at most.
ANSWERED_ROWS = 128
ANSWER_TOKENS = 128
# Of `edgegt generate`, unless told.
NEW_TOKENS = 64


@dataclass(frozen=True)
class Subject:
    """What is evaluated: the model as a module, its tokenizer, and the run it came from, if any."""

    module: Any
    tokenizer: Any
    device: Any
    options: RunOptions | None
    separator: str
    labels: tuple[str, ...] = ()

    @property
    def start(self) -> int | None:
        """Of an encoder-decoder, what its decoder begins with."""
        from edgegt.architecture import decoder_start

        return decoder_start(self.module.config)

    @property
    def reading(self) -> Reading | None:
        """How rows are read for classification; None of a language model."""
        from edgegt.classifier import reading_of

        return reading_of(self.module.config, self.labels) if self.labels else None

    @property
    def positions(self) -> int | None:
        """How many tokens a row may have."""
        from edgegt.architecture import positions_of
        from edgegt.classifier import classifier_positions

        return (classifier_positions if self.labels else positions_of)(self.module.config)


def load_subject(run: str | None, model: str | None, patch: str | None) -> Subject:
    """A run's personalised model, or --model with or without --patch, in int8.

    Raises: InputError when neither or both are named, or when they do not fit together.
    """
    if (run is None) == (model is None):
        raise InputError("name a run folder, or a model with --model (and --patch): exactly one of the two")
    if run is None:
        assert model is not None
        return _loaded(model, Path(patch) if patch else None, None, None)
    if patch is not None:
        raise InputError("--patch goes with --model; a run folder brings its own")
    folder = RunFolder(Path(run))
    about, options = folder.read("run.json"), folder.options()
    try:
        directory, separator = str(about["model"]["directory"]), about["data"].get("separator")
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder.path / 'run.json'} is damaged (no {error}): run `edgegt run` again") from error
    return _loaded(directory, folder.patch, options, _separator(options) if separator is None else str(separator))


def _loaded(name: str, patch: Path | None, options: RunOptions | None, separator: str | None) -> Subject:
    import torch

    from edgegt.cache import cache_dir
    from edgegt.classifier import as_classifier, check_writes, known_labels
    from edgegt.model import load_int8
    from edgegt.patch import apply_patch, patch_labels, read_patch
    from edgegt.prepare import choose_kernels
    from edgegt.source import load_tokenizer, open_source, read_config

    about = read_patch(patch)[1] if patch is not None else {}
    source, config = open_source(name), read_config(name)
    labels = patch_labels(patch, about) if patch is not None else known_labels(config)
    if labels:
        config = as_classifier(config, labels, 0, source.files)
    else:
        check_writes(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kernels = choose_kernels(device, Log())
    model = load_int8(config, source, cache_dir(), kernels.backend, device)
    if patch is not None:
        about = apply_patch(model, patch)
        separator = about.get("separator", "") if separator is None else separator
    return Subject(model.module, load_tokenizer(source.directory, not labels), device, options, separator or "", labels)


def generate_text(run: str | None, model: str | None, patch: str | None, prompt: str, tokens: int | None) -> str:
    """The greedy answer to one prompt, of 64 tokens at most unless told; of a classifier the label of the text."""
    from edgegt.data import BY_TEMPLATE, Row, Turn, tokenize
    from edgegt.evaluate import answer

    if tokens is not None and tokens < 1:
        raise InputError(f"--tokens {tokens} is out of range: give a positive whole number")
    subject = load_subject(run, model, patch)
    if subject.reading is not None:
        if tokens is not None:
            raise InputError("--tokens is for answers in words, and this is a classification: leave it out")
        return _label_of(subject, prompt)
    if subject.options is not None and subject.options.data is None:
        prompt = home.as_prompt(prompt)
    # The prompt as training saw it, with the separator before a completion; the completion itself is cut off again.
    if subject.separator == BY_TEMPLATE:
        row = Row.of_turns((Turn("user", prompt), Turn("assistant", "x")), 1)
    else:
        apart = prompt[-1:].isspace() or not prompt or subject.start is not None
        separator = "" if apart else subject.separator
        row = Row(prompt + separator, " x", 1)
    example = tokenize([row], subject.tokenizer, 1 << 20, start=subject.start)[0][0]
    most = tokens or NEW_TOKENS
    return answer(subject.module, subject.tokenizer, [example.prompt], most, 1, subject.device)[0].strip()


def _label_of(subject: Subject, text: str) -> str:
    """The class that a classifier finds a text to be of."""
    from edgegt.data import Row, labelled
    from edgegt.evaluate import says
    from edgegt.prepare import pad_of

    if not text.strip():
        raise InputError("the text is empty: give one whose class is to be said")
    assert subject.reading is not None
    row, most = Row(text, subject.labels[0], 1), subject.positions or 1 << 20
    examples, _ = labelled([row], subject.tokenizer, most, subject.labels, subject.reading)
    return says(subject.module, examples, subject.labels, pad_of(subject.tokenizer), 1, subject.device)[0]


def _separator(options: RunOptions) -> str:
    """What stood between prompt and completion in the run's own data, for a run folder that does not say it."""
    from edgegt.job import read_sources

    data = str(home.TRAIN) if options.data is None else options.data
    if not Path(data).exists():
        return "\n"
    return read_sources(dataclasses.replace(options, data=data))[0].rows[0].separator


def evaluate_subject(
    run: str | None,
    model: str | None = None,
    patch: str | None = None,
    data: str | None = None,
    columns: str | None = None,
    max_length: int | None = None,
    skip_bad_rows: bool = False,
    layout: str | None = None,
    metrics: str | None = None,
    answers: int | None = None,
    tokens: int | None = None,
) -> dict[str, Any]:
    """Loss, perplexity, tokens and rows on --data, or on the rows that the run held out; and the scores of answers.

    columns, layout, max_length: how `data` is read; by default as the run read its own (a model alone: 512 tokens).
    metrics: names of `metrics.METRICS`, divided by commas; answers: rows that are answered for them, spread evenly
    (default: 128); tokens: new tokens of an answer at most (default: what the longest reference takes, 128 at most).
    """
    from edgegt.data import labelled, parse_columns, read_rows, tokenize
    from edgegt.evaluate import classified, held_out_loss
    from edgegt.job import read_corpus, within_positions
    from edgegt.prepare import pad_of

    if data is None and run is None and model is not None:
        raise InputError("--model needs --data: give the file to evaluate on")
    if data is None and (columns is not None or layout is not None or max_length is not None):
        raise InputError(
            "--columns, --format and --max-length go with --data: held-out rows are read as the run read them"
        )
    names = _checked_metrics(metrics, answers, tokens)
    own = RunFolder(Path(run)).options() if run is not None else RunOptions()
    if max_length is not None and max_length < 8:
        raise InputError(f"--max-length {max_length} is out of range: give a number at least 8")
    if layout is not None and layout not in DATA_FORMATS:
        raise InputError(f"--format '{format_text(layout)}' is not one of {', '.join(DATA_FORMATS)}")
    wanted = columns or (own.columns if layout is None else None)
    there = run is None and model is not None and data is not None and Path(data).is_file()
    labels = own.classifies or (there and _classifies(str(model), patch))
    if labels and (layout is not None or names):
        which = "--format" if layout is not None else "--metrics"
        raise InputError(f"{which} is for answers in words, and this is a classification: leave it out")
    layout = "classification" if labels else layout or (own.format if columns is None else None)
    skip = skip_bad_rows or own.skip_bad_rows
    source = read_rows(Path(data), parse_columns(wanted, labels) if wanted else None, skip, layout) if data else None
    subject = load_subject(run, model, patch)
    if source is not None:
        longest = dataclasses.replace(own, max_length=max_length or own.max_length)
        most = within_positions(longest, subject.positions).max_length
        if subject.reading is None:
            examples = tuple(tokenize(source.rows, subject.tokenizer, most, skip, subject.start)[0])
        else:
            found, report = labelled(source.rows, subject.tokenizer, most, subject.labels, subject.reading)
            Log().say(f"data: {report.line()}")
            examples = tuple(found)
    else:
        assert subject.options is not None
        given = within_positions(subject.options, subject.positions) if subject.labels else subject.options
        start = None if subject.labels else subject.start
        examples = read_corpus(given, subject.tokenizer, start, subject.reading).held_out
    pad = pad_of(subject.tokenizer)
    if subject.labels:
        return classified(subject.module, examples, pad, 16, subject.device)
    asked = questions(examples, answers or ANSWERED_ROWS, names)
    numbers = held_out_loss(subject.module, examples, pad, 16, subject.device)
    if not names:
        return numbers
    scores: dict[str, Any] = {"perplexity": numbers["perplexity"]} if "perplexity" in names else {}
    return numbers | (answered(subject, asked, names, tokens, scores) if asked else {"scores": scores})


def _classifies(model: str, patch: str | None) -> bool:
    """Whether --model, with --patch or by the head in its files, says the class of a text."""
    from edgegt.classifier import known_labels
    from edgegt.patch import patch_labels, read_patch
    from edgegt.source import read_config

    if patch is not None:
        return bool(patch_labels(Path(patch), read_patch(Path(patch))[1]))
    return bool(known_labels(read_config(model)))


def questions(examples: Sequence[Example], count: int, names: Sequence[str]) -> list[Example]:
    """At most `count` of the examples that ask something, one per row, spread evenly; none where no metric needs them.

    Raises: InputError when there is nothing to answer.
    """
    if not asks(names):
        return []
    asking = {id(one.row): one for one in reversed(examples) if one.row.prompt or one.row.turns}
    found = list(reversed(asking.values()))
    if not found:
        raise InputError("the rows are plain text and ask nothing: leave out --metrics, or give perplexity alone")
    return [found[place * len(found) // count] for place in range(count)] if count < len(found) else found


def answered(
    subject: Subject, asked: Sequence[Example], names: Sequence[str], tokens: int | None, scores: dict[str, Any]
) -> dict[str, Any]:
    """How many rows were answered with how many new tokens at most, and `scores` with those of the answers."""
    from edgegt.evaluate import answer

    references = [tuple(dict.fromkeys((one.row.completion, *one.row.references))) for one in asked]
    if tokens is None:
        written = [text for right in references for text in right]
        longest = max(len(ids) for ids in subject.tokenizer(written, add_special_tokens=False)["input_ids"])
        tokens = min(ANSWER_TOKENS, longest + 8)
    prompts = list(dict.fromkeys(one.prompt for one in asked))
    Log().say(f"answering {len(asked)} rows with at most {tokens} new tokens each")
    answers = answer(subject.module, subject.tokenizer, prompts, tokens, 16, subject.device)
    said = dict(zip(prompts, answers, strict=True))
    found = score(names, [said[one.prompt].strip() for one in asked], references)
    return {"answers": len(asked), "answer_tokens": tokens, "scores": scores | found}


def _checked_metrics(metrics: str | None, answers: int | None, tokens: int | None) -> tuple[str, ...]:
    """The names of --metrics. Raises: InputError, also for a number out of range or one that nothing reads."""
    for flag, value in (("--answers", answers), ("--tokens", tokens)):
        if value is not None and metrics is None:
            raise InputError(f"{flag} goes with --metrics: without it nothing is answered")
        if value is not None and value < 1:
            raise InputError(f"{flag} {value} is out of range: give a positive whole number")
    return () if metrics is None else parse_metrics(metrics)
