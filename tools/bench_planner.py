"""The joint planner against the published selection and simpler baselines: seconds, budgets kept, and value kept.

speed    336 tensors (48 layers of a Llama, 7 linears each; norms and head worth nothing) at rho 0.7: the published
         dynamic program, which knows FLOPs alone, against the mixed-integer program with FLOPs and memory budgets
random   random tables of 20 to 120 weights under random budgets: every plan is checked from the cost table, batch by
         batch
quality  traced families and shapes of well-known models: worth of the joint plan over that of the best baseline, where
         each baseline takes the best of all ways to train

Seconds are those of one processor. Exit code 1 when a criterion does not hold.

    python tools/bench_planner.py --quick
    python tools/bench_planner.py --json planner.json
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from shapes import config_of

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.append(str(Path(__file__).resolve().parents[1]))  # after PYTHONPATH, which may name another copy

from edgegt import baselines
from edgegt.case import Case
from edgegt.cost import CostTable
from edgegt.errors import BudgetError
from edgegt.integers import case_of
from edgegt.memory import Setting, peak_terms
from edgegt.planner import Plan, plan, smallest
from edgegt.problem import Problem, Way
from edgegt.solver import Choice, joint

RHO = 0.7
LOOSE, TIGHTEST = 1.0, 1.05
SHARES = (LOOSE, 0.3, 0.05)
COMBINATION_S, PLAN_S, TIMES_FASTER, GAP = 2.0, 10.0, 3.0, 1e-3
SHAPES = ("smollm2-135m", "qwen2.5-0.5b", "opt-2.7b", "llama-2-7b")
BUDGETS = ((0.42, 0.3), (0.48, 0.05), (0.55, 0.15))  # rho, and share of the way from the least memory to the most
HEAD_ROWS = (None, 64)
BASELINES: dict[str, Callable[[Case, int], Choice]] = {
    "greentrainer-dp": baselines.published,
    "last-layers": baselines.last_layers,
    "random-layers": baselines.random_layers,
    "bias": baselines.vectors_only,
    "random": baselines.random_order,
}
Numbers = dict[str, Any]


def helpers() -> Any:
    """The tables and problems that the planner's tests make."""
    return importlib.import_module("test_planner")


def seconds_of(work: Callable[[], Any]) -> tuple[Any, float]:
    """What `work` returns, and the processor seconds it took."""
    start = time.process_time()
    return work(), time.process_time() - start


def tightened(problem: Problem, rho: float, share: float) -> Problem:
    """With rho, and `share` of the way from the least memory under it to that of training everything."""
    problem = dataclasses.replace(problem, flops=int(rho * problem.full_flops), memory_bytes=1 << 50)
    least = smallest(problem).memory_bytes
    whole = problem.memory(problem.ways()[0], (1 << len(problem.table.weights)) - 1, ())
    return dataclasses.replace(problem, memory_bytes=int(least + share * (sum(whole.values()) - least)))


def budgets_of(problem: Problem, shares: Sequence[float]) -> Iterator[tuple[str, Problem]]:
    """The problem at rho 0.7 with each memory budget, the last of them 1.05 times the smallest."""
    for share in shares:
        yield f"{share:.0%} of the way", tightened(problem, RHO, share)
    last = tightened(problem, RHO, 0.0)
    yield f"{TIGHTEST} x smallest", dataclasses.replace(last, memory_bytes=int(TIGHTEST * last.memory_bytes))


def large_problem(draw: int, layers: int = 48) -> Problem:
    """48 layers of 7 linears that count; FLOPs at rho 0.7, memory unlimited."""
    table = helpers().llama_table(layers, hidden=1536, inner=8960)
    problem: Problem = helpers().problem_of(table, random.Random(draw), 8, 256)
    linear = {weight.name for weight in table.weights if weight.kind == "linear"}
    values = {name: value if name in linear else 0.0 for name, value in problem.values.items()}
    return dataclasses.replace(problem, values=values, flops=int(RHO * problem.full_flops))


def speed(draws: int, shares: Sequence[float], every: int) -> list[Numbers]:
    """A row per draw of importance and memory budget; `every`: of how many ways to train one is solved alone."""
    rows = []
    for number in range(draws):
        problem = large_problem(number)
        case = case_of(problem, problem.ways()[0]).affordable()
        baselines.published_selection.cache_clear()
        old, old_s = seconds_of(partial(baselines.published, case))
        new, new_s = seconds_of(partial(joint, case))
        rows.append(
            {
                "draw": number, "memory": "unlimited, one way", "tensors": len(case.candidates), "published_s": old_s,
                "seconds": [new_s], "gaps": [gap_of(new)], "plan_s": None, "plan_gap": None,
                "published_share": old.value / new.value,
            }
        )  # fmt: skip
        for label, budgeted in budgets_of(problem, shares):
            choices = []
            for way in budgeted.ways()[(number + len(rows)) % every :: every]:
                limited = case_of(budgeted, way).affordable()
                choices.append(seconds_of(partial(joint, limited)))
            found, plan_s = seconds_of(partial(plan, budgeted))
            rows.append(
                {
                    "draw": number, "memory": label, "tensors": len(case.candidates), "published_s": old_s,
                    "seconds": [taken for _, taken in choices], "gaps": [gap_of(choice) for choice, _ in choices],
                    "plan_s": plan_s, "plan_gap": found.optimality_gap, "published_share": None,
                }
            )  # fmt: skip
    return rows


def gap_of(choice: Choice) -> float:
    """What is missing to the bound, as a share of it."""
    return 1 - choice.value / choice.bound if choice.bound else 0.0


def random_instance(seed: int) -> Problem:
    """A random or a Llama-like table of 20 to 120 weights, random batches, formats' choices and budgets."""
    draw, tests = random.Random(seed), helpers()
    if seed % 2:
        table = tests.random_table(draw, 20 + int(100 * draw.random() ** 2))
    else:
        table = tests.llama_table(draw.randint(2, 13), draw.choice((64, 256)), draw.choice((128, 768)), 500)
    problem: Problem = tests.problem_of(table, draw, draw.choice((1, 2)))
    problem = dataclasses.replace(problem, head_rows=draw.choice(((None,), (None, 60), (60,))))
    least = 1.0001 * smallest(problem).rho_flops / problem.full_flops
    return tightened(problem, draw.uniform(least, max(1.0, 1.2 * least)), draw.uniform(0.0, 0.8))


def spent(problem: Problem, found: Plan) -> tuple[int, int]:
    """FLOPs and peak bytes of a plan, from the cost table, batch by batch and micro-batch by micro-batch."""
    rows = found.head_rows
    table = problem.table if rows is None else problem.table.with_head_rows(rows)
    mask, accumulate = table.mask(found.selected), found.micro_batch < problem.batch_size
    work, peaks = table.train_work(mask, found.recompute), []
    for shape in problem.shapes:
        micro = dataclasses.replace(shape, rows=min(shape.rows, found.micro_batch))
        setting = Setting(micro, problem.vocabulary, accumulate, found.formats)
        peaks.append(sum(peak_terms(table, found.selected, found.recompute, problem.around, setting).values()))
    return sum(work.at(shape) for shape in problem.shapes), max(peaks)


def random_plans(count: int) -> Numbers:
    """Plans of random instances; violations: plans over a budget. Refused: both budgets together allow nothing."""
    gaps, taken, violations, refused, recomputing = [], [], [], 0, 0
    for seed in range(count):
        problem = random_instance(seed)
        try:
            found, plan_s = seconds_of(partial(plan, problem))
        except BudgetError:
            refused += 1
            continue
        flops, peak_bytes = spent(problem, found)
        if flops > problem.flops or peak_bytes > problem.memory_bytes or not found.selected:
            violations.append(seed)
        gaps.append(found.optimality_gap)
        taken.append(plan_s)
        recomputing += bool(found.recompute)
    return {
        "count": count, "violations": violations, "refused": refused, "recomputing": recomputing, "gaps": gaps,
        "seconds": taken,
    }  # fmt: skip


def tables(shapes: Sequence[str], families: int | None) -> Iterator[tuple[str, CostTable]]:
    """Traced tables by name: random models of every family, and the shapes of well-known models."""
    from transformers import AutoConfig

    from edgegt.trace import trace

    models = importlib.import_module("tiny_models")
    known = {**models.FAMILIES, **getattr(models, "TRACED_ONLY", {})}
    for name in list(known)[:families]:
        yield name, trace(known[name]())
    for name in shapes:
        config = config_of(name)
        yield name, trace(AutoConfig.for_model(config.pop("model_type"), **config))


def quality(shapes: Sequence[str], families: int | None, draws: int) -> list[Numbers]:
    """A row per table, draw of importance and pair of budgets: the joint plan over the best baseline.

    One row per table also has the ways that train a part of the head; each baseline has the ways that the plan has.
    """
    rows = []
    for name, table in tables(shapes, families):
        for number in range(draws):
            whole: Problem = helpers().problem_of(table, random.Random(f"{name}/{number}"), 2)
            for rho, share in BUDGETS:
                rows_too = number == 0 and (rho, share) == BUDGETS[-1]
                problem = tightened(
                    dataclasses.replace(whole, head_rows=HEAD_ROWS if rows_too else (None,)), rho, share
                )
                try:
                    found = plan(problem)
                except BudgetError:
                    continue
                rows.append({"table": name, "draw": number, "rho": rho, "share": share, **compared(problem, found)})
    return rows


def compared(problem: Problem, found: Plan) -> Numbers:
    """Ratios of the joint plan to the best baseline: by worth over all ways, and by value in its own way."""
    own = Way(found.micro_batch, found.formats, found.head_rows, bool(found.recompute))
    best, same = dict.fromkeys(BASELINES, 0.0), 0.0
    for way in problem.ways():
        case = case_of(problem, way)
        case = case.recomputing(case.every_layer).affordable()
        if case.candidates:
            for name, strategy in BASELINES.items():
                value = strategy(case, 0).value
                best[name] = max(best[name], way.worth * value)
                same = max(same, value) if way == own else same
    first = max(best, key=lambda name: best[name])
    return {
        "ratio": own.worth * found.value / best[first],
        "same_way_ratio": found.value / same if same else None,
        "best_baseline": first,
        "ratios": {name: own.worth * found.value / worth if worth else None for name, worth in best.items()},
        "gap": found.optimality_gap,
    }


def show(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a markdown table, the first column to the left."""
    print("| " + " | ".join(head) + " |")
    print("|" + " --- |" + " ---: |" * (len(head) - 1))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def show_speed(rows: Sequence[Numbers]) -> dict[str, bool]:
    """Print the first table; returns its criteria."""
    print("Speed: 336 tensors, rho 0.7, seconds of one processor\n")
    lines = []
    for row in rows:
        middle = statistics.median(row["seconds"])
        whole = "" if row["plan_s"] is None else f"{row['plan_s']:.2f}"
        times, slowest = row["published_s"] / middle, row["published_s"] / max(row["seconds"])
        lines.append([
            str(row["draw"]), row["memory"], f"{row['published_s']:.2f}", f"{middle:.2f}", f"{max(row['seconds']):.2f}",
            f"{max(row['gaps']):.3%}", f"{times:.1f} ({slowest:.1f})", whole,
            "" if row["plan_gap"] is None else f"{row['plan_gap']:.3%}",
            "" if row["published_share"] is None else f"{row['published_share']:.3f}",
        ])  # fmt: skip
    head = (
        "draw", "memory", "published s", "combination s", "its max", "its largest gap", "times faster (worst)",
        "plan s", "plan gap", "value of the published",
    )  # fmt: skip
    show(head, lines)
    combinations = [(taken, gap) for row in rows for taken, gap in zip(row["seconds"], row["gaps"], strict=True)]
    times = [row["published_s"] / taken for row in rows for taken in row["seconds"]]
    plans = [row["plan_s"] for row in rows if row["plan_s"] is not None]
    quick = sum(taken < COMBINATION_S and gap <= GAP * 1.001 for taken, gap in combinations)
    print(f"{quick} of {len(combinations)} combinations within {COMBINATION_S:g} s and a gap of {GAP:.1%};")
    print(f"median {statistics.median(times):.1f} times as fast as the published program\n")
    return {
        f"every combination under {COMBINATION_S:g} s at a gap of {GAP:.1%}": quick == len(combinations),
        f"every plan under {PLAN_S:g} s": max(plans) < PLAN_S,
        f"at least {TIMES_FASTER:g} times faster than the published program (median)": (
            statistics.median(times) >= TIMES_FASTER
        ),
    }


def show_random(found: Numbers) -> dict[str, bool]:
    """Print the second table; returns its criterion."""
    print("Random instances of 20 to 120 weights, checked from the cost table\n")
    gaps, taken = found["gaps"], found["seconds"]
    head = (
        "instances", "planned", "refused", "recomputing", "violations", "median gap", "largest gap", "median s",
        "max s", "total s",
    )  # fmt: skip
    row = [
        str(found["count"]), str(len(gaps)), str(found["refused"]), str(found["recomputing"]),
        str(len(found["violations"])), f"{statistics.median(gaps):.3%}", f"{max(gaps):.3%}",
        f"{statistics.median(taken):.3f}", f"{max(taken):.2f}", f"{sum(taken):.0f}",
    ]  # fmt: skip
    show(head, [row])
    return {"no random plan above a budget": not found["violations"]}


def show_quality(rows: Sequence[Numbers]) -> dict[str, bool]:
    """Print the third table; returns its criterion."""
    print("Quality: worth of the joint plan over that of the best baseline\n")
    lines = []
    for name in dict.fromkeys(row["table"] for row in rows):
        mine = [row for row in rows if row["table"] == name]
        ratios = [row["ratio"] for row in mine]
        same = [row["same_way_ratio"] for row in mine if row["same_way_ratio"]]
        firsts = [row["best_baseline"] for row in mine]
        wins = ", ".join(f"{first} {firsts.count(first)}" for first in dict.fromkeys(firsts))
        in_same_way = (f"{min(same):.3f}", f"{statistics.median(same):.3f}") if same else ("", "")
        lines.append(
            [name, str(len(mine)), f"{min(ratios):.3f}", f"{statistics.median(ratios):.3f}", *in_same_way, wins]
        )
    show(
        ("table", "plans", "least ratio", "median ratio", "least, same way", "median, same way", "best baseline"), lines
    )
    return {"the joint plan keeps at least as much on every row": all(row["ratio"] >= 1 for row in rows)}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="also write every number to this file")
    parser.add_argument("--quick", action="store_true", help="under a minute: few draws, small models")
    parser.add_argument("--count", type=int, help="random instances (default: 1000, quick: 40)")
    parser.add_argument("--only", choices=("speed", "random", "quality"), help="one of the three tables")
    args = parser.parse_args()
    start = time.perf_counter()
    numbers: Numbers = {}
    criteria: dict[str, bool] = {}
    if args.only in (None, "speed"):
        timings = speed(1, SHARES[-1:], 12) if args.quick else speed(2, SHARES, 8)
        numbers["speed"] = timings
        criteria |= show_speed(timings)
    if args.only in (None, "random"):
        instances = random_plans(args.count or (40 if args.quick else 1000))
        numbers["random"] = instances
        criteria |= show_random(instances)
    if args.only in (None, "quality"):
        comparison = quality((), 3, 1) if args.quick else quality(SHAPES, None, 3)
        numbers["quality"] = comparison
        criteria |= show_quality(comparison)
    show(("criterion", "holds"), [[name, "yes" if holds else "no"] for name, holds in criteria.items()])
    print(f"{time.perf_counter() - start:.0f} s")
    if args.json:
        args.json.write_text(json.dumps({**numbers, "criteria": criteria}, indent=1) + "\n", encoding="utf-8")
    return 0 if all(criteria.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
