"""`edgegt export` and `edgegt patch`: what was trained, in forms that other programs read.

A model folder holds the files of the base with the trained tensors in their places, under the base's own names, so that
it can stand wherever the base did. One tensor is in memory at a time.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgegt.card import Exported, model_card
from edgegt.disk import replacing_folder, write_json, write_text
from edgegt.errors import InputError
from edgegt.folder import RunFolder
from edgegt.log import Log
from edgegt.patch import Patch, open_patch, save_patch
from edgegt.sealed import DTYPES, Item, write_sealed
from edgegt.units import format_bytes, format_text
from edgegt.version import __version__

if TYPE_CHECKING:
    import torch

    from edgegt.pretrained import Pretrained

# What `edgegt export --to` can write.
FORMATS = ("hf", "patch")
MODEL_DTYPES = ("float32", "bfloat16", "float16")
PATCH_DTYPES = ("float32", "bfloat16")
SHARD_BYTES = 5 * 10**9
# What stands beside weights and is needed to use them, or to pass them on. Everything else may be anything.
_BESIDE = (
    "tokenizer*", "vocab*", "merges.txt", "*.model", "*.spm", "*.tiktoken", "special_tokens_map.json",
    "added_tokens.json", "chat_template*", "additional_chat_templates", "generation_config.json",
    "*processor_config.json", "license*", "licence*", "notice*", "copying*", "use_policy*",
)  # fmt: skip
_CARD, _BASE_CARD = "README.md", "BASE_README.md"
_WRITTEN = ("config.json", "model.safetensors.index.json")
# Elements whose rounding is measured at a time.
_PART = 2**20


@dataclass
class Rounding:
    """What a smaller dtype takes from tensors: sums of squares of the values, of what is lost, of what was trained."""

    values: float = 0.0
    lost: float = 0.0
    trained: float = 0.0

    def add(self, exact: torch.Tensor, rounded: torch.Tensor, before: torch.Tensor | None = None) -> None:
        """Count a tensor. before: what it was before training."""
        for start in range(0, exact.numel(), _PART):
            part = slice(start, start + _PART)
            one, other = exact.reshape(-1)[part].double(), rounded.reshape(-1)[part].double()
            self.values += float(one.square().sum())
            self.lost += float((one - other).square().sum())
            if before is not None:
                self.trained += float((one - before.reshape(-1)[part].double()).square().sum())

    @property
    def of_values(self) -> float:
        return math.sqrt(self.lost / self.values) if self.values else 0.0

    @property
    def of_training(self) -> float | None:
        """What is lost, of what training changed; None where nothing was."""
        return math.sqrt(self.lost / self.trained) if self.trained else None


def subject_patch(run: str | None, patch: str | None) -> Patch:
    """The patch of a run folder, or a file. Raises: InputError unless exactly one is named and readable."""
    if (run is None) == (patch is None):
        raise InputError("name a run folder, or a patch with --patch: exactly one of the two")
    return patch_at(str(run if patch is None else patch))


def patch_at(place: str) -> Patch:
    """The patch in this file, or of this run folder. Raises: InputError."""
    path = Path(place)
    return open_patch(RunFolder(path).patch if path.is_dir() else path)


def export_patch(
    run: str | None, patch: str | None, output: str, dtype: str | None = None, force: bool = False,
    log: Log | None = None,
) -> Path:  # fmt: skip
    """Write the patch of a run, or a patch file, as one file; dtype: float32 or bfloat16, as it is unless given.

    Raises: InputError for a dtype that is none of these, a file that exists, or a patch that cannot be read.
    """
    import torch

    log = log or Log()
    _check_dtype(dtype, PATCH_DTYPES)
    given, path = subject_patch(run, patch), new_file(output, force)
    rounding, items = Rounding(), []
    for name in given.names:
        kind = given.values(name).dtype if dtype is None else getattr(torch, dtype)
        items.append(Item(name, kind, given.shapes[name], partial(_of_patch, given, name, kind, rounding)))
        rows = given.rows(name)
        if rows is not None:
            items.append(Item.of(f"{name}|rows", rows))
    about = given.about
    tensors = {item.name: item for item in items}
    origin = about.get("model", "?"), __version__, about.get("separator", ""), given.labels
    save_patch(path, tensors, given.fingerprint, *origin)
    if rounding.lost:
        log.say(f"trained tensors rounded to {dtype}: {rounding.of_values:.3%} of their norm is lost")
    log.say(f"{len(given.names)} trained tensors, {format_bytes(path.stat().st_size)}")
    return path


def export_model(
    run: str | None, model: str | None, patch: str | None, output: str, dtype: str | None = None, force: bool = False,
    log: Log | None = None,
) -> Path:  # fmt: skip
    """Write the base's weights with what was trained, tokenizer, config and a model card, as a folder for transformers.

    model: the base, of a run the place where it lies now if it was moved; dtype: of all float tensors, as the base's
    files have it unless given.
    Raises: InputError when the patch is not one of this base, or the folder exists.
    """
    from edgegt.pretrained import open_pretrained

    log = log or Log()
    _check_dtype(dtype, MODEL_DTYPES)
    given = subject_patch(run, patch)
    base = open_pretrained(base_of(run, model))
    base.check(given)
    path = new_folder(output, force, (base.source.directory, given.path), log)
    with replacing_folder(path, force) as partly:
        done = _write_model(base, given, partly, dtype)
        write_card(base, given, run, partly, done)
    say_what_was_done(done, log)
    return path


def write_card(base: Pretrained, patch: Patch, run: str | None, folder: Path, done: Exported) -> None:
    """The folder's README.md."""
    about = None if run is None else RunFolder(Path(run))
    write_text(folder / _CARD, model_card(base.source.name, patch, about, done))


def say_what_was_done(done: Exported, log: Log) -> None:
    """What a person should know of an exported folder."""
    for note in done.notes:
        log.say(note)
    if done.left_out:
        log.say(f"left out, of the base's folder: {', '.join(format_text(name) for name in done.left_out)}")
    trained = f"{len(done.tensors)} trained tensors in {format_bytes(done.total_bytes)} of weights"
    log.say(f"{trained}, {len(done.files)} file(s), {done.dtype}")


def base_of(run: str | None, model: str | None) -> str:
    """Where the base lies: --model, or where the run had it. Raises: InputError."""
    if model is not None:
        return model
    if run is None:
        raise InputError("--patch needs its base: give it with --model")
    folder = RunFolder(Path(run))
    try:
        directory = str(folder.read("run.json")["model"]["directory"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder.path / 'run.json'} is damaged (no {error}): give the base with --model") from error
    if not Path(directory).is_dir():
        raise InputError(f"the base of this run is not at '{directory}' any more: give its place with --model")
    return directory


def _check_dtype(dtype: str | None, known: Sequence[str]) -> None:
    if dtype is not None and dtype not in known:
        raise InputError(f"--dtype '{format_text(dtype)}' is not one of {', '.join(known)}")


def new_file(output: str, force: bool) -> Path:
    """Where a file is to be written. Raises: InputError when something is there, unless it is a file and `force`."""
    path = Path(output)
    if path.is_dir() or (os.path.lexists(path) and not force):
        remedy = "give the name of a file" if path.is_dir() else "give a new name, or --force to replace it"
        raise InputError(f"--output '{format_text(output, None)}' exists: {remedy}")
    return path


def new_folder(output: str, force: bool, kept: Iterable[Path], log: Log) -> Path:
    """Where a folder is to be written. `force` replaces a model's folder, unless anything to be kept lies in it.

    What an export that was killed left beside it is said.

    Raises: InputError.
    """
    path, shown = Path(os.path.abspath(Path(output).expanduser())), format_text(output, None)
    for left in sorted(path.parent.glob(f".{escape(path.name)}.*")):
        if left.suffix in (".tmp", ".old"):
            log.say(f"note: '{left}' is of an export that still runs, or was killed: delete it in that case")
    if not os.path.lexists(path):
        return path
    if not force:
        raise InputError(f"--output '{shown}' exists: give a new name, or --force to replace it")
    for place in kept:
        if place.resolve().is_relative_to(path.resolve()):
            raise InputError(f"--output '{shown}' holds what is exported, '{place}': give a new name")
    is_model = path.is_dir() and not path.is_symlink() and (not any(path.iterdir()) or (path / "config.json").is_file())
    if not is_model:
        raise InputError(f"--output '{shown}' is no folder of a model, which is all that --force replaces: delete it")
    return path


def _write_model(base: Pretrained, patch: Patch, folder: Path, dtype: str | None) -> Exported:
    from huggingface_hub import split_state_dict_into_shards_factory

    trained, others = Rounding(), Rounding()
    items = _items(base, patch, dtype, trained, others)
    sizes = {item.name: math.prod(item.shape) * item.dtype.itemsize for item in items}
    plan = split_state_dict_into_shards_factory(
        sizes, get_storage_size=int, filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD_BYTES
    )
    by_name = {item.name: item for item in items}
    for file, names in plan.filename_to_tensors.items():
        write_sealed(folder / file, [by_name[name] for name in names], {"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
    kinds = sorted({str(item.dtype).removeprefix("torch.") for item in items if item.dtype.is_floating_point})
    done = Exported(patch.names, " and ".join(kinds), sum(sizes.values()), list(plan.filename_to_tensors))
    _say_what_is_lost(done, trained, others, dtype)
    write_config(base, patch, folder, dtype, done)
    done.left_out = copy_beside(base.source.directory, {path.name for path in base.source.files.values()}, folder)
    return done


def _items(base: Pretrained, patch: Patch, dtype: str | None, trained: Rounding, others: Rounding) -> list[Item]:
    """Every tensor of the files in their order, trained ones in their places, and a new head last."""
    import torch

    from edgegt.pretrained import name_of_new_head

    apart = base.head in patch.names
    replaced = {place: name for name in patch.names for place in base.places(name, apart)}
    forms = _forms(base)
    if apart and not base.places(base.head, apart):
        new = name_of_new_head(base)
        replaced[new], forms[new] = base.head, forms[base.files[base.embedding]]
    found = []
    for place, (kind, shape) in forms.items():
        wanted = getattr(torch, dtype) if dtype is not None and kind.is_floating_point else kind
        name = replaced.get(place)
        if name is None:
            get = partial(_of_base, base, place, wanted, others)
        else:
            held = base.shapes[name][::-1] if name in base.transposed else base.shapes[name]
            if shape != held:
                raise InputError(f"'{place}' is {shape} in the files of '{base.source.name}' and {held} in the model")
            get = partial(_of_training, base, patch, name, wanted, trained)
        found.append(Item(place, wanted, shape, get))
    return found


def _forms(base: Pretrained) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of every tensor in the files. Raises: InputError for a dtype that is not written here."""
    import torch
    from safetensors import safe_open

    found = {}
    by_file: dict[Path, list[str]] = {}
    for name, file in base.source.files.items():
        by_file.setdefault(file, []).append(name)
    for file, names in by_file.items():
        with safe_open(str(file), framework="pt") as handle:
            for name in names:
                part = handle.get_slice(name)
                kind = part.get_dtype()
                if kind not in DTYPES:
                    raise InputError(
                        f"{file}: '{format_text(name)}' is {kind}, which cannot be exported: use the patch"
                    )
                found[name] = getattr(torch, DTYPES[kind]), tuple(part.get_shape())
    return {name: found[name] for name in base.source.files}


def _of_base(base: Pretrained, place: str, wanted: torch.dtype, others: Rounding) -> torch.Tensor:
    stored: torch.Tensor = base.source.tensor(place)
    return stored if stored.dtype == wanted else _rounded(place, stored, wanted, others)


def _of_training(
    base: Pretrained, patch: Patch, name: str, wanted: torch.dtype, trained: Rounding
) -> torch.Tensor:  # fmt: skip
    """A trained tensor as the files hold it: over the base's where only rows were trained, transposed for GPT-2."""
    rows, values = patch.rows(name), patch.values(name)
    if values.dtype != wanted:
        values = _rounded(name, values, wanted, trained, base.value(name, rows))
    if rows is not None:
        whole = base.value(name).to(wanted, copy=True)
        whole[rows] = values
        values = whole
    return values.t() if name in base.transposed else values


def _of_patch(patch: Patch, name: str, wanted: torch.dtype, rounding: Rounding) -> torch.Tensor:
    values = patch.values(name)
    return values if values.dtype == wanted else _rounded(name, values, wanted, rounding)


def _rounded(
    name: str, exact: torch.Tensor, wanted: torch.dtype, rounding: Rounding, before: torch.Tensor | None = None
) -> torch.Tensor:
    """The tensor in another dtype, and what that loses. Raises: InputError when a value becomes infinite."""
    found = exact.to(wanted)
    if not _finite(found) and _finite(exact):
        kind = str(wanted).removeprefix("torch.")
        raise InputError(
            f"'{format_text(name)}' has values up to {float(exact.abs().max()):.3g}, which {kind} cannot hold: give "
            "--dtype bfloat16 or float32"
        )
    rounding.add(exact, found, before)
    return found


def _finite(tensor: torch.Tensor) -> bool:
    return not tensor.numel() or all(bool(end.isfinite()) for end in tensor.aminmax())


def _say_what_is_lost(done: Exported, trained: Rounding, others: Rounding, dtype: str | None) -> None:
    kind = dtype or done.dtype
    if trained.lost:
        change = trained.of_training
        more = "" if change is None else f", {change:.2%} of what training changed"
        done.notes.append(f"trained tensors rounded to {kind}: {trained.of_values:.3%} of their norm is lost{more}")
    if others.lost:
        done.notes.append(f"the base's tensors rounded to {kind}: {others.of_values:.3%} of their norm is lost")


def write_config(base: Pretrained, patch: Patch, folder: Path, dtype: str | None, done: Exported) -> None:
    """config.json as it is, but for the dtype, and for a head that is not the embedding's any more."""
    from edgegt.pretrained import can_untie

    origin = base.source.directory / "config.json"
    tree: dict[str, Any] = json.loads(origin.read_text(encoding="utf-8"))
    changes: dict[str, Any] = {}
    if dtype is not None:
        changes["dtype" if "dtype" in tree else "torch_dtype"] = dtype
    if base.tied and base.head in patch.names:
        if can_untie(base.config, tree):
            changes["tie_word_embeddings"] = False
        else:
            done.notes.append(
                "the head is saved apart from the embedding, which this architecture's config cannot say: transformers "
                "5 sees it from the weights, an older one may tie them again"
            )
    if changes:
        write_json(folder / "config.json", {**tree, **changes})
    else:
        shutil.copyfile(origin, folder / "config.json")


def copy_beside(origin: Path, weights: Collection[str], folder: Path) -> list[str]:
    """Copy tokenizer, templates, generation config and licences as they are; returns what else is not hidden there."""
    left_out = []
    for path in sorted(origin.iterdir()):
        name = path.name.lower()
        if name in _WRITTEN or path.name in weights or name.startswith("."):
            continue
        if name == _CARD.lower():
            shutil.copyfile(path, folder / _BASE_CARD)
        elif not any(fnmatch(name, pattern) for pattern in _BESIDE):
            left_out.append(path.name)
        elif path.is_dir():
            shutil.copytree(path, folder / path.name, copy_function=shutil.copyfile)
        else:
            shutil.copyfile(path, folder / path.name)
    return left_out
