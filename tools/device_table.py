"""The plan of every well-known shape on every device profile: what fits, what would be trained, how fast.

One markdown table per shape with a row per profile, from `edgegt plan`'s own predictions: nothing is run, no weights
are needed, the batch is the one that a plan states when it has no data. A shape or a device that is refused is a row
that says so, with the smallest budget that would do.

    python tools/device_table.py --shape qwen2.5-0.5b --output docs/devices.md
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from shapes import SHAPES, write_config

sys.path.append(str(Path(__file__).resolve().parents[1]))  # after PYTHONPATH, which may name another copy

from edgegt.cost import CostTable
from edgegt.device import Resolved
from edgegt.errors import InputError
from edgegt.options import RunOptions
from edgegt.profile import Profile, load_profile, profile_names, profiles_dir
from edgegt.units import GIB, format_bytes

DEFAULT_SHAPES = (
    "llama-2-7b", "llama-3-8b", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b", "opt-2.7b", "bloomz-3b", "flan-t5-3b",
)  # fmt: skip
ROWS, TOKENS = 8, 256
COLUMNS = (
    "device", "budget", "fits", "trained", "down to", "head", "recomputed", "micro-batch", "peak", "FLOPs",
    "tokens/s",
)  # fmt: skip
LEFT = ("device", "fits", "down to", "head")
LAYER = re.compile(r"(?:^|\.)(?:layers|h|block|blocks|layer)\.(\d+)\.")
HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|embed_tokens|wte|word_embeddings|shared)\.weight$")
REFUSAL_LETTERS = 90


def plan_on(shape: str, folder: Path, profile: Profile) -> dict[str, Any]:
    """The outlook of one shape on one device, as `edgegt plan --json` prints it. Raises: InputError when refused."""
    from edgegt.outlook import ON_GPU, batches_of, prospect_of

    model = str(folder / shape)
    options = RunOptions(device=profile.name, model=model, batch_size=ROWS, max_length=TOKENS)
    table, config = traced(model, profile.kind not in ON_GPU)
    device, batches = Resolved(profile, None, False), batches_of(options, model, config)
    return prospect_of(options, device, profile.budget_bytes, table, config, model, batches).outlook


@cache
def traced(model: str, causal: bool) -> tuple[CostTable, Any]:
    """The cost table and the config of a model, which are the same on every device with this attention."""
    from edgegt.source import read_config
    from edgegt.trace import trace

    config = read_config(model, for_run=False)
    return trace(config, causal=causal), config


def cells(profile: Profile, outlook: dict[str, Any]) -> dict[str, str]:
    """One row, by column."""
    row = {"device": profile.title, "budget": _gib(profile.budget_bytes)}
    if not outlook["fits"]:
        return row | {"fits": f"no: {_refusal(outlook, profile.budget_bytes)}"}
    names, predicted = list(outlook["selected"]), outlook["predicted"]
    recomputed = outlook.get("recompute") or []
    return row | {
        "fits": "yes, streamed" if outlook["streamed"] else "yes",
        "trained": str(len(names)), "down to": lowest_layer(names), "head": _head(names, outlook),
        "recomputed": str(len(recomputed) if isinstance(recomputed, list) else recomputed),
        "micro-batch": str(outlook["micro_batch"]), "peak": _gib(predicted["peak_bytes"]["expected"]),
        "FLOPs": f"{predicted['flops_ratio']:.0%}",
        "tokens/s": _three_digits(predicted["tokens_per_s"]),
    }  # fmt: skip


def lowest_layer(names: Sequence[str]) -> str:
    """'layer 12', 'encoder layer 3' for the lowest layer with a trained tensor; '-' when there is none."""
    layers = [(name, int(found[1])) for name in names if (found := LAYER.search(name))]
    encoder = [layer for name, layer in layers if name.startswith("encoder.")]
    decoder = any(name.startswith("decoder.block.") for name, _ in layers)
    if not layers:
        return "-"
    if encoder:
        return f"encoder layer {min(encoder)}"
    return f"{'decoder ' if decoder else ''}layer {min(layer for _, layer in layers)}"


def _head(names: Sequence[str], outlook: dict[str, Any]) -> str:
    if not any(HEAD.search(name) for name in names):
        return "-"
    rows = outlook.get("head_rows")
    return f"{rows} rows" if rows else "all"


def _refusal(outlook: dict[str, Any], budget_bytes: int) -> str:
    """Why not, in a few words: the memory that would do, or what the planner said."""
    least = outlook["smallest_bytes"] or 0
    return f"needs {_gib(least)}" if least > budget_bytes else short(str(outlook["refusal"]))


def short(text: str) -> str:
    """The first words of a message, without a machine's paths, safe in a table's cell."""
    plain = re.sub(r"'?/[^\s:']+'?:? ?", "", " ".join(text.split())).replace("|", "/")
    return plain if len(plain) <= REFUSAL_LETTERS else plain[: REFUSAL_LETTERS - 1].rsplit(" ", 1)[0] + " …"


def _gib(count: float) -> str:
    return f"{count / GIB:.2f} GiB"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def table_of(shape: str, profiles: Sequence[Profile], folder: Path, progress: Any = sys.stderr) -> Iterator[str]:
    """The lines of one shape's section."""
    write_config(shape, folder / shape)
    rows: list[dict[str, str]] = []
    size = f"{SHAPES[shape].parameters / 1e9:.2f} billion parameters"
    for number, profile in enumerate(profiles, 1):
        started = time.perf_counter()
        try:
            outlook = plan_on(shape, folder, profile)
        except InputError as error:
            rows.append({"device": profile.title, "fits": f"no: {short(str(error))}"})
            print(f"{shape} {number}/{len(profiles)} {profile.name} refused", file=progress, flush=True)
            if number == 1:  # the shape itself: the same would be said of every device
                rows[0]["device"] = "every device"
                break
            continue
        rows.append(cells(profile, outlook))
        took = time.perf_counter() - started
        print(f"{shape} {number}/{len(profiles)} {profile.name} {took:.1f} s", file=progress, flush=True)
        if number == 1:
            size += f", {format_bytes(outlook['model']['base_bytes'])} in int8"
    fitting = sum(row["fits"].startswith("yes") for row in rows)
    yield from (f"## {shape}", "", f"{size}; fits on {fitting} of {len(profiles)} devices.", "")
    yield from markdown(rows)
    yield ""


def markdown(rows: Sequence[dict[str, str]]) -> Iterator[str]:
    """The rows as a markdown table whose columns line up as text too."""
    table = [list(COLUMNS), *([row.get(column, "") for column in COLUMNS] for row in rows)]
    widths = [max(len(row[index]) for row in table) for index in range(len(COLUMNS))]
    for number, row in enumerate(table):
        texts = [
            text.ljust(width) if column in LEFT else text.rjust(width)
            for text, width, column in zip(row, widths, COLUMNS, strict=True)
        ]
        yield f"| {' | '.join(texts)} |"
        if number == 0:
            sides = zip(widths, COLUMNS, strict=True)
            marks = ["-" * width if column in LEFT else "-" * (width - 1) + ":" for width, column in sides]
            yield f"| {' | '.join(marks)} |"


HEADING = f"""# What fits where

Predicted by `edgegt plan` for steps of {ROWS} rows of {TOKENS} tokens (64 of them completion), each row twice, 8,192
different tokens in the data, at each profile's own budgets; made by
`python tools/device_table.py --output docs/devices.md`. Budget and peak are bytes of the whole process (512 MiB of them
for the program), FLOPs are of full fine-tuning on the same batches, tokens per second follow from the profile's rates
and were not measured on any of these devices. What is trained is chosen by a stand-in for importance, which needs the
weights. Streamed: the int8 base does not fit, and of the layers below the lowest trained one, one is in memory at a
time. What hidden states take on the disk is within each profile's budget.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description="Plans of well-known shapes on every device profile, as markdown.")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(DEFAULT_SHAPES), metavar="NAME")
    parser.add_argument("--device", nargs="+", choices=profile_names(), metavar="PROFILE", help="default: all")
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="default: standard output")
    args = parser.parse_args()
    profiles = [load_profile(profiles_dir() / f"{name}.toml") for name in args.device or profile_names()]
    lines = HEADING.split("\n")
    with tempfile.TemporaryDirectory(prefix="device-table-") as folder:
        for shape in args.shape:
            lines += table_of(shape, profiles, Path(folder))
    text = "\n".join(lines).rstrip() + "\n"
    if args.output is None:
        print(text, end="")
    else:
        args.output.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
