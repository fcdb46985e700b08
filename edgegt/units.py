"""Quantities as text and back: bytes, durations, FLOPs. Bytes are ints; GiB = 2**30."""

from __future__ import annotations

import re

from edgegt.errors import InputError

_SECONDS = {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600}
_JOULES = {"j": 1, "kj": 1e3, "mj": 1e6, "wh": 3600, "kwh": 3.6e6}
_BYTE_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
MIB = 2**20
GIB = 2**30


def parse_bytes(text: str, what: str = "memory") -> int:
    """Bytes in a quantity such as '4GiB', '900 MiB' or '2.5GB'.

    Raises: InputError when the text is not a positive number followed by a unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    if match is None or match[2].upper() not in _BYTE_UNITS or not 0 < float(match[1]) < float("inf"):
        raise InputError(f"{what} '{text}' is not a size: write a positive number and a unit, such as 4GiB or 900MiB")
    return int(float(match[1]) * _BYTE_UNITS[match[2].upper()])


def parse_duration(text: str, what: str = "time") -> float:
    """Seconds in a quantity such as '20m', '90s' or '1h30m'.

    Raises: InputError when the text is not one or more positive numbers, each followed by s, m or h.
    """
    found = re.findall(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text)
    whole = re.fullmatch(r"\s*(?:\d+(?:\.\d+)?\s*[A-Za-z]+\s*)+", text)
    seconds = sum(float(number) * _SECONDS.get(unit.lower(), 0) for number, unit in found)
    if whole is None or not 0 < seconds < float("inf") or any(unit.lower() not in _SECONDS for _, unit in found):
        raise InputError(
            f"{what} '{text}' is not a duration: write a positive number and s, m or h, such as 20m or 90s"
        )
    return seconds


def parse_energy(text: str, what: str = "energy") -> float:
    """Joules in a quantity such as '15Wh' or '54kJ'.

    Raises: InputError when the text is not a positive number followed by a unit of energy.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    if match is None or match[2].lower() not in _JOULES or match[2] == "mJ" or not 0 < float(match[1]) < float("inf"):
        raise InputError(
            f"{what} '{text}' is not an energy: write a positive number and Wh, kWh, J or kJ, such as 15Wh"
        )
    return float(match[1]) * _JOULES[match[2].lower()]


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
