"""`edgegt completion`: a script with which a shell completes commands, options, choices, devices and files.

shtab writes it from the very parsers that read the command line. It is made once, so that no Python starts at a tab.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from edgegt.options import RunOptions
from edgegt.profile import profile_names

SHELLS = ("bash", "zsh", "fish")
_FOLDERS = {"model", "output", "resume", "run", "words"}
_FILES = {"config", "data", "eval_data", "frontier", "patch", "patches", "rates"}
_FILE_OUTPUTS = {"edgegt calibrate", "edgegt export", "edgegt patch merge"}


def add_completion(commands: Any, name: str) -> None:
    """`edgegt completion SHELL`."""
    about = "write the script with which a shell completes edgegt"
    parser = commands.add_parser(name, help=about, prog="edgegt completion")
    parser.add_argument("shell", choices=SHELLS)
    parser.set_defaults(handler=_completion)


def _completion(parsed: argparse.Namespace) -> int:
    import shtab

    whole: argparse.ArgumentParser = parsed.parser
    for parser in _with_commands(whole):
        for action in parser._actions:
            _say_what_completes(action, parser.prog)
    print(shtab.complete(whole, parsed.shell, preamble=_preamble(parsed.shell)))
    return 0


def _with_commands(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parser, and those of its commands and of their actions."""
    below = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [parser, *(found for choices in below for one in choices.values() for found in _with_commands(one))]


def _say_what_completes(action: argparse.Action, command: str) -> None:
    """Give an option or a word of the command line what shtab completes it by; most take a number, and have nothing."""
    import shtab

    choices = {item.name: item.metadata.get("choices") for item in dataclasses.fields(RunOptions)}.get(action.dest)
    names_a_device = action.dest == "device" or (action.dest == "name" and command == "edgegt devices")
    if choices and not action.choices:
        action.choices = choices
    elif names_a_device:
        action.complete = {  # type: ignore[attr-defined]
            "bash": "_edgegt_device_files", "zsh": "_edgegt_device_files", "fish": "(_edgegt_device_files)",
        }  # fmt: skip
    elif action.dest == "output" and command in _FILE_OUTPUTS:
        action.complete = shtab.FILE  # type: ignore[attr-defined]
    elif action.dest in _FOLDERS:
        action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    elif action.dest in _FILES:
        action.complete = shtab.FILE  # type: ignore[attr-defined]
    elif action.dest == "metrics":
        from edgegt.metrics import METRICS

        action.choices = tuple(METRICS)


def _preamble(shell: str) -> str:
    """What completes --device in this shell: the profiles of the package, and .toml files."""
    names = " ".join(("auto", "jetson", *profile_names()))
    functions = {
        "bash": f'''_edgegt_device_files() {{
  compgen -W "{names}" -- "$1"
  compgen -f -X '!*.toml' -- "$1"
  case "$1" in */*|.*) compgen -d -- "$1";; esac
}}''',
        "zsh": f"""_edgegt_device_files() {{
  _alternative 'devices:device:({names})' 'files:profile:_files -g "*.toml"'
}}""",
        "fish": f"""function _edgegt_device_files
  printf '%s\\n' {names}
  __fish_complete_suffix .toml
end""",
    }
    return functions[shell]
