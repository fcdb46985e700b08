"""How much of training goes into padding: what packing short rows into one could save at most.

The batches are those of one epoch of `edgegt run`: its split, its tokenizer, rows of similar length together. Packing
puts several rows into one, without attention across them. It makes no token cheaper, so it saves the padding and no
more; perfect packing would leave none.

padding    share of the inputs that are padding
FLOPs      of training every tensor, by the cost table of each --shape, that perfect packing would save
time       of a step, likewise, by the rates of the profile --device

    python tools/bench_packing.py --model DIR --data devset.csv --columns prompt=mr,completion=ref
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from shapes import SHAPES, write_config

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.append(str(Path(__file__).resolve().parents[1]))  # after PYTHONPATH, which may name another copy

from edgegt.cost import BatchShape, CostTable, Totals
from edgegt.data import Example
from edgegt.errors import InputError
from edgegt.host import read_host
from edgegt.job import make_schedule, read_corpus, within_positions
from edgegt.options import DATA_FORMATS, RunOptions
from edgegt.rates import Rates, of_profile

BATCH_SIZES = (1, 4, 8, 16, 32)
DEFAULT_SHAPES = ("base-7m", "smollm2-135m")
Numbers = dict[str, Any]


def table_of(shape: str) -> CostTable:
    """The cost table of a well-known shape, with attention as a run on a processor has it."""
    from edgegt.source import read_config
    from edgegt.trace import trace

    with tempfile.TemporaryDirectory() as folder:
        return trace(read_config(str(write_config(shape, Path(folder)))), causal=True)


def without_padding(examples: Sequence[Example]) -> Totals:
    """The totals of the same rows if no input were padding."""
    return Totals.of(
        BatchShape(1, len(one.inputs), len(one.targets), one.supervised) for one in examples
    )  # fmt: skip


def saved_flops(table: CostTable, padded: Totals, packed: Totals) -> float:
    """The share of the FLOPs of training every tensor that is spent on padding."""
    work = table.train_work((1 << len(table.weights)) - 1)
    return 1 - work.over(packed) / work.over(padded)


def saved_time(table: CostTable, rates: Rates, padded: Totals, packed: Totals, steps: int) -> float:
    """The same share of predicted seconds, of which dispatch and the optimizer stay what they are."""
    everything = (1 << len(table.weights)) - 1
    before, after = (rates.run_s(table, everything, totals, steps, steps) for totals in (padded, packed))
    return 1 - after / before


def measure(
    options: RunOptions, train: tuple[Example, ...], sizes: Sequence[int], tables: dict[str, CostTable], rates: Rates
) -> list[Numbers]:  # fmt: skip
    """One row of numbers per batch size."""
    packed = without_padding(train)
    found = []
    for size in sizes:
        schedule = make_schedule(replace(options, batch_size=size, epochs=1.0), train)
        padded = Totals.of(schedule.shapes)
        found.append(
            {
                "batch_size": size, "rows": len(train), "tokens_per_row": packed.token / len(train),
                "padding": 1 - packed.token / padded.token,
                "flops": {name: saved_flops(table, padded, packed) for name, table in tables.items()},
                "time": {
                    name: saved_time(table, rates, padded, packed, schedule.steps) for name, table in tables.items()
                },
            }
        )  # fmt: skip
    return found


def row_of(label: str, numbers: Numbers) -> str:
    """One line of the table."""
    shares = [numbers["padding"]]
    shares += [numbers[kind][name] for name in numbers["flops"] for kind in ("flops", "time")]
    cells = [label, f"{numbers['rows']}", f"{numbers['tokens_per_row']:.0f}", f"{numbers['batch_size']}"]
    return " | ".join(["", *cells, *(f"{share:.1%}" for share in shares), ""]).strip()


def main() -> int:
    parser = argparse.ArgumentParser(description="The share of padding in training, and what packing would save.")
    parser.add_argument("--model", required=True, help="model folder whose tokenizer is used")
    parser.add_argument("--data", required=True)
    parser.add_argument("--columns", help="which fields of the data to read, as for `edgegt run`")
    parser.add_argument("--format", choices=DATA_FORMATS)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, action="append", help=f"may be given again (default: {BATCH_SIZES})")
    parser.add_argument("--shape", choices=SHAPES, action="append", help=f"may be given again ({DEFAULT_SHAPES})")
    parser.add_argument("--device", default="auto", help="profile whose rates predict the seconds, as for `edgegt run`")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    from edgegt.architecture import positions_of
    from edgegt.device import resolve_device
    from edgegt.source import load_tokenizer, locate, read_config

    try:
        options = RunOptions(
            model=args.model, data=args.data, columns=args.columns, format=args.format, max_length=args.max_length
        )
        options = within_positions(options, positions_of(read_config(args.model)))
        rates = of_profile(resolve_device(args.device, read_host()).profile)
        corpus = read_corpus(options, load_tokenizer(locate(args.model, weights=False)))
    except InputError as error:
        parser.error(str(error))
    tables = {name: table_of(name) for name in args.shape or DEFAULT_SHAPES}
    found = measure(options, corpus.train, args.batch_size or BATCH_SIZES, tables, rates)
    titles = [f"{name}, {kind}" for name in tables for kind in ("FLOPs", "time")]
    print(f"| data | rows | tokens | batch | padding | {' | '.join(titles)} |")
    print("|" + " --- |" * (5 + len(titles)))
    for numbers in found:
        print(row_of(Path(args.data).name, numbers))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
