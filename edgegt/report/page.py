"""The one page a user opens, rendered from page.html.j2.

The template only places things: what they say is decided in `words`, what they look like in `charts` and `grid`,
both from the same tree as report.json, so that page and contract cannot disagree.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from edgegt.frontier import Frontier
from edgegt.report import charts, words
from edgegt.report.charts import Bar
from edgegt.report.events import PAUSES, TURNS, event_rows, marked_steps, stopping_text
from edgegt.report.facts import RunFacts, number
from edgegt.report.frontier import frontier_svg
from edgegt.report.grid import draw_tensors
from edgegt.units import format_bytes

Tree = Mapping[str, Any]


def render(facts: RunFacts, report: Tree, frontier: Frontier | None = None) -> str:
    """The page as text; `report` is what `build_report` returned, `frontier` the run's where it is known."""
    source = resources.files("edgegt.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    model, device = report["model"].get("name", "model"), words.device_title(report["device"])
    return environment.from_string(source).render(
        title=f"{model} on {device}",
        facts=facts,
        report=report,
        frontier=None if frontier is None else Markup(frontier_svg(frontier)),
        frontier_notes=[] if frontier is None else words.frontier_notes(frontier),
        **_texts(facts, report),
        **_pictures(facts, report),
    )


def _texts(facts: RunFacts, report: Tree) -> dict[str, Any]:
    return {
        "verdict": words.verdict(facts, report),
        "unfinished": None if facts.finished else words.unfinished_text(facts),
        "subtitle": words.subtitle_rows(facts, report),
        "asked": words.asked_rows(facts),
        "flops_rows": words.flops_rows(report),
        "kept": words.kept_words(report),
        "memory_rows": words.memory_rows(report),
        "terms": words.term_rows(_terms(report), number(report["predicted"], "peak_bytes"), report["measured_terms"]),
        "memory_lead": words.memory_lead(report["memory_terms"]),
        "rounds": words.round_rows(facts.plans),
        "costs": words.cost_rows(facts, report),
        "cost_notes": words.cost_notes(facts),
        "times": words.time_rows(report),
        "heat_lead": words.heat_lead(facts, report),
        "happened": event_rows(facts.events),
        "turns": bool(marked_steps(facts.events, TURNS, facts.last_step)),
        "pauses": bool(marked_steps(facts.events, PAUSES, facts.last_step)),
        "data": words.data_rows(report["data"]),
        "held_out": words.held_out_rows(facts),
        "stopping": stopping_text(report["early_stopping"]),
        "measured": charts.has(facts, charts.HELD_OUT),
        "examples": words.example_rows(facts),
        "hidden": facts.options.get("examples") is False,
    }


def _terms(report: Tree) -> dict[str, int]:
    """The terms of the predicted peak that are not nothing."""
    return {name: value for name, value in report["memory_terms"].items() if value}


def _pictures(facts: RunFacts, report: Tree) -> dict[str, Markup | None]:
    terms, limit = _terms(report), number(report["budget"], "memory_bytes")
    drawings = {
        "flops_bars": _flops_bars(report),
        "memory_bars": _memory_bars(report),
        "memory_bar": charts.memory_bar(terms, limit) if terms else None,
        "tensors": draw_tensors(facts.plans),
        "loss": charts.loss_chart(facts),
        "memory": charts.memory_chart(facts),
        "temperature": charts.temperature_chart(facts, wide=not charts.has(facts, "power_w")),
        "power": charts.power_chart(facts, wide=not charts.has(facts, "temperature_c")),
    }
    return {name: None if drawing is None else Markup(drawing) for name, drawing in drawings.items()}


def _flops_bars(report: Tree) -> str | None:
    """Predicted and measured FLOPs as shares of full fine-tuning; the importance probe is the pale part."""
    rho, full = number(report["budget"], "rho"), number(report, "full_flops")
    bars = []
    for label, tree in (("predicted", report["predicted"]), ("measured", report["measured"])):
        ratio, probe = number(tree, "flops_ratio"), number(tree, "probe_flops")
        if ratio is not None:
            pale = probe / full if probe is not None and full else 0.0
            bars.append(Bar(label, ratio, words.percent(ratio), pale, _colour(label)))
    if rho is None or not bars:
        return None
    upto = max(1.0, *(bar.value * 1.05 for bar in bars))
    return charts.budget_chart("flops", bars, rho, words.percent(rho), upto, lambda value: f"{100 * value:g} %")


def _memory_bars(report: Tree) -> str | None:
    """Predicted and measured peak bytes; the runtime floor is the pale part."""
    limit = number(report["budget"], "memory_bytes")
    bars = []
    for label, tree in (("predicted", report["predicted"]), ("measured", report["measured"])):
        peak, floor = number(tree, "peak_bytes"), number(tree, "floor_bytes")
        if peak is not None:
            bars.append(Bar(label, peak, format_bytes(peak), floor or 0.0, _colour(label)))
    if limit is None or not bars:
        return None
    largest = max(limit, *(bar.value for bar in bars))
    unit, name = charts.scale(largest)
    scaled = [Bar(bar.label, bar.value / unit, bar.text, bar.pale / unit, bar.colour) for bar in bars]
    tick = f"{{:g}} {name}".format
    return charts.budget_chart("peak", scaled, limit / unit, format_bytes(limit), largest / unit * 1.04, tick)


def _colour(label: str) -> str:
    return charts.PREDICTED if label == "predicted" else charts.ACCENT
