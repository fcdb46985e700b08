"""A finished model, from a run folder or from a base with a patch, loaded to be used."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgegt import home
from edgegt.errors import InputError
from edgegt.folder import RunFolder
from edgegt.log import Log
from edgegt.options import RunOptions

if TYPE_CHECKING:
    from edgegt.data import Reading


@dataclass(frozen=True)
class Subject:
    """A model to be used: the module, its tokenizer, and the run it came from, if any.

    separator: what stands between a prompt and its answer, as it was trained (`data.rows`); directory: the base's
    files; trained: a patch is in it; household: it was trained by the home assistant's own data.
    """

    module: Any
    tokenizer: Any
    device: Any
    options: RunOptions | None
    separator: str
    labels: tuple[str, ...] = ()
    directory: Path = Path()
    trained: bool = False
    household: bool = False

    @property
    def start(self) -> int | None:
        """Of an encoder-decoder, what its decoder begins with."""
        from edgegt.architecture import decoder_start

        return decoder_start(self.module.config)

    @property
    def at_home(self) -> bool:
        """Whether it is the home assistant that ships with the package, trained by its own data or not at all."""
        if self.options is not None:
            return self.options.data is None
        return self.household or (not self.trained and self.directory.resolve() == home.MODEL)

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


def load_subject(run: str | None, model: str | None, patch: str | None, onnx: str | None = None) -> Subject:
    """A run's personalised model, or --model with or without --patch, in int8; or the ONNX files in a folder.

    onnx: of a run, another form of its weights. Raises: InputError when neither or both are named, or when they do not
    fit together.
    """
    if onnx is not None:
        return _in_onnx(run, model, patch, onnx)
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


def _in_onnx(run: str | None, model: str | None, patch: str | None, onnx: str) -> Subject:
    import torch

    from edgegt.onnx.module import OnnxModule
    from edgegt.onnx.runtime import OnnxModel
    from edgegt.patch import open_patch
    from edgegt.source import load_tokenizer, read_config

    if model is not None or patch is not None:
        raise InputError("--onnx is a whole model: leave out --model and --patch")
    directory, options = Path(onnx), None if run is None else RunFolder(Path(run)).options()
    if options is not None and options.classifies:
        raise InputError(f"'{run}' says the class of a text, and ONNX files write: leave out --onnx")
    files = OnnxModel(directory)
    module, about = OnnxModule(files, read_config(onnx)), files.about
    if run is not None and open_patch(RunFolder(Path(run)).patch).fingerprint != about.get("edgegt.base"):
        raise InputError(f"the ONNX files in '{onnx}' are of another base than '{run}': give those exported from it")
    separator, household = about.get("edgegt.separator", ""), about.get("edgegt.household") == "yes"
    made = torch.device("cpu"), options, separator
    return Subject(module, load_tokenizer(directory), *made, directory=directory, trained=True, household=household)


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
    tokenizer, trained = load_tokenizer(source.directory, not labels), patch is not None
    directory = Path(source.directory)
    return Subject(model.module, tokenizer, device, options, separator or "", labels, directory, trained)


def _separator(options: RunOptions) -> str:
    """What stood between prompt and completion in the run's own data, for a run folder that does not say it."""
    from edgegt.job import read_sources

    data = str(home.TRAIN) if options.data is None else options.data
    if not Path(data).exists():
        return "\n"
    return read_sources(dataclasses.replace(options, data=data))[0].rows[0].separator
