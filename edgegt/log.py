"""What a run tells: a line per stage, a progress bar on a terminal, and every fallback on record."""

from __future__ import annotations

import sys
from typing import Any

from edgegt.units import format_bytes, format_duration, format_flops


class Log:
    """Progress of one run, on standard error; `fallbacks` is what the run folder records."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.fallbacks: list[str] = []
        self._bar: Any = None
        self._task: Any = None
        self._epoch = 0, 0.0, 0.0  # its number, when it began, and the seconds of the one before

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

    def start_steps(self, total: int) -> None:
        """Begin the progress bar of the training steps (on a terminal only)."""
        if self.quiet or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = [TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[facts]}")]
        self._bar = Progress(*columns, console=Console(file=sys.stderr), transient=True)
        self._task = self._bar.add_task("train", total=total, facts="")
        self._bar.start()

    def step(self, entry: dict[str, Any]) -> None:
        """One finished training step; shown on a terminal, and in metrics.jsonl in any case."""
        facts = (
            f"loss {entry['loss']:.3f}  {entry['tokens_per_s']:.0f} tokens/s  "
            f"{format_bytes(entry['bytes'])}  {format_duration(entry['remaining_s'])} left"
        )
        epoch = int(entry.get("epoch", 0))
        if epoch != self._epoch[0]:
            self._epoch = epoch, entry["elapsed_s"], entry["elapsed_s"] - self._epoch[1]
        if self._epoch[2]:
            facts += f"  {format_duration(self._epoch[2])} for epoch {epoch}"
        if "cache_hits" in entry:
            hits = entry["cache_hits"] / max(1, entry["cache_visits"])
            facts += f"  {hits:.0%} of rows from disk ({format_bytes(entry['cache_read_bytes'])}, "
            facts += f"{format_flops(entry['saved_flops'])} saved)"
        if self._bar is not None:
            self._bar.update(self._task, completed=entry["step"], facts=facts)

    def end_steps(self) -> None:
        """Remove the progress bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
