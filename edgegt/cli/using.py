"""`edgegt report` and `edgegt eval`: what is done with a run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from edgegt.cli.parser import print_json
from edgegt.metrics import METRICS


def add_report(commands: Any, name: str) -> None:
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


def add_eval(commands: Any, name: str) -> None:
    parser = commands.add_parser(name, help="held-out loss of a run or of a model with a patch", prog="edgegt eval")
    _add_subject(parser)
    parser.add_argument("--onnx", metavar="DIR", help="ONNX files, of a run or with --data, instead of PyTorch")
    parser.add_argument("--data", help="file to evaluate on (default: the run's held-out rows)")
    parser.add_argument("--columns", help="which fields of --data to read, such as prompt=mr,completion=ref")
    parser.add_argument(
        "--format", help="what the rows of --data hold, such as messages (default: as their fields say)"
    )
    parser.add_argument("--max-length", type=int, help="tokens of a row of --data at most (default: the run's, or 512)")
    parser.add_argument("--skip-bad-rows", action="store_true", help="leave out rows of --data that cannot be read")
    parser.add_argument(
        "--metrics", metavar="NAME,...", help=f"answer held-out rows and score them by some of: {', '.join(METRICS)}"
    )
    parser.add_argument("--answers", type=int, metavar="ROWS", help="rows answered for --metrics (default: 128)")
    parser.add_argument("--tokens", type=int, help="new tokens of an answer at most (default: as references need, 128)")
    parser.add_argument("--json", action="store_true", help="print only JSON on standard output")
    parser.set_defaults(handler=_eval)


def _eval(parsed: argparse.Namespace) -> int:
    from edgegt.use import evaluate_subject

    numbers = evaluate_subject(
        parsed.run, parsed.model, parsed.patch, parsed.data, parsed.columns, parsed.max_length, parsed.skip_bad_rows,
        parsed.format, parsed.metrics, parsed.answers, parsed.tokens, parsed.onnx,
    )  # fmt: skip
    if parsed.json:
        print_json(numbers)
        return 0
    scores = numbers.pop("scores", {})
    for key, value in numbers.items():
        print(f"{key:<20} {_number(value, 4)}")
    if scores:
        print("\nscore, from 0 to 100; perplexity is no percentage")
    for key, value in scores.items():
        print(f"{key:<20} {_number(value, 2)}")
    return 0


def _number(value: Any, digits: int) -> str:
    return "too large" if value is None else f"{value:.{digits}f}" if isinstance(value, float) else str(value)
