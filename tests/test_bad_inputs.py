"""Bad inputs by hand, with the exact line that each one gets; and what the command line makes of some of them."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from edgegt.cli import main
from edgegt.data.read import parse_columns, read_rows
from edgegt.errors import EdgegtError, InputError
from edgegt.folder import RunFolder
from edgegt.options import RunOptions, read_options
from edgegt.patch import apply_patch, read_patch, save_patch
from edgegt.profile import load_profile, profiles_dir
from edgegt.units import parse_bytes, parse_duration, parse_energy
from runs import STORIES
from tiny_models import FAMILIES, load, save_model

SKIP = "or leave such rows out with --skip-bad-rows"
NEITHER = (
    "has none of 'messages', 'conversations', 'prompt' and 'completion', 'instruction' and 'output', 'text': it has"
)
CLOSE, DELETE = "close every quote and double those inside", "correct or delete it"
DEEP, LEARN = "brackets too deep to read", "give a file with text to learn"
SIZE = "is not a size: write a positive number and a unit, such as 4GiB or 900MiB"
LINES = 'write lines such as total = "8 GiB"'
ROLES = "--columns prompt=NAME,completion=NAME, --columns text=NAME or --columns messages=NAME"
SUFFIXES = "'.jsonl', '.json', '.csv', '.tsv', '.txt', '.parquet', '.arrow'"
HEX = "0x" + "f" * 5000


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory: every path is short."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(EdgegtError) as caught:
        call()
    assert isinstance(caught.value, InputError) and caught.value.exit_code == 2
    assert str(caught.value).isprintable()
    return str(caught.value)


# ---- data

DATA: list[tuple[str, str | bytes, str | None, str]] = [
    ("d.jsonl", '{"text": "a"}\n{"text": "b}\n', None, "'d.jsonl' row 2: malformed JSON at column 10 (Unterminated "
     f"string starting at) near '{{\"text\": \"b}}': {DELETE}, {SKIP}"),
    ("d.jsonl", '{"text": "a"}\n[1]\n', None,
     f"'d.jsonl' row 2 is [1], not an object: write {{\"prompt\": ..., \"completion\": ...}}, {SKIP}"),
    ("d.jsonl", "[" * 100_000, None, f"'d.jsonl' row 1: a number too long or {DEEP}: delete it, {SKIP}"),
    ("d.jsonl", f'{{"text": {"9" * 5000}}}', None, f"'d.jsonl' row 1: a number too long or {DEEP}: delete it, {SKIP}"),
    ("d.jsonl", '{"text": "a"}\n{"txt": "b"}', None,
     f"'d.jsonl' row 2 has no field 'text': it has 'txt'; add it or delete the row, {SKIP}"),
    ("d.jsonl", '{"text": ["a"]}', None,
     f"'d.jsonl' row 1: field 'text' is a list, wanted text or a number: join it to one text first, {SKIP}"),
    ("d.jsonl", b'{"text": "caf\xe9"}', None,
     f"'d.jsonl' line 1: byte 13 (0xe9) is not valid UTF-8: save the file as UTF-8, {SKIP}"),
    ("d.jsonl", b"\xff\xfea", None, "'d.jsonl' line 1: byte 2 (0x61) is not valid UTF-16: save the file as UTF-8"),
    ("d.jsonl", b"\0\0", None, "'d.jsonl' row 1: malformed JSON at column 1 (Expecting value) near '\\x00\\x00': "
     f"{DELETE}, {SKIP}"),
    ("d.jsonl", "\n\n", None, f"'d.jsonl' has no usable row (it is empty): {LEARN}"),
    ("d.jsonl", '{"a\\nb\\u001b": 1}', None, f"'d.jsonl' {NEITHER} 'a\\nb\\x1b'; use {ROLES}"),
    ("d.json", '{"text":\n"a"}', None,
     "'d.json' is not a list of objects: write [{...}, {...}] or one object per line"),
    ("d.json", "[null, nope]", None,
     f"'d.json' row 2 (line 1): malformed JSON at column 8 (Expecting value) near '[null, nope]': {DELETE}"),
    ("d.csv", "text,n\na,1\nb, c,2\n", None,
     f"'d.csv' row 3 has 3 fields, the header has 2: put text that holds ',' in quotes, {SKIP}"),
    ("d.csv", 'text,n\na,1\n"b,2\n', None, f"'d.csv' row 3: unexpected end of data: {CLOSE}, {SKIP}"),
    ("d.tsv", 'text\tn\n"b"x\t2\n', None, f"'d.tsv' row 2: '\\t' expected after '\"': {CLOSE}, {SKIP}"),
    ("d.csv", '"text\nn,1\n', None, f"'d.csv' row 1: unexpected end of data: {CLOSE}"),
    ("d.csv", "text,n,text\na,1,b\n", None, "'d.csv' has the column 'text' twice: rename one of them"),
    ("d.csv", '"te\nxt",n\na,1\n', "text=text",
     "'d.csv' has no column 'text' (did you mean 'te\\nxt'?): it has 'te\\nxt', 'n'; correct --columns"),
    ("d.csv", "mr," + "x" * 200_000 + "\na,b\n", None, f"'d.csv' {NEITHER} 'mr', '{'x' * 37}...'; use {ROLES}"),
    ("d.txt", "a", "text=b", "'d.txt' is plain text and has no columns: leave --columns out"),
    ("d.xlsx", "PK", None, f"'d.xlsx' has the unknown format '.xlsx': convert or rename to {SUFFIXES}"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "columns", "line"), DATA)
def test_data(name: str, content: str | bytes, columns: str | None, line: str) -> None:
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert refusal(lambda: read_rows(Path(name), parse_columns(columns) if columns else None)) == line


def test_data_that_is_no_file() -> None:
    Path("train.jsonl").write_text("")
    os.mkfifo("pipe.jsonl")
    near = "(did you mean 'train.jsonl'?)"
    gone = "does not exist{}: check the path of --data"
    for name, line in {
        ".": f"data '.' is a folder: give one file, {SUFFIXES}",
        "trian.jsonl": f"data file 'trian.jsonl' {gone.format(' ' + near)}",
        "train.jsonl/x.csv": f"data file 'train.jsonl/x.csv' {gone.format('')}",
        "a\0b/c.csv": f"data file 'a\\x00b/c.csv' {gone.format('')}",
        "no\nline.csv": f"data file 'no\\nline.csv' {gone.format('')}",
        "x" * 5000 + ".csv": f"data file '{'x' * 5000}.csv' {gone.format('')}",
        "pipe.jsonl": "'pipe.jsonl' is not a regular file: copy what it gives into one",
    }.items():
        assert refusal(partial(read_rows, Path(name), None)) == line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("mr", f"--columns 'mr': 'mr' is not one ROLE=NAME; write {ROLES}"),
        ("prompt=a,prompt=b", f"--columns 'prompt=a,prompt=b': 'prompt=b' is not one ROLE=NAME; write {ROLES}"),
        ("promt=a,text=b", f"--columns 'promt=a,text=b': unknown role 'promt'; write {ROLES}"),
        ("prompt=a", f"--columns 'prompt=a' names only 'prompt'; write {ROLES}"),
        ("x\n\x1b[2J", f"--columns 'x\\n\\x1b[2J': 'x\\n\\x1b[2J' is not one ROLE=NAME; write {ROLES}"),
        ("y" * 9999, f"--columns '{'y' * 97}...': '{'y' * 57}...' is not one ROLE=NAME; write {ROLES}"),
    ],
)
def test_columns(text: str, line: str) -> None:
    assert refusal(lambda: parse_columns(text)) == line


# ---- bad rows left out


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("d.jsonl", "{\n{\n", "'d.jsonl' has no usable row (all 2 bad, such as row 1: malformed JSON at column 2): "
         f"{LEARN}"),
        ("d.jsonl", '{\n{"text": ""}\n', "'d.jsonl' has no usable row (1 with empty text and 1 bad, such as row 1: "
         f"malformed JSON at column 2): {LEARN}"),
        ("d.jsonl", '{"a": 1}\n{"b": 1}', f"'d.jsonl' {NEITHER} 'a'; use {ROLES}"),
        ("d.json", "[1, nope]", "'d.json' row 2 (line 1): malformed JSON at column 5 (Expecting value) near '[1, nope]'"
         f": {DELETE}"),
        ("d.csv", "text,n\na,1\n" + 'x","\n' * 9999, f"'d.csv' row 11: unexpected end of data: {CLOSE}"),
    ],
)  # fmt: skip
def test_what_is_refused_although_bad_rows_may_be_left_out(name: str, content: str, line: str) -> None:
    Path(name).write_text(content)
    assert refusal(lambda: read_rows(Path(name), None, skip_bad=True)) == line


# ---- profiles, options and quantities


@pytest.mark.parametrize(
    ("good", "bad", "line"),
    [
        ('total = "8 GiB"', f"total = {HEX}", "memory.total = (too long to show): must be a size: a positive number "
         'and GiB or MiB; write "8 GiB"'),
        ('total = "8 GiB"', "total = nan", "memory.total = NaN: must be a size: a positive number and GiB or MiB; "
         'write "8 GiB"'),
        ("rho = 0.5", "rho = inf", "budget.rho = Infinity: must be a number above 0 and at most 1, without quotes or "
         "unit; write 0.5"),
        ("[memory]", f"{'x' * 9000} = 1\n[memory]",
         f"match.{'x' * 51}... = 1: unknown key; use device_tree, cuda, cpu"),
        ("[storage]", "[\"a\\nb\\u001b\"]\nx = 1\n[storage]", "[a\\nb\\x1b] = {\"x\": 1}: unknown table; use device, "
         "match, memory, rates, power, storage, budget, thermal, sources"),
    ],
)  # fmt: skip
def test_a_profile(good: str, bad: str, line: str) -> None:
    text = (profiles_dir() / "jetson-orin-nano-8gb.toml").read_text(encoding="utf-8")
    assert good in text
    Path("jetson-orin-nano-8gb.toml").write_text(text.replace(good, bad, 1), encoding="utf-8")
    found = refusal(lambda: load_profile(Path("jetson-orin-nano-8gb.toml")))
    assert found == f"jetson-orin-nano-8gb.toml: {line}"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"a = " + b"[" * 5000, f"p.toml: has too many brackets in brackets; {LINES}"),
        (b"a = " + b"9" * 5000, f"p.toml: has a number of thousands of digits; {LINES}"),
        (b"a" + b".a" * 20_000 + b" = 1", f"p.toml: has more than 100 dots in one line; {LINES}"),
        (b"#" * 70_000, "p.toml: is larger than 64 KiB; give a profile written by hand"),
        (b"a = \xe9", "p.toml: is not valid TOML in UTF-8 ('utf-8' codec can't decode byte 0xe9 in position 4: "
         f"unexpected end of data); {LINES}"),
        (b"sources = 3",
         'p.toml: [sources] = 3: must be a table; write [sources] and lines key = "where it is from"'),
    ],
)  # fmt: skip
def test_a_file_that_is_no_profile(content: bytes, line: str) -> None:
    Path("p.toml").write_bytes(content)
    assert refusal(lambda: load_profile(Path("p.toml"))) == line


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("rho = nan", "--rho nan is out of range: give a number greater than 0 and at most 1, such as 0.5"),
        ("lr = 1e999", "--lr inf is out of range: give a number greater than 0, such as 5e-4"),
        (f"steps = {HEX}", "--steps of 20000 bits is out of range: give a positive whole number"),
        (f"seed = {HEX}", "--seed of 20000 bits is out of range: give a whole number from 0 to 2**63 - 1"),
        (f"rho = {HEX}", "o.toml: rho = (too long to show) should be of type float: change the value"),
        ('strategy = "a\\nb"', "--strategy 'a\\nb' is not one of greentrainer, greentrainer-dp, last-layers, bias, "
         "random, lisa, full"),
        ('data = "a\\u0000b"', "--data 'a\\x00b' holds a control character: leave it out"),
        ('"a\\nb" = 1', "o.toml: unknown key 'a\\nb': `edgegt run --help` lists the options"),
        ("steps = 2024-01-01", "o.toml: steps = datetime.date(2024, 1, 1) should be of type int: change the value"),
        (f'checkpoint_every = "{"9" * 5000}"', f"--checkpoint-every '{'9' * 57}...' is neither steps nor a time: write "
         "a positive number of steps, or a time such as 90s or 5m"),
        ("rho = ", "o.toml: is not valid TOML in UTF-8 (Invalid value (at end of document)); write lines such as rho = "
         "0.5"),
    ],
)  # fmt: skip
def test_options(content: str, line: str) -> None:
    Path("o.toml").write_text(content)
    assert refusal(lambda: RunOptions(**read_options(Path("o.toml")))) == line


@pytest.mark.parametrize(
    ("parse", "text", "line"),
    [
        (parse_bytes, "9" * 50 + "GiB", f"memory '{'9' * 50}GiB' {SIZE}"),
        (parse_bytes, "0.1B", f"memory '0.1B' {SIZE}"),
        (parse_bytes, "4GiB\n\0", f"memory '4GiB\\n\\x00' {SIZE}"),
        (parse_duration, "1" * 200_000, f"time '{'1' * 57}...' is not a duration: write a positive number and s, m or "
         "h, such as 20m or 90s"),
        (parse_energy, "9" * 400 + "kWh", f"energy '{'9' * 57}...' is not an energy: write a positive number and Wh, "
         "kWh, J or kJ, such as 15Wh"),
    ],
)  # fmt: skip
def test_quantities(parse: Callable[[str], float], text: str, line: str) -> None:
    assert refusal(lambda: parse(text)) == line


# ---- patches and run folders


def patch_file(header: dict[str, Any] | str, data: bytes = b"", length: int | None = None) -> None:
    """p: a file with this safetensors header, whose length is as given."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    Path("p").write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


ABOUT: dict[str, Any] = {"__metadata__": {"format": "1", "fingerprint": "f" * 64}}
ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
AGAIN = "take it from the run folder again"
DAMAGED = "patch 'p' is damaged (Error while deserializing header: {}): " + AGAIN


@pytest.mark.parametrize(
    ("header", "data", "length", "line"),
    [
        ("not a patch", b"", None, "invalid JSON in header: expected ident at line 1 column 2"),
        (ABOUT, b"", 2**62, "header too large"),
        ({**ABOUT, "a": ONE}, b"", None, "incomplete metadata, file not fully covered"),
        ({**ABOUT, "a": {**ONE, "shape": [2**40], "data_offsets": [0, 2**42]}}, b"abcd", None,
         "incomplete metadata, file not fully covered"),
        ({**ABOUT, "a": ONE, "b": ONE}, b"abcd", None, None),
        ({**ABOUT, "a": {**ONE, "dtype": "F\n"}}, b"abcd", None, None),
    ],
)  # fmt: skip
def test_a_damaged_patch(header: dict[str, Any] | str, data: bytes, length: int | None, line: str | None) -> None:
    patch_file(header, data, length)
    found = refusal(lambda: read_patch(Path("p")))
    assert found.startswith("patch 'p' is damaged (") and found.endswith(AGAIN)
    if line is not None:  # else the library names one of two tensors, or all dtypes that it knows
        assert found == DAMAGED.format(line)


def test_a_patch_of_sizes_that_no_tensor_has() -> None:
    patch_file({**ABOUT, "a": {"dtype": "F32", "shape": [2**63, 0], "data_offsets": [0, 0]}})
    assert refusal(lambda: read_patch(Path("p"))).startswith("patch 'p' is damaged (")


def test_a_patch_with_one_changed_bit() -> None:
    save_patch(Path("p"), {"a": torch.ones(9)}, "f" * 64, "m", "0")
    raw = bytearray(Path("p").read_bytes())
    raw[-3] ^= 1
    Path("p").write_bytes(raw)
    assert refusal(lambda: read_patch(Path("p"))) == f"patch 'p' is damaged (its checksum does not match): {AGAIN}"


def test_a_patch_with_a_name_twice() -> None:
    text = json.dumps({**ABOUT, "a": ONE})
    patch_file(text[:-1] + f', "\\u0061": {json.dumps(ONE)}}}', b"abcd")
    twice = "patch 'p' has 'a' twice: take the patch from the run folder again"
    assert refusal(lambda: read_patch(Path("p"))) == twice


def test_what_is_not_a_patch() -> None:
    patch_file({"__metadata__": {"format": "pt"}})
    line = '\'p\' is not an edgegt patch (metadata {"format": "pt"}): give a patch.safetensors'
    assert refusal(lambda: read_patch(Path("p"))) == line
    for name, shown in ((".", "."), ("n\0o\n", "n\\x00o\\n")):
        line = f"patch '{shown}' does not exist: give the patch.safetensors of a run folder"
        assert refusal(partial(read_patch, Path(name))) == line


def test_a_patch_that_does_not_fit_touches_neither_the_model_nor_any_file(here: Path) -> None:
    save_model(here / "model", FAMILIES["llama"]())
    model, path = load(here / "model", here / "cache"), Path("p")
    before = {name: linear.weight.q.clone() for name, linear in model.linears.items()}
    there = sorted(here.rglob("*"))
    save_patch(path, {"a": torch.ones(1)}, "e" * 64, "other\nbase", "0")
    ours = model.fingerprint[:12]
    assert refusal(lambda: apply_patch(model, path)) == (
        f"patch 'p' was trained on another base (other\\nbase, fingerprint {'e' * 12}) than 'model' ({ours}): give "
        "that base with --model"
    )
    for name in ("../../x", "/etc/x", "a\0b", "", ".", "__class__.__dict__", "model.__init__", "x" * 5000):
        save_patch(path, {name: torch.ones(1)}, model.fingerprint, "model", "0")
        shown = f"{name[:57]}..." if len(name) > 60 else name.replace("\0", "\\x00")
        line = f"patch 'p' has '{shown}', which 'model' does not: give the right base"
        assert refusal(lambda: apply_patch(model, path)) == line
    norm = {"dtype": "F8_E4M3", "shape": [64], "data_offsets": [0, 64]}
    patch_file(
        {"__metadata__": {"format": "1", "fingerprint": model.fingerprint}, "model.norm.weight": norm}, b"a" * 64
    )
    assert refusal(lambda: apply_patch(model, path)) == (
        "patch 'p' has 'model.norm.weight' as torch.float8_e4m3fn with values that are not all finite floats: take the "
        "patch from the run folder again"
    )
    assert sorted(set(here.rglob("*")) - {here / "p"}) == there
    assert all(torch.equal(before[name], linear.weight.q) for name, linear in model.linears.items())


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "'run' is not a finished run folder (it has no run.json): give the folder that `edgegt run` named"),
        ("[1]", "run/run.json is damaged (not a JSON object): run `edgegt run` again"),
        ("{", "run/run.json is damaged (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)): "
         "run `edgegt run` again"),
        ("[" * 100_000, "run/run.json is damaged (maximum recursion depth exceeded while decoding a JSON array from a "
         "unicode string): run `edgegt run` again"),
    ],
)  # fmt: skip
def test_a_run_folder(content: str | None, line: str) -> None:
    Path("run").mkdir()
    if content is not None:
        Path("run/run.json").write_text(content)
    assert refusal(lambda: RunFolder(Path("run")).read("run.json")) == line


# ---- the same on the command line


def test_the_command_line_says_the_line_and_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    Path("o.toml").write_text("rho = nan\n")
    Path("p.toml").write_text("[memroy]\n")
    for words, line in {
        "plan --config o.toml": "--rho nan is out of range: give a number greater than 0 and at most 1, such as 0.5",
        "plan --config no.toml": "options file 'no.toml' does not exist: give the path of a .toml file after --config",
        "run --memory 4TiB": f"--memory '4TiB' {SIZE}",
        "devices show ./p.toml": "p.toml: [memroy] = {}: unknown table (did you mean 'memory'?); use device, match, "
        "memory, rates, power, storage, budget, thermal, sources",
        "eval --model m --patch no --data d.csv": "data file 'd.csv' does not exist: check the path of --data",
    }.items():
        assert main(words.split()) == 2, words
        out, err = capsys.readouterr()
        assert (out, err) == ("", f"edgegt: {line}\n")


@pytest.mark.skipif(not STORIES.is_dir(), reason="no stories260K under shared/data")
def test_a_bad_row_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("d.csv").write_text("prompt,completion\na,b\nc\n")
    words = ["plan", "--quiet", "--device", "jetson", "--model", str(STORIES), "--data", "d.csv"]
    assert main(words) == 2
    line = f"'d.csv' row 3 has 1 field, the header has 2: put text that holds ',' in quotes, {SKIP}"
    assert capsys.readouterr().err == f"edgegt: {line}\n"
