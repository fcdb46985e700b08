"""`edgegt plan`: everything but training. Fits or not, what would be trained, and what it would cost.

With --data it uses the rows' own lengths; without, a stated default batch. Importance needs a loaded model, so here a
proxy stands for it and is marked as such: every weight is worth the square root of its size, more towards the loss.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from edgegt.architecture import decoder_start, is_classifier, outputs_of, positions_of
from edgegt.budget import (
    Need,
    Probes,
    check_memory,
    check_time,
    flops_budget,
    plan_probes,
    probe_seconds,
    smallest_bytes,
    within_memory,
)
from edgegt.cost import BatchShape, CostTable
from edgegt.data import Example, Row
from edgegt.device import Resolved
from edgegt.errors import BudgetError, InputError
from edgegt.job import (
    NO_CLASSES,
    ONLY_THE_HOUSEHOLD,
    Schedule,
    head_forms,
    make_schedule,
    memory_budget,
    read_corpus,
    resolve,
    rows_to_keep,
    within_positions,
)
from edgegt.log import Log
from edgegt.options import RunOptions
from edgegt.planner import Plan, Problem, plan
from edgegt.profile import Profile
from edgegt.rates import Rates, joules, of_profile
from edgegt.units import format_bytes, format_duration, format_energy, format_flops
from edgegt.value import values_of

PROXY = "proxy: square root of a weight's size, rising towards the loss (importance needs the weights and the data)"
DEFAULT_STEPS = 100
DEFAULT_TOKENS, DEFAULT_KEPT = 256, 64
DEFAULT_HEAD_ROWS = 8192
FLOOR_BYTES = 512 * 2**20
# Kinds of devices that compute on a GPU; the others have the compiled kernels.
ON_GPU = ("jetson", "geforce")
SPREAD = {"flops": (0.98, 1.0, 1.0), "bytes": (0.93, 1.0, 1.0), "seconds": (0.6, 1.0, 2.5)}


@dataclass(frozen=True)
class Batches:
    """The batches that are planned for, in words too. used_tokens: different tokens in them, each a row of the head.

    train: the rows, where there are data.
    """

    schedule: Schedule
    words: str
    used_tokens: int
    train: tuple[Example, ...] = ()


@dataclass(frozen=True)
class Prospect:
    """An outlook with what it was computed from. plan: None when nothing fits. probe_flops, probe_s: of importance."""

    outlook: dict[str, Any]
    problem: Problem
    plan: Plan | None
    probe_flops: int
    probe_s: float


def look_ahead(options: RunOptions, log: Log) -> dict[str, Any]:
    """The plan of the first round as plain data; `fits` says whether anything can be trained within every budget."""
    return prospect(options, log).outlook


def prospect(options: RunOptions, log: Log) -> Prospect:
    """`look_ahead`, with the problem and the plan."""
    from edgegt import home
    from edgegt.classifier import check_writes
    from edgegt.model import head_is_apart
    from edgegt.source import open_source, read_config, stored_names
    from edgegt.trace import trace

    if options.strategy == "full":
        raise InputError("--strategy full trains everything at rho 1: there is nothing to plan; leave --strategy out")
    if options.data is not None and options.model is None:
        raise InputError(ONLY_THE_HOUSEHOLD)
    name = options.model or str(home.MODEL)
    resolved, host = resolve(options)
    asked = options.memory_bytes or resolved.profile.budget_bytes
    memory_bytes, less = memory_budget(options, resolved, host) if resolved.on_board else (asked, None)
    if less:
        log.fallback(less)
    config = read_config(name, for_run=False)
    if options.classifies:
        config, batches = classified_batches(options, name, config)
    else:
        check_writes(config)
        options = within_positions(options, positions_of(config))
        batches = batches_of(options, name, config)
    table = trace(config, causal=resolved.profile.kind not in ON_GPU)
    has_files = getattr(config, "text_config", None) is None and stored_names(name) is not None
    if has_files and head_is_apart(config, open_source(name)):
        table = table.with_head_apart()
    return prospect_of(options, resolved, memory_bytes, table, config, name, batches)


def batches_of(options: RunOptions, model: str, config: Any) -> Batches:
    """The batches of --data, or of the household, or stated default ones."""
    from edgegt.source import load_tokenizer, locate

    if options.data is not None or options.model is None:
        corpus = read_corpus(options, load_tokenizer(locate(model, weights=False)), decoder_start(config))
        schedule = make_schedule(options, corpus.train)
        longest = max(shape.tokens for shape in schedule.shapes)
        words = f"{corpus.name} ({corpus.format}, {corpus.layout}): {schedule.steps} steps of "
        words += f"{options.batch_size} rows, at most {longest} tokens"
        return Batches(schedule, words, len(corpus.used_tokens), corpus.train)
    tokens = min(DEFAULT_TOKENS, options.max_length)
    shape = BatchShape(options.batch_size, tokens, min(DEFAULT_KEPT, tokens))
    steps = options.steps or DEFAULT_STEPS
    words = f"default: {steps} steps of {shape.rows} rows x {tokens} tokens, {shape.kept} of them completion"
    if getattr(config, "is_encoder_decoder", False):
        words = f"default: {steps} steps of {shape.rows} rows x {tokens} encoder and {shape.kept} decoder tokens"
    used = DEFAULT_HEAD_ROWS
    if 3 * used < vocabulary_of(config):
        words += f"; {used} different tokens"
    return _stated(options, steps, shape, words, used)


def _stated(options: RunOptions, steps: int, shape: BatchShape, words: str, used: int) -> Batches:
    """Batches of one shape, of rows that come twice, which counts where hidden states are kept."""
    words += "" if options.cache == "off" else "; each row twice"
    epoch, size = -(-steps // 2), shape.rows
    firsts = [(step // epoch, step % epoch * size) for step in range(steps)]
    batches = tuple((float(number), tuple(range(first, first + size))) for number, first in firsts)
    train = tuple(Example((row,) * shape.tokens, (row,), Row("", "", row + 1)) for row in range(epoch * size))
    return Batches(Schedule(batches, (shape,) * steps, (steps,)), words, used, train)


def classified_batches(options: RunOptions, model: str, config: Any) -> tuple[Any, Batches]:
    """The same for classification, and the config with its classes: two, where no data say which there are."""
    from edgegt.classifier import as_classifier, classifier_positions, known_labels, reading_of
    from edgegt.source import load_tokenizer, locate, stored_names

    if options.model is None:
        raise InputError(NO_CLASSES)
    reading, stored = reading_of(config), stored_names(model)
    options = within_positions(options, classifier_positions(config))
    if options.data is not None:
        corpus = read_corpus(options, load_tokenizer(locate(model, weights=False), False), None, reading)
        schedule = make_schedule(options, corpus.train)
        words = (
            f"{corpus.name} ({corpus.format}, {corpus.layout}, {len(corpus.labels)} classes): {schedule.steps} steps"
        )
        words += f" of {options.batch_size} rows, at most {max(shape.tokens for shape in schedule.shapes)} tokens"
        return as_classifier(config, corpus.labels, options.seed, stored), Batches(schedule, words, 0, corpus.train)
    tokens, labels = min(DEFAULT_TOKENS, options.max_length), known_labels(config) or ("0", "1")
    shape, steps = BatchShape(options.batch_size, tokens, 1), options.steps or DEFAULT_STEPS
    words = f"default: {steps} steps of {shape.rows} rows x {tokens} tokens, {len(labels)} classes"
    return as_classifier(config, labels, options.seed, stored), _stated(options, steps, shape, words, 0)


def vocabulary_of(config: Any) -> int:
    """Number of tokens that the model of this transformers config knows, or of the classes."""
    return outputs_of(config)


def prospect_of(
    options: RunOptions,
    resolved: Resolved,
    memory_bytes: int,
    table: CostTable,
    config: Any,
    name: str,
    batches: Batches,
) -> Prospect:
    """The plan of the first round, its problem and the outlook, for a model that was traced before."""
    schedule, profile = batches.schedule, resolved.profile
    longest = BatchShape(1, max(s.tokens for s in schedule.shapes), max(s.kept for s in schedule.shapes))
    vocabulary = vocabulary_of(config)
    rates = of_profile(profile)
    heads = (None,) if is_classifier(config) else head_forms(batches.used_tokens, vocabulary)
    copied = table.largest_weight if profile.kind in ON_GPU else 0
    need = Need(table, FLOOR_BYTES, vocabulary, longest, head_rows=heads, rates=rates, copy_bytes=copied)
    limit, bytes_per_s = 0 if table.encoder_decoder else profile.cache_bytes, profile.storage_bytes_per_s
    keepable = partial(rows_to_keep, options, batches.train, schedule, table.width, limit, bytes_per_s)
    need = replace(need, rows=keepable() if options.cache != "off" else None, spare=keepable)
    need = within_memory(options, need, schedule, memory_bytes)
    rho, seconds = options.rho or profile.rho, options.seconds_of(profile)
    full = table.full_work().total(schedule.shapes)
    probes = Probes(0, 0)
    if options.measures_importance:
        probes = plan_probes(options, schedule, rho, need, memory_bytes)
    probe_flops = len(schedule.rounds) * table.probe_work().total(probes.shapes(schedule))
    probe_s = probe_seconds(need, schedule, probes)
    values = values_of(proxy_importance(table), table)
    left = None if seconds is None else seconds - probe_s
    problem = need.problem(options, schedule.shapes, values, int(rho * full) - probe_flops, memory_bytes, left)
    chosen, refusal = None, None
    try:
        flops_budget(rho, options, need, schedule, probes)
        check_memory(memory_bytes, options, need, schedule)
        check_time(seconds, 0.0, options, need, schedule, probes)
        chosen = plan(problem, options.strategy, options.seed)
    except BudgetError as error:
        refusal = str(error)
    outlook: dict[str, Any] = {
        "fits": chosen is not None,
        "device": profile.name,
        "notice": resolved.notice,
        "model": {"name": name, "architecture": (config.architectures or [config.model_type])[0],
                  "parameters": table.parameters, "base_bytes": table.base_bytes, "layers": table.blocks},
        "budget": {"rho": rho, "flops": int(rho * full), "memory_bytes": memory_bytes, "seconds": seconds},
        "smallest_bytes": smallest_bytes(options, need, schedule), "full_flops": full,
        "batch": batches.words, "steps": schedule.steps, "importance": PROXY, "refusal": refusal,
        "floor_bytes": FLOOR_BYTES, "weights": len(table.weights), "selected": [], "trained_parameters": 0,
        "lowest_layer": None, "head": False, "predicted": {},
        "micro_batch": None, "accumulation": None, "recompute": [], "formats": None,
        "head_rows": None, "memory": {}, "optimality_gap": None, "notes": [], "boundary": 0, "cache": {},
        "streamed": False,
    }  # fmt: skip
    if chosen is not None:
        outlook |= _chosen(chosen, problem)
        outlook["predicted"] = _predicted(chosen, problem, profile, need.rates, probe_flops, probe_s)
    return Prospect(outlook, problem, chosen, probe_flops, probe_s)


def _chosen(chosen: Plan, problem: Problem) -> dict[str, Any]:
    """What the plan decides, as plain data."""
    rows, table = chosen.head_rows, problem.table
    table = table if rows is None else table.with_head_rows(rows)
    mask = table.mask(chosen.selected)
    trained = [weight for bit, weight in enumerate(table.weights) if mask >> bit & 1]
    layers = [weight.block for weight in trained if 0 <= weight.block < table.blocks]
    return {
        "selected": list(chosen.selected), "micro_batch": chosen.micro_batch, "accumulation": chosen.accumulation,
        "trained_parameters": sum(weight.numel for weight in trained), "lowest_layer": min(layers, default=None),
        "head": any(weight.kind == "head" for weight in trained),
        "recompute": list(chosen.recompute), "formats": asdict(chosen.formats), "head_rows": rows,
        "memory": chosen.memory, "notes": list(chosen.notes), "optimality_gap": chosen.optimality_gap,
        "boundary": chosen.boundary, "cache": chosen.cached, "streamed": problem.streams,
    }  # fmt: skip


def _predicted(
    chosen: Plan, problem: Problem, profile: Profile, rates: Rates | None, probe_flops: int, probe_s: float
) -> dict[str, Any]:
    """What the plan would cost: FLOPs of the whole run, peak bytes, seconds and joules of steps and run."""
    train_s, flops = chosen.seconds or 0.0, chosen.flops + probe_flops
    tokens, table = problem.totals.token, problem.table
    tokens += problem.totals.kept if table.encoder_decoder else 0
    counts = Counter(problem.shapes)
    full_s = sum(count * rates.full_step_s(table, shape) for shape, count in counts.items()) if rates else None
    return {
        "flops_ratio": flops / problem.full_flops, "flops": _spread(flops, "flops"),
        "probe_flops": probe_flops, "full_flops": problem.full_flops,
        "peak_bytes": _spread(chosen.peak_bytes, "bytes"),
        "step_s": _spread(train_s / problem.steps, "seconds"), "train_s": _spread(train_s, "seconds"),
        "probe_s": probe_s, "full_s": full_s, "tokens_per_s": tokens / train_s if train_s else None,
        "watts": profile.power.watts, "energy_j": _spread(joules(profile, train_s + probe_s), "seconds"),
    }  # fmt: skip


def proxy_importance(table: CostTable) -> dict[str, float]:
    """A stand-in for importance: square root of the size, up to twice as much at the top of the stack."""
    return {w.name: math.sqrt(w.numel) * (1 + max(0, w.block) / max(1, table.blocks)) for w in table.weights}


def _spread(value: float, kind: str) -> dict[str, float]:
    low, expected, high = (factor * value for factor in SPREAD[kind])
    return {"low": low, "expected": expected, "high": high}


def outlook_text(outlook: dict[str, Any]) -> str:
    """The outlook for a person."""
    model, budget = outlook["model"], outlook["budget"]
    limits = [format_bytes(budget["memory_bytes"]), f"rho {budget['rho']:g}"]
    limits += [f"at most {format_duration(budget['seconds'])}"] if budget["seconds"] is not None else []
    lines = [
        f"model      {model['name']} ({model['architecture']}, {_count(model['parameters'])} parameters, "
        f"{format_bytes(model['base_bytes'])} in int8)",
        f"device     {outlook['device']}: {', '.join(limits)}",
    ]
    lines += [f"           ({outlook['notice']})"] if outlook["notice"] else []
    lines.append(f"batch      {outlook['batch']}")
    if not outlook["fits"]:
        return "\n".join([*lines, f"fits       no: {outlook['refusal']}"])
    lines.append(f"fits       yes, from about {format_bytes(outlook['smallest_bytes'])}")
    return "\n".join([*lines, *_choice_lines(outlook), *_cost_lines(outlook)])


def _choice_lines(outlook: dict[str, Any]) -> list[str]:
    """What is trained and how."""
    selected, layers, again = outlook["selected"], outlook["model"]["layers"], outlook["recompute"]
    trained = f"{len(selected)} of {outlook['weights']} tensors, {_count(outlook['trained_parameters'])} parameters"
    if outlook["lowest_layer"] is not None:
        trained += f"; layers {outlook['lowest_layer']} to {layers - 1}"
    if outlook["head"]:
        rows = outlook["head_rows"]
        trained += "; the whole head" if rows is None else f"; {rows} rows of the head"
    shown = ", ".join(selected[:3]) + (f", and {len(selected) - 3} more" if len(selected) > 3 else "")
    batch = f"micro-batch {outlook['micro_batch']}"
    batch += f", {outlook['accumulation']} accumulated" if outlook["accumulation"] > 1 else ""
    kept = f"{len(again)} of {layers} layers recomputed ({_ranges(again)})" if again else "no layer recomputed"
    if outlook["streamed"]:
        kept += f"; the base streamed, {format_bytes(outlook['memory']['base'])} of it in memory"
    if outlook["boundary"]:
        kept += f"; what the lowest {outlook['boundary']} give is kept: {format_bytes(outlook['cache']['bytes'])}"
    gap = outlook["optimality_gap"]
    formats = f"{outlook['formats']['master']} masters, {outlook['formats']['states']} AdamW states"
    return [
        f"trained    {trained}",
        f"           {shown}",
        f"           ({outlook['importance']})",
        f"how        {batch}; {kept}; {formats}",
        f"           {'the' if gap < 5e-5 else f'within {gap:.2%} of the'} best possible choice",
    ]


def _cost_lines(outlook: dict[str, Any]) -> list[str]:
    """What it would cost."""
    predicted = outlook["predicted"]
    flops, peak, step, whole = (predicted[key] for key in ("flops", "peak_bytes", "step_s", "train_s"))
    energy, rate, full_s = predicted["energy_j"], predicted["tokens_per_s"], predicted["full_s"]
    lines = [
        f"FLOPs      {predicted['flops_ratio']:.1%} of full fine-tuning: {format_flops(flops['expected'])} "
        f"(at most {format_flops(flops['high'])}) of {format_flops(predicted['full_flops'])}",
        f"memory     {format_bytes(peak['expected'])} ({format_bytes(peak['low'])} to {format_bytes(peak['high'])}), "
        f"of it {format_bytes(outlook['floor_bytes'])} for the program",
        f"time       {format_duration(step['expected'])} per step ({format_duration(step['low'])} to "
        f"{format_duration(step['high'])}), {format_duration(whole['expected'])} for {outlook['steps']} steps, "
        "from the profile's rates",
    ]
    if rate and full_s:
        lines.append(f"           {rate:,.0f} tokens/s; full fine-tuning there: {format_duration(full_s)}")
    lines.append(
        f"energy     {format_energy(energy['expected'])} ({format_energy(energy['low'])} to "
        f"{format_energy(energy['high'])}) at {predicted['watts']:g} W"
    )
    return lines


def _count(value: float) -> str:
    """'6.74 billion', '26.2 million', '4,096'."""
    for word, size in (("billion", 1e9), ("million", 1e6)):
        if value >= size:
            return f"{value / size:.3g} {word}"
    return f"{value:,.0f}"


def _ranges(numbers: list[int]) -> str:
    """'0 to 3, 7' for 0, 1, 2, 3, 7."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]} to {part[-1]}" for part in parts)
