"""What the commands share: a parser with one-line errors, the options of a run as flags, JSON on standard output."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from edgegt.errors import InputError, nearest
from edgegt.options import RunOptions, flag, merge_options, option_type, read_options


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors that name the nearest option, and no abbreviated options."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            word = unknown.split()[0]
            known = [option for action in self._actions for option in action.option_strings]
            message = f"unknown option '{word}'{nearest(word, known)}"
        raise InputError(f"{message}; `{self.prog} --help` lists what is allowed")


def add_options(parser: argparse.ArgumentParser, only: Sequence[str] | None = None) -> None:
    for item in filter(lambda one: only is None or one.name in only, dataclasses.fields(RunOptions)):
        wanted, help_text = option_type(item), str(item.metadata["help"])
        default = f" (default: {item.default})" if item.default is not None and wanted is not bool else ""
        if wanted is bool:
            parser.add_argument(
                flag(item.name), dest=item.name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS,
                help=help_text,
            )  # fmt: skip
            continue
        choices = item.metadata.get("choices")
        parser.add_argument(
            flag(item.name), dest=item.name, type=wanted, default=argparse.SUPPRESS,
            metavar="{" + ",".join(choices) + "}" if choices else wanted.__name__.upper(), help=help_text + default,
        )  # fmt: skip
    if only is None:
        parser.add_argument("--config", metavar="FILE", help="TOML file with any of these; the command line wins")
        parser.add_argument("--quiet", action="store_true", help="say nothing on standard error but errors")


def options_given(parsed: argparse.Namespace) -> RunOptions:
    names = {item.name for item in dataclasses.fields(RunOptions)}
    given = {name: value for name, value in vars(parsed).items() if name in names}
    return merge_options(read_options(Path(parsed.config)) if parsed.config else {}, given)


def print_json(tree: Any) -> None:
    print(json.dumps(tree, indent=1))
