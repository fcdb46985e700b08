"""Patches of one base compared and averaged.

    merged = sum_i w_i value_i / sum_i w_i,    value_i: the patch's tensor, or the base's where the patch has none

What only some patches have, tensors or rows of a head, needs the base's own values. A patch that trained the embedding
of a tied model has trained its head too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from edgegt.errors import InputError
from edgegt.patch import Patch, rows_name, save_patch
from edgegt.pretrained import Pretrained
from edgegt.sealed import Item
from edgegt.units import format_text
from edgegt.version import __version__

# Elements that are averaged, or compared, at a time in float64.
PART = 2**20


@dataclass(frozen=True)
class Extent:
    """How much of a tensor patches trained: shape [rows, ...] of the values, and which rows, None for all of them."""

    shape: tuple[int, ...]
    rows: torch.Tensor | None


def parse_weights(text: str | None, count: int) -> list[float]:
    """'0.7,0.3' as shares of one; equal ones without it. Raises: InputError."""
    if text is None:
        return [1 / count] * count
    try:
        given = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise _bad_weights(text, count) from error
    total = sum(given)
    if len(given) != count or any(not 0 <= one < math.inf for one in given) or not 0 < total < math.inf:
        raise _bad_weights(text, count)
    return [one / total for one in given]


def _bad_weights(text: str, count: int) -> InputError:
    example = ",".join(["1"] * count)
    return InputError(
        f"--weights '{format_text(text)}' are not {count} numbers, none negative and not all 0: give one for each "
        f"patch, such as {example}"
    )


def check_one_base(patches: Sequence[Patch], base: Pretrained | None) -> None:
    """Raises: InputError when the patches are not of one base and task, or not of this base."""
    first = patches[0]
    for other in patches[1:]:
        if other.fingerprint != first.fingerprint:
            raise InputError(
                f"patches '{first.path}' (base {first.fingerprint[:12]}) and '{other.path}' (base "
                f"{other.fingerprint[:12]}) were trained on different bases: give patches of one base"
            )
        if other.labels != first.labels:
            raise InputError(
                f"patches '{first.path}' ({_task(first)}) and '{other.path}' ({_task(other)}) were trained for "
                "different tasks: give patches of one task"
            )
    if base is not None:
        for patch in patches:
            base.check(patch)


def _task(patch: Patch) -> str:
    return f"the classes {format_text(', '.join(patch.labels))}" if patch.labels else "answers in words"


def merge(patches: Sequence[Patch], shares: Sequence[float], base: Pretrained | None, output: Path) -> list[str]:
    """Write the average of several patches as one of float32; returns the names of its tensors.

    Raises: InputError when a tensor is not in all of them and no base is given.
    """
    check_one_base(patches, base)
    items: list[Item] = []
    names = list(dict.fromkeys(name for patch in patches for name in patch.names))
    for name in names:
        extent = _union(patches, name, base)
        if base is None:
            _need_no_base(patches, name, extent)
        averaged = partial(_average, patches, shares, base, name, extent)
        items.append(Item(name, torch.float32, extent.shape, averaged))
        if extent.rows is not None:
            items.append(Item.of(rows_name(name), extent.rows))
    about = patches[0].about
    given = {item.name: item for item in items}
    origin = about.get("model", "?"), __version__, about.get("separator", ""), patches[0].labels
    save_patch(output, given, about["fingerprint"], *origin)
    return names


def compare(first: Patch, second: Patch, base: Pretrained | None) -> dict[str, Any]:
    """What differs: of each tensor where it is, and the norm of the difference, alone and of the first's values.

    Of a tensor that one patch has, against the base's values; None without a base. Of rows likewise: without a base
    those are compared that both have, and the tensor is the same only where the rows are.
    """
    patches = (first, second)
    check_one_base(patches, base)
    listed: list[dict[str, Any]] = []
    for name in dict.fromkeys((*first.names, *second.names)):
        holders = [patch for patch in patches if name in patch.shapes]
        where = "both" if len(holders) == 2 else "first" if holders == [first] else "second"
        extent = _union(patches, name, base) if base is not None else _common(holders, name)
        entry: dict[str, Any] = {
            "name": name,
            "shape": list(extent.shape),
            "in": where,
            "difference": None,
            "relative": None,
        }
        if extent.rows is not None:
            entry["rows"] = len(extent.rows)
        if base is not None or (len(holders) == 2 and entry.get("rows") != 0):
            difference, norm = _norms(patches, base, name, extent)
            entry["difference"], entry["relative"] = difference, difference / norm if norm else None
        known = base is not None or (len(holders) == 2 and _same_rows(holders, name))
        entry["same"] = known and entry["difference"] == 0
        listed.append(entry)
    return {"fingerprint": first.fingerprint, "first": str(first.path), "second": str(second.path), "tensors": listed}


def value_in(patch: Patch, base: Pretrained | None, name: str, rows: torch.Tensor | None) -> torch.Tensor:
    """What the model with this patch has of a tensor, all of it or these rows, in whatever float dtype it is stored.

    Raises: InputError when that is the base's and none is given.
    """
    if name in patch.shapes:
        values, own = patch.values(name), patch.rows(name)
        if own is None and rows is not None and (not values.ndim or int(rows[-1:].sum()) >= len(values)):
            raise patch.unfit(f"has '{format_text(name)}' as {tuple(values.shape)}, another one rows beyond that")
        if own is None:
            return values if rows is None else values[rows]
        if rows is not None and torch.equal(own, rows):
            return values
        if rows is not None and bool(torch.isin(rows, own).all()):
            return values[torch.searchsorted(own, rows)]
        if base is None:
            raise _needs_base(name, patch)
        whole = base.value(name).to(torch.float32, copy=True)
        whole[own] = values.to(torch.float32)
        return whole if rows is None else whole[rows]
    if base is None:
        raise _needs_base(name, patch)
    if base.tied and name == base.head and base.embedding in patch.shapes:
        embedding = patch.values(base.embedding)
        return embedding if rows is None else embedding[rows]
    return base.value(name, rows)


def _union(patches: Sequence[Patch], name: str, base: Pretrained | None) -> Extent:
    """All rows that any of the patches trained."""
    holders = [patch for patch in patches if name in patch.shapes]
    given = [patch.rows(name) for patch in holders]
    whole = next((patch.shapes[name] for patch, rows in zip(holders, given, strict=True) if rows is None), None)
    if base is not None and base.tied and name == base.head:
        others = [patch for patch in patches if patch not in holders]
        if any(base.embedding in patch.shapes for patch in others):
            whole = base.shapes[name]
    parts = [rows for rows in given if rows is not None]
    if whole is not None or not parts:
        return Extent(whole or holders[0].shapes[name], None)
    rows = torch.unique(torch.cat(parts))
    return Extent((len(rows), *holders[0].shapes[name][1:]), rows)


def _common(holders: Sequence[Patch], name: str) -> Extent:
    """The rows that all of these patches trained."""
    shape, rows = holders[0].shapes[name], holders[0].rows(name)
    for patch in holders[1:]:
        other = patch.rows(name)
        if rows is None:
            rows, shape = other, patch.shapes[name]
        elif other is not None:
            rows = rows[torch.isin(rows, other)]
    return Extent(shape if rows is None else (len(rows), *shape[1:]), rows)


def _same_rows(holders: Sequence[Patch], name: str) -> bool:
    """Whether all of these patches trained the whole tensor, or the same rows of it."""
    rows = [patch.rows(name) for patch in holders]
    first = rows[0]
    return all(other is None if first is None else other is not None and torch.equal(first, other) for other in rows)


def _need_no_base(patches: Sequence[Patch], name: str, extent: Extent) -> None:
    """Raises: InputError when a patch lacks the tensor, or rows of it; or when shapes differ."""
    for patch in patches:
        if name not in patch.shapes:
            raise _needs_base(name, patch)
        rows = patch.rows(name)
        if rows is not None and (extent.rows is None or not torch.equal(rows, extent.rows)):
            raise _needs_base(name, patch)
        if patch.shapes[name] != extent.shape:
            raise patch.unfit(f"has '{format_text(name)}' as {patch.shapes[name]}, another one as {extent.shape}")


def _needs_base(name: str, patch: Patch) -> InputError:
    return InputError(
        f"patch '{patch.path}' lacks '{format_text(name)}' or rows of it, and counts there as its base: give that base "
        "with --model"
    )


def _average(
    patches: Sequence[Patch], shares: Sequence[float], base: Pretrained | None, name: str, extent: Extent
) -> torch.Tensor:
    values = [value_in(patch, base, name, extent.rows) for patch in patches]
    shape = extent.shape or (1,)  # a scalar as a row
    averaged, step = torch.empty(shape), _rows_at_once(shape)
    for start in range(0, shape[0], step):
        rows = [value.reshape(shape)[start : start + step].double() for value in values]
        averaged[start : start + step] = sum(row * share for row, share in zip(rows, shares, strict=True))
    return averaged.reshape(extent.shape)


def _norms(patches: Sequence[Patch], base: Pretrained | None, name: str, extent: Extent) -> tuple[float, float]:
    """Frobenius norms of the difference of two patches' tensors, and of the first."""
    first, second = (value_in(patch, base, name, extent.rows) for patch in patches)
    if first.shape != second.shape:
        raise patches[1].unfit(f"has '{format_text(name)}' as {tuple(second.shape)}, the other {tuple(first.shape)}")
    difference = norm = 0.0
    shape = extent.shape or (1,)
    step = _rows_at_once(shape)
    for start in range(0, shape[0], step):
        one, other = (value.reshape(shape)[start : start + step].double() for value in (first, second))
        difference += float((one - other).square().sum())
        norm += float(one.square().sum())
    return math.sqrt(difference), math.sqrt(norm)


def _rows_at_once(shape: tuple[int, ...]) -> int:
    return max(1, PART // max(1, math.prod(shape[1:])))
