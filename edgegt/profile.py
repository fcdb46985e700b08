"""The device profile: one TOML file per device, read strictly.

A profile decides what a run may use, so a typing error in it must not pass: units are part of the values
('8 GiB', '68 GB/s', '20 TOPS', '15 W', '85 C'), unknown keys are refused, and every number needs its source under
[sources]. `[rates]` are dense peaks as printed; a power mode's `rate_scale` says what is left of them in that mode.
A profile with `calibrated = true` was written by `edgegt calibrate`: its rates were reached, and it has more of them.
"""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgegt.errors import InputError, nearest
from edgegt.units import GIB, MIB, format_bytes, format_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KINDS = ("jetson", "geforce", "apple", "laptop", "raspberry-pi")

_UNITS: dict[str, dict[str, float]] = {
    "size": {"GiB": GIB, "MiB": MIB},
    "bandwidth": {"GB/s": 1e9, "MB/s": 1e6},
    "int8 rate": {"TOPS": 1e12, "GOPS": 1e9},
    "float rate": {"TFLOPS": 1e12, "GFLOPS": 1e9},
    "power": {"W": 1.0},
    "temperature": {"C": 1.0},
    "element rate": {"M/s": 1e6, "G/s": 1e9},
    "duration": {"us": 1e-6, "ms": 1e-3},
}
# What each key holds; '?' marks a key that may be left out. Keys of [sources] are the dotted names of the numbers.
_TABLES: dict[str, dict[str, str]] = {
    "device": {"name": "text", "title": "text", "kind": "kind", "unified": "truth", "calibrated": "truth?",
               "compute_capability": "text?", "jetpack": "text?", "notes": "text?"},
    "match": {"device_tree": "texts?", "cuda": "texts?", "cpu": "texts?"},
    "memory": {"total": "size", "reserved": "size", "bandwidth": "bandwidth"},
    "rates": {"int8": "int8 rate?", "bf16": "float rate?", "fp16": "float rate?", "fp32": "float rate",
              "int8_back": "int8 rate?", "dw": "float rate?", "attention": "float rate?",
              "forward_bytes": "bandwidth?", "backward_bytes": "bandwidth?", "logits": "element rate?",
              "optimizer": "element rate?",
              "optimizer_float32": "element rate?", "dispatch": "duration?", "update": "duration?"},
    "power": {"name": "text", "watts": "power", "default": "truth?", "rate_scale": "scale?",
              "bandwidth": "bandwidth?"},
    "storage": {"cache": "size", "read": "bandwidth"},
    "budget": {"rho": "share", "memory": "size"},
    "thermal": {"ceiling": "temperature"},
}  # fmt: skip
# Rates of training that only a calibrated profile has, and the fields of `rates.Rates` that they are.
_FORMATS = ("int8", "bf16", "fp16", "fp32")
TRAINING_RATES = {"int8_back": "int8_back", "dw": "dw", "attention": "attention", "forward_bytes": "forward_bytes",
                  "backward_bytes": "backward_bytes", "logits": "logits", "optimizer": "optimizer",
                  "optimizer_float32": "optimizer_float32", "dispatch": "dispatch_s",
                  "update": "update_s"}  # fmt: skip
# No profile comes near. The TOML reader needs time with the square of a dotted key's length.
_MOST_TOML = 65536
_MOST_DOTS = 100
_STANDS_IN = {"int8": ("fp16", "fp32"), "fp16": ("fp32",), "bf16": ("fp32",), "fp32": ()}


@dataclass(frozen=True)
class PowerMode:
    """One setting of the board: its watts, the share of the peak rates it reaches, its memory bandwidth."""

    name: str
    watts: float
    default: bool
    rate_scale: float
    bandwidth_bytes_per_s: float


@dataclass(frozen=True)
class Profile:
    """A device. `rates_flops_per_s` are dense peaks as printed; `rate()` is what the power mode leaves of them.

    calibrated: its rates were measured here, and reached. training_rates: further ones, by field of `rates.Rates`.
    """

    name: str
    title: str
    kind: str
    unified: bool
    memory_bytes: int
    reserved_bytes: int
    bandwidth_bytes_per_s: float
    rates_flops_per_s: dict[str, float]
    power_modes: tuple[PowerMode, ...]
    cache_bytes: int
    storage_bytes_per_s: float
    rho: float
    budget_bytes: int
    ceiling_c: float
    notes: str
    compute_capability: str
    jetpack: str
    match: dict[str, tuple[str, ...]]
    sources: dict[str, str]
    path: Path
    calibrated: bool = False
    training_rates: dict[str, float] = field(default_factory=dict)

    @property
    def power(self) -> PowerMode:
        """The default power mode."""
        return next(mode for mode in self.power_modes if mode.default)

    def rate(self, number_format: str) -> float:
        """Operations per second in the default power mode; a format the device lacks runs as the next wider one."""
        formats = (number_format, *_STANDS_IN[number_format])
        peak = next(self.rates_flops_per_s[name] for name in formats if name in self.rates_flops_per_s)
        return peak * self.power.rate_scale

    def to_json(self) -> dict[str, Any]:
        """A plain dict for profile.json."""
        tree = asdict(self) | {"path": str(self.path), "power_modes": [asdict(mode) for mode in self.power_modes]}
        return tree | {"match": {key: list(words) for key, words in self.match.items()}}


def load_profile(path: Path) -> Profile:
    """The profile in a TOML file.

    Raises: InputError `file: key = value: what was allowed; remedy` for the first thing that is wrong.
    """
    path = Path(path)
    tree = read_toml(path, 'total = "8 GiB"', "profile")
    sources = _flatten(path, tree.pop("sources", {}))
    values, numbers = _read_tables(path, tree)
    modes = _power_modes(path, values)
    _check_sources(path, sources, numbers)
    room = values["memory.total"] - values["memory.reserved"]
    if values["device.name"] != path.stem:
        raise _wrong(path, "device.name", values["device.name"], f'must equal the file\'s name; write "{path.stem}"')
    if values["budget.memory"] > room:
        problem = f"more than total - reserved = {format_bytes(room)}; lower it or memory.reserved"
        raise _wrong(path, "budget.memory", tree["budget"]["memory"], problem)
    return Profile(
        **{key: values[f"device.{key}"] for key in ("name", "title", "kind", "unified")},
        **{key: values.get(f"device.{key}", "") for key in ("notes", "compute_capability", "jetpack")},
        memory_bytes=int(values["memory.total"]),
        reserved_bytes=int(values["memory.reserved"]),
        bandwidth_bytes_per_s=values["memory.bandwidth"],
        rates_flops_per_s={key: values[f"rates.{key}"] for key in _FORMATS if f"rates.{key}" in values},
        power_modes=modes,
        cache_bytes=int(values["storage.cache"]),
        storage_bytes_per_s=values["storage.read"],
        rho=values["budget.rho"],
        budget_bytes=int(values["budget.memory"]),
        ceiling_c=values["thermal.ceiling"],
        match={key: values.get(f"match.{key}", ()) for key in _TABLES["match"]},
        sources=sources,
        path=path,
        calibrated=bool(values.get("device.calibrated", False)),
        training_rates={
            field_name: values[f"rates.{key}"] for key, field_name in TRAINING_RATES.items() if f"rates.{key}" in values
        },
    )


def _wrong(path: Path, key: str, value: object, problem: str) -> InputError:
    """One line: `file: key = value: problem`; a missing value is shown as (missing)."""
    try:
        shown = "(missing)" if value is None else json.dumps(value, ensure_ascii=False)
    except TypeError:  # a date or a time, which JSON has no word for
        shown = f"{value}"
    except (ValueError, RecursionError):  # a hexadecimal number of thousands of digits, or tables in tables
        shown = "(too long to show)"
    line = f"{format_text(path, None)}: {format_text(key)} = {format_text(shown)}: {format_text(problem, 400)}"
    return InputError(" ".join(line.split()))


def read_toml(path: Path, example: str, kind: str) -> dict[str, Any]:
    """The tree of a small TOML file. example, kind: a right line and the name of such a file, for the message.

    Raises: InputError `file: why; remedy` for a file that is missing, too large or not TOML.
    """
    shown = format_text(path, None)
    try:
        with path.open("rb") as file:
            raw = file.read(_MOST_TOML + 1)
        if len(raw) > _MOST_TOML:
            raise InputError(f"{shown}: is larger than {_MOST_TOML // 1024} KiB; give a {kind} written by hand")
        if any(line.count(b".") > _MOST_DOTS for line in raw.split(b"\n")):
            raise InputError(f"{shown}: has more than {_MOST_DOTS} dots in one line; write lines such as {example}")
        return tomllib.loads(raw.decode("utf-8"))
    except OSError as error:
        raise InputError(f"{shown}: cannot be read ({error.strerror}); give the path of a .toml {kind}") from None
    except RecursionError:
        raise InputError(f"{shown}: has too many brackets in brackets; write lines such as {example}") from None
    except ValueError as error:  # also of Python, for a NUL in the path and a number of thousands of digits
        if "Exceeds the limit" in str(error):
            raise InputError(f"{shown}: has a number of thousands of digits; write lines such as {example}") from None
        reason = format_text(" ".join(str(error).split()), 120)
        raise InputError(f"{shown}: is not valid TOML in UTF-8 ({reason}); write lines such as {example}") from None


def _convert(kind: str, value: object) -> Any:
    """The value in base units. Raises: ValueError saying what is allowed and how to write it."""
    if kind in _UNITS:
        return _quantity(kind, value)
    if kind == "truth":
        if not isinstance(value, bool):
            raise ValueError("must be a truth value; write true or false without quotes")
    elif kind == "texts":
        if not (isinstance(value, list) and value and all(isinstance(one, str) and one.strip() for one in value)):
            raise ValueError('must be a list of texts; write ["Orin Nano"]')
        return tuple(value)
    elif kind in ("share", "scale"):
        allowed = "above 0 and at most 1" if kind == "share" else "above 0"
        number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
        if not (0 < number <= (1 if kind == "share" else 100)):
            raise ValueError(f"must be a number {allowed}, without quotes or unit; write 0.5")
        return float(number)
    elif not (isinstance(value, str) and value.strip()):
        raise ValueError("must be a text that is not empty; write it in quotes")
    elif kind == "kind" and value not in KINDS:
        raise ValueError(f"not a kind of device{nearest(value, KINDS)}; use one of {', '.join(KINDS)}")
    return value


def _quantity(kind: str, value: object) -> float:
    """A number with a unit of this kind, in the base unit. Raises: ValueError as `_convert`."""
    units = _UNITS[kind]
    how = f'must be a {kind}: a positive number and {" or ".join(units)}; write "8 {next(iter(units))}"'
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?([A-Za-z/]+)", value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(how)
    if match[2] not in units:
        raise ValueError(f"unit '{format_text(match[2], 20)}' is wrong here, {how}")
    if float(match[1]) <= 0:
        raise ValueError(f"is not positive, {how}")
    return float(match[1]) * units[match[2]]


def _read_tables(path: Path, tree: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """All values by dotted key ('power.15W.watts'), and the keys of those that are numbers."""
    for name, table in tree.items():
        if name not in _TABLES:
            known = nearest(name, [*_TABLES, "sources"])
            raise _wrong(path, f"[{name}]", table, f"unknown table{known}; use {', '.join([*_TABLES, 'sources'])}")
    values: dict[str, Any] = {}
    for name in _TABLES:
        table = tree.get(name, {})
        if name == "power":
            if not (isinstance(table, list) and table and all(isinstance(mode, dict) for mode in table)):
                problem = 'must be one or more tables; write [[power]], name = "15W", watts = "15 W", default = true'
                raise _wrong(path, name, table or None, problem)
            for index, mode in enumerate(table, start=1):
                label = mode.get("name")
                if not (isinstance(label, str) and re.fullmatch(r"[A-Za-z0-9_-]+", label)):
                    problem = 'must be letters, digits, _ or -; write name = "15W"'
                    raise _wrong(path, f"power {index}, name", label, problem)
                if f"power.{label}.name" in values:
                    raise _wrong(path, f"power {index}, name", label, "is there twice; give every mode its own name")
                _read_table(path, f"power.{label}", _TABLES["power"], mode, values)
        elif not isinstance(table, dict):
            raise _wrong(path, name, table, f"must be a table; write [{name}] and its keys below")
        else:
            _read_table(path, name, _TABLES[name], table, values)
    return values, [key for key, value in values.items() if isinstance(value, float)]


def _read_table(path: Path, prefix: str, keys: dict[str, str], table: dict[str, Any], into: dict[str, Any]) -> None:
    """Checks one table against its keys and adds its values under `prefix`."""
    for key, value in table.items():
        if key not in keys:
            problem = f"unknown key{nearest(key, keys)}; use {', '.join(keys)}"
            raise _wrong(path, f"{prefix}.{key}", value, problem)
    for key, kind in keys.items():
        if key not in table and kind.endswith("?"):
            continue
        try:
            into[f"{prefix}.{key}"] = _convert(kind.rstrip("?"), table.get(key))
        except ValueError as error:
            raise _wrong(path, f"{prefix}.{key}", table.get(key), str(error)) from None


def _power_modes(path: Path, values: dict[str, Any]) -> tuple[PowerMode, ...]:
    """The power modes; exactly one is the default, and memory.bandwidth is that mode's."""
    modes = []
    for name in [value for key, value in values.items() if re.fullmatch(r"power\..+\.name", key)]:
        of: dict[str, Any] = {key: values.get(f"power.{name}.{key}") for key in _TABLES["power"]}
        bandwidth = of["bandwidth"] or values["memory.bandwidth"]
        if of["default"] and of["bandwidth"]:
            problem = "the default mode has memory.bandwidth; remove this key"
            raise _wrong(path, f"power.{name}.bandwidth", f"{bandwidth / 1e9:g} GB/s", problem)
        modes.append(PowerMode(name, of["watts"], bool(of["default"]), of["rate_scale"] or 1.0, bandwidth))
    defaults = [mode.name for mode in modes if mode.default]
    if len(defaults) != 1:
        problem = f"exactly one of the modes {', '.join(mode.name for mode in modes)} must have default = true"
        raise _wrong(path, "power, default", defaults, problem + "; mark the one the device starts in")
    return tuple(modes)


def _flatten(path: Path, tree: object) -> dict[str, Any]:
    """{'memory': {'total': text}} as {'memory.total': text}."""
    if not isinstance(tree, dict):
        raise _wrong(path, "[sources]", tree, 'must be a table; write [sources] and lines key = "where it is from"')
    flat: dict[str, Any] = {}
    for table, value in tree.items():
        pending = [(table, value)]
        while pending:
            prefix, inner = pending.pop()
            if isinstance(inner, dict):
                pending += [(f"{prefix}.{key}", deeper) for key, deeper in reversed(inner.items())]
            else:
                flat[prefix] = inner
    return flat


def _check_sources(path: Path, sources: dict[str, Any], numbers: list[str]) -> None:
    """Every number has a source that is a text, and every source belongs to a number."""
    known = set(numbers)
    for key, text in sources.items():
        if key not in known:
            problem = f"names no number of this file{nearest(key, numbers)}; remove it or correct the key"
            raise _wrong(path, f"sources.{key}", text, problem)
        if not (isinstance(text, str) and text.strip()):
            raise _wrong(path, f"sources.{key}", text, 'must be a text; write where the number is from, "S: datasheet"')
    for key in numbers:
        if key not in sources:
            problem = f'every number needs its source; add {key} = "where it is from" under [sources]'
            raise _wrong(path, f"sources.{key}", None, problem)


def profiles_dir() -> Path:
    """The shipped profiles: inside the installed package, or beside it in a source checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "profiles", package.parent / "profiles"):
        if folder.is_dir():
            return folder
    raise InputError(f"{package / 'profiles'}: the device profiles are missing; install edgegt again")


def profile_names() -> list[str]:
    """The names of the shipped profiles, sorted, 8gb before 16gb."""
    names = (path.stem for path in profiles_dir().glob("*.toml"))
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])
