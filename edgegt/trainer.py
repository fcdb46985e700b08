"""edgegt from Python: one object over the functions of the command line, with rows from memory as well as from files.

Rows in memory reach the readers as a JSONL file in the user's cache, named by its content and readable by its owner
only. It goes with the object, unless a run that was broken off needs it to go on; then a line says where it stays.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import weakref
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgegt.cache import cache_dir
from edgegt.disk import write_text
from edgegt.errors import InputError, nearest
from edgegt.folder import RunFolder, unfinished
from edgegt.log import Log
from edgegt.options import RunOptions

# Options that the arguments of Trainer are for.
_GIVEN = ("model", "data", "eval_data")


@dataclass(frozen=True)
class Trained:
    """What a run reached and took. flops_share: of full fine-tuning on the same batches; seconds: of the whole run."""

    folder: Path
    loss_before: float
    loss_after: float
    flops: int
    flops_share: float
    peak_bytes: int
    seconds: float

    @classmethod
    def of(cls, path: Path) -> Trained:
        """What a finished run's folder says. Raises: InputError when it is none."""
        folder = RunFolder(path)
        measured, result = folder.read("run.json")["measured"], folder.read("eval.json")
        before, after = result["before"]["loss"], result["after"]["loss"]
        share = measured.get("flops_ratio", 0.0)
        return cls(path, before, after, measured["flops"], share, measured["peak_bytes"], measured["elapsed_s"])


class Trainer:
    """Fine-tune `model` (a folder or hub id) on rows under the budgets of a device, and use what comes of it.

    train_dataset, eval_dataset: a path, or rows: mappings in any layout that files may have, or texts; a list, a
    datasets.Dataset, or anything else with `to_list()` or that can be gone through again. Without eval_dataset a part
    of the rows is held out. options: those of RunOptions, such as device, rho, memory, epochs. Without model and rows:
    the home assistant and its household. Raises: InputError for an option or a row that cannot be.
    """

    def __init__(
        self, model: str | Path | None = None, train_dataset: Any = None, eval_dataset: Any = None, *,
        log: Log | None = None, **options: Any,
    ) -> None:  # fmt: skip
        known = [item.name for item in dataclasses.fields(RunOptions) if item.name not in _GIVEN]
        for name in options:
            if name not in known:
                raise InputError(f"unknown option '{name}'{nearest(name, known)}: RunOptions lists them all")
        if model is not None and not isinstance(model, (str, Path)):
            raise InputError(
                f"the model is a {type(model).__name__}: give the folder that its save_pretrained(...) wrote, or a hub "
                "id; for a float model in memory there is SelectionCallback"
            )
        self.log = log or Log()
        self.folder: Path | None = None
        self._model = None if model is None else str(model)
        self._datasets = {"data": train_dataset, "eval_data": eval_dataset}
        self._written: dict[str, Path] = {}
        self._unfinished: set[Path] = set()
        self._options = options
        _ = self.options  # so that what is wrong with them, or with a row, is said here
        weakref.finalize(self, _remove, self._written, self._unfinished, self.log)

    @property
    def options(self) -> RunOptions:
        """The options of the run; rows in memory are written to their file where they are not there."""
        data, eval_data = self._path("data"), self._path("eval_data")
        return RunOptions(model=self._model, data=data, eval_data=eval_data, **self._options)

    def plan(self) -> dict[str, Any]:
        """What would be trained and what it would cost, as `edgegt plan --json` says it; nothing is trained."""
        from edgegt.outlook import look_ahead

        return look_ahead(self.options, self.log)

    def train(self, resume: bool = False) -> Trained:
        """Train. resume: go on with a run of the same options and rows that was broken off, if there is one.

        Raises: InputError and BudgetError before anything is trained; Interrupted and EdgegtError as `run`.
        """
        from edgegt.run import resume as go_on
        from edgegt.run import run

        options = self.options
        earlier = unfinished(options) if resume else None
        self._unfinished.update(self._written.values())
        try:
            if earlier is None:
                self.folder = run(options, self.log, "edgegt.Trainer")
            else:
                self.folder = go_on(earlier, self.log, "edgegt.Trainer")
        finally:
            if unfinished(options) is None:
                self._unfinished.clear()
        return Trained.of(self.folder)

    def evaluate(self, dataset: Any = None, **options: Any) -> dict[str, Any]:
        """Loss, and scores with metrics="rouge,bleu", on the rows that were held out, or on a path or rows given.

        options: those of `evaluate_subject`, such as metrics, answers, tokens.
        """
        from edgegt.use import evaluate_subject

        _ = self.options  # the rows held out are read from their file again
        self._datasets["asked"] = dataset
        try:
            return evaluate_subject(str(self._trained()), data=self._path("asked"), **options)
        finally:
            del self._datasets["asked"]
            asked = self._written.pop("asked", None)  # other rows may be asked next time
            if asked is not None and asked not in self._written.values():
                asked.unlink(missing_ok=True)

    def generate(self, prompt: str, tokens: int | None = None) -> str:
        """The greedy answer to a prompt; of a classifier the label of the text."""
        from edgegt.talk import generate_text

        return generate_text(str(self._trained()), None, None, prompt, tokens)

    def export(self, folder: str | Path, dtype: str | None = None, force: bool = False, to: str = "hf") -> Path:
        """Write the model with what was trained as a folder that transformers loads without edgegt.

        to: 'hf', or 'onnx' for ONNX files in 8 bits (`edgegt.export_onnx` has more to choose).
        """
        from edgegt.export import export_model

        if to not in ("hf", "onnx") or (to == "onnx" and dtype is not None):
            raise InputError(f"cannot export to '{to}' with dtype {dtype}: give 'hf', or 'onnx' without a dtype")
        if to == "onnx":
            from edgegt.onnx.write import export_onnx

            return export_onnx(str(self._trained()), None, None, str(folder), force=force, log=self.log)
        return export_model(str(self._trained()), None, None, str(folder), dtype, force, self.log)

    def _trained(self) -> Path:
        if self.folder is None:
            raise InputError("nothing was trained yet: call train() first")
        return self.folder

    def _path(self, name: str) -> str | None:
        """The path of a dataset, that of the file of its rows if it is in memory."""
        dataset = self._datasets[name]
        if dataset is None or isinstance(dataset, (str, Path)):
            return None if dataset is None else str(dataset)
        if name not in self._written or not self._written[name].is_file():
            self._written[name] = _write_rows(dataset, name)
        return str(self._written[name])


def _write_rows(dataset: Any, name: str) -> Path:
    """The rows as a JSONL file of the user's cache. Raises: InputError for what is no row."""
    what = "eval_dataset" if name == "eval_data" else "train_dataset" if name == "data" else "dataset"
    rows = dataset.to_list() if hasattr(dataset, "to_list") else dataset
    if not isinstance(rows, Iterable) or isinstance(rows, (bytes, Mapping)):
        raise InputError(f"{what} is a {type(dataset).__name__}: give a path, or a list of rows such as {_EXAMPLE}")
    lines = [_line(row, f"{what}, row {number}") for number, row in enumerate(rows, 1)]
    if not lines:
        raise InputError(f"{what} has no rows: give some, such as {_EXAMPLE}")
    text = "".join(f"{line}\n" for line in lines)
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()[:32]
    path = cache_dir() / "rows" / f"{digest}.jsonl"
    if not path.is_file():
        write_text(path, text)
    return path


_EXAMPLE = '{"prompt": "...", "completion": "..."}'


def _line(row: Any, where: str) -> str:
    row = {"text": row} if isinstance(row, str) else row
    if not isinstance(row, Mapping):
        raise InputError(f"{where} is a {type(row).__name__}: give mappings such as {_EXAMPLE}, or texts")
    try:
        return json.dumps(dict(row), ensure_ascii=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{where} cannot be written as JSON ({error}): give texts, numbers, lists and dicts"
        ) from error


def _remove(written: Mapping[str, Path], unfinished_files: set[Path], log: Log) -> None:
    """Delete the files of rows, but for those that a run needs to go on."""
    for path in set(written.values()):
        if path in unfinished_files:
            log.say(f"the rows of the run that was broken off stay in {path}, so that it can go on")
        else:
            with suppress(OSError):
                path.unlink(missing_ok=True)
