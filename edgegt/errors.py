"""Everything edgegt raises on purpose, drawn once.

    EdgegtError                 exit code 1: the run failed
    ├── InputError              exit code 2: input refused (value, what is allowed, one remedy)
    │   └── BudgetError         exit code 2: nothing fits; carries the smallest budget that would do
    └── Interrupted             exit code 130 (SIGINT) or 143 (SIGTERM): stopped by the user, work saved

A message is one line that names the file, row or value, what was allowed, and a remedy.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EdgegtError(Exception):
    """The run failed; the message says why and what to do."""

    exit_code = 1


class InputError(EdgegtError):
    """Something the user gave is refused before any work is lost."""

    exit_code = 2


class BudgetError(InputError):
    """No plan fits the budget. `smallest_bytes`, `smallest_rho` or `smallest_s` is the least that would do."""

    def __init__(
        self,
        message: str,
        smallest_bytes: int | None = None,
        smallest_rho: float | None = None,
        smallest_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.smallest_bytes = smallest_bytes
        self.smallest_rho = smallest_rho
        self.smallest_s = smallest_s


class Interrupted(EdgegtError):
    """The user stopped the run; what was trained is saved."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def nearest(word: str, known: Iterable[str]) -> str:
    """' (did you mean 'X'?)' for the known word closest to `word`, or '' when none is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""
