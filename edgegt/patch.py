"""The patch: trained tensors in full precision, or exported in bfloat16, and what identifies the base they belong to.

Of a linear of which only some output rows were trained it holds two tensors: '<name>', the values [R, in], and
'<name>|rows', their sorted int64 index [R]. Such a patch has format 'sealed 2', any other 'sealed 1'.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgegt.errors import InputError
from edgegt.sealed import SEAL, Item, read_sealed, write_sealed
from edgegt.units import format_text

if TYPE_CHECKING:
    import torch
    from torch import nn

    from edgegt.model import Int8Model
    from edgegt.quant import Int8Embedding, Int8Linear

    Holder = Int8Linear | Int8Embedding | nn.Parameter

# Sealed patches and, without a checksum, those of before. No flipped bit makes one word of another.
FORMAT, ROWS_FORMAT = "sealed 1", "sealed 2"
OLD_FORMATS = ("1", "2")
_ROWS = "|rows"


def rows_name(name: str) -> str:
    """The name of the tensor that says which output rows of `name` there are."""
    return f"{name}{_ROWS}"


def save_patch(
    path: Path, tensors: Mapping[str, torch.Tensor | Item], fingerprint: str, model: str, version: str,
    separator: str = "", labels: Sequence[str] = (),
) -> None:  # fmt: skip
    """Write the trained tensors (float32, by weight name) with the base's fingerprint, whole or not at all.

    tensors: as they are, or items that are fetched one at a time; trained rows of a linear come as '<name>' [R, in] and
    '<name>|rows' int64 [R].
    separator: what stood between prompt and completion in training, so that the patch can be asked alike.
    labels: of a classifier its classes, in the order of its logits.
    """
    kind = ROWS_FORMAT if any(name.endswith(_ROWS) for name in tensors) else FORMAT
    about = {"format": kind, "fingerprint": fingerprint, "model": model, "edgegt": version, "separator": separator}
    if labels:
        about["labels"] = json.dumps(list(labels))
    items = [given if isinstance(given, Item) else Item.of(name, given) for name, given in tensors.items()]
    write_sealed(path, items, about)


@dataclass(frozen=True)
class Patch:
    """A patch on disk whose every byte was checked, read one tensor at a time. shapes: of all its tensors, by name."""

    path: Path
    about: dict[str, str]
    shapes: dict[str, tuple[int, ...]]

    @property
    def names(self) -> list[str]:
        """The trained tensors. Raises: InputError for rows without their values."""
        for name in self.shapes:
            if name.endswith(_ROWS) and name.removesuffix(_ROWS) not in self.shapes:
                raise self.unfit(f"has '{format_text(name)}' without the values of these rows")
        return [name for name in self.shapes if not name.endswith(_ROWS)]

    @property
    def fingerprint(self) -> str:
        return self.about["fingerprint"]

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes of a classifier's patch, none of a language model's. Raises: InputError as `patch_labels`."""
        return patch_labels(self.path, self.about)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor as stored. Raises: KeyError when the patch lacks it, InputError when it cannot be read."""
        from safetensors import SafetensorError, safe_open

        if name not in self.shapes:
            raise KeyError(name)
        try:
            with safe_open(str(self.path), framework="pt") as handle:
                found: torch.Tensor = handle.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError, TypeError, ValueError) as error:
            raise _damaged(self.path, error) from error
        return found

    def values(self, name: str) -> torch.Tensor:
        """A trained tensor as stored, or of its trained rows. Raises: InputError, also when it is not finite floats."""
        found = self.tensor(name)
        if not _finite(found):
            raise self.unfit(f"has '{format_text(name)}' as {found.dtype} with values that are not all finite floats")
        return found

    def rows(self, name: str) -> torch.Tensor | None:
        """Which output rows of the tensor were trained, sorted int64 [R]; None for all. Raises: InputError if unfit."""
        from edgegt.quant import index_fault

        if rows_name(name) not in self.shapes:
            return None
        rows = self.tensor(rows_name(name))
        fault = index_fault(rows, 1 << 48)
        if fault is None and self.shapes[name][:1] != rows.shape:
            fault = f"{len(rows)} rows, and values {self.shapes[name]}"
        if fault is not None:
            raise self.unfit(f"has rows of '{format_text(name)}' that cannot be ({fault})")
        return rows

    def unfit(self, what: str) -> InputError:
        """The error about a patch that is whole and makes no sense."""
        return _unfit(self.path, what)

    def check_base(self, name: str, fingerprint: str) -> None:
        """Raises: InputError when the patch belongs to another base than the model of this name and fingerprint."""
        if self.fingerprint != fingerprint:
            raise InputError(
                f"patch '{self.path}' was trained on another base ({format_text(self.about.get('model', '?'))}, "
                f"fingerprint {format_text(self.fingerprint[:12])}) than '{name}' ({fingerprint[:12]}): give that base "
                "with --model"
            )


def open_patch(path: Path) -> Patch:
    """A patch, checked as a whole and not read yet; one without a seal, of an older version, is taken all the same.

    Raises: InputError when it is missing, damaged or not a patch.
    """
    from safetensors import SafetensorError, safe_open

    shown = format_text(path, None)
    if not path.is_file():
        raise InputError(f"patch '{shown}' does not exist: give the patch.safetensors of a run folder")
    try:
        with safe_open(str(path), framework="pt") as handle:
            about = dict(handle.metadata() or {})
            shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
        twice = _name_given_twice(path)
    except (SafetensorError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise _damaged(path, error) from error
    if twice is not None:
        raise _unfit(path, f"has '{format_text(twice)}' twice")
    if about.get("format") not in (FORMAT, ROWS_FORMAT, *OLD_FORMATS) or "fingerprint" not in about:
        found = json.dumps(about)[:80]
        raise InputError(f"'{shown}' is not an edgegt patch (metadata {found}): give a patch.safetensors")
    if about.pop(SEAL, None) is not None or about["format"] not in OLD_FORMATS:
        try:
            read_sealed(path)
        except InputError as error:
            raise InputError(f"patch {format_text(error, None)}: take it from the run folder again") from error
    return Patch(path, about, shapes)


def read_patch(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors of a patch, and its metadata. Raises: InputError as `open_patch`."""
    patch = open_patch(path)
    return {name: patch.tensor(name) for name in patch.shapes}, patch.about


def _damaged(path: Path, error: Exception) -> InputError:
    # The library checks names, dtypes and offsets; sizes that no tensor can have are refused by torch.
    reason = format_text(str(error).partition("\n")[0], 120)
    return InputError(f"patch '{format_text(path, None)}' is damaged ({reason}): take it from the run folder again")


def patch_labels(path: Path, about: Mapping[str, str]) -> tuple[str, ...]:
    """The classes of a classifier's patch, none of a language model's. Raises: InputError when they are no list."""
    try:
        found = json.loads(about.get("labels", "[]"))
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(label, str) for label in found) or len(found) == 1:
        raise _unfit(path, f"has the labels '{format_text(about['labels'])}', which are no list of classes")
    return tuple(found)


def _name_given_twice(path: Path) -> str | None:
    """A name that the header of a readable file gives twice, of which the library would take the last."""
    found: list[str] = []

    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        tree = dict(pairs)
        if len(tree) < len(pairs):
            found.append(Counter(name for name, _ in pairs).most_common(1)[0][0])
        return tree

    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        json.loads(file.read(length), object_pairs_hook=once)
    return found[0] if found else None


def apply_patch(model: Int8Model, path: Path) -> dict[str, str]:
    """Put the trained tensors into the int8 model, as the two planes that training computed with; returns the metadata.

    An embedding that was trained whole goes to a tied head too, unless the patch has the head apart.
    Raises: InputError when the patch belongs to another base or does not fit it; nothing is changed then.
    """
    import torch

    patch = open_patch(path)
    patch.check_base(model.source.name, model.fingerprint)
    names, about = patch.names, patch.about
    _check_task(model, path, patch_labels(path, about))
    tensors = {name: patch.tensor(name) for name in patch.shapes}
    values = {name: tensors[name] for name in names}
    holders = {name: _fitting_holder(model, path, name, tensors) for name in values}
    for name, value in values.items():
        if not _finite(value):
            raise _unfit(path, f"has '{name}' as {value.dtype} with values that are not all finite floats")
    for name, holder in holders.items():
        rows = tensors.get(rows_name(name))
        _put(holder, values[name].to(model.device, torch.float32), None if rows is None else rows.to(model.device))
    embedding = model.module.get_input_embeddings()
    if model.tied and model.head not in tensors and any(holder is embedding for holder in holders.values()):
        model.linears[model.head].restore(embedding.weight)
    return about


def _check_task(model: Int8Model, path: Path, labels: tuple[str, ...]) -> None:
    """Raises: InputError when the patch was trained for another task than the model is loaded for, or other classes."""
    if labels == model.labels:
        return
    if labels and model.labels:
        said = f"tells the classes {format_text(', '.join(labels))} apart, and the model others"
    elif labels:
        said = "was trained with --task classification, and the model answers in words"
    else:
        said = "was trained to answer in words, and the model is loaded for --task classification"
    raise InputError(f"patch '{format_text(path, None)}' {said}: give a patch of the same task")


def _fitting_holder(model: Int8Model, path: Path, name: str, tensors: Mapping[str, torch.Tensor]) -> Holder:
    """What holds the tensor of this name. Raises: InputError when nothing does, or not in this shape."""
    from edgegt.quant import Int8Linear, index_fault

    holder = _holder(model, name)
    if holder is None:
        raise InputError(
            f"patch '{path}' has '{format_text(name)}', which '{model.source.name}' does not: give the right base"
        )
    given, held = tuple(tensors[name].shape), _shape(holder)
    rows = tensors.get(rows_name(name))
    if rows is not None:
        fault = index_fault(rows, held[0])
        if not isinstance(holder, Int8Linear):
            fault = "only the rows of a linear can be trained apart"
        if fault:
            raise _unfit(path, f"has rows of '{name}' that '{model.source.name}' cannot have ({fault})")
        held = (len(rows), *held[1:])
    if given != held:
        which = f"as {held}" if rows is None else f"with these rows as {held}"
        raise _unfit(path, f"has '{name}' as {given}, '{model.source.name}' {which}")
    return holder


def _finite(value: torch.Tensor) -> bool:
    """Whether these are floats as a patch has them, all of them finite. Torch cannot compare those of 8 and 4 bits."""
    wide = value.is_floating_point() and value.element_size() >= 2
    return wide and all(bool(end.isfinite()) for end in value.aminmax())


def _unfit(path: Path, what: str) -> InputError:
    return InputError(f"patch '{format_text(path, None)}' {what}: take the patch from the run folder again")


def _holder(model: Int8Model, name: str) -> Holder | None:
    """What holds the tensor of this name: an int8 layer, an int8 embedding, or a float parameter; None for nothing."""
    from edgegt.quant import Int8Embedding

    if name in model.linears:
        return model.linears[name]
    owner, _, short = name.rpartition(".")
    # Looked up in tables, because an attribute of the name that a stranger chose may compute anything.
    module: nn.Module | None = model.module
    for part in owner.split(".") if owner else ():
        module = None if module is None else dict(module.named_children()).get(part)
    if module is None:
        return None
    if isinstance(module, Int8Embedding):
        return module if short == "weight" else None
    return dict(module.named_parameters(recurse=False)).get(short)


def _shape(holder: Holder) -> tuple[int, ...]:
    from torch import nn

    return tuple(holder.shape if isinstance(holder, nn.Parameter) else holder.weight.shape)


def _put(holder: Holder, values: torch.Tensor, rows: torch.Tensor | None) -> None:
    from edgegt.quant import Int8Embedding, Int8Linear, TrainedRows, split_planes

    if isinstance(holder, Int8Linear) and rows is not None:
        holder.restore(holder.weight, TrainedRows.of(rows, values, holder.weight.shape))
    elif isinstance(holder, Int8Linear):
        holder.restore(split_planes(values))
    elif isinstance(holder, Int8Embedding):
        holder.weight = split_planes(values)
    else:
        holder.data.copy_(values)
