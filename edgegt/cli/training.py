"""`edgegt run`, `plan` and `data`: what learns, and what says beforehand how that would go."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from edgegt.cli.parser import add_options, options_given, print_json
from edgegt.errors import InputError
from edgegt.log import Log
from edgegt.options import RunOptions


def add_run(commands: Any, name: str) -> None:
    parser = commands.add_parser(name, help="personalise a model under the device's budgets", prog="edgegt run")
    add_options(parser)
    parser.add_argument("--resume", metavar="RUN", help="go on with a run that was broken off, as it began")
    parser.set_defaults(handler=_run)


def _run(parsed: argparse.Namespace) -> int:
    options, log = options_given(parsed), Log(parsed.quiet)
    path = None if parsed.resume is None else Path(parsed.resume)
    if path is not None and (options != RunOptions() or parsed.config):
        raise InputError("--resume goes on with the options that the run has: give no others but --quiet")
    if path is None:
        from edgegt.folder import unfinished

        earlier = unfinished(options)
        if earlier is not None and _goes_on(earlier, log):
            path = earlier
    from edgegt.run import resume, run

    print(run(options, log, parsed.typed) if path is None else resume(path, log, parsed.typed))
    return 0


def _goes_on(earlier: Path, log: Log) -> bool:
    """Whether to go on with a run of the same options: asked on a terminal, elsewhere only offered."""
    if log.quiet or not (sys.stdin.isatty() and sys.stderr.isatty()):
        log.say(f"'{earlier}' has the same options and was broken off: `edgegt run --resume {earlier}` goes on with it")
        return False
    print(f"'{earlier}' has the same options and was broken off. Go on with it? [Y/n] ", end="", file=sys.stderr)
    sys.stderr.flush()
    return sys.stdin.readline().strip().lower() in ("", "y", "yes")


def add_plan(commands: Any, name: str) -> None:
    parser = commands.add_parser(name, help="what would be trained and what it would cost", prog="edgegt plan")
    add_options(parser)
    parser.add_argument("--json", action="store_true", help="print only JSON on standard output")
    parser.add_argument(
        "--explain", action="store_true", help="where memory, FLOPs and time go, what each budget costs, alternatives"
    )
    parser.add_argument(
        "--frontier", nargs="?", const="frontier.png", metavar="FILE.png",
        help="draw what 40 pairs of budgets could reach (default file: frontier.png); with --json the numbers too",
    )  # fmt: skip
    parser.set_defaults(handler=_plan)


def _plan(parsed: argparse.Namespace) -> int:
    options = options_given(parsed)
    if parsed.frontier is not None:
        from edgegt.report.frontier import check_png, write_png

        check_png(Path(parsed.frontier))
    from edgegt.outlook import outlook_text, prospect

    log = Log(parsed.quiet)
    found = prospect(options, Log(parsed.quiet or parsed.json))
    outlook = dict(found.outlook)
    if not parsed.json:
        print(outlook_text(outlook), flush=True)
    if parsed.explain and found.plan is not None:
        from edgegt.explain import explain, explained_text

        outlook["explained"] = explain(found.problem, found.plan, found.probe_flops, found.probe_s, log.say)
        if not parsed.json:
            print(f"\n{explained_text(outlook['explained'])}", flush=True)
    if parsed.frontier is not None:
        from edgegt.frontier import frontier_of

        frontier = frontier_of(found.problem, found.probe_flops, found.plan, say=log.say)
        outlook["frontier"] = frontier.to_json()
        title = f"{Path(outlook['model']['name']).name} on {outlook['device']}"
        path = write_png(frontier, Path(parsed.frontier), title)
        log.say(f"frontier: {path}")
    if parsed.json:
        print_json(outlook)
    return 0 if outlook["fits"] else 2


def add_data(commands: Any, name: str) -> None:
    parser = commands.add_parser(name, help="what would be trained of a file or folder", prog="edgegt data")
    parser.add_argument("data", metavar="FILE", help="file or folder, as for --data of a run")
    add_options(parser, ("model", "task", "columns", "format", "max_length", "skip_bad_rows"))
    parser.add_argument("--json", action="store_true", help="print only JSON on standard output")
    parser.set_defaults(handler=_data, config=None)


def _data(parsed: argparse.Namespace) -> int:
    from edgegt.survey import survey, survey_text

    tree, in_colour = survey(options_given(parsed)), sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(json.dumps(tree, indent=1) if parsed.json else survey_text(tree, in_colour))
    return 0
