"""Everything that is decided before a model is loaded: device, data, batches, costs and budgets.

`plan` stops here; `run` goes on from here. Bad input is refused in the order in which a user would want to hear of it,
and nothing is written to the run folder yet.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgegt import home
from edgegt.cost import BatchShape, CostTable
from edgegt.data import (
    BadRow,
    Example,
    Reading,
    Row,
    Source,
    TokenReport,
    classes_of,
    data_files,
    labelled,
    parse_columns,
    read_parts,
    read_rows,
    split_rows,
    tokenize,
)
from edgegt.device import Resolved, resolve_device
from edgegt.errors import InputError
from edgegt.host import Host, read_host
from edgegt.options import RunOptions
from edgegt.prefix import FREE_SHARE, Rows
from edgegt.units import format_bytes, format_text

TWO_ROUNDS_FROM = 40
SPARE_ROWS = 512
BAD_ROWS_KEPT = 1000
BAD_ROWS_SHOWN = 5
NO_CLASSES = "--task classification needs --model and --data: the built-in model and household are not for it"
ONLY_THE_HOUSEHOLD = "--data without --model: give --model too (the built-in model only knows its household)"


@dataclass(frozen=True)
class Corpus:
    """The user's rows as token ids, on two sides.

    format: of the file; layout: what its rows hold; reports: of the training and of the held-out side; unread: rows
    without anything to learn, by reason; bad: of each file its name and the rows that were left out as unreadable.
    labels: for classification the classes. spare: held-out rows that are not evaluated, see `evaluated_rows`.
    """

    name: str
    format: str
    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    general: tuple[Example, ...]
    reports: tuple[TokenReport, TokenReport]
    unread: dict[str, int]
    separator: str
    layout: str
    bad: tuple[tuple[str, tuple[BadRow, ...]], ...] = ()
    labels: tuple[str, ...] = ()
    spare: tuple[Example, ...] = ()

    @property
    def longest_held_out(self) -> BatchShape:
        """One row as long as the longest held-out one."""
        rows = [*self.held_out, *self.general]
        tokens = max(len(example.inputs) for example in rows)
        return BatchShape(1, tokens, max(len(example.targets) for example in rows))

    @property
    def used_tokens(self) -> tuple[int, ...]:
        """The ids that occur in the training rows, ascending: rows of the head that need a master."""
        used = {token for one in self.train for token in (*(one.prompt if one.start is None else ()), *one.completion)}
        return tuple(sorted(used))

    @property
    def notes(self) -> tuple[str, ...]:
        """What was done otherwise than the data say, once each."""
        return tuple(dict.fromkeys(note for report in self.reports for note in report.notes))

    def to_json(self) -> dict[str, Any]:
        """What became of every row of the data, for run.json."""
        listed = [(name, row) for name, rows in self.bad for row in rows]
        dropped = dict(self.unread) | ({"bad row": len(listed)} if listed else {})
        for report in self.reports:
            for reason, count in report.dropped.items():
                dropped[reason] = dropped.get(reason, 0) + count
        return {
            "name": self.name, "format": self.format, "layout": self.layout, "separator": self.separator,
            "rows": sum(report.rows for report in self.reports) + sum(self.unread.values()) + len(listed),
            "kept": sum(report.kept for report in self.reports), "cut": sum(report.cut for report in self.reports),
            "dropped": dropped, "train_rows": len(self.train), "eval_rows": len(self.held_out),
            "supervised_tokens": self.reports[0].supervised_tokens, "labels": list(self.labels),
            "bad_rows": [
                {"file": name, "row": row.number, "reason": row.reason} for name, row in listed[:BAD_ROWS_KEPT]
            ],
        }  # fmt: skip

    def bad_lines(self) -> list[str]:
        """Of each file with bad rows 'left out 2 bad rows of rows.jsonl: row 4 (malformed JSON at column 9), ...'."""
        return [bad_line(name, rows) for name, rows in self.bad if rows]


def bad_line(name: str, rows: tuple[BadRow, ...]) -> str:
    """How many rows of a file were left out, and the first of them."""
    shown = [f"row {row.number} ({row.reason})" for row in rows[:BAD_ROWS_SHOWN]]
    more = f" and {len(rows) - len(shown)} more" if len(rows) > len(shown) else ""
    count = "1 bad row" if len(rows) == 1 else f"{len(rows)} bad rows"
    return f"left out {count} of {format_text(name)}: {', '.join(shown)}{more}"


@dataclass(frozen=True)
class Schedule:
    """The batches of the run, as indices into the training rows, with the epoch in which each falls; and the rounds."""

    batches: tuple[tuple[float, tuple[int, ...]], ...]
    shapes: tuple[BatchShape, ...]
    rounds: tuple[int, ...]

    @property
    def steps(self) -> int:
        return len(self.batches)


def resolve(options: RunOptions) -> tuple[Resolved, Host]:
    """The profile of --device, and this machine; torch is asked for the GPU."""
    import torch  # noqa: F401

    host = read_host()
    return resolve_device(options.device, host), host


def memory_budget(options: RunOptions, device: Resolved, host: Host) -> tuple[int, str | None]:
    """Peak bytes the process may use: --memory, else the profile's; on this machine never more than there is.

    Returns the bytes and, when they are less than asked for, a line that says so.
    """
    asked = options.memory_bytes or device.profile.budget_bytes
    unified = device.profile.unified or host.cuda_bytes is None
    there = host.available_bytes if unified else host.cuda_bytes
    if there is not None and asked > there:
        line = f"only {format_bytes(there)} of memory are available here: the budget is that, not {format_bytes(asked)}"
        return there, line
    return asked, None


def storage_budget(options: RunOptions, device: Resolved, table: CostTable) -> tuple[int, str | None]:
    """Bytes of the disk that hidden states may take: the profile's, and at most half of what is free; 0 for none.

    With a line that says so when they are fewer than the profile's.
    """
    if options.strategy == "full" or table.encoder_decoder:
        full = "full fine-tuning trains every layer"
        return (
            0,
            f"no hidden states are kept: {full if options.strategy == 'full' else 'the model is an encoder-decoder'}",
        )
    place = Path(options.output or ".").absolute()
    there = next(folder for folder in (place, *place.parents) if folder.exists())
    allowed, free = device.profile.cache_bytes, shutil.disk_usage(there).free // FREE_SHARE
    less = f"hidden states may take {format_bytes(free)}, half of what is free, not {format_bytes(allowed)}"
    return min(allowed, free), less if free < allowed else None


def rows_to_keep(
    options: RunOptions, train: Sequence[Example], schedule: Schedule, width: int, limit: int, bytes_per_s: float
) -> Rows | None:
    """The training rows whose hidden states may be kept within so many bytes; None where none may."""
    if not limit or not train:
        return None
    inputs = [example.inputs for example in train]
    wanted = options.cache == "on"
    return Rows(inputs, schedule.batches, schedule.shapes, width, options.batch_size, limit, bytes_per_s, wanted)


def within_positions(options: RunOptions, positions: int | None) -> RunOptions:
    """The options with rows no longer than the model has positions."""
    if positions is None or options.max_length <= positions:
        return options
    return replace(options, max_length=positions)


def read_corpus(
    options: RunOptions, tokenizer: Any, start: int | None = None, reading: Reading | None = None
) -> Corpus:  # fmt: skip
    """The user's data, or the household's when no data is named. Raises: InputError for anything unusable.

    start: of an encoder-decoder, what its decoder begins with. reading: how rows are read for classification.
    """
    if options.data is None:
        return _household(options, tokenizer)
    sources = read_sources(options)
    source = sources[0]
    if len(sources) == 1:
        train, held = split_rows(source.rows, options.eval_fraction, options.seed)
    else:
        train, held = list(source.rows), list(sources[1].rows)
    if options.classifies:
        return _labelled(options, tokenizer, train, held, sources, reading or Reading())
    return _tokenised(options, tokenizer, source, train, held, [], sources, start)


def _labelled(
    options: RunOptions, tokenizer: Any, train: list[Row], held: list[Row], sources: list[Source], reading: Reading
) -> Corpus:  # fmt: skip
    classes = classes_of(train, reading)
    sides = [labelled(rows, tokenizer, options.max_length, classes, reading) for rows in (train, held)]
    (examples, report), (held_out, held_report) = sides
    unread = sum((Counter(source.dropped) for source in sources), Counter[str]())
    evaluated, spare = evaluated_rows(held_out, options.eval_rows)
    return Corpus(
        sources[0].name, sources[0].format, tuple(examples), evaluated, (),
        (report, held_report), dict(unread), "", sources[0].layout, tuple((one.name, one.bad) for one in sources),
        classes, spare,
    )  # fmt: skip


def read_sources(options: RunOptions) -> list[Source]:
    """The rows of --data, and those held out where --eval-data or the folder names them."""
    assert options.data is not None
    columns = parse_columns(options.columns, options.classifies) if options.columns else None
    layout = options.task if options.classifies else options.format
    files = data_files(Path(options.data))
    held = files.held_out if options.eval_data is None else (Path(options.eval_data),)
    sides = [side for side in (files.train, held) if side]
    return [read_parts(side, columns, options.skip_bad_rows, layout) for side in sides]


def _household(options: RunOptions, tokenizer: Any) -> Corpus:
    train, held, general = (list(read_rows(path, None).rows) for path in (home.TRAIN, home.HELD_OUT, home.GENERAL))
    source = Source((), "jsonl", "household", {}, layout="prompt-completion")
    return _tokenised(options, tokenizer, source, train, held, general, [])


def _tokenised(
    options: RunOptions, tokenizer: Any, source: Source, train: list[Row], held: list[Row], general: list[Row],
    sources: list[Source], start: int | None = None,
) -> Corpus:  # fmt: skip
    examples, report = tokenize(train, tokenizer, options.max_length, options.skip_bad_rows, start)
    held_out, held_report = tokenize(held, tokenizer, options.max_length, options.skip_bad_rows, start)
    other = tuple(tokenize(general, tokenizer, options.max_length)[0]) if general else ()
    unread = sum((Counter(source.dropped) for source in sources), Counter[str]())
    evaluated, spare = evaluated_rows(held_out, options.eval_rows)
    return Corpus(
        source.name, source.format, tuple(examples), evaluated, other,
        (report, held_report), dict(unread), train[0].separator, source.layout,
        tuple((one.name, one.bad) for one in sources), spare=spare,
    )  # fmt: skip


def evaluated_rows(held: Sequence[Example], most: int) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """The held-out rows that are evaluated, and of the others SPARE_ROWS at most, spread evenly.

    Those are no longer than the longest that is evaluated, so that what is planned for evaluation holds for them.
    """
    evaluated = tuple(held[:most])
    inputs = max((len(one.inputs) for one in evaluated), default=0)
    targets = max((len(one.targets) for one in evaluated), default=0)
    others = [one for one in held[most:] if len(one.inputs) <= inputs and len(one.targets) <= targets]
    return evaluated, spread(others, SPARE_ROWS)


def spread(rows: Sequence[Example], most: int) -> tuple[Example, ...]:
    """All of the rows, or `most` of them, spread evenly."""
    count = min(most, len(rows))
    return tuple(rows[index * len(rows) // count] for index in range(count))


def head_forms(used: int, vocabulary: int) -> tuple[int | None, ...]:
    """How much of the head may be trained: all of it, or the rows of `used` tokens where that is cheaper."""
    return (None, used) if 3 * used < vocabulary else (None,)


def make_schedule(options: RunOptions, train: tuple[Example, ...]) -> Schedule:
    """Length-bucketed batches for --steps or --epochs, cut into rounds of --round-epochs."""
    from edgegt.data import length_bucketed, shape_of

    lengths = [example.length for example in train]
    per_epoch = math.ceil(len(train) / options.batch_size)
    epochs = options.epochs or (home.EPOCHS if options.model is None and options.data is None else 2.0)
    steps = options.steps or max(1, round(per_epoch * epochs))
    batches: list[tuple[float, tuple[int, ...]]] = []
    epoch = 0
    while len(batches) < steps:
        for indices in length_bucketed(lengths, options.batch_size, options.seed, epoch):
            batches.append((len(batches) / per_epoch, tuple(indices)))
        epoch += 1
    del batches[steps:]
    shapes = tuple(shape_of([train[i] for i in indices]) for _, indices in batches)
    halves = steps / per_epoch / (2 if steps >= TWO_ROUNDS_FROM else 1)
    every = max(1, round((options.round_epochs or halves) * per_epoch))
    lengths_of_rounds = [min(every, steps - start) for start in range(0, steps, every)]
    if len(lengths_of_rounds) > 1 and lengths_of_rounds[-1] < every / 4:
        lengths_of_rounds[-2] += lengths_of_rounds.pop()
    return Schedule(tuple(batches), shapes, tuple(lengths_of_rounds))


def model_name(options: RunOptions) -> str:
    """--model, or the home assistant's folder."""
    if options.classifies and (options.model is None or options.data is None):
        raise InputError(NO_CLASSES)
    if options.model is None:
        if options.data is not None:
            raise InputError(ONLY_THE_HOUSEHOLD)
        return str(home.MODEL)
    if options.data is None:
        raise InputError("--model without --data: give --data too, a JSONL, JSON, CSV or text file")
    return options.model


def data_digests(options: RunOptions) -> dict[str, str]:
    """SHA-256 of the user's files, by option; of files that are there, and of a data folder's together."""
    found = {}
    for name in ("data", "eval_data", "device"):
        path = getattr(options, name)
        if path is None or (name == "device" and not path.endswith(".toml")):
            continue
        files = data_files(Path(path)).all if name == "data" else (Path(path),)
        if all(file.is_file() for file in files):
            found[name] = _digest(files)
    return found


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
    return digest.hexdigest()
