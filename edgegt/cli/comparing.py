"""`edgegt compare`: several ways to fine-tune, on the same rows and with the same budget."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from edgegt.cli.parser import add_options, options_given, print_json
from edgegt.comparison.contenders import CONTENDERS, EQUAL, PASSED
from edgegt.errors import InputError
from edgegt.log import Log
from edgegt.metrics import METRICS
from edgegt.options import RunOptions

_NUMBERS = {"seeds", "tune_steps", "rows", "answers"}
_OWN = ("strategies", "rhos", "seeds", "equal", "rates", "grid", "tune_steps", "rows", "metrics", "answers")


def add_compare(commands: Any, name: str) -> None:
    """`edgegt compare`."""
    about = "edgegt against full fine-tuning, LoRA, prefix tuning and simpler selections, on equal terms"
    parser = commands.add_parser(name, help=about, prog="edgegt compare")
    add_options(parser, (*PASSED, "output"))
    helps = {
        "strategies": f"which, divided by commas (default: all: {', '.join(CONTENDERS)})",
        "rhos": "FLOPs of a step as fractions of full fine-tuning's, for those that keep to one (default: 0.5)",
        "seeds": "how often each is trained, with seeds 0, 1, ... (default: 3)",
        "equal": f"what all may spend as much of as full fine-tuning: {', '.join(EQUAL)} (default: flops)",
        "rates": "learning rates: a rates.toml, or 'stored': the package's (default: found on validation rows)",
        "grid": "learning rates tried, as factors of 0.4 / hidden size (default: 0.5,1,2,4)",
        "tune_steps": "steps of full fine-tuning when rates are tried (default: half)",
        "rows": "rows of training at most (default: all)",
        "metrics": f"answer held-out rows and score them by some of: {', '.join(METRICS)}",
        "answers": "rows answered for --metrics (default: 128)",
    }
    for option, help_text in helps.items():
        spelled = "--rho" if option == "rhos" else "--" + option.replace("_", "-")
        parser.add_argument(
            spelled, dest=option, type=int if option in _NUMBERS else str, help=help_text, default=argparse.SUPPRESS,
            metavar="NUMBER" if option in _NUMBERS else "TEXT",
        )  # fmt: skip
    parser.add_argument("--resume", metavar="FOLDER", help="go on with a comparison that was broken off, as it began")
    parser.add_argument("--json", action="store_true", help="print only JSON on standard output")
    parser.add_argument("--quiet", action="store_true", help="say nothing on standard error but errors")
    parser.set_defaults(handler=_compare, config=None)


def _compare(parsed: argparse.Namespace) -> int:
    from edgegt.comparison.request import request_of
    from edgegt.comparison.session import TABLE, compare, resume

    options, log = options_given(parsed), Log(parsed.quiet)
    own = {name: getattr(parsed, name) for name in _OWN if hasattr(parsed, name)}
    if parsed.resume is not None:
        if options != RunOptions() or own:
            raise InputError("--resume goes on with the options that the comparison has: give no others but --quiet")
        outcome = resume(Path(parsed.resume), log)
    else:
        outcome = compare(request_of(options, **own), log, options.output, parsed.typed)
    if parsed.json:
        print_json(outcome.results)
    else:
        print((outcome.folder / TABLE).read_text(encoding="utf-8"), end="")
        print(f"\n{outcome.folder}")
    return 1 if outcome.problems else 0
