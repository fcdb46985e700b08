"""Quantities as text: what is read, what is refused, what is shown."""

from __future__ import annotations

import pytest

from edgegt.errors import InputError
from edgegt.units import GIB, MIB, format_bytes, format_duration, format_flops, format_text, parse_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4GiB", 4 * GIB),
        ("900 MiB", 900 * MIB),
        (" 2.5GB ", 2_500_000_000),
        ("1kb", 1000),
        ("1 KiB", 1024),
        ("7 B", 7),
        ("0.5gib", GIB // 2),
    ],
)
def test_sizes_are_read(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text", ["", "4", "GiB", "-1GiB", "0GiB", "4 GB of RAM", "4 TiB", "1e3MiB", "nanGiB", "1,5GiB"]
)
def test_what_is_not_a_size_is_refused_with_value_and_remedy(text: str) -> None:
    with pytest.raises(InputError) as refusal:
        parse_bytes(text, "--memory")
    assert str(refusal.value).startswith(f"--memory '{text}' is not a size")
    assert "4GiB or 900MiB" in str(refusal.value)


def test_bytes_are_shown_in_binary_units() -> None:
    assert format_bytes(512) == "512 B"
    assert format_bytes(37 * MIB) == "37.0 MiB"
    assert format_bytes(1.31 * GIB) == "1.31 GiB"
    assert format_bytes(-2 * GIB) == "-2.00 GiB"


def test_shown_sizes_are_read_back() -> None:
    for size in (1, 1000, 2**20 + 7, 3 * GIB // 2, 41 * GIB):
        assert parse_bytes(format_bytes(size)) == pytest.approx(size, rel=0.05)


def test_flops_have_three_digits() -> None:
    assert format_flops(41.84e15) == "41.8 PFLOP"
    assert format_flops(3.2e12) == "3.2 TFLOP"
    assert format_flops(1e9) == "1 GFLOP"
    assert format_flops(12) == "12 FLOP"


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(4.04, "4.0 s"), (9.99, "10.0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"),
     (3599.7, "1 h 00 min"), (7500, "2 h 05 min")],
)  # fmt: skip
def test_durations_are_shown_in_two_units_at_most(seconds: float, expected: str) -> None:
    assert format_duration(seconds) == expected


@pytest.mark.parametrize("text", ["x" * 30, "\udcd1" * 14 + "user", "\U000e0001" * 9, "a\nb" * 9])
def test_a_text_in_a_message_is_printable_and_no_longer_than_allowed(text: str) -> None:
    for most in (8, 20, 60):
        shown = format_text(text, most)
        assert shown.isprintable() and len(shown) <= most
    assert len(format_text(text, None)) >= len(text)
