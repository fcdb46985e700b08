"""What happened during a run besides training: rests for heat, waits for mains, steps back, resumes.

events.jsonl has one JSON object per line. It is optional and its lines come from a run that may have been killed, so a
line that is not an event is left out. A kind that happened often is one row, or the list would bury what is rare.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from edgegt.report.facts import number
from edgegt.units import format_duration

Tree = Mapping[str, Any]
Row = tuple[str, str, str]

PAUSES = ("heat", "battery", "mains")
TURNS = ("rollback", "nan", "memory", "resume")
MOST_OF_A_KIND = 4
MOST_ROWS = 30


def event_rows(events: Sequence[Tree]) -> list[Row]:
    """Step, what happened, and how long it paused the run; in the order of the first of each."""
    by_kind: dict[str, list[Tree]] = {}
    for event in events:
        by_kind.setdefault(event["kind"], []).append(event)
    rows = []
    for event in events:
        alike = by_kind[event["kind"]]
        if len(alike) <= MOST_OF_A_KIND:
            rows.append((_steps([event]), event["text"], _pause([event])))
        elif event is alike[0]:
            rows.append((_steps(alike), f"{len(alike)} × {event['kind']}, first: {event['text']}", _pause(alike)))
    left = len(rows) - MOST_ROWS
    return rows if left <= 0 else [*rows[:MOST_ROWS], ("", f"and {left} more, in events.jsonl", "")]


def stopping_text(found: Tree | None) -> str | None:
    """What early stopping measured, whether that is what is reported, and which epoch was kept; None without it."""
    if not found or not found.get("losses"):
        return None
    rows, best, loss = (number(found, key) for key in ("rows", "best_epoch", "best_loss"))
    if rows is None or best is None or loss is None:
        return None
    same = "which the loss after training is reported on too: chosen by them, it flatters a little"
    parts = [f"After each epoch the loss was measured on {rows:.0f} held-out rows, "]
    parts.append(same if found.get("overlaps") else "which the numbers here do not report on")
    parts.append(f". The best was {loss:.3f} after epoch {best:.3g}")
    if found.get("put_back"):
        parts.append(", and is what the run ended with")
    early = ". Training ended early: FLOPs are held against full fine-tuning on all epochs that were planned"
    return "".join(parts) + (early if found.get("stopped") else "") + "."


def _steps(events: Sequence[Tree]) -> str:
    """'12', or '12–90' for several."""
    steps = [step for event in events if (step := number(event, "step")) is not None]
    if not steps:
        return ""
    first, last = min(steps), max(steps)
    return f"{first:.0f}" if first == last else f"{first:.0f}–{last:.0f}"


def _pause(events: Iterable[Tree]) -> str:
    seconds = sum(number(event, "paused_s") or 0.0 for event in events)
    return format_duration(seconds) if seconds else ""


def marked_steps(events: Iterable[Tree], kinds: Sequence[str], last_step: int) -> list[float]:
    """Steps at which something of these kinds happened, each once, and no two closer than a picture shows."""
    return list(_apart(sorted(_steps_of(events, kinds)), last_step / 200))


def _steps_of(events: Iterable[Tree], kinds: Sequence[str]) -> Iterator[float]:
    for event in events:
        step = number(event, "step")
        if event["kind"] in kinds and step is not None:
            yield step


def _apart(steps: Iterable[float], least: float) -> Iterator[float]:
    last = None
    for step in steps:
        if last is None or step - last > least:
            last = step
            yield step
