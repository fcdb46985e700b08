"""The picture of which tensors were trained in which round: layers from the top down, one column per kind of tensor.

Rows and columns come from the tensors' names alone, so that it holds for every family: the first number in a name is
its layer, what follows is its column. Tensors without a layer (head, final norm, embedding) get a row of their own.
A cell has one stripe per round. Its shade is the tensor's rank by importance among the candidates of that round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline

from edgegt.report.charts import ACCENT, INK, MUTED, canvas, to_svg

SHADES = 5
WIDTH, LEFT, RIGHT, COLUMN_GAP = 1000, 118, 34, 5.0
FLAT_LABELS = 6

Candidate = Mapping[str, Any]
Place = tuple[str, str]


@dataclass(frozen=True)
class Grid:
    """Row and column labels in drawing order, and the place of each tensor; column '' spans the whole row."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    places: Mapping[str, Place]


STACKS = ("encoder", "decoder")


def place(name: str, stacks: bool = False) -> Place:
    """Row and column of a tensor: ('7', 'self_attn.q_proj'), ('lm_head', '').

    stacks: the model has two, and rows say which: ('encoder 7', ...), ('decoder norm', '').
    """
    parts = name.split(".")
    stack = next((f"{part} " for part in parts if part in STACKS), "") if stacks else ""
    if parts[-1] in ("weight", "bias"):
        parts = [*parts[:-2], f"{parts[-2]} bias"] if parts[-1] == "bias" and len(parts) > 1 else parts[:-1]
    for index, part in enumerate(parts[:-1]):
        if part.isdigit():
            return stack + part, ".".join("*" if inner.isdigit() else inner for inner in parts[index + 1 :])
    return f"{stack}norm" if stack and "norm" in parts[-1] else parts[-1], ""


def short_labels(columns: Sequence[str]) -> list[str]:
    """The shortest ends of dotted names that still differ: 'q_proj', but 'attn.c_proj' beside 'mlp.c_proj'.

    A name that is the end of another stays whole.
    """
    labels = []
    for column in columns:
        parts = column.split(".")
        ends = [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
        alone = (end for end in ends if sum(f".{other}".endswith(f".{end}") for other in columns) == 1)
        labels.append(next(alone, column))
    return labels


def lay_out(plans: Sequence[Mapping[str, Any]]) -> Grid:
    """Rows from the loss down (head, final norm, last layer ... first layer, embedding), matrices before vectors."""
    blocks: dict[str, int] = {}
    columns: dict[str, bool] = {}
    places: dict[str, Place] = {}
    every = [candidate for plan in plans for candidate in plan.get("candidates") or ()]
    stacks = all(any(stack in str(one["name"]).split(".") for one in every) for stack in STACKS)
    for candidate in every:
        name = str(candidate["name"])
        row, column = places[name] = place(name, stacks)
        blocks[row] = int(candidate.get("block", row if column else -1))
        if column:
            columns.setdefault(column, candidate.get("kind") == "vector")
    outside = {row for row, column in places.values() if not column}
    heads = {row for row in outside if "head" in row or row == "embed_out"}
    rows = sorted(blocks, key=lambda row: (blocks[row], row in outside, row in heads), reverse=True)
    return Grid(tuple(rows), tuple(sorted(columns, key=lambda column: columns[column])), places)


def ranks(plan: Mapping[str, Any]) -> dict[str, float]:
    """Rank of each candidate of a round by importance, 0 (least) to 1 (most)."""
    ordered = sorted(plan.get("candidates") or (), key=lambda candidate: float(candidate.get("importance") or 0.0))
    return {str(candidate["name"]): index / max(1, len(ordered) - 1) for index, candidate in enumerate(ordered)}


def draw_tensors(plans: Sequence[Mapping[str, Any]]) -> str | None:
    """The picture as SVG, or None when no plan lists candidates."""
    grid = lay_out(plans)
    if not grid.rows:
        return None
    row_height = 26 if len(grid.rows) <= 14 else 17 if len(grid.rows) <= 44 else 11
    flat = len(grid.columns) <= FLAT_LABELS
    height = row_height * len(grid.rows)
    longest = max((len(label) for label in short_labels(grid.columns)), default=0)
    top, right = (30, RIGHT) if flat else (max(86, 12 + 4 * longest), max(2 * RIGHT, 5 * longest - 20))
    figure, axes = canvas(WIDTH, height + top + 8, LEFT, right, top, 8)
    axes.set(xlim=(0, WIDTH - LEFT - right), ylim=(height, 0), xticks=[], yticks=[])
    _label(axes, grid, row_height, flat)
    _fill(axes, grid, plans, row_height)
    return to_svg(figure, "tensors", f"trained tensors in {len(plans)} rounds, {len(grid.rows)} rows")


def _label(axes: Axes, grid: Grid, row_height: float, flat: bool) -> None:
    every = 1 if row_height > 12 else 4
    for index, row in enumerate(grid.rows):
        number = row.rpartition(" ")[2]
        if number.isdigit() and int(number) % every and len(grid.rows) > 1:
            continue
        text, colour = (f"layer {row}" if row == number else row, MUTED) if number.isdigit() else (row, INK)
        axes.text(-10, (index + 0.5) * row_height, text, ha="right", va="center_baseline", color=colour, fontsize=11)
    width = axes.get_xlim()[1] / max(1, len(grid.columns))
    for index, label in enumerate(short_labels(grid.columns)):
        centre = (index + 0.5) * width - COLUMN_GAP / 2
        axes.text(
            centre, -8, label, ha="center" if flat else "left", va="bottom", rotation=0 if flat else 32,
            rotation_mode="anchor", color=INK, fontsize=11,
        )  # fmt: skip


def _fill(axes: Axes, grid: Grid, plans: Sequence[Mapping[str, Any]], row_height: float) -> None:
    """Draw every stripe; those of one shade form one path, which keeps 80 layers small."""
    full_width = axes.get_xlim()[1]
    width = full_width / max(1, len(grid.columns))
    index_of_row = {row: index for index, row in enumerate(grid.rows)}
    index_of_column = {column: index for index, column in enumerate(grid.columns)}
    outlines: dict[tuple[bool, int], list[Outline]] = {}
    for stripe, plan in enumerate(plans):
        rank, shared = ranks(plan), _shared(plan, grid)
        for (row, column), members in shared.items():
            left = index_of_column[column] * width if column else 0.0
            cell = (width if column else full_width) - COLUMN_GAP
            for part, candidate in enumerate(members):
                each = cell / len(plans) / len(members)
                gap = 1.5 if each > 6 else 0.3
                start = left + cell * stripe / len(plans) + part * each
                shade = min(SHADES - 1, int(rank[str(candidate["name"])] * SHADES))
                above = index_of_row[row] * row_height
                box = _box(start, above + row_height * 0.07, each - gap, row_height * 0.86)
                outlines.setdefault((bool(candidate.get("selected")), shade), []).append(box)
    for (trained, shade), boxes in sorted(outlines.items()):
        alpha = 0.36 + 0.64 * shade / (SHADES - 1) if trained else 0.07 + 0.17 * shade / (SHADES - 1)
        outline = Outline.make_compound_path(*boxes)
        axes.add_patch(PathPatch(outline, facecolor=ACCENT if trained else MUTED, edgecolor="none", alpha=alpha))


def _shared(plan: Mapping[str, Any], grid: Grid) -> dict[Place, list[Candidate]]:
    """The candidates of a round by cell; the experts of a mixture share one."""
    cells: dict[Place, list[Candidate]] = {}
    for candidate in plan.get("candidates") or ():
        cells.setdefault(grid.places[str(candidate["name"])], []).append(candidate)
    return cells


def _box(left: float, top: float, width: float, height: float) -> Outline:
    corners = [(left, top), (left + width, top), (left + width, top + height), (left, top + height), (left, top)]
    return Outline(corners, [Outline.MOVETO, Outline.LINETO, Outline.LINETO, Outline.LINETO, Outline.CLOSEPOLY])
