"""`edgegt eval`: held-out loss and scores of answers, of a run folder or of a base with a patch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgegt.errors import InputError
from edgegt.folder import RunFolder
from edgegt.log import Log
from edgegt.metrics import asks, parse_metrics, score
from edgegt.options import DATA_FORMATS, RunOptions
from edgegt.sampling import Sampling, generation_defaults
from edgegt.subject import Subject, load_subject
from edgegt.talk import Wanted, engine_of, nowhere, reply
from edgegt.units import format_text

if TYPE_CHECKING:
    from edgegt.data import Example

# Of `edgegt eval --metrics`: rows that are answered unless told, and new tokens of an answer at most.
ANSWERED_ROWS = 128
ANSWER_TOKENS = 128


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
    onnx: str | None = None,
) -> dict[str, Any]:
    """Loss, perplexity, tokens and rows on --data, or on the rows that the run held out; and the scores of answers.

    onnx: a folder of ONNX files that stands for the model, of a run or with --data.

    columns, layout, max_length: how `data` is read; by default as the run read its own (a model alone: 512 tokens).
    metrics: names of `metrics.METRICS`, divided by commas; answers: rows that are answered for them, spread evenly
    (default: 128); tokens: new tokens of an answer at most (default: what the longest reference takes, 128 at most).
    """
    from edgegt.data import labelled, parse_columns, read_rows, tokenize
    from edgegt.evaluate import classified, held_out_loss
    from edgegt.job import read_corpus, within_positions
    from edgegt.prepare import pad_of

    if data is None and run is None and (model or onnx):
        raise InputError(f"--{'model' if model else 'onnx'} needs --data: give the file to evaluate on")
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
    subject = load_subject(run, model, patch, onnx)
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
    references = [tuple(dict.fromkeys((one.row.completion, *one.row.references))) for one in asked]
    if tokens is None:
        written = [text for right in references for text in right]
        longest = max(len(ids) for ids in subject.tokenizer(written, add_special_tokens=False)["input_ids"])
        tokens = min(ANSWER_TOKENS, longest + 8)
    prompts = list(dict.fromkeys(one.prompt for one in asked))
    Log().say(f"answering {len(asked)} rows with at most {tokens} new tokens each")
    answers = _answers(subject, prompts, tokens)
    said = dict(zip(prompts, answers, strict=True))
    found = score(names, [said[one.prompt].strip() for one in asked], references)
    return {"answers": len(asked), "answer_tokens": tokens, "scores": scores | found}


def _answers(subject: Subject, prompts: Sequence[tuple[int, ...]], tokens: int) -> list[str]:
    """The greedy answers, of PyTorch several at a time."""
    from edgegt.evaluate import answer
    from edgegt.onnx.module import OnnxModule

    if not isinstance(subject.module, OnnxModule):
        defaults = generation_defaults(subject.directory)
        return answer(subject.module, subject.tokenizer, prompts, tokens, 16, subject.device, defaults)
    engine, wanted = engine_of(subject), Wanted(tokens)
    return [reply(engine, subject.tokenizer, one, wanted, Sampling(), nowhere).text for one in prompts]


def _checked_metrics(metrics: str | None, answers: int | None, tokens: int | None) -> tuple[str, ...]:
    """The names of --metrics. Raises: InputError, also for a number out of range or one that nothing reads."""
    for flag, value in (("--answers", answers), ("--tokens", tokens)):
        if value is not None and metrics is None:
            raise InputError(f"{flag} goes with --metrics: without it nothing is answered")
        if value is not None and value < 1:
            raise InputError(f"{flag} {value} is out of range: give a positive whole number")
    return () if metrics is None else parse_metrics(metrics)
