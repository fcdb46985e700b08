"""A folder of data: train, valid and test files, or a Hugging Face dataset on disk, as the files of each side."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from edgegt.data.formats import listed
from edgegt.data.read import SUFFIXES
from edgegt.errors import InputError
from edgegt.units import format_text

TRAIN = ("train", "training")
HELD_OUT = ("valid", "validation", "val", "dev", "eval", "test")
_SHARD = re.compile(r"-\d+-of-\d+$")
_STATE = "state.json"


@dataclass(frozen=True)
class DataFiles:
    """The files to train on, and those held out, if the folder has any."""

    train: tuple[Path, ...]
    held_out: tuple[Path, ...] = ()

    @property
    def all(self) -> tuple[Path, ...]:
        return self.train + self.held_out


def data_files(path: Path) -> DataFiles:
    """A file as it is; of a folder the train file (or shards, or the only file), and valid, else test.

    Raises: InputError for a folder in which these cannot be told.
    """
    if not os.path.isdir(path):
        return DataFiles((path,))
    if (path / _STATE).is_file():
        return DataFiles(_saved(path))
    if (path / "dataset_dict.json").is_file():
        there = {child.name: child for child in sorted(path.iterdir()) if (child / _STATE).is_file()}
        train, held = (next((there[name] for name in names if name in there), None) for names in (TRAIN, HELD_OUT))
        if train is None:
            raise InputError(f"dataset '{_shown(path)}' has no split 'train', it has {listed(there)}: give one of "
                             "its folders as --data")  # fmt: skip
        return DataFiles(_saved(train), () if held is None else _saved(held))
    files = sorted(child for child in path.iterdir() if child.suffix.lower() in SUFFIXES and child.is_file())
    if len(files) == 1:
        return DataFiles(tuple(files))
    train_files = _split(files, TRAIN) or tuple(file for file in files if _stem(file).startswith(TRAIN))
    held_files = _split(files, HELD_OUT)
    if not train_files or not all(map(_is_one, (train_files, held_files))):
        found = listed(file.name for file in files) or "no data file"
        what = "training file" if not _is_one(train_files) or not train_files else "held-out file"
        remedy = f"name one train.jsonl and one valid.jsonl ({listed(SUFFIXES)}), or give a file as --data"
        raise InputError(f"data folder '{_shown(path)}' has no one {what}, it has {found}: {remedy}")
    return DataFiles(train_files, held_files)


def _split(files: Iterable[Path], names: tuple[str, ...]) -> tuple[Path, ...]:
    """The file or the shards (train-00000-of-00002) of the first of these splits that is there."""
    for name in names:
        found = tuple(file for file in files if _SHARD.sub("", _stem(file)) == name)
        if found:
            return found
    return ()


def _stem(file: Path) -> str:
    return file.stem.casefold()


def _is_one(files: tuple[Path, ...]) -> bool:
    """Whether these are one file, or the shards of one."""
    return len(files) < 2 or all(_SHARD.search(file.stem) for file in files)


def _saved(folder: Path) -> tuple[Path, ...]:
    """The Arrow files of a dataset that `save_to_disk` wrote, in its order."""
    try:
        names = [str(one["filename"]) for one in json.loads((folder / _STATE).read_bytes())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"'{_shown(folder / _STATE)}' is damaged: save the dataset again") from error
    files = tuple(folder / Path(name).name for name in names)
    if not files:
        raise InputError(f"dataset '{_shown(folder)}' has no rows: save it again")
    return files


def _shown(path: Path) -> str:
    return format_text(path, None)
