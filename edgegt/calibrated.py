"""What was measured on a machine as a device profile: TOML, every number with its source.

What cannot be measured (watts, temperature ceiling, how much of the memory to leave to other programs) is carried over
from the profile that comes nearest, and its source says so.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from edgegt.host import Host
from edgegt.profile import TRAINING_RATES, Profile
from edgegt.rates import Rates
from edgegt.units import MIB, format_bytes

_RATE_UNITS = {
    "int8": (("TOPS", 1e12), ("GOPS", 1e9)),
    "float": (("TFLOPS", 1e12), ("GFLOPS", 1e9)),
    "bytes": (("GB/s", 1e9), ("MB/s", 1e6)),
    "elements": (("G/s", 1e9), ("M/s", 1e6)),
    "seconds": (("ms", 1e-3), ("us", 1e-6)),
}


@dataclass(frozen=True)
class Measured:
    """What was measured. half: FLOP/s of 16-bit products by format, where a GPU has them; storage: bytes/s, and how.

    width: of the linears that were measured.
    """

    backend: str
    width: int
    rates: Rates
    half: dict[str, float]
    bandwidth: float
    storage: float | None
    storage_how: str
    gpu: str | None
    gpu_bytes: int
    gpu_unified: bool
    capability: str


@dataclass(frozen=True)
class Place:
    """Where it was measured. nearest: the profile to carry over from; free_bytes: of the disk; date: as in the text."""

    host: Host
    nearest: Profile
    free_bytes: int
    date: str


def profile_text(name: str, measured: Measured, place: Place) -> str:
    """The profile as TOML, every number with its source; `name` must be the name of its file without .toml."""
    host, nearest, date = place.host, place.nearest, place.date
    here = f"measured by edgegt calibrate, {date}"
    carried = f"carried over from profile {nearest.name}"
    discrete = measured.gpu is not None and not measured.gpu_unified
    total = (measured.gpu_bytes if discrete else host.usable_bytes) // MIB
    reserved = max(1, round(total * nearest.reserved_bytes / nearest.memory_bytes))
    budget = min(total - reserved, max(1, round(total * nearest.budget_bytes / nearest.memory_bytes)))
    cache = max(1, min(nearest.cache_bytes, place.free_bytes // 2) // MIB)
    watts = nearest.power
    sources: dict[str, str] = {}

    def number(key: str, value: str, source: str) -> str:
        sources[key] = source
        return f"{key.rpartition('.')[2]} = {value}"

    available = f"{format_bytes(host.available_bytes)} of the process's memory were available then"
    piece = f"{here}: width {measured.width}, backend {measured.backend}, quantising included"
    lines = [
        "[device]",
        f"name = {_quoted(name)}",
        f"title = {_quoted(measured.gpu or host.model or host.cpu)}",
        f"kind = {_quoted(_kind(measured, nearest))}",
        f"unified = {'false' if discrete else 'true'}",
        "calibrated = true",
        *([f"compute_capability = {_quoted(measured.capability)}"] if measured.capability else []),
        f"notes = {_quoted(f'Written by edgegt calibrate, {date}: rates are what was reached here, not peaks.')}",
        "",
        "[match]",
        *_match(host, measured),
        "",
        "[memory]",
        number("memory.total", f'"{total} MiB"', f"{here}; {available}"),
        number("memory.reserved", f'"{reserved} MiB"', f"{carried}: its share of the memory"),
        number("memory.bandwidth", _amount(measured.bandwidth, "bytes"), f"{here}: one array read, one written"),
        "",
        "[rates]",
        number("rates.int8", _amount(measured.rates.int8, "int8"), piece),
        *(number(f"rates.{key}", _amount(rate, "float"), here) for key, rate in sorted(measured.half.items())),
        number("rates.fp32", _amount(measured.rates.float32, "float"), here),
        *(
            number(f"rates.{key}", _amount(getattr(measured.rates, field), _unit_of(field)), here)
            for key, field in TRAINING_RATES.items()
        ),
        "",
        "[[power]]",
        f"name = {_quoted(watts.name)}",
        number(f"power.{watts.name}.watts", f'"{watts.watts:.9g} W"', f"{carried}: power is not measured"),
        "default = true",
        "",
        "[storage]",
        number("storage.cache", f'"{cache} MiB"', f"{carried}, at most half of what is free on the disk"),
        number(
            "storage.read",
            _amount(measured.storage or nearest.storage_bytes_per_s, "bytes"),
            f"{here}: {measured.storage_how}" if measured.storage else f"{carried}: {measured.storage_how}",
        ),
        "",
        "[budget]",
        number("budget.rho", f"{nearest.rho:.9g}", carried),
        number("budget.memory", f'"{budget} MiB"', f"{carried}: its share of the memory"),
        "",
        "[thermal]",
        number("thermal.ceiling", f'"{nearest.ceiling_c:.9g} C"', carried),
        "",
        "[sources]",
    ]
    return "\n".join([*lines, *(f"{key} = {_quoted(source)}" for key, source in sources.items())]) + "\n"


def _kind(measured: Measured, nearest: Profile) -> str:
    """A kind whose runs compute where this was measured: on a GPU, 'jetson' with unified memory, else 'geforce'."""
    if measured.gpu is None:
        return nearest.kind if nearest.kind not in ("jetson", "geforce") else "laptop"
    return "jetson" if measured.gpu_unified else "geforce"


def _match(host: Host, measured: Measured) -> list[str]:
    """What this machine calls itself, so that the profile is recognised as its own."""
    names = {"device_tree": host.model, "cuda": (measured.gpu or "").removeprefix("NVIDIA "), "cpu": host.cpu}
    return [f"{key} = [{_quoted(name)}]" for key, name in names.items() if name]


def _unit_of(field: str) -> str:
    if field.endswith("_s"):
        return "seconds"
    if field.endswith("_bytes"):
        return "bytes"
    if field in ("logits", "optimizer", "optimizer_float32"):
        return "elements"
    return "int8" if field.startswith("int8") else "float"


def _amount(value: float, kind: str) -> str:
    """A quantity as a profile spells it, in its largest unit that leaves at least 1, with 4 decimals."""
    units = _RATE_UNITS[kind]
    unit, size = next(((unit, size) for unit, size in units if value >= size), units[-1])
    return f'"{max(value / size, 1e-4):.4f} {unit}"'


def _quoted(text: str) -> str:
    """A basic TOML string: JSON's escapes are TOML's."""
    return json.dumps(" ".join(text.split()), ensure_ascii=False)
