"""Readers survive anything: drawn inputs with a shape, and a short run of the mutator of tools/fuzz.py per target."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))

from edgegt.data.read import parse_columns, read_rows
from edgegt.errors import EdgegtError, InputError
from edgegt.options import RunOptions, read_options
from edgegt.profile import load_profile
from edgegt.units import format_text, parse_bytes, parse_duration, parse_energy
from fuzz import TOKENS, Executor, Hang, Mutator, inputs, table
from fuzz_targets import PROFILE, TARGETS, Target

QUICK = settings(
    max_examples=120, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
EXECUTIONS = 1500
WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)
RECORDS = st.dictionaries(st.sampled_from(["prompt", "completion", "text", "", "\0"]), VALUES, max_size=4)
PIECES = st.lists(st.sampled_from([token.decode("latin-1") for token in TOKENS]) | WORDS, max_size=10).map("".join)


def refused(error: EdgegtError) -> None:
    assert str(error).isprintable() and 10 < len(str(error)) < 2000


@QUICK
@given(rows=st.lists(RECORDS | VALUES, max_size=6))
def test_any_json_lines_are_rows_dropped_or_bad_and_none_is_lost(rows: list[object], tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    try:
        source = read_rows(path, None, skip_bad=True)
    except InputError as error:
        refused(error)
        return
    assert len(source.rows) + sum(source.dropped.values()) + len(source.bad) == len(rows)
    assert sorted({row.number for row in (*source.rows, *source.bad)}) == sorted(
        row.number for row in (*source.rows, *source.bad)
    )
    if not source.bad:
        assert read_rows(path, None) == source
    else:
        with pytest.raises(InputError, match=r"--skip-bad-rows|--columns"):
            read_rows(path, None)


@QUICK
@given(content=PIECES, suffix=st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".txt"]), skip=st.booleans())
def test_any_text_under_any_name_is_read_or_refused(content: str, suffix: str, skip: bool, tmp_path: Path) -> None:
    path = tmp_path / f"d{suffix}"
    path.write_bytes(content.encode("latin-1", "replace"))
    try:
        source = read_rows(path, None, skip)
    except InputError as error:
        refused(error)
        return
    assert all(row.completion.strip() and row.context.isprintable() in (True, False) for row in source.rows)
    assert all(len(row.reason) < 80 and row.reason.isprintable() for row in source.bad)


@QUICK
@given(text=PIECES)
def test_quantities_and_columns_are_read_or_refused(text: str) -> None:
    for parse in (parse_bytes, parse_duration, parse_energy):
        try:
            assert 0 < parse(text) < float("inf")
        except InputError as error:
            refused(error)
    try:
        assert set(parse_columns(text)) in ({"text"}, {"prompt", "completion"})
    except InputError as error:
        refused(error)


@QUICK
@given(text=st.text(), most=st.integers(4, 80))
def test_a_text_in_a_message_is_one_short_line(text: str, most: int) -> None:
    shown = format_text(text, most)
    assert shown.isprintable() and len(shown) <= 10 * most
    if text.isprintable() and len(text) <= most:
        assert shown == text


NUMBERS = st.sampled_from(["nan", "inf", "-inf", "1e999", "-1", "0", "0x" + "f" * 5000, "9" * 5000, "0.5", "3", "1_0"])
OTHERS = st.sampled_from(
    ["true", "[]", "{}", "2024-01-01", "07:32:00", '""', '"a\\nb"', '"\\u0000"', "[[1]]", '"4GiB"']
)


@QUICK
@given(
    values=st.dictionaries(
        st.sampled_from([item.name for item in dataclasses.fields(RunOptions)]), NUMBERS | OTHERS, max_size=4
    )
)
def test_any_values_of_options_are_taken_or_refused(values: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "o.toml"
    path.write_text("".join(f"{name} = {value}\n" for name, value in values.items()), encoding="utf-8")
    try:
        options = RunOptions(**read_options(path))
    except InputError as error:
        refused(error)
        return
    for item in dataclasses.fields(options):
        value = getattr(options, item.name)
        assert value is None or isinstance(value, (str, bool)) or abs(value) < 2**63


@QUICK
@given(line=st.integers(0, PROFILE.count("\n")), value=NUMBERS | OTHERS, key=st.sampled_from(["", "x", "a.b", '"\\n"']))
def test_any_value_in_any_line_of_a_profile_is_taken_or_refused(
    line: int, value: str, key: str, tmp_path: Path
) -> None:
    lines = TARGETS["profile"].seeds()[0].decode().split("\n")
    found = lines[line].partition("=")[0].strip()
    lines[line] = f"{key or found} = {value}"
    path = tmp_path / "p.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    try:
        assert load_profile(path).memory_bytes > 0
    except InputError as error:
        refused(error)


@pytest.mark.parametrize("name", list(TARGETS))
def test_a_short_run_of_the_mutator_finds_nothing(name: str, tmp_path: Path) -> None:
    executor = Executor(TARGETS[name], tmp_path, tmp_path / "failures")
    executor.watch()
    for _ in inputs(TARGETS[name].seeds(), 7, executor.execute):
        if executor.end_of(EXECUTIONS):
            break
    tally = executor.tally
    assert tally.failed == 0, {fault: Path(path).read_bytes()[:200] for fault, path in tally.failures.items()}
    assert tally.accepted and tally.refused and tally.accepted + tally.refused == EXECUTIONS


def test_the_mutator_is_the_same_for_the_same_seed() -> None:
    first, second, other = (Mutator([b"seed one", b"two"], seed) for seed in (3, 3, 4))
    made = [first.next() for _ in range(200)]
    assert made == [second.next() for _ in range(200)] != [other.next() for _ in range(200)]


def test_what_is_wrong_is_found_saved_and_named(tmp_path: Path) -> None:
    def call(data: bytes) -> object:
        if data == b"crash":
            return {}[data]
        if data == b"lines":
            raise InputError("one\ntwo")
        if data == b"hang":
            raise Hang
        raise InputError("a clear line: write another")

    target = Target("broken", lambda: [], lambda folder: call)
    executor = Executor(target, tmp_path, tmp_path / "failures")
    executor.watch()
    for data in (b"crash", b"crash", b"lines", b"hang", b"fine"):
        executor.execute(data)
    assert executor.end_of(5)
    tally = executor.tally
    assert (tally.executions, tally.accepted, tally.refused, tally.failed) == (5, 0, 1, 4)
    assert {Path(path).read_bytes() for path in tally.failures.values()} == {b"crash", b"lines", b"hang"}
    assert "KeyError" in table([tally]) and "not one printable line" in table([tally]) and not tally.ok
