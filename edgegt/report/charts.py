"""Pictures of a run as inline SVG: drawn by matplotlib, coloured by the page. Other pictures are PNG files.

matplotlib cannot know whether the reader's screen is light or dark. So every colour is drawn as a token (a colour
that nobody uses) and replaced by a CSS variable of the page; text stays text in the page's own font. Namespaces and
metadata are dropped, since inline SVG needs neither and the page must name no address.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, MaxNLocator

from edgegt.errors import EdgegtError
from edgegt.report.events import PAUSES, TURNS, marked_steps
from edgegt.report.facts import RunFacts, number
from edgegt.units import GIB, MIB, format_bytes

INK, MUTED, LINE, ACCENT, PREDICTED, BUDGET, PALE = (f"#{i:02x}{i:02x}01" for i in range(1, 8))
# The page's colours on a light screen, for PNG files.
LIGHT = {INK: "#1b1f23", MUTED: "#667079", LINE: "#e5e6e2", ACCENT: "#13795b", BUDGET: "#c2410c", PALE: "#ffffff"}
TERM_COLOURS = tuple(f"#07{i:02x}02" for i in range(14))
_VARIABLES = {
    **{INK: "ink", MUTED: "muted", LINE: "line", ACCENT: "accent", PREDICTED: "guess", BUDGET: "limit", PALE: "paper"},
    **{colour: f"term-{i}" for i, colour in enumerate(TERM_COLOURS)},
}
MAX_POINTS = 500
HELD_OUT = "held_out_loss"
_SETTINGS = {"svg.fonttype": "none", "font.size": 11.5, "font.family": "DejaVu Sans"}


@dataclass(frozen=True)
class Bar:
    """One horizontal bar: its length, the same as text, and how much of it is drawn pale (no plan can change it)."""

    label: str
    value: float
    text: str
    pale: float = 0.0
    colour: str = ACCENT


def canvas(width: int, height: int, left: int, right: int, top: int, bottom: int) -> tuple[Figure, Axes]:
    """A figure of `width` x `height` CSS pixels with margins in pixels, without frame."""
    figure = Figure(figsize=(width / 72, height / 72))
    FigureCanvasSVG(figure)
    axes = figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    )
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(length=0, pad=6, colors=MUTED)
    axes.set_axisbelow(True)
    return figure, axes


def to_svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an `<svg>` element in the page's colours and font; `name` keeps its ids apart from others'."""
    buffer = io.BytesIO()
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    with matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True)
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith("metadata"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {key.rpartition("}")[2]: _themed(value, name) for key, value in element.attrib.items()}
        if "id" in element.attrib:
            element.attrib["id"] = f"{name}-{element.attrib['id']}"
        if element.text and element.tag == "style":
            element.text = _themed(element.text, name)
    size = root.attrib["viewBox"].split()
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label, "class": f"chart {name}"}
    root.attrib["style"] = f"aspect-ratio: {size[2]} / {size[3]}"
    return ElementTree.tostring(root, encoding="unicode")


def save_png(figure: Figure, path: Path) -> Path:
    """Write the figure as a PNG, whole or not at all; returns the path. Raises: EdgegtError when it cannot be."""
    FigureCanvasAgg(figure)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, format="png", dpi=144, facecolor=LIGHT[PALE])
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise EdgegtError(f"cannot write '{path}': {error.strerror}; free space or make the folder writable") from error
    return path


def _themed(value: str, name: str) -> str:
    """An attribute with CSS variables for colour tokens, ids of its own, and the page's font."""
    value = re.sub(r"#0[0-9a-f]{5}", lambda match: f"var(--{_VARIABLES.get(match[0], 'ink')})", value)
    value = re.sub(r"font: ([\d.]+)px [^;]+", r"font-size: \1px", value)
    value = re.sub(r"font-family: [^;]+(; *|$)", "", value)
    return re.sub(r"(url\(|^)#(?=[A-Za-z])", rf"\1#{name}-", value)


def thin(values: Sequence[float], pick: Callable[[Sequence[float]], float], most: int = MAX_POINTS) -> list[float]:
    """At most `most` values, each `pick` of as many neighbours."""
    width = -(-len(values) // most) or 1
    return [pick(values[start : start + width]) for start in range(0, len(values), width)]


def smooth(values: Iterable[float], weight: float) -> list[float]:
    """Exponential moving average without the bias of its start."""
    smoothed, mean, mass = [], 0.0, 0.0
    for value in values:
        mean, mass = weight * mean + (1 - weight) * value, weight * mass + (1 - weight)
        smoothed.append(mean / mass)
    return smoothed


def budget_chart(
    name: str, bars: Sequence[Bar], limit: float, limit_text: str, upto: float, tick: Callable[[float], str]
) -> str:
    """Bars for predicted and measured use from 0 to `upto`, and the budget as a line; `tick` writes an axis value."""
    figure, axes = canvas(500, 62 + 40 * len(bars), 92, 26, 28, 30)
    for row, bar in enumerate(bars):
        axes.barh(row, bar.value, height=0.6, color=bar.colour)
        if bar.pale:
            axes.barh(row, bar.pale, height=0.6, color=PALE, alpha=0.45)
        beside = axes.get_yaxis_transform()
        axes.text(-0.025, row - 0.03, bar.label, transform=beside, ha="right", va="bottom", color=MUTED)
        axes.text(-0.025, row + 0.03, bar.text, transform=beside, ha="right", va="top", color=INK)
    axes.set(xlim=(0, upto), ylim=(len(bars) - 0.5, -0.5), yticks=[])
    _limit_line(axes, limit, f"budget {limit_text}", "right" if limit > 0.8 * upto else "center")
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value) if value else "0"))
    axes.grid(axis="x", color=LINE, linewidth=1)
    return to_svg(figure, name, f"{limit_text} budget; " + ", ".join(f"{bar.label} {bar.text}" for bar in bars))


def _limit_line(axes: Axes, limit: float, text: str, side: Literal["right", "center"]) -> None:
    """A budget: an upright line that stands out of the bars, with its value on top."""
    axes.axvline(limit, color=BUDGET, linewidth=2, ymin=-0.03, ymax=1.06, clip_on=False)
    axes.annotate(
        text, (limit, 1), xycoords=axes.get_xaxis_transform(), xytext=(0, 9), textcoords="offset points",
        ha=side, color=BUDGET,
    )  # fmt: skip


def memory_bar(terms: Mapping[str, int], budget: float | None) -> str:
    """One stacked bar of the named terms of training, with the budget as a line."""
    figure, axes = canvas(1000, 82, 2, 24, 26, 28)
    start = 0.0
    unit, unit_name = scale(max(sum(terms.values()), budget or 0))
    for index, value in enumerate(terms.values()):
        axes.barh(0, value / unit, left=start, height=0.9, color=TERM_COLOURS[index % len(TERM_COLOURS)])
        start += value / unit
    upto = max(start, (budget or 0) / unit) * 1.015
    axes.set(xlim=(0, upto), ylim=(-0.5, 0.5), yticks=[])
    if budget:
        _limit_line(axes, budget / unit, f"budget {format_bytes(budget)}", "right")
    axes.xaxis.set_major_locator(MaxNLocator(6, prune="both"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} {unit_name}"))
    return to_svg(figure, "memory-terms", "predicted memory of training by term")


def scale(largest: float) -> tuple[int, str]:
    """The unit in which a memory axis reads well: its bytes and its name."""
    return (GIB, "GiB") if largest >= GIB else (MIB, "MiB")


def _series(facts: RunFacts, key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one column of metrics.jsonl, without the lines that lack it."""
    pairs = [(float(line.get("step", 0)), value) for line in facts.metrics if (value := number(line, key)) is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _rounds(axes: Axes, facts: RunFacts) -> None:
    """A thin line where each round but the first begins, with its number as long as there is room."""
    for plan in facts.plans:
        first = float(plan.get("first_step", 0))
        if plan is not facts.plans[0]:
            axes.axvline(first, color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
        if len(facts.plans) <= 6:
            axes.annotate(
                f"round {plan.get('round', '')}", (first, 1), xycoords=axes.get_xaxis_transform(), xytext=(3, 4),
                textcoords="offset points", color=MUTED, fontsize=10,
            )  # fmt: skip


def _mark(axes: Axes, facts: RunFacts, kinds: Sequence[str], colour: str) -> None:
    """A small triangle on the axis at each step where something of these kinds happened."""
    steps = marked_steps(facts.events, kinds, facts.last_step)
    if steps:
        beside = axes.get_xaxis_transform()
        axes.plot(
            steps, [0.0] * len(steps), transform=beside, marker="^", markersize=7, color=colour, markeredgewidth=0,
            linestyle="none", clip_on=False, zorder=6,
        )  # fmt: skip


def _over_steps(facts: RunFacts, wide: bool = False) -> tuple[Figure, Axes]:
    figure, axes = canvas(1000 if wide else 500, 240 if wide else 290, 62, 14, 24, 46)
    axes.grid(axis="y", color=LINE, linewidth=1)
    axes.set_xlabel("optimizer step", color=MUTED, labelpad=6)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlim(-0.02 * facts.last_step, 1.03 * facts.last_step)
    _rounds(axes, facts)
    return figure, axes


def loss_chart(facts: RunFacts) -> str | None:
    """Training loss, raw and smoothed, with the held-out loss before, after, and after epochs; None without metrics."""
    steps, losses = _series(facts, "loss")
    if not steps:
        return None
    figure, axes = _over_steps(facts)
    axes.plot(thin(steps, _mean), thin(losses, _mean), color=ACCENT, alpha=0.35, linewidth=1)
    smoothed = smooth(losses, 1 - 1 / max(2.0, min(25.0, len(losses) / 12)))
    axes.plot(thin(steps, _mean), thin(smoothed, _mean), color=ACCENT, linewidth=2.2)
    measured, between = _series(facts, HELD_OUT)
    axes.plot(measured, between, color=INK, linewidth=1.2, marker="D", markersize=4, zorder=4)
    for at, found in ((0.0, facts.before), (steps[-1], facts.after)):
        held_out = number(found or {}, "loss")
        if held_out is None:
            continue
        axes.axhline(held_out, color=INK, linewidth=1, alpha=0.35, linestyle=(0, (5, 4)))
        axes.plot([at], [held_out], marker="D", markersize=7, color=INK, clip_on=False, zorder=5)
        axes.annotate(
            f"{held_out:.2f}", (at, held_out), xytext=(9 if at == 0 else -2, -5 if at == 0 else 8), color=INK,
            va="top" if at == 0 else "bottom", textcoords="offset points", ha="left" if at == 0 else "right",
        )  # fmt: skip
    unit = "row" if "accuracy" in (facts.before or {}) else "token"
    axes.set_ylabel(f"loss (nats per {unit})", color=MUTED, labelpad=6)
    _mark(axes, facts, TURNS, INK)
    if not has(facts, "temperature_c"):
        _mark(axes, facts, PAUSES, BUDGET)
    more = ", and after epochs" if measured else ""
    return to_svg(figure, "loss", f"training loss by step, held-out loss before and after{more}")


def memory_chart(facts: RunFacts) -> str | None:
    """Resident bytes and their peak by step against prediction and budget; None without metrics."""
    steps, resident = _series(facts, "bytes")
    peak_steps, peaks = _series(facts, "peak_bytes")
    if not steps and not peak_steps:
        return None
    figure, axes = _over_steps(facts)
    budget, predicted = number(facts.part("budget"), "memory_bytes"), number(facts.part("predicted"), "peak_bytes")
    top = max([*resident, *peaks, budget or 0, predicted or 0])
    unit, unit_name = scale(top)
    axes.plot(thin(steps, _mean), [value / unit for value in thin(resident, max)], color=ACCENT, alpha=0.5, linewidth=1)
    axes.plot(thin(peak_steps, _mean), [value / unit for value in thin(peaks, max)], color=ACCENT, linewidth=2.2)
    if predicted is not None:
        axes.axhline(predicted / unit, color=PREDICTED, linewidth=2, linestyle=(0, (5, 3)))
    if budget is not None:
        axes.axhline(budget / unit, color=BUDGET, linewidth=2)
    axes.set_ylim(0, top / unit * 1.06)
    axes.set_ylabel(f"memory ({unit_name})", color=MUTED, labelpad=6)
    return to_svg(figure, "memory", "memory by step against the budget")


def has(facts: RunFacts, key: str) -> bool:
    """Whether metrics.jsonl has any number of this column."""
    return any(number(line, key) is not None for line in facts.metrics)


def temperature_chart(facts: RunFacts, wide: bool) -> str | None:
    """Degrees by step against the ceiling, the hottest of neighbours, with a mark at each pause; None without any."""
    steps, found = _series(facts, "temperature_c")
    if not steps:
        return None
    figure, axes = _over_steps(facts, wide)
    axes.plot(thin(steps, _mean), thin(found, max), color=ACCENT, linewidth=2.2, **_dot(steps))
    lowest, highest = min(found), max([*found, facts.ceiling_c or 0.0])
    if facts.ceiling_c is not None:
        axes.axhline(facts.ceiling_c, color=BUDGET, linewidth=2)
    axes.set_ylim(lowest - max(2.0, 0.1 * (highest - lowest)), highest + max(1.0, 0.06 * (highest - lowest)))
    axes.set_ylabel("temperature (°C)", color=MUTED, labelpad=6)
    _mark(axes, facts, PAUSES, BUDGET)
    return to_svg(figure, "temperature" + "-wide" * wide, "temperature by step against the ceiling")


def power_chart(facts: RunFacts, wide: bool) -> str | None:
    """Watts by step, raw and smoothed, from 0; None without any."""
    steps, found = _series(facts, "power_w")
    if not steps:
        return None
    figure, axes = _over_steps(facts, wide)
    axes.plot(thin(steps, _mean), thin(found, _mean), color=ACCENT, alpha=0.35, linewidth=1)
    smoothed = smooth(found, 1 - 1 / max(2.0, min(25.0, len(found) / 12)))
    axes.plot(thin(steps, _mean), thin(smoothed, _mean), color=ACCENT, linewidth=2.2, **_dot(steps))
    axes.set_ylim(0, max(1.0, 1.08 * max(found)))
    axes.set_ylabel("power (W)", color=MUTED, labelpad=6)
    return to_svg(figure, "power" + "-wide" * wide, "power by step")


def _dot(steps: Sequence[float]) -> dict[str, Any]:
    """A line through a single point would not be seen."""
    return {"marker": "o", "markersize": 5} if len(steps) == 1 else {}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
