"""`edgegt data`: what would be trained of the user's files: counts, lengths, and rows to look at."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from edgegt.architecture import decoder_start, positions_of
from edgegt.classifier import check_writes, classifier_positions, reading_of
from edgegt.data import Example, LabelReport, Source, TokenReport, classes_of, labelled, tokenize
from edgegt.errors import InputError
from edgegt.job import bad_line, read_sources, within_positions
from edgegt.options import RunOptions
from edgegt.source import load_tokenizer, locate, read_config
from edgegt.units import format_text

Tree = dict[str, Any]
BINS = 8
BAR = 32
SHOWN_ROWS = 3
READ_CHARACTERS = 240
LEARNED_CHARACTERS = 480
BRACKETS = ("[", "]")
GREEN = ("\x1b[32m", "\x1b[0m")


def survey(options: RunOptions) -> Tree:
    """What becomes of --data (and of the rows it holds out itself) with the tokenizer of --model.

    Raises: InputError for anything that a run would refuse.
    """
    if options.model is None:
        raise InputError("`edgegt data` needs --model: what is learned depends on its tokenizer and chat template")
    sources = read_sources(options)
    config = read_config(options.model, for_run=False)
    if not options.classifies:
        check_writes(config)
    tokenizer = load_tokenizer(locate(options.model, weights=False), not options.classifies)
    if options.classifies:
        fitting = within_positions(options, classifier_positions(config))
        reading = reading_of(config)
        classes = classes_of(sources[0].rows, reading)
        made = [labelled(source.rows, tokenizer, fitting.max_length, classes, reading) for source in sources]
        sides = [_side(source, tokenizer, *one) for source, one in zip(sources, made, strict=True)]
        return {"model": options.model, "max_length": fitting.max_length, "files": sides}
    fitting = within_positions(options, positions_of(config))
    start, most, skip = decoder_start(config), fitting.max_length, options.skip_bad_rows
    sides = [_side(source, tokenizer, *tokenize(source.rows, tokenizer, most, skip, start)) for source in sources]
    return {"model": options.model, "max_length": fitting.max_length, "files": sides}


def _side(source: Source, tokenizer: Any, examples: Sequence[Example], report: TokenReport) -> Tree:
    dropped = dict(source.dropped) | ({"bad row": len(source.bad)} if source.bad else {})
    for reason, count in report.dropped.items():
        dropped[reason] = dropped.get(reason, 0) + count
    learned = [example.supervised for example in examples]
    different = list({id(example.row): example for example in reversed(examples)}.values())
    return {
        "name": source.name, "format": source.format, "layout": source.layout,
        "rows": len(source.rows) + sum(source.dropped.values()) + len(source.bad),
        "kept": report.kept, "cut": report.cut, "dropped": dropped,
        "bad_rows": [{"row": row.number, "reason": row.reason} for row in source.bad],
        "examples": report.examples, "longest": report.longest, "mean_tokens": report.mean_tokens,
        "supervised_tokens": report.supervised_tokens, "least_supervised": min(learned),
        "classes": dict(report.counts) if isinstance(report, LabelReport) else None,
        "lengths": _lengths(examples, report), "notes": list(report.notes),
        "shown": [
            {"row": one.row.number, "pieces": _pieces(one, tokenizer)} for one in different[: -SHOWN_ROWS - 1 : -1]
        ],
        "bad": bad_line(source.name, source.bad) if source.bad else None,
    }  # fmt: skip


def _lengths(examples: Sequence[Example], report: TokenReport) -> list[Tree]:
    """How many examples have up to so many inputs, in at most BINS bins of one width."""
    width = -(-report.longest // BINS)
    counts = [0] * -(-report.longest // width)
    for example in examples:
        counts[(len(example.inputs) - 1) // width] += 1
    return [{"from": place * width + 1, "to": (place + 1) * width, "examples": n} for place, n in enumerate(counts)]


def _pieces(example: Example, tokenizer: Any) -> list[Tree]:
    """The example as text, in stretches that are read and stretches that are learned."""
    if example.label is not None:
        read = str(tokenizer.decode(list(example.prompt)))
        return [{"text": f"{read} ", "learned": False}, {"text": example.row.completion, "learned": True}]
    cuts = [0, *(edge for gap in example.gaps for edge in gap), len(example.completion)]
    stretches = [(example.prompt, False)]
    for place, (first, end) in enumerate(pairwise(cuts)):
        stretches.append((example.completion[first:end], place % 2 == 0))
    if not example.prompt:  # nothing predicts a text's very first token
        stretches[:2] = [(example.completion[:1], False), (stretches[1][0][1:], True)]
    return [{"text": str(tokenizer.decode(list(ids))), "learned": learned} for ids, learned in stretches if ids]


def survey_text(tree: Tree, colours: bool) -> str:
    """The same for people; learned text in green where there are colours, else in brackets."""
    return "\n\n".join(_side_text(side, tree["max_length"], GREEN if colours else BRACKETS) for side in tree["files"])


def _side_text(side: Tree, most: int, marks: tuple[str, str]) -> str:
    pieces = f" in {side['examples']} examples" if side["examples"] > side["kept"] else ""
    reasons = ", ".join(f"{reason} {count}" for reason, count in side["dropped"].items())
    mean = side["supervised_tokens"] / side["examples"]
    lines = [
        f"data       {format_text(side['name'], None)}: {side['format']}, {side['layout']}",
        f"rows       {side['rows']}: {side['kept']} kept{pieces}, {side['cut']} of them cut to {most} tokens, "
        f"{sum(side['dropped'].values())} dropped{f' ({reasons})' if reasons else ''}",
        f"learned    {side['supervised_tokens']:,} tokens: {mean:.0f} per example, at least {side['least_supervised']}"
        if side["classes"] is None
        else f"learned    {len(side['classes'])} classes",
        *(f"  {format_text(label, 30):<30} {count}" for label, count in (side["classes"] or {}).items()),
        *(f"note       {line}" for line in (*side["notes"], *([side["bad"]] if side["bad"] else []))),
        f"lengths    tokens per example: {side['mean_tokens']:.0f} on average, at most {side['longest']}",
    ]
    largest = max(one["examples"] for one in side["lengths"])
    for one in side["lengths"]:
        bar = "█" * -(-BAR * one["examples"] // largest)
        lines.append(f"  {one['from']:>6} to {one['to']:<6} {bar:<{BAR}} {one['examples']}")
    words = "in green" if marks == GREEN else "in brackets"
    lines.append(f"examples   what is learned {words}, the rest is read")
    for one in side["shown"]:
        shown = "".join(_marked(piece["text"], piece["learned"], marks) for piece in one["pieces"])
        lines.append(f"  row {one['row']}: {shown}")
    return "\n".join(lines)


def _marked(text: str, learned: bool, marks: tuple[str, str]) -> str:
    """A stretch on one line, without its middle where it is long."""
    most = LEARNED_CHARACTERS if learned else READ_CHARACTERS
    if len(text) > most:
        text = f"{text[: most // 2]} ... {text[-most // 2 :]}"
    shown = format_text(text, None)
    return f"{marks[0]}{shown}{marks[1]}" if learned else shown
