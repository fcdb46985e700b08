"""The chart of a comparison: held-out loss and the task's first score against FLOPs, seconds and peak memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from edgegt.comparison.table import Result, grouped, mean_and_spread, metric_names
from edgegt.errors import EdgegtError
from edgegt.report.charts import ACCENT, INK, LINE, MUTED, PALE
from edgegt.report.frontier import LIGHT
from edgegt.units import MIB

Value = Callable[[Result], float]
COSTS: dict[str, Value] = {
    "FLOPs of training, TFLOP": lambda one: one["flops"] / 1e12,
    "seconds of training": lambda one: one["seconds"],
    "peak memory of the process, MiB": lambda one: one["peak_bytes"] / MIB,
}
WIDTH, HEIGHT = 1080, 330
OURS = "edgegt"


def write_chart(results: Sequence[Result], path: Path) -> Path:
    """Write the chart as a PNG, whole or not at all; returns the path. Raises: EdgegtError when it cannot be written."""
    goods: dict[str, Value] = {"held-out loss": lambda one: one["loss"]}
    for name in metric_names(results)[:1]:
        if all(name in one["metrics"] for one in results):
            goods[name] = lambda one, name=name: one["metrics"][name]  # type: ignore[misc]
    figure = Figure(figsize=(WIDTH / 72, HEIGHT * len(goods) / 72), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(goods), len(COSTS), squeeze=False)
    for row, (good, height) in enumerate(goods.items()):
        for place, (cost, width) in enumerate(COSTS.items()):
            axes: Axes = panels[row][place]
            _draw(axes, results, width, height)
            axes.set_xlabel(cost, color=LIGHT[MUTED])
            if place == 0:
                axes.set_ylabel(good, color=LIGHT[MUTED])
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, format="png", dpi=144, facecolor=LIGHT[PALE])
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise EdgegtError(f"cannot write '{path}': {error.strerror}; free space or make the folder writable") from error
    return path


def _draw(axes: Axes, results: Sequence[Result], width: Value, height: Value) -> None:
    """One point per strategy and rho at the means over seeds, with bars of one standard deviation."""
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0, colors=LIGHT[MUTED])
    axes.grid(color=LIGHT[LINE], linewidth=1)
    axes.set_axisbelow(True)
    for (strategy, rho), seeds in grouped(results).items():
        (x, wide), (y, high) = (mean_and_spread([value(one) for one in seeds]) for value in (width, height))
        colour = LIGHT[ACCENT if strategy == OURS else INK]
        axes.errorbar(
            x, y, xerr=wide, yerr=high, marker="D" if strategy == OURS else "o", markersize=7, color=colour,
            elinewidth=1.2, zorder=4 if strategy == OURS else 3,
        )  # fmt: skip
        name = strategy if rho is None else f"{strategy} {rho:g}"
        axes.annotate(name, (x, y), xytext=(6, 5), textcoords="offset points", color=colour, fontsize=9)
    axes.margins(0.16)
