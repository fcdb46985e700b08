"""Quantities as text and back: bytes, durations, energy, FLOPs. Bytes are ints; GiB = 2**30.

A refused text may be anything at all, so it is shown through `format_text`: on one line, printable and short.
"""

from __future__ import annotations

import math
import re

from edgegt.errors import InputError

_SECONDS = {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600}
_JOULES = {"j": 1, "kj": 1e3, "mj": 1e6, "wh": 3600, "kwh": 3.6e6}
_BYTE_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)")
# Longer than any quantity that is meant; the patterns below take time with the square of the length.
_LONGEST = 64
_MOST_BYTES = 2**62
MIB = 2**20
GIB = 2**30


def parse_bytes(text: str, what: str = "memory") -> int:
    """Bytes in a quantity such as '4GiB', '900 MiB' or '2.5GB'.

    Raises: InputError when the text is not a number followed by a unit, or not from 1 B to 2**62 B.
    """
    number, unit = _number_and_unit(text)
    size = number * _BYTE_UNITS.get(unit.upper(), 0)
    if not 1 <= size <= _MOST_BYTES:
        shown = format_text(text)
        raise InputError(f"{what} '{shown}' is not a size: write a positive number and a unit, such as 4GiB or 900MiB")
    return int(size)


def parse_duration(text: str, what: str = "time") -> float:
    """Seconds in a quantity such as '20m', '90s' or '1h30m'.

    Raises: InputError when the text is not one or more positive numbers, each followed by s, m or h.
    """
    short = text.strip() if len(text) <= _LONGEST else ""
    found = _QUANTITY.findall(short)
    whole = re.fullmatch(rf"(?:{_QUANTITY.pattern}\s*)+", short)
    seconds = sum(float(number) * _SECONDS.get(unit.lower(), 0) for number, unit in found)
    if whole is None or not 0 < seconds < math.inf or any(unit.lower() not in _SECONDS for _, unit in found):
        shown = format_text(text)
        raise InputError(
            f"{what} '{shown}' is not a duration: write a positive number and s, m or h, such as 20m or 90s"
        )
    return seconds


def parse_energy(text: str, what: str = "energy") -> float:
    """Joules in a quantity such as '15Wh' or '54kJ'.

    Raises: InputError when the text is not a positive number followed by a unit of energy.
    """
    number, unit = _number_and_unit(text)
    joules = number * _JOULES.get(unit.lower(), 0)
    if not 0 < joules < math.inf or unit == "mJ":
        shown = format_text(text)
        raise InputError(
            f"{what} '{shown}' is not an energy: write a positive number and Wh, kWh, J or kJ, such as 15Wh"
        )
    return joules


def _number_and_unit(text: str) -> tuple[float, str]:
    """The parts of '4 GiB'; (nan, '') where the text is something else."""
    match = _QUANTITY.fullmatch(text.strip()) if len(text) <= _LONGEST else None
    return (math.nan, "") if match is None else (float(match[1]), match[2])


def format_text(text: object, most: int | None = 60) -> str:
    """A text of the user for a message: on one line, what cannot be printed escaped, at most `most` characters."""
    words = str(text)
    most = len(words) * 10 if most is None else most  # an escape has ten characters at most
    shown = words[: most + 1]
    if not shown.isprintable():
        shown = "".join(one if one.isprintable() else repr(one)[1:-1] for one in shown)
    return shown if len(shown) <= most else shown[: most - 3] + "..."


def format_energy(joules: float) -> str:
    """'1.9 Wh', '41 mWh', with two significant digits below 10."""
    hours = joules / 3600
    if hours < 0.1:
        return f"{hours * 1000:.2g} mWh"
    return f"{hours:.2g} Wh" if hours < 10 else f"{hours:.0f} Wh"


def format_bytes(count: float) -> str:
    """'1.31 GiB', '37.0 MiB', '512 B'."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", 2**10)):
        if abs(count) >= size:
            return f"{count / size:.2f} {unit}" if unit == "GiB" else f"{count / size:.1f} {unit}"
    return f"{int(count)} B"


def format_flops(flops: float) -> str:
    """'41.8 PFLOP', '3.20 TFLOP', with three significant digits."""
    for unit, size in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6)):
        if abs(flops) >= size:
            return f"{flops / size:.3g} {unit}"
    return f"{flops:.0f} FLOP"


def format_duration(seconds: float) -> str:
    """'6.6 ms', '4.0 s', '3 min 20 s', '2 h 05 min'."""
    if seconds < 0.1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
