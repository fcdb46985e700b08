"""The picture of a frontier: importance against rho, one line per memory budget, the chosen plan marked.

One drawing for both the page (colours are the page's) and a PNG file (colours are the page's light ones).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from edgegt.errors import InputError
from edgegt.frontier import Frontier, Point
from edgegt.report.charts import ACCENT, BUDGET, INK, LIGHT, LINE, MUTED, PALE, canvas, save_png, to_svg
from edgegt.units import format_bytes

PAGE = {token: token for token in LIGHT}
NO_PLAN = "× nothing can be trained"
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 1000, 400, 66, 132, 34, 50
LABEL_GAP = 0.062


def frontier_svg(frontier: Frontier) -> str:
    """The frontier as an `<svg>` element of the page."""
    figure, axes = canvas(WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM)
    _draw(axes, frontier, PAGE)
    return to_svg(figure, "frontier", "importance of the trained tensors against FLOPs, by memory budget")


def write_png(frontier: Frontier, path: Path, title: str) -> Path:
    """Write the frontier as a PNG of 2000 pixels' width, whole or not at all; returns the path.

    Raises: InputError when the folder does not exist; EdgegtError when the file cannot be written.
    """
    check_png(path)
    figure, axes = canvas(WIDTH, HEIGHT + 40, LEFT, RIGHT, TOP + 40, BOTTOM)
    _draw(axes, frontier, LIGHT)
    figure.text(LEFT / WIDTH, 1 - 14 / (HEIGHT + 40), title, color=LIGHT[INK], fontsize=14, va="top", parse_math=False)
    return save_png(figure, path)


def check_png(path: Path) -> None:
    """Raises: InputError when no picture can be written there: another ending than .png, or no such folder."""
    if path.suffix.lower() != ".png":
        raise InputError(f"--frontier '{path}' is no PNG file: give a name that ends in .png")
    if path.is_dir():
        raise InputError(f"--frontier '{path}' is a folder: give the name of a file in it")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--frontier '{path}': the folder '{path.parent}' does not exist: make it first")


def _draw(axes: Axes, frontier: Frontier, colour: Mapping[str, str]) -> None:
    rhos = frontier.rhos
    shares = [point.share for row in frontier.points for point in row if point is not None]
    top = 1.06 * max([*shares, frontier.chosen.share if frontier.chosen else 0.0, 0.01])
    axes.tick_params(colors=colour[MUTED])
    axes.grid(axis="y", color=colour[LINE], linewidth=1)
    axes.set_xlabel("rho: FLOPs of the run as a share of full fine-tuning", color=colour[MUTED], labelpad=7)
    axes.set_ylabel("share of all importance", color=colour[MUTED], labelpad=7)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
    room = 0.02 * max(rhos[-1] - rhos[0], 0.01)
    upto = max(rhos[-1], frontier.rho if frontier.chosen else 0.0)
    axes.set(xlim=(min(rhos[0], frontier.rho if frontier.chosen else rhos[0]) - room, upto + room), ylim=(0, top))
    for index, row in enumerate(frontier.points):
        strength = 0.35 + 0.65 * (index + 1) / len(frontier.points)
        own = frontier.memories[index] == frontier.memory_bytes
        there = [(rho, point.share) for rho, point in zip(rhos, row, strict=True) if point is not None]
        if there:
            axes.plot(
                *zip(*there, strict=True), color=colour[ACCENT], alpha=strength, linewidth=3.4 if own else 1.8,
                marker="o", markersize=6 if own else 4, solid_capstyle="round", clip_on=False, zorder=4 if own else 3,
            )  # fmt: skip
        missing = [rho for rho, point in zip(rhos, row, strict=True) if point is None]
        axes.plot(
            missing, [0.0] * len(missing), linestyle="", marker="x", markersize=7, color=colour[MUTED], clip_on=False,
            zorder=5,
        )  # fmt: skip
    _names(axes, frontier, colour, top)
    if frontier.chosen is not None:
        _mark(axes, frontier.chosen, frontier, colour)
    if any(point is None for row in frontier.points for point in row):
        axes.annotate(
            NO_PLAN, (0, 1), xycoords="axes fraction", xytext=(2, 9), textcoords="offset points", color=colour[MUTED]
        )


def _mark(axes: Axes, chosen: Point, frontier: Frontier, colour: Mapping[str, str]) -> None:
    """The chosen plan, under the rho that it was given."""
    axes.axvline(frontier.rho, color=colour[BUDGET], linewidth=2, zorder=2)
    axes.annotate(
        f"rho {100 * frontier.rho:.3g} %", (frontier.rho, 1), xycoords=axes.get_xaxis_transform(), xytext=(0, 9),
        textcoords="offset points", ha="center", color=colour[BUDGET],
    )  # fmt: skip
    axes.plot(
        [frontier.rho], [chosen.share], marker="D", markersize=10, color=colour[INK], zorder=6, clip_on=False,
        markeredgecolor=colour[PALE], markeredgewidth=1.5,
    )  # fmt: skip
    left = frontier.rho > (axes.get_xlim()[0] + axes.get_xlim()[1]) / 2
    axes.annotate(
        f"this plan: {100 * chosen.share:.3g} %, {format_bytes(chosen.peak_bytes)}", (frontier.rho, chosen.share),
        xytext=(-12 if left else 12, -16), textcoords="offset points", ha="right" if left else "left", zorder=7,
        color=colour[INK],
    )  # fmt: skip


def _names(axes: Axes, frontier: Frontier, colour: Mapping[str, str], top: float) -> None:
    """Each line's memory budget at its right end, moved apart where lines meet."""
    ends = [next((point.share for point in reversed(row) if point is not None), 0.0) for row in frontier.points]
    for end, height, size in zip(ends, _apart(ends, LABEL_GAP * top), frontier.memories, strict=True):
        own = size == frontier.memory_bytes
        axes.annotate(
            format_bytes(size) + (" (budget)" if own else ""), (frontier.rhos[-1], end),
            xytext=(1.015, height / top), textcoords="axes fraction", va="center", annotation_clip=False,
            color=colour[INK if own else MUTED],
        )  # fmt: skip


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """The heights in their order, each pushed below the one above it until they are `gap` apart."""
    placed, above = list(heights), float("inf")
    for index in sorted(range(len(heights)), key=lambda index: (-heights[index], -index)):
        placed[index] = above = min(placed[index], above - gap)
    return placed
