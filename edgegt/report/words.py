"""A run in words: every number of the report as text with its unit, in rows that a page can place.

Nothing here draws, and nothing is invented: a number that the run folder does not hold is 'not known'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgegt.explain import TERM_MEANINGS, phase_of
from edgegt.frontier import Frontier
from edgegt.report.facts import CO2_KG_PER_KWH, CO2_SOURCE, RunFacts, energy, energy_basis, full_time, number
from edgegt.units import format_bytes, format_duration, format_flops

MAX_EXAMPLES = 8
UNKNOWN = "not known"
Tree = Mapping[str, Any]
Row = tuple[str, ...]


def percent(share: float | None) -> str:
    """'48.3 %', with three significant digits."""
    return UNKNOWN if share is None else f"{100 * share:.3g} %" if abs(share) < 9.995 else f"{100 * share:.0f} %"


def _bytes(tree: Tree, key: str) -> str:
    value = number(tree, key)
    return UNKNOWN if value is None else format_bytes(value)


def _seconds(tree: Tree, key: str) -> str:
    """A duration that stays exact below a second, as step times often are."""
    value = number(tree, key)
    if value is None:
        return UNKNOWN
    return f"{1000 * value:.3g} ms" if value < 1 else f"{value:.2f} s" if value < 10 else format_duration(value)


def device_title(device: Tree) -> str:
    return str(device.get("title") or device.get("name") or "an unnamed device")


def verdict(facts: RunFacts, report: Tree) -> list[str]:
    """What came out, in plain words: loss, FLOPs and memory, then exact match where the data have one."""
    before, after = facts.before or {}, facts.after or {}
    first, last = number(before, "loss"), number(after, "loss")
    if first is not None and last is not None:
        start = f"Held-out loss {first:.2f} → {last:.2f}" + ("" if last < first else " (not better)")
    elif first is not None:
        start = f"Held-out loss {first:.2f} before training"
    else:
        start = "No held-out loss was measured"
    sentences = [start + _flops_words(report) + _memory_words(report) + "."]
    exact = [_change(before, after, "accuracy", "Accuracy on held-out rows")]
    exact.append(_change(before, after, "macro_f1", "macro-F1"))
    exact.append(_change(before, after, "exact_match", "Exact match on held-out rows"))
    exact.append(_change(before, after, "general_exact_match", "general commands"))
    words = ", ".join(text for text in exact if text)
    return [*sentences, f"{words[0].upper()}{words[1:]}."] if words else sentences


def _flops_words(report: Tree) -> str:
    ratio, rho = number(report["measured"], "flops_ratio"), number(report["budget"], "rho")
    if ratio is None:
        return ""
    so_far = "" if report["finished"] else " so far"
    over = f", over the budget of {percent(rho)}" if rho is not None and ratio > rho else ""
    return f" with {percent(ratio)} of the FLOPs of full fine-tuning{so_far}{over}"


def _memory_words(report: Tree) -> str:
    peak, limit = number(report["measured"], "peak_bytes"), number(report["budget"], "memory_bytes")
    if peak is None or limit is None:
        return ""
    return f", {'within' if peak <= limit else 'over the memory budget:'} {_of(peak, limit)}"


def _of(part: float, whole: float) -> str:
    """'3.90 of 5.00 GiB', or both units where they differ."""
    left, right = format_bytes(part), format_bytes(whole)
    same = left.split()[1] == right.split()[1]
    return f"{left.split()[0] if same else left} of {right}"


def _change(before: Tree, after: Tree, key: str, label: str) -> str:
    first, last = number(before, key), number(after, key)
    if first is None:
        return ""
    return f"{label} {percent(first)}" + (" before training" if last is None else f" → {percent(last)}")


def unfinished_text(facts: RunFacts) -> str:
    missing = [
        text
        for text, there in (
            ("no plan", facts.plans), ("no training step", facts.metrics), ("no evaluation before", facts.before),
            ("no evaluation after", facts.after),
        )
        if not there
    ]  # fmt: skip
    when = f"after step {facts.last_step}" if facts.last_step else "before the first step"
    found = f"It was stopped {when}"
    lacks = f"; its folder holds {', '.join(missing)}" if missing else ""
    return f"This run is not finished. {found}{lacks}. Numbers of use are those so far."


def subtitle_rows(facts: RunFacts, report: Tree) -> list[Row]:
    model, data = report["model"], report["data"]
    size = number(model, "parameters")
    about = [str(model.get("architecture") or ""), f"{_count(size)} parameters" if size else ""]
    training = [str(report.get(key)) for key in ("strategy", "backend") if report.get(key)]
    threads = number(facts.run, "threads")
    training += [f"{threads:.0f} thread{'' if threads == 1 else 's'}"] if threads else []
    device = [device_title(report["device"]), "" if report["device"].get("on_board") else "profile; run elsewhere"]
    return [
        ("Model", " · ".join(text for text in (str(model.get("name", UNKNOWN)), *about) if text)),
        ("Device", " · ".join(text for text in device if text)),
        ("Data", " · ".join(str(data[key]) for key in ("name", "format") if data.get(key)) or UNKNOWN),
        ("Training", " · ".join(training) or UNKNOWN),
    ]


def _count(value: float) -> str:
    for word, size in (("billion", 1e9), ("million", 1e6), ("thousand", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {word}"
    return f"{value:.0f}"


def asked_rows(facts: RunFacts) -> list[Row]:
    """Every option that has a value, as the run resolved it."""
    return [
        (f"--{key.replace('_', '-')}", str(value))
        for key, value in facts.options.items()
        if value is not None and value != "" and value is not False and value != []
    ]


def flops_rows(report: Tree) -> list[Row]:
    """The FLOPs budget and its use: label, share of full fine-tuning, count."""
    budget, predicted, used = report["budget"], report["predicted"], report["measured"]
    probe, full = number(used, "probe_flops"), number(report, "full_flops")
    rows: list[Row] = [
        ("Budget", percent(number(budget, "rho")), _flops(budget, "flops")),
        ("Predicted", percent(number(predicted, "flops_ratio")), _flops(predicted, "flops")),
        ("Measured", percent(number(used, "flops_ratio")), _flops(used, "flops")),
    ]
    if probe is not None and full:
        rows.append(("… importance, of it", percent(probe / full), _flops(used, "probe_flops")))
    cache = report["cache"]
    if cache["boundary"] and full:
        rows.append(("Saved by kept states", percent(cache["saved_flops"] / full), _flops(cache, "saved_flops")))
    return [*rows, ("Full fine-tuning", "100 %", _flops(report, "full_flops"))]


def kept_words(report: Tree) -> str:
    """'Hidden states are kept below layer 6: 99 % of rows read, 1.2 GiB from the disk.'; empty without."""
    cache = report["cache"]
    if not cache["boundary"]:
        return ""
    hits, read = percent(cache["hits"] / (cache["visits"] or 1)), format_bytes(cache["read_bytes"])
    return f"Hidden states are kept below layer {cache['boundary']}: {hits} of rows read, {read} from the disk."


def memory_rows(report: Tree) -> list[Row]:
    """The memory budget and its use: label, peak of the process, how much of it lies above the runtime floor."""
    budget, predicted, used = report["budget"], report["predicted"], report["measured"]
    rows: list[Row] = [
        ("Budget", _bytes(budget, "memory_bytes"), ""),
        ("Predicted", _bytes(predicted, "peak_bytes"), _above_floor(predicted)),
        ("Measured", _bytes(used, "peak_bytes"), _above_floor(used)),
    ]
    if number(budget, "lowered_to_bytes") is not None:
        since = f"{_bytes(used, 'peak_since_bytes')} used since"
        rows.append(("Budget from the last step back on", _bytes(budget, "lowered_to_bytes"), since))
    return rows


def _above_floor(tree: Tree) -> str:
    peak, floor = number(tree, "peak_bytes"), number(tree, "floor_bytes")
    return "" if peak is None or floor is None else f"{format_bytes(peak - floor)} above the floor"


def _flops(tree: Tree, key: str) -> str:
    value = number(tree, key)
    return UNKNOWN if value is None else format_flops(value)


def term_rows(terms: Tree, predicted_peak: float | None, found: Tree) -> list[Row]:
    """Each term of training: name, meaning, bytes predicted, share of the sum, bytes measured; then the sum, and the
    predicted peak if it is another. found: the terms that were measured; no row has the last column without any.
    """
    total = sum(terms.values()) or 1
    rows: list[Row] = [
        (name, TERM_MEANINGS.get(name, ""), format_bytes(value), percent(value / total), _measured_term(found, name))
        for name, value in terms.items()
    ]
    if not rows:
        return []
    meaning = "the terms of training" if predicted_peak != total else "the terms of training: the predicted peak"
    rows.append(("sum", meaning, format_bytes(total), "100 %", ""))
    if predicted_peak is not None and predicted_peak != total:
        meaning = "the largest of training, evaluation and importance"
        rows.append(("predicted peak", meaning, format_bytes(predicted_peak), "", ""))
    return rows if found else [row[:4] for row in rows]


def _measured_term(found: Tree, name: str) -> str:
    value = number(found, name)
    return "not separable" if value is None else format_bytes(value)


def memory_lead(terms: Tree) -> str:
    """When the predicted peak of training is."""
    return f"Training at its largest, which is {phase_of(terms)}, term by term, as predicted."


def frontier_notes(frontier: Frontier) -> list[str]:
    """What the picture of the frontier shows, and what it does not."""
    count = len(frontier.rhos) * len(frontier.memories)
    return [
        f"{count} pairs of budgets, planned with the importance measured before the first step of this run.",
        "Each line is one memory budget; a point shows the best plan in the leanest number formats.",
        "The diamond is the plan of the first round.",
    ]


def round_rows(plans: Sequence[Tree]) -> list[Row]:
    """One row per round: number, steps, tensors, parameters, formats, batch, FLOPs, peak, gap to the optimum."""
    return [_round_row(plan) for plan in plans]


def _round_row(plan: Tree) -> Row:
    first, steps = int(plan.get("first_step") or 0), int(plan.get("steps") or 0)
    candidates = plan.get("candidates") or ()
    trained = sum(_trained_numel(candidate, plan) for candidate in candidates if candidate.get("selected"))
    selected, recompute = plan.get("selected") or (), plan.get("recompute") or ()
    predicted, gap = plan.get("predicted") or {}, number(plan, "optimality_gap")
    return (
        str(plan.get("round", "")),
        f"{first}–{first + steps}",
        f"{len(selected)} of {len(candidates)}" + (f", {len(recompute)} layers recomputed" if recompute else ""),
        _count(trained),
        _formats(plan),
        f"{plan.get('micro_batch', '?')} × {plan.get('accumulation', 1)}",
        percent(number(predicted, "flops_ratio")),
        _bytes(predicted, "peak_bytes"),
        "" if gap is None else f"{100 * gap:.2g} %",
    )


def _trained_numel(candidate: Tree, plan: Tree) -> int:
    """Elements of a trained tensor: of the head, those of its trained rows."""
    numel, rows = int(number(candidate, "numel") or 0), number(plan, "head_rows")
    problem = plan.get("problem")
    vocabulary = number(problem, "vocabulary") if isinstance(problem, Mapping) else None
    if candidate.get("kind") == "head" and rows is not None and vocabulary:
        return int(numel * rows / vocabulary)
    return numel


def _formats(plan: Tree) -> str:
    """'bfloat16, 8-bit; 812 rows of the head', as far as the plan says so."""
    formats, rows = plan.get("formats"), number(plan, "head_rows")
    parts = []
    if isinstance(formats, Mapping):
        parts.append(f"{formats.get('master', '?')}, {formats.get('states', '?')}")
    return "; ".join([*parts, *([] if rows is None else [f"{rows:.0f} rows of the head"])])


def cost_rows(facts: RunFacts, report: Tree) -> list[Row]:
    """FLOPs, time, energy and CO2: label, this run, full fine-tuning, this run as a share of it."""
    spent, used = energy(facts), report["measured"]
    train_s = number(used, "train_s")
    full_s = None if train_s is None else full_time(facts, train_s)
    share = number(used, "flops_ratio") if facts.finished else None
    estimated = percent(share) if full_s is not None else ""
    rows: list[Row] = [
        ("FLOPs", _flops(used, "flops"), _flops(report, "full_flops"), percent(share) if share is not None else ""),
        ("Training time", _seconds(used, "train_s"), "" if full_s is None else format_duration(full_s), estimated),
    ]
    if spent is None:
        return [*rows, ("Energy", UNKNOWN, "", ""), ("CO₂", UNKNOWN, "", "")]
    full_wh, how, estimated = spent.full_wh, "", percent(share) if spent.full_s is not None else ""
    if spent.predicted:
        how, full = ", predicted", "" if spent.full_s is None else format_duration(spent.full_s)
        rows.append(("Time on the device, predicted", format_duration(spent.train_s), full, estimated))
    return [
        *rows,
        (f"Energy{how}", _wh(spent.wh), "" if full_wh is None else _wh(full_wh), estimated),
        (f"CO₂{how}", _co2(spent.wh), "" if full_wh is None else _co2(full_wh), estimated),
    ]


def _wh(value: float) -> str:
    return f"{value / 1000:.3g} kWh" if value >= 1000 else f"{value:.3g} Wh"


def _co2(wh: float) -> str:
    grams = wh * CO2_KG_PER_KWH
    if grams >= 1000:
        return f"{grams / 1000:.3g} kg"
    return f"{grams:.2g} g" if grams >= 0.01 else f"{1000 * grams:.2g} mg"


def cost_notes(facts: RunFacts) -> list[str]:
    """Where the numbers of `cost_rows` come from."""
    watts, basis = number(facts.part("power"), "watts"), energy_basis(facts)
    notes = ["Full fine-tuning is estimated at the rate, in FLOPs per second, that this run reached."]
    if watts is not None and basis is not None:
        notes.append(f"Energy ({watts:g} W): {basis}.")
    return [*notes, f"CO₂ at {CO2_KG_PER_KWH} kg/kWh ({CO2_SOURCE})."]


def heat_lead(facts: RunFacts, report: Tree) -> str:
    """The hottest moment against the ceiling, rests for heat, and power, as far as they are known."""
    heat = report["temperature"]
    hottest, ceiling, rested = (number(heat, key) for key in ("max_c", "ceiling_c", "paused_s"))
    watts = [value for line in facts.metrics if (value := number(line, "power_w")) is not None]
    parts = []
    if hottest is not None:
        against = "" if ceiling is None else f", the ceiling is {ceiling:g} °C"
        parts.append(f"At most {hottest:.1f} °C{against}.")
    if hottest is not None or rested:
        parts.append(f"{format_duration(rested)} of rest for heat." if rested else "No rest for heat.")
    if watts:
        parts.append(f"{sum(watts) / len(watts):.1f} W on average where it was measured, {max(watts):.1f} W at most.")
    return " ".join(parts)


def time_rows(report: Tree) -> list[Row]:
    """Seconds per step, predicted and measured on this machine, and what is predicted for the device elsewhere."""
    predicted, used, device = report["predicted"], report["measured"], report["device"]
    guess, found = number(predicted, "step_s"), number(used, "step_s")
    ratio = f"{found / guess:.2f} × predicted" if guess and found is not None else ""
    rows: list[Row] = [
        ("This machine, predicted", _seconds(predicted, "step_s"), ""),
        ("This machine, measured", _seconds(used, "step_s"), ratio),
    ]
    rate = number(used, "tokens_per_s")
    if rate is not None:
        rows.append(("Throughput, measured", f"{rate:,.0f} tokens/s".replace(",", "\u202f"), ""))
    if not device.get("on_board"):
        note = "not checkable here"
        rows.append((f"{device_title(device)}, predicted", _seconds(predicted, "device_step_s"), note))
    return rows


def data_rows(data: Tree) -> list[Row]:
    """What became of the rows, and how many tokens carried the loss."""
    dropped = data.get("dropped") or {}
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
    total = f"{sum(dropped.values()):,}" + (f" ({reasons})" if reasons else "")
    labels = (("rows", "Rows read"), ("kept", "Kept"), ("cut", "of these cut to length"))
    rows: list[Row] = [(label, _integer(data, key)) for key, label in labels]
    rows.append(("Dropped", total))
    later = [("train_rows", "Trained on"), ("eval_rows", "Held out")]
    if classes := data.get("labels"):
        return [*rows, *((label, _integer(data, key)) for key, label in later), ("Classes", f"{len(classes):,}")]
    later.append(("supervised_tokens", "Supervised tokens"))
    return [*rows, *((label, _integer(data, key)) for key, label in later)]


def held_out_rows(facts: RunFacts) -> list[Row]:
    """The evaluation before and after, on the same rows."""
    before, after = facts.before or {}, facts.after or {}
    rows = []
    for key, label, text in (
        ("loss", f"Loss (nats per {'row' if 'accuracy' in before else 'token'})", "{:.3f}".format),
        ("accuracy", "Accuracy", percent),
        ("macro_f1", "Macro-F1", percent),
        ("perplexity", "Perplexity", "{:.4g}".format),
        ("exact_match", "Exact match", percent),
        ("general_exact_match", "Exact match, general check", percent),
        ("tokens", "Supervised tokens", "{:,.0f}".format),
        ("rows", "Rows", "{:,.0f}".format),
    ):
        pair = number(before, key), number(after, key)
        if pair != (None, None):
            rows.append((label, *("" if value is None else text(value) for value in pair)))
    return rows or [("Not evaluated yet", "", "")]


def _integer(data: Tree, key: str) -> str:
    value = number(data, key)
    unit = "tokens" if "tokens" in key else "rows"
    return UNKNOWN if value is None else f"{value:,.0f} {unit}"


def example_rows(facts: RunFacts) -> list[tuple[str, str, str, str, bool, bool]]:
    """Prompt, reference, answers before and after, and whether each answer is the reference exactly."""
    rows = []
    for example in facts.examples[:MAX_EXAMPLES]:
        prompt, reference, before, after = (
            str(example.get(key) or "").strip() for key in ("prompt", "reference", "before", "after")
        )
        rows.append((prompt, reference, before, after, before == reference, after == reference))
    return rows
