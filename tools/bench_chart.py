"""The chart of the benchmark: seconds of a step and peak memory of every method, one line of panels per shape.

Colours are of a middle brightness on no background, so that the picture can be read on a light and on a dark page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TEXT, PEER, OURS = "#777d86", "#9aa2ad", "#2f81f7"
OURS_PREFIX = "edgegt"
WIDTH, BAR_HEIGHT, AROUND = 10.0, 0.30, 0.85
ROOM = 1.22
PANELS: tuple[tuple[str, str, float, Callable[[float], str]], ...] = (
    ("step_s", "seconds per step", 1.0, lambda value: f"{value:.2f}"),
    ("peak_bytes", "peak memory, GiB", 2.0**30, lambda value: f"{value:.2f}"),
)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the chart as SVG or PNG, by the file's name. Raises: ValueError when no method ran."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    ran = [row for row in rows if row.get("step_s") is not None]
    shapes = list(dict.fromkeys(row["shape"] for row in ran))
    if not shapes:
        raise ValueError(f"{path}: there is nothing to draw, because no method ran")
    most = max(sum(row["shape"] == shape for row in ran) for shape in shapes)
    with rc_context({"svg.hashsalt": "bench", "font.size": 10, "text.color": TEXT}):
        figure = Figure(figsize=(WIDTH, len(shapes) * (most * BAR_HEIGHT + AROUND)), layout="constrained")
        grid = figure.subplots(len(shapes), len(PANELS), squeeze=False)
        for line, shape in zip(grid, shapes, strict=True):
            mine = [row for row in ran if row["shape"] == shape]
            for axes, panel in zip(line, PANELS, strict=True):
                _panel(axes, mine, shape, panel, first=axes is line[0])
        figure.savefig(path, transparent=True, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)


def _panel(
    axes: Any, rows: Sequence[dict[str, Any]], shape: str, panel: tuple[str, str, float, Callable[[float], str]],
    first: bool,
) -> None:  # fmt: skip
    """One bar per method, the first on top, with its number behind it. first: whether it names the methods."""
    key, title, unit, text = panel
    values = [row[key] / unit for row in rows]
    colours = [OURS if row["name"].startswith(OURS_PREFIX) else PEER for row in rows]
    bars = axes.barh(range(len(rows)), values, color=colours, height=0.72)
    for label, row in zip(axes.bar_label(bars, [text(value) for value in values], padding=4), rows, strict=True):
        label.set_color(OURS if row["name"].startswith(OURS_PREFIX) else TEXT)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows] if first else [""] * len(rows))
    for label, colour in zip(axes.get_yticklabels(), colours, strict=True):
        label.set_color(OURS if colour == OURS else TEXT)
    axes.invert_yaxis()
    axes.set_xlim(0, ROOM * max(values))
    axes.set_title(f"{shape}: {title}", loc="left", color=TEXT, fontsize=10)
    axes.tick_params(length=0)
    axes.xaxis.set_visible(False)
    for side in axes.spines.values():
        side.set_visible(False)
