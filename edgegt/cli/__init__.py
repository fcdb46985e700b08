"""The command line: `edgegt run`, `plan`, `data`, `devices`, `report`, `eval`, `generate`, `doctor` and others.

Options of run and plan come from the table in `options`; torch is imported only by commands that compute. Results go
to standard output, progress and errors to standard error. Exit codes: 0 done, 1 the run failed, 2 input refused or
budget infeasible, 130 and 143 interrupted.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

from edgegt.cli.comparing import add_compare
from edgegt.cli.completion import add_completion
from edgegt.cli.exporting import add_export, add_patch
from edgegt.cli.machine import add_cache, add_calibrate, add_devices, add_doctor
from edgegt.cli.parser import Parser
from edgegt.cli.talking import add_chat, add_generate
from edgegt.cli.training import add_data, add_plan, add_run
from edgegt.cli.using import add_eval, add_report
from edgegt.errors import EdgegtError, InputError, is_out_of_memory, nearest
from edgegt.process import share_the_machine
from edgegt.version import __version__

_COMMANDS = {
    "run": add_run, "plan": add_plan, "data": add_data, "devices": add_devices, "report": add_report,
    "compare": add_compare, "eval": add_eval, "generate": add_generate, "chat": add_chat, "export": add_export,
    "patch": add_patch, "doctor": add_doctor, "calibrate": add_calibrate, "cache": add_cache,
    "completion": add_completion,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    _quiet_libraries()
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        parsed = _parse(words)
        return int(parsed.handler(parsed) or 0)
    except EdgegtError as error:
        print(f"edgegt: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        more = "; nothing had been trained yet" if words[:1] == ["run"] else ""
        print(f"edgegt: stopped{more}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (MemoryError, OSError, RuntimeError) as error:
        line = _system_problem(error)
        if line is None:
            raise
        print(f"edgegt: {line}", file=sys.stderr)
        return 1


def _system_problem(error: Exception) -> str | None:
    """What the machine lacked, in one line; None for an error that is edgegt's own."""
    if is_out_of_memory(error):
        return "out of memory: lower --memory or --batch-size"
    if isinstance(error, RuntimeError):
        return None
    name = getattr(error, "filename", None)
    where = f" ({name})" if name else ""
    return f"{getattr(error, 'strerror', None) or error}{where}: check the disk and the permissions, and run again"


def _quiet_libraries() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    share_the_machine()


def _parse(words: list[str]) -> argparse.Namespace:
    parser = Parser(prog="edgegt", description="Fine-tune a language model on the device that uses it.")
    parser.add_argument("--version", action="version", version=f"edgegt {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for name, add in _COMMANDS.items():
        add(commands, name)
    if words and not words[0].startswith("-") and words[0] not in _COMMANDS:
        near = nearest(words[0], _COMMANDS)
        raise InputError(f"unknown command '{words[0]}'{near}; commands: {', '.join(_COMMANDS)}")
    if not words:
        parser.print_help()
        raise SystemExit(0)
    parsed, left = parser.parse_known_args(words)
    if left and left != ["--"]:
        commands.choices.get(parsed.command, parser).error(f"unrecognized arguments: {' '.join(left)}")
    if parsed.command is None:
        parser.error(f"no command is named; commands: {', '.join(_COMMANDS)}")
    parsed.parser = parser
    parsed.typed = shlex.join(["edgegt", *words])
    return parsed
