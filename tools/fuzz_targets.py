"""What `fuzz.py` feeds: one row per reader, with the inputs it starts from and how bytes reach it.

`prepare` gets a folder in memory and returns the call; imports happen there, so that they can be instrumented. A call
returns anything for an input that is accepted and raises for one that is refused; it asserts what must hold of the
accepted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from edgegt.errors import InputError

Call = Callable[[bytes], object]
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Target:
    """A reader. share: of all executions, relative to the others."""

    name: str
    seeds: Callable[[], list[bytes]]
    prepare: Callable[[Path], Call]
    share: float = 1.0


PROFILE = """[device]
name = "p"
title = "A board"
kind = "jetson"
unified = true
[match]
device_tree = ["Board"]
[memory]
total = "8 GiB"
reserved = "2.4 GiB"
bandwidth = "68 GB/s"
[rates]
fp32 = "1.28 TFLOPS"
[[power]]
name = "15W"
watts = "15 W"
default = true
[storage]
cache = "8 GiB"
read = "1.5 GB/s"
[budget]
rho = 0.5
memory = "5 GiB"
[thermal]
ceiling = "85 C"
[sources]
"""
OPTIONS = """device = "jetson"
rho = 0.5
memory = "4GiB"
time = "1h30m"
energy = "15Wh"
strategy = "greentrainer"
steps = 12
batch-size = 4
lr = 1e-3
schedule = "cosine"
eval_fraction = 0.1
seed = 7
checkpoint_every = "60s"
examples = false
"""


def _or_refusal(call: Callable[[], Answer]) -> Answer | InputError:
    """What the call returns, or its refusal, which must be one line."""
    from edgegt.errors import InputError

    try:
        return call()
    except InputError as error:
        refusal = error
    line = str(refusal)
    assert line.isprintable() and len(line) < 2000, "a message that is not one printable line"
    return refusal


def _json_rows() -> list[dict[str, object]]:
    long = "the quick brown fox jumps over the lazy dog " * 5
    return [{"prompt": long, "completion": "hi"}, {"prompt": "é", "completion": 3}, {"text": long + "a\u2028b"}]


def _lines() -> list[bytes]:
    rows = [json.dumps(row).encode() for row in _json_rows()]
    return [b"\n".join(rows[:2]), rows[2] + b"\n\n" + rows[2], b"\xef\xbb\xbf" + rows[2], rows[1] + b"\r\n"]


def _list() -> list[bytes]:
    rows = json.dumps(_json_rows()[:2])
    return [rows.encode(), json.dumps(_json_rows(), indent=1).encode(), rows.encode("utf-16"), *_lines()[:1]]


def _table(delimiter: str) -> Callable[[], list[bytes]]:
    lines = [("prompt", "completion"), ("a quick brown fox " * 9, '"b ""c"""'), ('"d\ne"', "f over the lazy dog " * 9)]
    text = "\r\n".join(delimiter.join(line) for line in lines)
    wide = f"text{delimiter}n\n" + f"one{delimiter}1\n" * 3
    return lambda: [text.encode(), wide.encode(), text.encode("utf-16"), b"text\na\nb\n", b"text;n\na, b;1\n"]


def _texts() -> list[bytes]:
    return [b"one\ntwo\n\nthree\n", b"a\n\nb\n<|endoftext|>\nc\n", b"a\r\n\r\nb", "straße".encode("utf-16")]


def _data(suffix: str) -> Callable[[Path], Call]:
    """Rows are read in both ways: bad ones refused, and bad ones left out."""

    def prepare(folder: Path) -> Call:
        from edgegt.data.read import read_rows
        from edgegt.errors import InputError

        path = folder / f"d{suffix}"

        def call(data: bytes) -> object:
            path.write_bytes(data)
            found = _or_refusal(lambda: read_rows(path, None, skip_bad=True))
            strict = read_rows(path, None)
            assert not isinstance(found, InputError) and found.rows == strict.rows, "both ways read the same rows"
            for row in strict.rows:
                assert row.completion.strip()
                row.context.encode(), row.completion.encode()
            return len(strict.rows)

        return call

    return prepare


def _kept(suffix: str) -> Callable[[Path], Call]:
    """Bad rows left out: what remains can be learned, and no reason shows more than a few characters of the text."""

    def prepare(folder: Path) -> Call:
        from edgegt.data.read import read_rows

        path = folder / f"d{suffix}"

        def call(data: bytes) -> object:
            path.write_bytes(data)
            found = read_rows(path, None, skip_bad=True)
            for row in found.rows:
                assert row.completion.strip()
                row.context.encode(), row.completion.encode()
            assert all(one.reason.isprintable() and len(one.reason) < 80 for one in found.bad)
            return len(found.rows)

        return call

    return prepare


def _conversations() -> list[bytes]:
    turns = [{"role": "user", "content": "hi"}, {"role": "model", "content": [{"type": "text", "text": "hello"}]}]
    told = [{"from": "human", "value": "a quick brown fox"}, {"from": "gpt", "value": "jumps over"}]
    rows = [{"messages": turns * 2}, {"conversations": told, "system": "Be brief."}]
    return [b"\n".join([json.dumps(row).encode()] * 3) for row in rows]


def _columns(folder: Path) -> Call:
    from edgegt.data.read import parse_columns, read_rows

    path = folder / "d.csv"
    path.write_text('mr,ref,"two\nlines"\na,b,c\n')

    def call(data: bytes) -> object:
        columns = parse_columns(data.decode("utf-8", "surrogateescape"))
        return len(read_rows(path, columns).rows)

    return call


def _profile(folder: Path) -> Call:
    from edgegt.profile import load_profile

    path = folder / "p.toml"

    def call(data: bytes) -> object:
        path.write_bytes(data)
        return json.dumps(load_profile(path).to_json())

    return call


def _profiles() -> list[bytes]:
    numbers = re.findall(r"(?m)^\[+(\w+)\]+|^(\w+) = (?:\"[0-9.]+ [A-Za-z/]+\"|[0-9.]+)$", PROFILE)
    table, keys = "", []
    for opened, key in numbers:
        table = opened or table
        if key:
            keys.append(f"power.15W.{key}" if table == "power" else f"{table}.{key}")
    return [(PROFILE + "".join(f'{key} = "S: datasheet"\n' for key in keys)).encode()]


def _options(folder: Path) -> Call:
    from edgegt.options import merge_options, read_options

    path = folder / "o.toml"

    def call(data: bytes) -> object:
        path.write_bytes(data)
        options = merge_options(read_options(path), {})
        return options.memory_bytes, options.checkpoint_interval

    return call


def _quantities(folder: Path) -> Call:
    from edgegt.errors import InputError
    from edgegt.units import parse_bytes, parse_duration, parse_energy

    parsers: tuple[Callable[[str], float], ...] = (parse_bytes, parse_duration, parse_energy)

    def call(data: bytes) -> object:
        text = data.decode("utf-8", "surrogateescape")
        answers = [_or_refusal(partial(parse, text)) for parse in parsers]
        found = [answer for answer in answers if not isinstance(answer, InputError)]
        assert all(0 < number < float("inf") for number in found)
        if not found:
            raise next(answer for answer in answers if isinstance(answer, InputError))
        return found

    return call


def _patches() -> list[bytes]:
    import torch
    from safetensors.torch import save

    about = {"format": "2", "fingerprint": "f" * 64, "model": "m", "edgegt": "0", "separator": "\n"}
    rows = {"head.weight": torch.ones(2, 3), "head.weight|rows": torch.tensor([1, 4])}
    small = {"norm": torch.ones(3), "half": torch.ones(1, dtype=torch.bfloat16)}
    return [save(rows, about), save(small, {**about, "format": "1"}), save(small), *_sealed_files()]


def _with_length(data: bytes) -> bytes:
    """Of every second input the length of a safetensors header that fits it, since hardly any mutation keeps that."""
    end = data.rfind(b"}") + 1
    return (end - 8).to_bytes(8, "little") + data[8:] if len(data) % 2 and end > 8 else data


def _patch(folder: Path) -> Call:
    from edgegt.patch import read_patch

    path = folder / "patch.safetensors"

    def call(data: bytes) -> object:
        path.write_bytes(_with_length(data))
        tensors, _ = read_patch(path)
        return sum(tensor.numel() for tensor in tensors.values())

    return call


def _run_folder(folder: Path) -> Call:
    from edgegt.folder import RunFolder

    path = folder / "run.json"

    def call(data: bytes) -> object:
        path.write_bytes(data)
        return len(RunFolder(folder).read("run.json"))

    return call


def _run_folder_options(folder: Path) -> Call:
    from edgegt.folder import RunFolder

    path = folder / "options.json"

    def call(data: bytes) -> object:
        path.write_bytes(data)
        return RunFolder(folder).options()

    return call


def _option_files() -> list[bytes]:
    import dataclasses

    from edgegt.options import RunOptions

    return [json.dumps(dataclasses.asdict(RunOptions()), indent=1).encode(), b'{"steps": 3, "memory": "4GiB"}']


def _sealed_files() -> list[bytes]:
    import tempfile

    import torch

    from edgegt.sealed import Item, write_sealed

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "s.safetensors"
        items = [Item.of("a", torch.ones(2, 3)), Item.of("b", torch.arange(3))]
        write_sealed(path, items, {"step": "4"})
        return [path.read_bytes()]


def _sealed(folder: Path) -> Call:
    """With the right checksum put in, since no mutation finds one: what comes after the check is what is tested."""
    import hashlib

    from edgegt.sealed import read_sealed

    path = folder / "s.safetensors"
    place = re.compile(rb'("sha256":")([0-9a-f]{64})')

    def call(data: bytes) -> object:
        empty, count = place.subn(rb"\g<1>" + b"0" * 64, _with_length(data), count=1)
        if count:
            data = place.sub(rb"\g<1>" + hashlib.sha256(empty).hexdigest().encode(), empty, count=1)
        path.write_bytes(data)
        found = read_sealed(path)
        return sum(found.tensor(name).numel() for name in found.entries)

    return call


def _run_files() -> list[bytes]:
    tree: dict[str, Any] = {"format": 1, "data": {"rows": 3, "dropped": {}}, "losses": [1.5, None, True]}
    return [json.dumps(tree, indent=1).encode(), b"{}", b"[1, 2]"]


def _quantity_texts() -> list[bytes]:
    return [b"4GiB", b"900 MiB", b"1h30m", b"90s", b"15Wh", b"54 kJ", b"2.5GB"]


def _column_texts() -> list[bytes]:
    return [b"prompt=mr,completion=ref", b"text=ref", b"text = two\nlines"]


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("jsonl", _lines, _data(".jsonl")),
        Target("json", _list, _data(".json")),
        Target("csv", _table(","), _data(".csv")),
        Target("tsv", _table("\t"), _data(".tsv")),
        Target("text", _texts, _data(".txt")),
        Target("jsonl-kept", _lines, _kept(".jsonl")),
        Target("turns-kept", _conversations, _kept(".jsonl")),
        Target("csv-kept", _table(","), _kept(".csv")),
        Target("columns", _column_texts, _columns),
        Target("profile", _profiles, _profile, 0.5),
        Target("options", lambda: [OPTIONS.encode()], _options, 0.5),
        Target("quantities", _quantity_texts, _quantities),
        Target("patch", _patches, _patch),
        Target("run-json", _run_files, _run_folder),
        Target("run-options", _option_files, _run_folder_options),
        Target("sealed", _sealed_files, _sealed),
    )
}
