"""Why a plan is what it is: its peak, FLOPs and time by part, what each budget costs, and the same tensors otherwise.

`explain` gives plain data, `explained_text` says it. A budget's price is found by planning again without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from edgegt.case import bits
from edgegt.memory import Formats
from edgegt.planner import Plan, Problem, Way, plan
from edgegt.problem import unlimited
from edgegt.rates import dispatches
from edgegt.units import format_bytes, format_duration, format_flops

TERM_MEANINGS = {
    "floor": "interpreter, libraries and tokenised data: held before the model",
    "base": "the frozen int8 model with scales, norms and biases",
    "masters": "masters of the trained tensors, in floating point",
    "planes": "int8 planes that the trained tensors' products read",
    "optimizer": "AdamW states of the trained tensors",
    "gradients": "gradients that exist at one time",
    "demoted": "planes of tensors trained in an earlier round",
    "activations": "what the forward pass keeps for backward",
    "recomputed": "one recomputed layer, while its backward runs",
    "logits": "head output on the supervised positions, in chunks",
    "transient": "the widest single product",
    "fragments": "holes in the heap between tensors that outlive a micro-batch",
    "libraries": "what libraries load on first use, after the floor was measured",
    "slack": "allowance for fragmentation and unnamed buffers",
}
PROBES = "importance probes"
BUDGETS = {"flops": "FLOPs", "memory": "memory", "time": "time"}
BAR_WIDTH = 24
NOTICEABLE = 5e-4

Tree = dict[str, Any]


def phase_of(terms: Mapping[str, int]) -> str:
    """When the peak is, in words, from its terms: what exists at one of the three moments only is 0 at the others."""
    if terms.get("recomputed"):
        return "in the backward of a recomputed layer"
    if terms.get("logits") and not terms.get("transient"):
        return "at the loss"
    return "when backward begins"


def explain(
    problem: Problem, found: Plan, probe_flops: int, probe_s: float, say: Callable[[str], None] | None = None
) -> Tree:
    """Everything that `edgegt plan --explain` tells of a plan of this problem.

    probe_flops, probe_s: of the run's importance probes, which the problem's budgets do not hold any more. say: takes
    a line before each budget is lifted, since planning again takes its time.
    """
    here = problem.at(found.boundary)
    return {
        "memory": {
            "phase": phase_of(found.memory),
            "peak_bytes": found.peak_bytes,
            "terms": dict(found.memory),
            "streamed_bytes": problem.table.base_bytes if problem.streams else 0,
        },
        "flops": flops_parts(here, found) | {PROBES: probe_flops},
        "full_flops": problem.full_flops,
        "seconds": None if problem.rates is None else seconds_parts(here, found) | {PROBES: probe_s},
        "budgets": [_lifted(problem, found, name, say) for name in BUDGETS if name != "time" or problem.seconds],
        "decisions": [_with_probes(decision, probe_flops, probe_s) for decision in _decisions(here, found)],
    }


def flops_parts(problem: Problem, found: Plan) -> dict[str, int]:
    """The FLOPs of training over all batches, by part; they add up to the plan's. problem: at the plan's boundary."""
    way = _way(found)
    table, totals = problem.table_of(way), problem.totals
    mask = table.mask(found.selected)
    return {
        "forward": table.forward.over(totals) - problem.saved_flops,
        "gradients to inputs": sum(path.flops.over(totals) for path in table.paths if path.weights & mask),
        "gradients to weights": sum(table.weights[bit].dw.over(totals) for bit in bits(mask)),
        "recomputation": sum(table.layers[index].forward.over(totals) for index in found.recompute),
    }


def seconds_parts(problem: Problem, found: Plan) -> dict[str, float]:
    """The predicted seconds of training, by part; they add up to the plan's. Raises: ValueError without rates."""
    if problem.rates is None:
        raise ValueError("seconds need rates")
    rates, way = problem.rates.of_states(found.formats.states), _way(found)
    table, totals, steps = problem.table_of(way), problem.totals, problem.steps
    mask, count = table.mask(found.selected), problem.micro_batches(way)
    chosen = [table.weights[bit] for bit in bits(mask)]
    fixed = rates.fixed_s(table, totals, steps, count)
    dispatch = rates.dispatch_s * dispatches(table) * max(count, steps)
    update = steps * sum(weight.numel / rates.optimizer + rates.update_s for weight in chosen)
    return {
        "forward and loss": fixed - dispatch - problem.saved_s(way) + problem.saved_dispatch_s(way),
        "dispatch": dispatch - problem.saved_dispatch_s(way),
        "gradients to inputs": sum(rates.path_s(path, totals) for path in table.paths if path.weights & mask),
        "gradients to weights": sum(rates.trained_s(weight, totals, steps) for weight in chosen) - update,
        "optimizer": update,
        "recomputation": sum(rates.layer_s(table.layers[index], totals) for index in found.recompute),
    }


def _way(found: Plan) -> Way:
    return Way(found.micro_batch, found.formats, found.head_rows, bool(found.recompute))


def _lifted(problem: Problem, found: Plan, name: str, say: Callable[[str], None] | None) -> Tree:
    """How much of a budget is used, and how much more the plan would be worth without it (a share, never below 0)."""
    free = unlimited(problem)
    limits = {
        "flops": (found.flops, problem.flops, replace(problem, flops=free.flops)),
        "memory": (found.peak_bytes, problem.memory_bytes, replace(problem, memory_bytes=free.memory_bytes)),
        "time": (found.seconds or 0.0, problem.seconds or 0.0, replace(problem, seconds=None)),
    }
    used, limit, lifted = limits[name]
    if say is not None:
        say(f"explain: planning without the {BUDGETS[name]} budget")
    better = plan(lifted, found.strategy)
    return {
        "name": name,
        "used": used,
        "limit": limit,
        "gain": max(0.0, better.value / found.value - 1) if found.value else 0.0,
        "tensors": len(better.selected),
    }


def _decisions(problem: Problem, found: Plan) -> Iterator[Tree]:
    """Each decision with its alternatives: the same tensors trained that way."""
    way, again = _way(found), found.recompute
    size, whole = found.micro_batch, problem.batch_size
    others = [replace(way, micro_batch=rows) for rows in (whole, max(1, size // 2)) if rows != size]
    yield _decision(problem, found, "micro-batch", f"{size} of {whole} rows", [(_rows(o), o, again) for o in others])
    layers = tuple(problem.table.layers[i].weights & problem.table.mask(found.selected) for i in _layers(problem))
    part = tuple(index for index, mask in enumerate(layers) if mask)
    if part:
        choices = {"none": (), f"all {len(part)}": part}
        now = f"{len(again)} of the {len(part)} layers in backward"
        offered = [
            (text, replace(way, recompute=bool(which)), which) for text, which in choices.items() if which != again
        ]
        yield _decision(problem, found, "recomputed", now, offered)
    formats = [form for form in problem.formats if form != found.formats]
    offered = [(_form(form), replace(way, formats=form), again) for form in formats]
    yield _decision(problem, found, "formats", _form(found.formats), offered)
    if any(problem.table.weights[bit].kind == "head" for bit in bits(problem.table.mask(found.selected))):
        heads = [rows for rows in problem.head_rows if rows != found.head_rows]
        offered = [(_head(rows), replace(way, head_rows=rows), again) for rows in heads]
        yield _decision(problem, found, "head", _head(found.head_rows), offered)


def _layers(problem: Problem) -> range:
    return range(len(problem.table.layers))


def _rows(way: Way) -> str:
    return f"{way.micro_batch} rows"


def _form(formats: Formats) -> str:
    return f"{formats.master} masters, {formats.states} states"


def _head(rows: int | None) -> str:
    return "all rows" if rows is None else f"{rows} rows"


def _decision(
    problem: Problem, found: Plan, name: str, chosen: str, offered: list[tuple[str, Way, tuple[int, ...]]]
) -> Tree:
    mask = problem.table.mask(found.selected)
    others = []
    for text, way, recompute in offered:
        peak = sum(problem.memory(way, mask, recompute).values())
        flops, seconds = problem.spent_flops(way, mask, recompute), problem.spent_s(way, mask, recompute)
        late = seconds is not None and problem.seconds is not None and seconds > problem.seconds
        over = {"flops": flops > problem.flops, "memory": peak > problem.memory_bytes, "time": late}
        exceeded = [budget for budget, exceeds in over.items() if exceeds]
        others.append({"choice": text, "peak_bytes": peak, "flops": flops, "seconds": seconds, "exceeded": exceeded})
    return {"name": name, "chosen": chosen, "alternatives": others}


def _with_probes(decision: Tree, probe_flops: int, probe_s: float) -> Tree:
    """The decision with alternatives that cost what the whole run would, as everything else that is shown."""
    whole = [
        other | {"flops": other["flops"] + probe_flops, "seconds": None if other["seconds"] is None else
                 other["seconds"] + probe_s}
        for other in decision["alternatives"]
    ]  # fmt: skip
    return decision | {"alternatives": whole}


def explained_text(explained: Tree) -> str:
    """The explanation for a person."""
    lines = [*_memory_lines(explained["memory"]), "", *_flops_lines(explained)]
    if explained["seconds"] is not None:
        lines += ["", *_seconds_lines(explained["seconds"])]
    return "\n".join([*lines, "", *_budget_lines(explained["budgets"]), "", *_decision_lines(explained)])


def bar(share: float) -> str:
    """A bar of up to BAR_WIDTH cells for a share of 1, in eighths of a cell; anything above 0 shows."""
    eighths = round(8 * BAR_WIDTH * min(max(share, 0.0), 1.0)) or int(share > 0)
    rest = " ▏▎▍▌▋▊▉"[eighths % 8].strip()
    return ("█" * (eighths // 8) + rest).ljust(BAR_WIDTH)


def _memory_lines(memory: Tree) -> Iterator[str]:
    yield f"peak       {format_bytes(memory['peak_bytes'])}, {memory['phase']}"
    largest = max(memory["terms"].values())
    for name, size in sorted(memory["terms"].items(), key=lambda term: -term[1]):
        if size:
            meaning = TERM_MEANINGS.get(name, "")
            if name == "base" and (whole := memory["streamed_bytes"]):
                meaning = f"what stays in memory of the streamed int8 model, {format_bytes(whole)} as a whole"
            yield f"  {name:<12} {format_bytes(size):>10}  {bar(size / largest)}  {meaning}".rstrip()
    absent = [name for name, size in memory["terms"].items() if not size]
    if absent:
        yield f"  {'nothing':<12} {'':>10}  {'':{BAR_WIDTH}}  {', '.join(absent)}"


def _flops_lines(explained: Tree) -> Iterator[str]:
    parts, full = explained["flops"], explained["full_flops"]
    yield f"FLOPs      {format_flops(sum(parts.values()))}, {sum(parts.values()) / full:.1%} of full fine-tuning"
    for name, count in parts.items():
        yield f"  {name:<21} {count / full:>6.1%}  {bar(count / full)}  {format_flops(count)}"
    yield f"  {'full fine-tuning':<21} {1:>6.0%}  {bar(1)}  {format_flops(full)}"


def _seconds_lines(parts: Tree) -> Iterator[str]:
    whole = sum(parts.values()) or 1.0
    yield f"time       {format_duration(sum(parts.values()))}, predicted from rates"
    for name, seconds in parts.items():
        yield f"  {name:<21} {seconds / whole:>6.1%}  {bar(seconds / whole)}  {format_duration(seconds)}"


def _budget_lines(budgets: list[Tree]) -> Iterator[str]:
    yield "budgets    what each allows, and what the plan would be worth without it"
    for budget in budgets:
        used = budget["used"] / budget["limit"] if budget["limit"] else 1.0
        gain = f"+{budget['gain']:.1%} importance" if budget["gain"] >= NOTICEABLE else "no gain"
        binds = "binds" if budget["gain"] >= NOTICEABLE else "does not bind"
        yield (
            f"  {BUDGETS[budget['name']]:<12} {used:>9.1%}  {bar(used)}  {binds}: without it {gain}, "
            f"{budget['tensors']} tensors"
        )


def _decision_lines(explained: Tree) -> Iterator[str]:
    yield "decisions  and the same tensors trained otherwise"
    here = explained["memory"]["peak_bytes"]
    for decision in explained["decisions"]:
        yield f"  {decision['name']:<12} {decision['chosen']}"
        for other in decision["alternatives"]:
            more = other["peak_bytes"] - here
            sign = "+" if more >= 0 else "-"
            over = ", ".join(BUDGETS[name] for name in other["exceeded"])
            fits = f"over {over}" if over else "fits"
            time = "" if other["seconds"] is None else f", {format_duration(other['seconds'])}"
            size, work = format_bytes(other["peak_bytes"]), format_flops(other["flops"])
            yield f"    {other['choice']:<34} {size:>10} ({sign}{format_bytes(abs(more))}), {work}{time}: {fits}"
