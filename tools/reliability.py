"""Breaks runs off in every way that docs/reliability.md speaks of, and writes its tables there.

python tools/reliability.py kill --times 100      one way; without --write the table is only printed
python tools/reliability.py all --write           all of them, about an hour and a half on two cores
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

# Tools import edgegt from the checkout that they lie in, and their trials run it.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "reliability.md"
Say = Callable[[str], None]


def _kill(args: argparse.Namespace, say: Say) -> str:
    from reliability_kill import kills, table

    return table(kills(args.times or 100, args.seed, args.jobs, say))


def _full(args: argparse.Namespace, say: Say) -> str:
    from reliability_faults import full_disks, table_of_full

    return table_of_full(full_disks(say))


def _flips(args: argparse.Namespace, say: Say) -> str:
    from reliability_faults import flips, table_of_flips

    return table_of_flips(flips(args.times or 500, args.seed, 20, say))


def _memory(args: argparse.Namespace, say: Say) -> str:
    from reliability_memory import table_of_taken, taken_away

    return table_of_taken(taken_away(args.times or 20, args.seed, say))


def _cost(args: argparse.Namespace, say: Say) -> str:
    from reliability_memory import resume_costs, table_of_costs

    models = ("stories260K", "base-7m")
    return table_of_costs({model: resume_costs(args.times or 5, model, say) for model in models})


def _long(args: argparse.Namespace, say: Say) -> str:
    from reliability_memory import long_run

    return long_run(args.times or 20000, say)


WAYS: dict[str, Callable[[argparse.Namespace, Say], str]] = {
    "kill": _kill, "full": _full, "flips": _flips, "memory": _memory, "cost": _cost, "long": _long,
}  # fmt: skip


def put_in(text: str, name: str, table: str) -> str:
    """The document with this table between the lines `<!-- name -->` and `<!-- end -->`. Raises: ValueError."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"the document has no place for '{name}'")
    return pattern.sub(lambda found: f"{found[1]}{table}\n{found[2]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("way", choices=[*WAYS, "all"])
    parser.add_argument("--times", type=int, help="trials (default: 100 kills, 500 flips, 20 times memory, ...)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="kills at the same time")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/reliability.md")
    args = parser.parse_args()
    for name in WAYS if args.way == "all" else [args.way]:
        began = time.perf_counter()
        table = WAYS[name](args, lambda line: print(line[:400], file=sys.stderr, flush=True))
        print(f"{table}\n\n{name}: {time.perf_counter() - began:.0f} s", flush=True)
        if args.write:
            DOCUMENT.write_text(put_in(DOCUMENT.read_text(encoding="utf-8"), name, table), encoding="utf-8")


if __name__ == "__main__":
    main()
