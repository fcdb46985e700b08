"""edgegt: fine-tune a language model on the device that uses it, in 8 bits, under a FLOPs and a memory budget.

    from edgegt import RunOptions, run
    folder = run(RunOptions(device="jetson", model="my-model", data="my.jsonl"))

The same as the command line offers; nothing heavy is imported before it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgegt.doctor import examine
    from edgegt.errors import BudgetError, EdgegtError, InputError, Interrupted
    from edgegt.export import export_model, export_patch
    from edgegt.hf import SelectionCallback
    from edgegt.options import RunOptions
    from edgegt.outlook import look_ahead
    from edgegt.profile import Profile, load_profile
    from edgegt.report import write_report
    from edgegt.run import run
    from edgegt.use import evaluate_subject, generate_text
    from edgegt.version import __version__

_HOMES = {
    "BudgetError": "errors",
    "EdgegtError": "errors",
    "InputError": "errors",
    "Interrupted": "errors",
    "Profile": "profile",
    "RunOptions": "options",
    "SelectionCallback": "hf",
    "__version__": "version",
    "evaluate_subject": "use",
    "examine": "doctor",
    "export_model": "export",
    "export_patch": "export",
    "generate_text": "use",
    "load_profile": "profile",
    "look_ahead": "outlook",
    "run": "run",
    "write_report": "report",
}

__all__ = [
    "BudgetError",
    "EdgegtError",
    "InputError",
    "Interrupted",
    "Profile",
    "RunOptions",
    "SelectionCallback",
    "__version__",
    "evaluate_subject",
    "examine",
    "export_model",
    "export_patch",
    "generate_text",
    "load_profile",
    "look_ahead",
    "run",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'edgegt' has no attribute '{name}'")
    return getattr(import_module(f"edgegt.{_HOMES[name]}"), name)
