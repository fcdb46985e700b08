"""edgegt: fine-tune a language model on the device that uses it, in 8 bits, under a FLOPs and a memory budget.

    from edgegt import Trainer
    trained = Trainer("my-model", "my.jsonl", device="jetson").train()

The same as the command line offers, a callback for transformers' Trainer, and an int8 model for a loop of one's own.
Nothing heavy is imported before it is used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgegt.doctor import examine
    from edgegt.errors import BudgetError, EdgegtError, InputError, Interrupted
    from edgegt.export import export_model, export_patch
    from edgegt.hf import SelectionCallback
    from edgegt.onnx.write import export_onnx
    from edgegt.options import RunOptions
    from edgegt.outlook import look_ahead
    from edgegt.plain import Int8Trainable, load_int8_model
    from edgegt.profile import Profile, load_profile
    from edgegt.report import write_report
    from edgegt.run import run
    from edgegt.talk import generate_text
    from edgegt.trainer import Trained, Trainer
    from edgegt.use import evaluate_subject
    from edgegt.version import __version__

_HOMES = {
    "BudgetError": "errors",
    "EdgegtError": "errors",
    "InputError": "errors",
    "Int8Trainable": "plain",
    "Interrupted": "errors",
    "Profile": "profile",
    "RunOptions": "options",
    "SelectionCallback": "hf",
    "Trained": "trainer",
    "Trainer": "trainer",
    "__version__": "version",
    "evaluate_subject": "use",
    "examine": "doctor",
    "export_model": "export",
    "export_onnx": "onnx.write",
    "export_patch": "export",
    "generate_text": "talk",
    "load_int8_model": "plain",
    "load_profile": "profile",
    "look_ahead": "outlook",
    "run": "run",
    "write_report": "report",
}

__all__ = [
    "BudgetError",
    "EdgegtError",
    "InputError",
    "Int8Trainable",
    "Interrupted",
    "Profile",
    "RunOptions",
    "SelectionCallback",
    "Trained",
    "Trainer",
    "__version__",
    "evaluate_subject",
    "examine",
    "export_model",
    "export_onnx",
    "export_patch",
    "generate_text",
    "load_int8_model",
    "load_profile",
    "look_ahead",
    "run",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'edgegt' has no attribute '{name}'")
    return getattr(import_module(f"edgegt.{_HOMES[name]}"), name)


class _Front(ModuleType):
    """The package, of which a public name is never the module of the same name: `run` is the function."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Front
