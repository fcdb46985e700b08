"""What a run folder says, as frozen values, and report.json made of them: the contract that other programs read.

A run may have been interrupted anywhere, so every file but run.json may be missing, and so may keys in it. What the
run did not sum up itself (`measured`) is read from the last lines of metrics.jsonl; what nobody knows stays None.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgegt.errors import InputError

CO2_KG_PER_KWH = 0.48
CO2_SOURCE = "world average electricity 2023, Ember"
JOULES_PER_WH = 3600

Tree = dict[str, Any]


@dataclass(frozen=True)
class RunFacts:
    """One run folder: its JSON files as they are, metrics and plans in order, no example if the user wanted none."""

    folder: Path
    options: Tree
    run: Tree
    plans: tuple[Tree, ...]
    metrics: tuple[Tree, ...]
    before: Tree | None
    after: Tree | None
    examples: tuple[Tree, ...]
    events: tuple[Tree, ...] = ()
    ceiling_c: float | None = None

    @property
    def finished(self) -> bool:
        return bool(self.run.get("finished")) and self.after is not None

    @property
    def last_step(self) -> int:
        return int(self.metrics[-1].get("step", len(self.metrics))) if self.metrics else 0

    def part(self, name: str) -> Tree:
        """A section of run.json, empty when the run did not get that far."""
        value = self.run.get(name)
        return value if isinstance(value, dict) else {}


@dataclass(frozen=True)
class Energy:
    """Energy of training on the device at its power mode, and of full fine-tuning at the same FLOPs per second.

    predicted: the time is not the measured one, which is another machine's, but the one predicted for the device.
    """

    watts: float
    train_s: float
    full_s: float | None
    predicted: bool

    @property
    def wh(self) -> float:
        return self.watts * self.train_s / JOULES_PER_WH

    @property
    def full_wh(self) -> float | None:
        return None if self.full_s is None else self.watts * self.full_s / JOULES_PER_WH


def number(tree: Mapping[str, Any], key: str) -> float | None:
    """The finite number under `key`, or None."""
    value = tree.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value


def read_facts(folder: Path) -> RunFacts:
    """Read a run folder. Raises: InputError when it is none, or when a file in it is not JSON."""
    if not folder.is_dir():
        raise InputError(f"run folder '{folder}' does not exist: give the folder that `edgegt run --output` wrote")
    if not (folder / "run.json").is_file():
        raise InputError(f"'{folder}' is not a run folder, it has no run.json: give the one that `edgegt run` wrote")
    options = _read_tree(folder / "options.json")
    evaluation = _read_tree(folder / "eval.json")
    plans = [_read_tree(path) for path in folder.glob("plan-*.json")]
    shown = evaluation.get("examples") if options.get("examples") is not False else None
    return RunFacts(
        folder=folder,
        options=options,
        run=_read_tree(folder / "run.json"),
        plans=tuple(sorted(plans, key=lambda plan: int(plan.get("round", 0)))),
        metrics=tuple(_read_lines(folder / "metrics.jsonl")),
        before=evaluation.get("before") or None,
        after=evaluation.get("after") or None,
        examples=tuple(shown or ()),
        events=tuple(event for line in _read_lines(folder / "events.jsonl") if (event := _event(line)) is not None),
        ceiling_c=_ceiling(folder / "profile.json"),
    )


def _read_tree(path: Path) -> Tree:
    """A JSON object, empty when the file is missing."""
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"'{path}' is not JSON ({error}): restore it, or run again with --output elsewhere") from error
    if not isinstance(tree, dict):
        raise InputError(f"'{path}' holds a {type(tree).__name__}, not an object: restore it, or run again")
    return tree


def _read_lines(path: Path) -> Iterator[Tree]:
    """The whole lines of a jsonl; a line that a killed run left half written is not one."""
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            tree = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(tree, dict):
            yield tree


def _event(line: Tree) -> Tree | None:
    """An event with the numbers that it has, None for a line that is none."""
    kind, text = line.get("kind"), line.get("text")
    if not (isinstance(kind, str) and kind and isinstance(text, str)):
        return None
    numbers = {key: value for key in ("at_s", "step", "paused_s") if (value := number(line, key)) is not None}
    return {"kind": kind[:40], "text": " ".join(text.split())[:300], **numbers}


def _ceiling(profile: Path) -> float | None:
    """The temperature at which the device of this profile should rest; None where the profile cannot be read."""
    try:
        return number(_read_tree(profile), "ceiling_c")
    except InputError:
        return None


def measured(facts: RunFacts) -> Tree:
    """What the run used; where it was stopped before it could say so, what metrics.jsonl shows so far."""
    found = {key: value for key, value in facts.part("measured").items() if value is not None}
    for key, value in _measured_so_far(facts).items():
        found.setdefault(key, value)
    flops, full = number(found, "flops"), facts.run.get("full_flops")
    if "flops_ratio" not in found and flops is not None and full:
        found["flops_ratio"] = flops / full
    return found


def _measured_so_far(facts: RunFacts) -> Tree:
    if not facts.metrics:
        return {}
    last = next((line for line in reversed(facts.metrics) if "loss" in line), facts.metrics[-1])
    elapsed = number(last, "elapsed_s")
    peaks = [peak for line in facts.metrics if (peak := number(line, "peak_bytes")) is not None]
    rates = [rate for line in facts.metrics if (rate := number(line, "tokens_per_s")) is not None]
    found = {
        "flops": number(last, "flops"),
        "peak_bytes": max(peaks, default=None),
        "tokens_per_s": sum(rates) / len(rates) if rates else None,
        "train_s": elapsed,
        "elapsed_s": elapsed,
        "step_s": elapsed / facts.last_step if elapsed is not None and facts.last_step else None,
    }
    return {key: value for key, value in found.items() if value is not None}


def energy(facts: RunFacts) -> Energy | None:
    """Energy of the training so far, or None where power or time is unknown.

    The profile's power belongs to the device: off the board it is multiplied by the time predicted for the device,
    never by this machine's. A step time of 0 means that none was predicted.
    """
    predicted = not facts.part("device").get("on_board")
    watts, train_s = number(facts.part("power"), "watts"), number(measured(facts), "train_s")
    if predicted:
        step_s = number(facts.part("predicted"), "device_step_s")
        train_s = step_s * facts.last_step if step_s and facts.last_step else None
    if watts is None or train_s is None:
        return None
    return Energy(watts, train_s, full_time(facts, train_s), predicted)


def full_time(facts: RunFacts, train_s: float) -> float | None:
    """Seconds of full fine-tuning at the rate (FLOPs per second) of a run that took `train_s`; None if unfinished."""
    flops, full = number(measured(facts), "flops"), number(facts.run, "full_flops")
    return train_s * full / flops if full and flops and facts.finished else None


def energy_basis(facts: RunFacts) -> str | None:
    """What the energy is computed from, in words; None where there is none."""
    spent, power = energy(facts), facts.part("power")
    if spent is None:
        return None
    mode, source = power.get("mode"), str(power.get("source") or "a source that is not recorded")
    if source == "profile":
        source = "the profile's power mode" + (f" {mode}" if mode else "")
    elif mode:
        source += f" (power mode {mode})"
    if spent.predicted:
        return f"predicted for the device: {source} and its predicted step time"
    return f"{source} × measured time"


def memory_terms(facts: RunFacts) -> Tree:
    """The terms of training at its largest: the run's, or those of the plan that needs most where it wrote none."""
    plans = [_bytes_by_name(plan.get("memory")) for plan in facts.plans]
    largest = max(plans, key=lambda terms: sum(terms.values()), default={})
    return _bytes_by_name(facts.run.get("memory_terms")) or largest


def _bytes_by_name(tree: Any) -> Tree:
    """Those entries of a tree that are sizes; empty for anything else."""
    return {key: value for key in tree if (value := number(tree, key)) is not None} if isinstance(tree, dict) else {}


def build_report(facts: RunFacts) -> Tree:
    """report.json as a tree: every key of the contract, None (or an empty list) where the run did not get that far."""
    budget, predicted, used = facts.part("budget"), facts.part("predicted"), measured(facts)
    predicted_keys = ("flops_ratio", "peak_bytes", "step_s", "flops", "device_step_s", "floor_bytes")
    measured_keys = ("flops_ratio", "peak_bytes", "step_s", "tokens_per_s", "flops", "floor_bytes", "train_s")
    more_measured = ("elapsed_s", "probe_flops", "peak_since_bytes", "dropped_steps", "paused_s")
    report = {
        "device": facts.part("device"),
        "model": facts.part("model"),
        "budget": {key: budget.get(key) for key in ("rho", "flops", "memory_bytes", "lowered_to_bytes")},
        "predicted": {key: predicted.get(key) for key in predicted_keys},
        "measured": {key: used.get(key) for key in (*measured_keys, *more_measured)},
        "eval": {"before": facts.before, "after": facts.after},
        "rounds": [_round(plan) for plan in facts.plans],
        "fallbacks": list(facts.run.get("fallbacks") or ()),
        "version": str(facts.run.get("version", "unknown")),
        "finished": facts.finished,
        "steps": facts.last_step,
        "strategy": facts.run.get("strategy"),
        "backend": facts.run.get("backend"),
        "full_flops": facts.run.get("full_flops"),
        "memory_terms": memory_terms(facts),
        "measured_terms": _bytes_by_name(facts.run.get("measured_terms")),
        "data": {key: value for key, value in facts.part("data").items() if key != "examples"},
        "events": list(facts.events),
        "temperature": _temperature(facts),
        "cache": _cache(facts),
        "early_stopping": facts.part("early_stopping") or None,
        **_energy_keys(facts),
    }
    finite: Tree = _finite(report)
    return finite


def _round(plan: Tree) -> Tree:
    """One round as the contract has it, and how long and how large it was."""
    kept = ("round", "first_step", "steps", "accumulation", "formats", "head_rows", "predicted", "optimality_gap")
    return {
        "selected": list(plan.get("selected") or ()),
        "recompute": list(plan.get("recompute") or ()),
        "micro_batch": plan.get("micro_batch"),
        **{key: plan.get(key) for key in kept},
    }


def _cache(facts: RunFacts) -> Tree:
    """What was kept of hidden states, all 0 without; and the seconds of training in each epoch."""
    keys = ("boundary", "rows", "hits", "visits", "bytes", "read_bytes", "saved_flops")
    epochs: dict[int, float] = {}
    for line in facts.metrics:
        epoch, step_s = number(line, "epoch"), number(line, "step_s")
        if epoch is not None and step_s is not None:
            epochs[int(epoch)] = epochs.get(int(epoch), 0.0) + step_s
    found = {key: number(facts.part("cache"), key) or 0 for key in keys}
    return {**found, "epoch_s": [epochs[epoch] for epoch in sorted(epochs)]}


def _temperature(facts: RunFacts) -> Tree:
    """The hottest that was measured, None without a sensor, and the seconds of rest for heat."""
    found = [value for line in facts.metrics if (value := number(line, "temperature_c")) is not None]
    rests = [number(event, "paused_s") or 0.0 for event in facts.events if event["kind"] == "heat"]
    return {"max_c": max(found, default=None), "ceiling_c": facts.ceiling_c, "paused_s": sum(rests)}


def _energy_keys(facts: RunFacts) -> Tree:
    spent, power = energy(facts), facts.part("power")
    wh = spent.wh if spent else None
    full_wh = spent.full_wh if spent else None
    return {
        "energy": {
            "watts": power.get("watts"),
            "source": power.get("source"),
            "mode": power.get("mode"),
            "basis": energy_basis(facts),
            "seconds": spent.train_s if spent else None,
            "wh": wh,
            "full_wh": full_wh,
        },
        "co2": {
            "kg_per_kwh": CO2_KG_PER_KWH,
            "source": CO2_SOURCE,
            "g": None if wh is None else wh * CO2_KG_PER_KWH,
            "full_g": None if full_wh is None else full_wh * CO2_KG_PER_KWH,
        },
    }


def _finite(value: Any) -> Any:
    """The same tree with None for every number that JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
