"""The chart of a comparison: held-out loss and the task's first score against FLOPs, seconds and peak memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex as hex_of
from matplotlib.figure import Figure

from edgegt.comparison.table import Result, grouped, mean_and_spread, metric_names
from edgegt.report.charts import ACCENT, INK, LIGHT, LINE, MUTED, save_png
from edgegt.units import MIB

Value = Callable[[Result], float]
COSTS: dict[str, Value] = {
    "FLOPs of training, TFLOP": lambda one: one["flops"] / 1e12,
    "seconds of training": lambda one: one["seconds"],
    "peak memory of the process, MiB": lambda one: one["peak_bytes"] / MIB,
}
WIDTH, HEIGHT = 1080, 330
OURS = "edgegt"
MARKERS = "osv^<>pPX*hd"
COLOURS = tuple(hex_of(colour) for colour in colormaps["tab10"](range(10)))


def write_chart(results: Sequence[Result], path: Path) -> Path:
    """Write the chart as a PNG, whole or not at all; returns the path. Raises: EdgegtError when it cannot be."""
    goods: dict[str, Value] = {"held-out loss": lambda one: one["loss"]}
    for name in metric_names(results)[:1]:
        if all(name in one["metrics"] for one in results):
            goods[name] = partial(_score, name=name)
    figure = Figure(figsize=(WIDTH / 72, HEIGHT * len(goods) / 72), layout="constrained")
    panels = figure.subplots(len(goods), len(COSTS), squeeze=False)
    for row, (good, height) in enumerate(goods.items()):
        for place, (cost, width) in enumerate(COSTS.items()):
            axes: Axes = panels[row][place]
            _draw(axes, results, width, height)
            axes.set_xlabel(cost, color=LIGHT[MUTED])
            if place == 0:
                axes.set_ylabel(good, color=LIGHT[MUTED])
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, labelcolor=LIGHT[INK])
    return save_png(figure, path)


def _score(one: Result, name: str) -> float:
    return float(one["metrics"][name])


def _draw(axes: Axes, results: Sequence[Result], width: Value, height: Value) -> None:
    """Per strategy a line over its rhos, at the means over seeds, with bars of one standard deviation."""
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0, colors=LIGHT[MUTED])
    axes.grid(color=LIGHT[LINE], linewidth=1)
    axes.set_axisbelow(True)
    lines: dict[str, list[list[Result]]] = {}
    for (strategy, _), seeds in grouped(results).items():
        lines.setdefault(strategy, []).append(seeds)
    for index, (strategy, points) in enumerate(lines.items()):
        ours = strategy == OURS
        (x, wide), (y, high) = (
            zip(*(mean_and_spread([value(one) for one in seeds]) for seeds in points), strict=True)
            for value in (width, height)
        )
        axes.errorbar(
            x, y, xerr=wide, yerr=high, marker="D" if ours else MARKERS[index % len(MARKERS)], markersize=8,
            label=strategy, color=LIGHT[ACCENT] if ours else COLOURS[index % len(COLOURS)], linewidth=1.2,
            elinewidth=1.2, alpha=0.85, zorder=4 if ours else 3,
        )  # fmt: skip
    axes.margins(0.12)
