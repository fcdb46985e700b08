"""The table of a comparison: means over seeds, and how far they spread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from edgegt.disk import write_text
from edgegt.units import MIB

Result = Mapping[str, Any]


def grouped(results: Sequence[Result]) -> dict[tuple[str, float | None], list[Result]]:
    """The results of all seeds, by strategy and rho."""
    found: dict[tuple[str, float | None], list[Result]] = {}
    for one in results:
        found.setdefault((one["strategy"], one["rho"]), []).append(one)
    return found


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and the standard deviation over seeds (of a sample; 0 of one)."""
    return fmean(values), stdev(values) if len(values) > 1 else 0.0


def metric_names(results: Sequence[Result]) -> list[str]:
    """The task's scores that are numbers, in the order in which they come."""
    return list(dict.fromkeys(
        name for one in results for name, value in one["metrics"].items() if isinstance(value, (int, float))
    ))  # fmt: skip


def table_of(results: Sequence[Result]) -> str:
    """A Markdown table: one row per strategy and rho, mean ± standard deviation where there are several seeds.

    FLOPs are shares of what full fine-tuning spends with the same seed.
    """
    scores = metric_names(results)
    heads = ["strategy", "rho", "lr", "steps", "FLOPs of full", "seconds", "peak, MiB", "held-out loss", *scores]
    rows = []
    for (strategy, rho), seeds in grouped(results).items():
        rows.append([
            strategy, "" if rho is None else f"{rho:g}", f"{seeds[0]['lr']:.2e}",
            f"{fmean(one['steps'] for one in seeds):.0f}",
            _cell([one["flops"] / one["budget_flops"] for one in seeds], 3),
            _cell([one["seconds"] for one in seeds], 1),
            _cell([one["peak_bytes"] / MIB for one in seeds], 0), _cell([one["loss"] for one in seeds], 4),
            *(_cell([one["metrics"][name] for one in seeds if name in one["metrics"]], 2) for name in scores),
        ])  # fmt: skip
    widths = [max(len(row[place]) for row in [heads, *rows]) for place in range(len(heads))]
    lines = [_row(heads, widths), "| " + " | ".join(_rule(place, width) for place, width in enumerate(widths)) + " |"]
    return "\n".join([*lines, *(_row(row, widths) for row in rows)])


def write_table(path: Path, text: str) -> None:
    """Write it, whole or not at all. Raises: DiskError."""
    write_text(path, text + "\n")


def _cell(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    mean, spread = mean_and_spread(values)
    return f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if len(values) > 1 else "")


def _rule(place: int, width: int) -> str:
    return "-" * width if place == 0 else "-" * (width - 1) + ":"


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = zip(cells, widths, strict=True)
    padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
    return "| " + " | ".join(padded) + " |"
