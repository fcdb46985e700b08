"""Which device profile `--device` means on this machine, and how profiles are listed and explained."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgegt.errors import InputError, nearest
from edgegt.host import Host
from edgegt.profile import TRAINING_RATES, Profile, load_profile, profile_names, profiles_dir
from edgegt.units import GIB, format_bytes, format_duration

JETSON_DEFAULT = "jetson-orin-nano-8gb"


@dataclass(frozen=True)
class Resolved:
    """What --device meant. `notice`: one line for the user; `on_board`: this machine is the device."""

    profile: Profile
    notice: str | None
    on_board: bool


def resolve_device(text: str, host: Host) -> Resolved:
    """The profile that --device names: a shipped name, a path to a TOML file, 'jetson' or 'auto'.

    Raises: InputError for an unknown name or a profile that is wrong.
    """
    if text == "auto":
        return _resolve_auto(host)
    if text == "jetson":
        return _resolve_jetson(host)
    if text.endswith(".toml") or "/" in text or os.sep in text:
        profile = load_profile(Path(text))
        on_board = any(_mentions(profile, kind, name) for kind, name, _ in _identities(host))
    elif text in profile_names():
        profile = _shipped(text)
        found = _recognise(host)
        on_board = found is not None and found[0].name == text
    else:
        known = [*profile_names(), "jetson", "auto"]
        close = nearest(text.lower(), known) or nearest(next((n for n in known if text.lower() in n), ""), known)
        raise InputError(
            f"--device '{text}' is unknown{close}; `edgegt devices` lists all {len(known) - 2}, "
            "or give the path of a .toml profile"
        )
    away = f"this machine is not '{profile.name}': time is predicted for it, and measured here"
    return Resolved(profile, None if on_board else away, on_board)


def _resolve_jetson(host: Host) -> Resolved:
    """The Jetson that this is, or the default Jetson with a line that says so."""
    found = _recognise(host)
    if found is not None and found[0].kind == "jetson":
        return Resolved(found[0], f"jetson: {found[1]}", True)
    here = f"no profile for the board '{host.model}'" if "Jetson" in (host.model or "") else "not on a Jetson"
    notice = f"{here}: using the profile of {JETSON_DEFAULT}; time is predicted for it, and measured here"
    return Resolved(_shipped(JETSON_DEFAULT), notice, False)


def _resolve_auto(host: Host) -> Resolved:
    """This machine's profile, or the x86 laptop that is nearest in memory, and why."""
    found = _recognise(host)
    if found is not None:
        return Resolved(found[0], f"auto: {found[1]}", True)
    name = "laptop-x86-16gb" if host.usable_bytes >= 12 * GIB else "laptop-x86-8gb"
    seen = host.model or host.cuda_name or host.cpu
    notice = (
        f"auto: no profile for '{seen}', using {name} because {format_bytes(host.usable_bytes)} of memory can be "
        "used; time is predicted for it, and measured here"
    )
    return Resolved(_shipped(name), notice, False)


def _shipped(name: str) -> Profile:
    return load_profile(profiles_dir() / f"{name}.toml")


def _identities(host: Host) -> Iterator[tuple[str, str, int]]:
    """What this machine calls itself, surest first: key in [match], name, memory that tells variants apart."""
    if host.model:
        yield "device_tree", host.model, host.total_bytes
    if host.cuda_name:
        yield "cuda", host.cuda_name.removeprefix("NVIDIA "), host.cuda_bytes or host.total_bytes
    yield "cpu", host.cpu, host.total_bytes


def _mentions(profile: Profile, key: str, name: str) -> bool:
    """A device-tree model contains the text; CUDA and CPU names are equal to it ('RTX 4070' is no 'RTX 4070 Ti')."""
    words = profile.match[key]
    return any(word in name for word in words) if key == "device_tree" else name in words


def _recognise(host: Host) -> tuple[Profile, str] | None:
    """The shipped profile of this machine and why, by model and, among its variants, by the nearest memory."""
    profiles = [_shipped(name) for name in profile_names()]
    for key, name, memory in _identities(host):
        variants = [profile for profile in profiles if _mentions(profile, key, name)]
        if variants:
            best = min(variants, key=lambda profile: abs(profile.memory_bytes - memory))
            reason = f"using {best.name}, recognised by its name '{name}' and {format_bytes(memory)} of memory"
            if not 0.75 <= memory / best.memory_bytes <= 1.1:
                reason += f" (the profile has {format_bytes(best.memory_bytes)}: its default budget may not suit)"
            return best, reason
    return None


def devices_json() -> list[dict[str, Any]]:
    """Every shipped profile as a plain dict, by name."""
    return [_shipped(name).to_json() for name in profile_names()]


def list_lines() -> list[str]:
    """The table of `edgegt devices`: a header, one line per profile, and how to read on."""
    rows: list[tuple[str, ...]] = [("NAME", "MEMORY", "BUDGET", "INT8", "FP16", "FP32", "BANDWIDTH", "POWER")]
    for profile in [_shipped(name) for name in profile_names()]:
        rates = [_rate_text(key, profile.rates_flops_per_s.get(key), 3) for key in ("int8", "fp16", "fp32")]
        sizes = [f"{count / GIB:g} GiB" for count in (profile.memory_bytes, profile.budget_bytes)]
        speed = _speed_text(profile.bandwidth_bytes_per_s)
        rows.append((profile.name, *sizes, *rates, speed, f"{profile.power.watts:g} W"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, len(widths)))]) for row in rows
    ]
    rule = "Rates are dense peaks, budget the default memory budget; `edgegt devices show NAME` explains every number."
    return [*lines, "", *textwrap.wrap(rule, 100)]


def explain(profile: Profile) -> str:
    """The text of `edgegt devices show NAME`: every number with its unit and source, at most 100 columns wide."""
    memory = "unified memory" if profile.unified else "its own memory"
    facts = [profile.kind, memory]
    if profile.compute_capability:
        facts.append(f"compute capability {profile.compute_capability}")
    if profile.jetpack:
        facts.append(f"JetPack {profile.jetpack}")
    lines = [f"{profile.name}: {profile.title}", ", ".join(facts), *textwrap.wrap(profile.notes, 100), ""]
    rows = list(_numbers(profile))
    wide_key, wide_value = (max(len(row[column]) for row in rows) for column in (0, 1))
    indent = " " * (wide_key + wide_value + 4)
    for key, value in rows:
        head = f"{key.ljust(wide_key)}  {value.rjust(wide_value)}  "
        lines += textwrap.wrap(profile.sources[key], 100, initial_indent=head, subsequent_indent=indent)
    usual = ", ".join(f"{key} {_rate_text(key, profile.rate(key))}" for key in profile.rates_flops_per_s)
    lines += ["", *textwrap.wrap(f"In its default power mode, {profile.power.name}: {usual}.", 100)]
    lines += ["Sources: S datasheet or vendor text seen, T third-party page seen, K not seen.", f"File: {profile.path}"]
    return "\n".join(lines)


def _numbers(profile: Profile) -> Iterator[tuple[str, str]]:
    """Every number that has a source, by its key in the file, as text with its unit."""
    yield "memory.total", format_bytes(profile.memory_bytes)
    yield "memory.reserved", format_bytes(profile.reserved_bytes)
    yield "memory.bandwidth", _speed_text(profile.bandwidth_bytes_per_s)
    for key, rate in profile.rates_flops_per_s.items():
        yield f"rates.{key}", _rate_text(key, rate)
    for key, field in TRAINING_RATES.items():
        if field in profile.training_rates:
            yield f"rates.{key}", training_rate_text(field, profile.training_rates[field])
    for mode in profile.power_modes:
        label = f"power.{mode.name}"
        yield f"{label}.watts", f"{mode.watts:g} W"
        if f"{label}.rate_scale" in profile.sources:
            yield f"{label}.rate_scale", f"x {mode.rate_scale:g}"
        if f"{label}.bandwidth" in profile.sources:
            yield f"{label}.bandwidth", _speed_text(mode.bandwidth_bytes_per_s)
    yield "storage.cache", format_bytes(profile.cache_bytes)
    yield "storage.read", _speed_text(profile.storage_bytes_per_s)
    yield "budget.rho", f"{profile.rho:g}"
    yield "budget.memory", format_bytes(profile.budget_bytes)
    yield "thermal.ceiling", f"{profile.ceiling_c:g} C"


def _rate_text(number_format: str, rate: float | None, digits: int = 4) -> str:
    if rate is None:
        return "-"
    unit = "OPS" if number_format == "int8" else "FLOPS"
    return f"{rate / 1e12:.{digits}g} T{unit}" if rate >= 1e12 else f"{rate / 1e9:.{digits}g} G{unit}"


def training_rate_text(field: str, rate: float) -> str:
    """A field of `rates.Rates` as text with its unit."""
    if field.endswith("_s"):
        return format_duration(rate)
    if field.endswith("_bytes"):
        return _speed_text(float(f"{rate:.4g}"))
    if field in ("logits", "optimizer", "optimizer_float32"):
        return f"{rate / 1e6:.4g} M/s"
    return _rate_text("int8" if field.startswith("int8") else "float", rate, 3)


def _speed_text(rate: float) -> str:
    return f"{rate / 1e9:g} GB/s" if rate >= 1e9 else f"{rate / 1e6:g} MB/s"
