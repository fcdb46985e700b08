"""The command line: `edgegt run`, `plan`, `data`, `devices`, `report`, `eval`, `generate`, `doctor` and others.

Options of run and plan come from the table in `options`; torch is imported only by commands that compute. Results go
to standard output, progress and errors to standard error. Exit codes: 0 done, 1 the run failed, 2 input refused or
budget infeasible, 130 and 143 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from edgegt.errors import EdgegtError, InputError, is_out_of_memory, nearest
from edgegt.log import Log
from edgegt.options import RunOptions, flag, merge_options, option_type, read_options
from edgegt.process import share_the_machine
from edgegt.version import __version__


class _Parser(argparse.ArgumentParser):
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
        print("edgegt: stopped; nothing had been trained yet", file=sys.stderr)
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
    parser = _Parser(prog="edgegt", description="Fine-tune a language model on the device that uses it.")
    parser.add_argument("--version", action="version", version=f"edgegt {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
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
    parsed.typed = shlex.join(["edgegt", *words])
    return parsed


def _add_options(parser: argparse.ArgumentParser, only: Sequence[str] | None = None) -> None:
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


def _options(parsed: argparse.Namespace) -> RunOptions:
    names = {item.name for item in dataclasses.fields(RunOptions)}
    given = {name: value for name, value in vars(parsed).items() if name in names}
    return merge_options(read_options(Path(parsed.config)) if parsed.config else {}, given)


def _print_json(tree: Any) -> None:
    print(json.dumps(tree, indent=1))


def _add_run(commands: Any, name: str) -> None:
    parser = commands.add_parser(name, help="personalise a model under the device's budgets", prog="edgegt run")
    _add_options(parser)
    parser.add_argument("--resume", metavar="RUN", help="go on with a run that was broken off, as it began")
    parser.set_defaults(handler=_run)


def _run(parsed: argparse.Namespace) -> int:
    options, log = _options(parsed), Log(parsed.quiet)
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


def _add_plan(commands: Any, name: str) -> None:
    parser = commands.add_parser(name, help="what would be trained and what it would cost", prog="edgegt plan")
    _add_options(parser)
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
    options = _options(parsed)
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
        _print_json(outlook)
    return 0 if outlook["fits"] else 2


def _add_data(commands: Any, name: str) -> None:
    parser = commands.add_parser(name, help="what would be trained of a file or folder", prog="edgegt data")
    parser.add_argument("data", metavar="FILE", help="file or folder, as for --data of a run")
    _add_options(parser, ("model", "columns", "format", "max_length", "skip_bad_rows"))
    parser.add_argument("--json", action="store_true", help="print only JSON on standard output")
    parser.set_defaults(handler=_data, config=None)


def _data(parsed: argparse.Namespace) -> int:
    from edgegt.survey import survey, survey_text

    tree, in_colour = survey(_options(parsed)), sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(json.dumps(tree, indent=1) if parsed.json else survey_text(tree, in_colour))
    return 0


def _add_devices(commands: Any, name: str) -> None:
    parser = commands.add_parser(name, help="list device profiles, or explain one", prog="edgegt devices")
    parser.add_argument("action", nargs="?", choices=("list", "show"), default="list")
    parser.add_argument("name", nargs="?", help="profile to show")
    parser.add_argument("--json", action="store_true", help="print only JSON on standard output")
    parser.set_defaults(handler=_devices)


def _devices(parsed: argparse.Namespace) -> int:
    from edgegt import device
    from edgegt.host import read_host

    if parsed.action == "show":
        if not parsed.name:
            raise InputError("`edgegt devices show` needs a name: `edgegt devices` lists them")
        resolved = device.resolve_device(parsed.name, read_host())
        if parsed.json:
            _print_json(resolved.profile.to_json())
        else:
            print(device.explain(resolved.profile))
    elif parsed.json:
        _print_json(device.devices_json())
    else:
        print("\n".join(device.list_lines()))
    return 0


def _add_report(commands: Any, name: str) -> None:
    parser = commands.add_parser(name, help="draw the report of a run folder again", prog="edgegt report")
    parser.add_argument("run", help="run folder")
    parser.add_argument("--quiet", action="store_true", help="print nothing")
    parser.set_defaults(handler=_report)


def _report(parsed: argparse.Namespace) -> int:
    from edgegt.report import write_report

    path = write_report(Path(parsed.run))
    if not parsed.quiet:
        print(path)
    return 0


def _add_subject(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", help="run folder")
    parser.add_argument("--model", help="model directory or hub id, instead of a run folder")
    parser.add_argument("--patch", help="patch.safetensors to put into --model")


def _add_eval(commands: Any, name: str) -> None:
    parser = commands.add_parser(name, help="held-out loss of a run or of a model with a patch", prog="edgegt eval")
    _add_subject(parser)
    parser.add_argument("--data", help="file to evaluate on (default: the run's held-out rows)")
    parser.add_argument("--columns", help="which fields of --data to read, such as prompt=mr,completion=ref")
    parser.add_argument(
        "--format", help="what the rows of --data hold, such as messages (default: as their fields say)"
    )
    parser.add_argument("--max-length", type=int, help="tokens of a row of --data at most (default: the run's, or 512)")
    parser.add_argument("--skip-bad-rows", action="store_true", help="leave out rows of --data that cannot be read")
    parser.add_argument("--json", action="store_true", help="print only JSON on standard output")
    parser.set_defaults(handler=_eval)


def _eval(parsed: argparse.Namespace) -> int:
    from edgegt.use import evaluate_subject

    numbers = evaluate_subject(
        parsed.run, parsed.model, parsed.patch, parsed.data, parsed.columns, parsed.max_length, parsed.skip_bad_rows,
        parsed.format,
    )  # fmt: skip
    if parsed.json:
        _print_json(numbers)
    else:
        for key, value in numbers.items():
            text = "too large" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
            print(f"{key:<20} {text}")
    return 0


def _add_generate(commands: Any, name: str) -> None:
    about = "answer a prompt with a run or a model with a patch"
    parser = commands.add_parser(name, help=about, prog="edgegt generate")
    parser.add_argument("words", nargs="*", metavar="[RUN] PROMPT", help="run folder (unless --model) and the prompt")
    parser.add_argument("--model", help="model directory or hub id, instead of a run folder")
    parser.add_argument("--patch", help="patch.safetensors to put into --model")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens at most (default: 64)")
    parser.set_defaults(handler=_generate)


def _generate(parsed: argparse.Namespace) -> int:
    wanted = 1 if parsed.model else 2
    if len(parsed.words) != wanted:
        shape = "PROMPT with --model" if parsed.model else "RUN PROMPT"
        raise InputError(
            f"`edgegt generate` takes {shape}, and got {len(parsed.words)} word(s): name the run folder, and quote "
            "the prompt"
        )
    from edgegt.use import generate_text

    run_folder = None if parsed.model else parsed.words[0]
    print(generate_text(run_folder, parsed.model, parsed.patch, parsed.words[-1], parsed.tokens))
    return 0


def _add_doctor(commands: Any, name: str) -> None:
    parser = commands.add_parser(name, help="what works on this machine", prog="edgegt doctor")
    parser.add_argument("--json", action="store_true", help="print only JSON on standard output")
    parser.set_defaults(handler=_doctor)


def _doctor(parsed: argparse.Namespace) -> int:
    from edgegt.doctor import examine, findings_text

    findings = examine()
    if parsed.json:
        _print_json(findings)
    else:
        print(findings_text(findings))
    return 0 if findings["ok"] else 1


def _add_calibrate(commands: Any, name: str) -> None:
    about = "measure this machine and write its device profile"
    parser = commands.add_parser(name, help=about, prog="edgegt calibrate")
    parser.add_argument("--output", metavar="FILE.toml", default="calibrated.toml", help="default: calibrated.toml")
    parser.add_argument("--force", action="store_true", help="replace a file that exists")
    parser.add_argument("--quick", action="store_true", help="a few seconds instead of about half a minute, less sure")
    parser.add_argument("--json", action="store_true", help="print only JSON on standard output")
    parser.set_defaults(handler=_calibrate)


def _calibrate(parsed: argparse.Namespace) -> int:
    from edgegt.calibrate import calibrate, findings_text

    Log(parsed.json).say("measuring this machine, a few seconds" if parsed.quick else "measuring, about half a minute")
    findings = calibrate(Path(parsed.output), parsed.force, parsed.quick)
    if parsed.json:
        _print_json(findings)
    else:
        print(findings_text(findings))
    return 0


def _add_cache(commands: Any, name: str) -> None:
    parser = commands.add_parser(name, help="list or clear the int8 models kept on disk", prog="edgegt cache")
    parser.add_argument("action", nargs="?", choices=("list", "clear"), default="list")
    parser.set_defaults(handler=_cache)


def _cache(parsed: argparse.Namespace) -> int:
    from edgegt.cache import cache_dir
    from edgegt.store import clear_cache, list_cache
    from edgegt.units import format_bytes

    if parsed.action == "clear":
        print(f"{format_bytes(clear_cache(cache_dir()))} freed in {cache_dir()}")
        return 0
    bases = list_cache(cache_dir())
    for base in bases:
        print(f"{base.model:<32} {format_bytes(base.size_bytes):>12}  {base.fingerprint[:12]}  {base.directory}")
    if not bases:
        print(f"nothing is cached in {cache_dir()}")
    return 0


_COMMANDS = {
    "run": _add_run, "plan": _add_plan, "data": _add_data, "devices": _add_devices, "report": _add_report,
    "eval": _add_eval, "generate": _add_generate, "doctor": _add_doctor, "calibrate": _add_calibrate,
    "cache": _add_cache,
}  # fmt: skip
