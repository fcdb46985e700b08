"""A finished model in use: evaluation and text from a run folder, or from a base with a patch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgegt import home
from edgegt.errors import InputError
from edgegt.folder import RunFolder
from edgegt.log import Log
from edgegt.options import DATA_FORMATS, RunOptions
from edgegt.units import format_text


@dataclass(frozen=True)
class Subject:
    """What is evaluated: the model as a module, its tokenizer, and the run it came from, if any."""

    module: Any
    tokenizer: Any
    device: Any
    options: RunOptions | None
    separator: str

    @property
    def start(self) -> int | None:
        """Of an encoder-decoder, what its decoder begins with."""
        from edgegt.architecture import decoder_start

        return decoder_start(self.module.config)


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
    from edgegt.model import load_int8
    from edgegt.patch import apply_patch, read_patch
    from edgegt.prepare import choose_kernels
    from edgegt.source import load_tokenizer, open_source, read_config

    if patch is not None:
        read_patch(patch)
    source, config = open_source(name), read_config(name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kernels = choose_kernels(device, Log())
    model = load_int8(config, source, cache_dir(), kernels.backend, device)
    if patch is not None:
        about = apply_patch(model, patch)
        separator = about.get("separator", "") if separator is None else separator
    return Subject(model.module, load_tokenizer(source.directory), device, options, separator or "")


def generate_text(run: str | None, model: str | None, patch: str | None, prompt: str, tokens: int) -> str:
    """The greedy answer to one prompt."""
    from edgegt.data import BY_TEMPLATE, Row, Turn, tokenize
    from edgegt.evaluate import answer

    if tokens < 1:
        raise InputError(f"--tokens {tokens} is out of range: give a positive whole number")
    subject = load_subject(run, model, patch)
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
    return answer(subject.module, subject.tokenizer, [example.prompt], tokens, 1, subject.device)[0].strip()


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
) -> dict[str, Any]:
    """Loss, perplexity, tokens and rows on --data, or on the rows that the run held out.

    columns, layout, max_length: how `data` is read; by default as the run read its own (a model alone: 512 tokens).
    """
    from edgegt.architecture import positions_of
    from edgegt.data import parse_columns, read_rows, tokenize
    from edgegt.evaluate import held_out_loss
    from edgegt.job import read_corpus, within_positions

    if data is None and run is None and model is not None:
        raise InputError("--model needs --data: give the file to evaluate on")
    if data is None and (columns is not None or layout is not None or max_length is not None):
        raise InputError(
            "--columns, --format and --max-length go with --data: held-out rows are read as the run read them"
        )
    own = RunFolder(Path(run)).options() if run is not None else RunOptions()
    if max_length is not None and max_length < 8:
        raise InputError(f"--max-length {max_length} is out of range: give a number at least 8")
    if layout is not None and layout not in DATA_FORMATS:
        raise InputError(f"--format '{format_text(layout)}' is not one of {', '.join(DATA_FORMATS)}")
    wanted = columns or (own.columns if layout is None else None)
    layout = layout or (own.format if columns is None else None)
    skip = skip_bad_rows or own.skip_bad_rows
    source = read_rows(Path(data), parse_columns(wanted) if wanted else None, skip, layout) if data else None
    subject = load_subject(run, model, patch)
    if source is not None:
        most = dataclasses.replace(own, max_length=max_length or own.max_length)
        most = within_positions(most, positions_of(subject.module.config))
        examples = tuple(tokenize(source.rows, subject.tokenizer, most.max_length, skip, subject.start)[0])
    else:
        assert subject.options is not None
        examples = read_corpus(subject.options, subject.tokenizer, subject.start).held_out
    pad = subject.tokenizer.pad_token_id
    pad = subject.tokenizer.eos_token_id if pad is None else pad
    return held_out_loss(subject.module, examples, pad, 16, subject.device)
