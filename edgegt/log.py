"""What a run tells: lines and a progress bar on a terminal, plain lines otherwise, and every fallback on record."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from edgegt.units import format_bytes, format_duration


class Log:
    """Progress of one run, on standard error; `fallbacks` is what the run folder records."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.fallbacks: list[str] = []
        self._bar: Any = None
        self._task: Any = None

    def say(self, line: str) -> None:
        """One line to the user."""
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def fallback(self, line: str) -> None:
        """Something is done another way than asked or expected: said once, and recorded."""
        if line not in self.fallbacks:
            self.fallbacks.append(line)
            self.say(f"note: {line}")

    def start_steps(self, total: int, done: int) -> None:
        """Begin the progress bar of the training steps (on a terminal only)."""
        if self.quiet or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = [TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[facts]}")]
        self._bar = Progress(*columns, console=Console(file=sys.stderr), transient=True)
        self._task = self._bar.add_task("train", total=total, completed=done, facts="")
        self._bar.start()

    def step(self, entry: dict[str, Any], total: int) -> None:
        """One finished training step."""
        facts = (
            f"loss {entry['loss']:.3f}  {entry['tokens_per_s']:.0f} tokens/s  "
            f"{format_bytes(entry['bytes'])}  {format_duration(entry['remaining_s'])} left"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=entry["step"], facts=facts)
        elif entry["step"] == total or entry["step"] % max(1, total // 10) == 0:
            self.say(f"step {entry['step']}/{total}  {facts}")

    def end_steps(self) -> None:
        """Remove the progress bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def write_json(path: Path, tree: Any) -> None:
    """Write a JSON file so that a reader sees the old one or the whole new one."""
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(json.dumps(tree, indent=1, allow_nan=True) + "\n", encoding="utf-8")
    partial.replace(path)
