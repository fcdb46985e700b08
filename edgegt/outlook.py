"""`edgegt plan`: everything but training. Fits or not, what would be trained, and what it would cost.

With --data it uses the rows' own lengths; without, a stated default batch. Importance needs a loaded model, so here a
proxy stands for it and is marked as such: every weight is worth the square root of its size, more towards the loss.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from edgegt.budget import Need, Probes, check_memory, flops_budget, plan_probes, smallest_bytes
from edgegt.cost import BatchShape, CostTable
from edgegt.errors import BudgetError, InputError
from edgegt.job import ONLY_THE_HOUSEHOLD, Schedule, make_schedule, memory_budget, read_corpus, resolve
from edgegt.log import Log
from edgegt.options import RunOptions
from edgegt.planner import Problem, plan
from edgegt.units import format_bytes, format_duration, format_flops
from edgegt.value import values_of

PROXY = "proxy: square root of a weight's size, rising towards the loss (importance needs the weights and the data)"
DEFAULT_STEPS = 100
DEFAULT_TOKENS, DEFAULT_KEPT = 256, 64
FLOOR_BYTES = 512 * 2**20
SPREAD = {"flops": (0.98, 1.0, 1.0), "bytes": (0.92, 1.0, 1.05), "seconds": (0.6, 1.0, 2.5)}


def look_ahead(options: RunOptions, log: Log) -> dict[str, Any]:
    """The plan of the first round as plain data; `fits` says whether anything can be trained within both budgets."""
    from edgegt import home
    from edgegt.speed import of_profile
    from edgegt.trace import trace

    if options.strategy == "full":
        raise InputError("--strategy full trains everything at rho 1: there is nothing to plan; leave --strategy out")
    if options.data is not None and options.model is None:
        raise InputError(ONLY_THE_HOUSEHOLD)
    name = options.model or str(home.MODEL)
    resolved, host = resolve(options)
    asked = options.memory_bytes or resolved.profile.budget_bytes
    memory_bytes = memory_budget(options, resolved, host)[0] if resolved.on_board else asked
    config, identity = _config(name)
    schedule, batch = _schedule(options, identity, config)
    table = trace(config)
    longest = BatchShape(1, max(s.tokens for s in schedule.shapes), max(s.kept for s in schedule.shapes))
    need = Need(table, FLOOR_BYTES, int(config.get_text_config().vocab_size), longest)
    rho = options.rho or resolved.profile.rho
    full = table.full_work().total(schedule.shapes)
    least = smallest_bytes(options, need, schedule)
    probes = _probes(options, schedule, rho, need, memory_bytes)
    probing = len(schedule.rounds) * table.probe_work().total(probes.shapes(schedule))
    chosen, refusal = None, None
    try:
        flops = flops_budget(rho, options, need, schedule, probes)
        check_memory(memory_bytes, options, need, schedule)
        problem = Problem(
            table, values_of(proxy_importance(table), table), schedule.shapes, flops - probing, memory_bytes,
            need.around, need.vocabulary, options.batch_size,
        )  # fmt: skip
        chosen = plan(problem, options.strategy, options.seed)
    except BudgetError as error:
        refusal = str(error)
    outlook: dict[str, Any] = {
        "fits": chosen is not None,
        "device": resolved.profile.name,
        "notice": resolved.notice,
        "model": {"name": name, "architecture": (config.architectures or [config.model_type])[0],
                  "parameters": table.parameters, "base_bytes": table.base_bytes},
        "budget": {"rho": rho, "flops": int(rho * full), "memory_bytes": memory_bytes},
        "smallest_bytes": least,
        "batch": batch, "steps": schedule.steps, "importance": PROXY, "refusal": refusal,
        "floor_bytes": FLOOR_BYTES, "selected": [], "predicted": {}, "micro_batch": None, "memory": {},
    }  # fmt: skip
    if chosen is not None:
        step_s = of_profile(resolved.profile).step_s(
            table, table.mask(chosen.selected), schedule.shapes[len(schedule.shapes) // 2], chosen.accumulation
        )
        outlook |= {"selected": list(chosen.selected), "micro_batch": chosen.micro_batch, "memory": chosen.memory}
        outlook["optimality_gap"] = chosen.optimality_gap
        outlook["predicted"] = {
            "flops_ratio": (chosen.flops + probing) / full, "flops": _spread(chosen.flops + probing, "flops"),
            "probe_flops": probing,
            "peak_bytes": _spread(chosen.peak_bytes, "bytes"), "step_s": _spread(step_s, "seconds"),
            "train_s": _spread(step_s * schedule.steps, "seconds"), "full_flops": full,
        }  # fmt: skip
    return outlook


def _probes(options: RunOptions, schedule: Schedule, rho: float, need: Need, memory_bytes: int) -> Probes:
    """How importance will be measured; not at all by strategies that do not use it."""
    if options.strategy != "greentrainer":
        return Probes(0, 0)
    return plan_probes(options, schedule, rho, need, memory_bytes)


def proxy_importance(table: CostTable) -> dict[str, float]:
    """A stand-in for importance: square root of the size, up to twice as much at the top of the stack."""
    return {w.name: math.sqrt(w.numel) * (1 + max(0, w.block) / max(1, table.blocks)) for w in table.weights}


def _config(name: str) -> tuple[Any, str]:
    from edgegt.source import read_config

    return read_config(name), name


def _schedule(options: RunOptions, model: str, config: Any) -> tuple[Schedule, str]:
    """The batches of --data, or of the household, or a stated default."""
    from edgegt.source import load_tokenizer, locate

    if options.data is None and options.model is not None:
        tokens = min(DEFAULT_TOKENS, options.max_length)
        shape = BatchShape(options.batch_size, tokens, min(DEFAULT_KEPT, tokens))
        steps = options.steps or DEFAULT_STEPS
        stated = f"default: {steps} steps of {shape.rows} rows x {shape.tokens} tokens, {shape.kept} of them completion"
        empty = tuple((0.0, ()) for _ in range(steps))
        return Schedule(empty, (shape,) * steps, (steps,)), stated
    corpus = read_corpus(options, load_tokenizer(locate(model, weights=False)))
    schedule = make_schedule(replace(options, model=options.model), corpus.train)
    longest = max(shape.tokens for shape in schedule.shapes)
    return schedule, f"{corpus.name}: {schedule.steps} steps of {options.batch_size} rows, at most {longest} tokens"


def _spread(value: float, kind: str) -> dict[str, float]:
    low, expected, high = (factor * value for factor in SPREAD[kind])
    return {"low": low, "expected": expected, "high": high}


def outlook_text(outlook: dict[str, Any]) -> str:
    """The outlook for a person."""
    model, budget = outlook["model"], outlook["budget"]
    lines = [
        f"model      {model['name']} ({model['architecture']}, {model['parameters'] / 1e6:,.1f} M parameters, "
        f"{format_bytes(model['base_bytes'])} in int8)",
        f"device     {outlook['device']}: {format_bytes(budget['memory_bytes'])}, rho {budget['rho']:g}",
        f"batch      {outlook['batch']}",
    ]
    if outlook["notice"]:
        lines.insert(2, f"           ({outlook['notice']})")
    if not outlook["fits"]:
        return "\n".join([*lines, f"fits       no: {outlook['refusal']}"])
    predicted, selected = outlook["predicted"], outlook["selected"]
    shown = ", ".join(selected[:6]) + (f", and {len(selected) - 6} more" if len(selected) > 6 else "")
    peak, step, whole = predicted["peak_bytes"], predicted["step_s"], predicted["train_s"]
    flops = predicted["flops"]
    return "\n".join([
        *lines,
        f"fits       yes, from about {format_bytes(outlook['smallest_bytes'])}; micro-batch {outlook['micro_batch']}",
        f"trained    {len(selected)} tensor{'s' if len(selected) > 1 else ''}: {shown}",
        f"           ({outlook['importance']})",
        f"FLOPs      {predicted['flops_ratio']:.1%} of full fine-tuning: {format_flops(flops['expected'])} "
        f"(at most {format_flops(flops['high'])}) of {format_flops(predicted['full_flops'])}",
        f"memory     {format_bytes(peak['expected'])} ({format_bytes(peak['low'])} to {format_bytes(peak['high'])}), "
        f"of it {format_bytes(outlook['floor_bytes'])} for the program",
        f"time       {format_duration(step['expected'])} per step ({format_duration(step['low'])} to "
        f"{format_duration(step['high'])}), {format_duration(whole['expected'])} for {outlook['steps']} steps, "
        "from the profile's rates",
    ])  # fmt: skip
