"""Everything edgegt raises on purpose, drawn once.

    EdgegtError                 exit code 1: the run failed
    ├── NotFinite               a loss, gradient or weight is NaN or infinite: the step is dropped
    ├── OutOfMemory             memory for a kernel could not be had: the run steps back
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


class NotFinite(EdgegtError):
    """A loss, a gradient or a trained tensor is NaN or infinite; the message says which."""


class OutOfMemory(EdgegtError):
    """Memory that a kernel needs could not be had."""


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this says that memory could not be had: Python's, torch's or our own error."""
    if isinstance(error, EdgegtError):
        return isinstance(error, OutOfMemory)
    # By name, because torch must not be imported for this: its CPU allocator raises a plain RuntimeError.
    named = any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    return isinstance(error, MemoryError) or named or "can't allocate memory" in str(error)


def nearest(word: str, known: Iterable[str]) -> str:
    """' (did you mean 'X'?)' for the known word closest to `word`, or '' when none is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""
