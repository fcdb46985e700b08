"""Sealed tensor files: safetensors that no byte can change in unseen, written and read tensor by tensor."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from edgegt.errors import InputError
from edgegt.sealed import Item, read_sealed, write_sealed

TENSORS = {
    "matrix": torch.randn(33, 7), "half": torch.randn(5).bfloat16(), "count": torch.tensor(7),
    "bytes": torch.arange(251, dtype=torch.uint8), "none": torch.empty(0, 3), "turned": torch.randn(4, 6).t(),
}  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_sealed(tmp_path / "a.safetensors", [Item.of(*pair) for pair in TENSORS.items()], {"who": "me"})
    return tmp_path / "a.safetensors"


def test_what_is_written_is_read_here_and_by_the_library(path: Path) -> None:
    found = read_sealed(path)
    assert found.about == {"who": "me"} and list(found.entries) == list(TENSORS)
    with safe_open(str(path), framework="pt") as library:
        assert library.metadata() == {"who": "me", "sha256": found.seal}
        for name, tensor in TENSORS.items():
            assert found.tensor(name).dtype == tensor.dtype
            assert torch.equal(found.tensor(name), tensor) and torch.equal(library.get_tensor(name), tensor), name


def test_the_same_content_is_the_same_bytes(path: Path, tmp_path: Path) -> None:
    write_sealed(tmp_path / "b", [Item.of(*pair) for pair in TENSORS.items()], {"who": "me"})
    assert (tmp_path / "b").read_bytes() == path.read_bytes()


def test_a_tensor_is_fetched_when_its_turn_comes_and_reported_when_written(tmp_path: Path) -> None:
    order: list[str] = []

    def get(name: str) -> torch.Tensor:
        order.append(f"get {name}")
        return torch.ones(3)

    items = [Item(name, torch.float32, (3,), lambda name=name: get(name)) for name in "ab"]
    write_sealed(tmp_path / "a", items, {}, lambda name: order.append(f"done {name}"))
    assert order == ["get a", "done a", "get b", "done b"]


def test_every_flipped_bit_is_seen(path: Path) -> None:
    raw, draw = path.read_bytes(), random.Random(0)
    places = [*range(0, len(raw), 3), *(draw.randrange(len(raw)) for _ in range(500))]
    for place in places:
        changed = bytearray(raw)
        changed[place] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(InputError, match="damaged"):
            read_sealed(path)


@pytest.mark.parametrize("length", [0, 5, 8, 60, -1])
def test_a_cut_off_file_is_seen(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(InputError, match="damaged"):
        read_sealed(path)


def test_more_bytes_are_seen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(InputError, match="damaged"):
        read_sealed(path)


@pytest.mark.parametrize(
    ("tree", "why"),
    [
        ({"a": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}}, "is wrong about 'a'"),
        ({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, "is wrong about 'a'"),
        ({"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, "is wrong about 'a'"),
        ({"a": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}, "is wrong about 'a'"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "is wrong about 'a'"),
        ({"a": {"dtype": [], "shape": [1], "data_offsets": [0, 4]}}, "is wrong about 'a'"),
        ({"a": 3}, "is wrong about 'a'"),
        ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "bytes and its header speaks of"),
    ],
)
def test_a_header_that_cannot_be_is_refused(tmp_path: Path, tree: dict[str, object], why: str) -> None:
    text = json.dumps({"__metadata__": {"sha256": "a" * 64}, **tree}, separators=(",", ":")).encode()
    path = tmp_path / "a"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(InputError, match=why):
        read_sealed(path)


@pytest.mark.parametrize(
    "text", [b"[]", b"{}", b'{"__metadata__": 3}', b'{"__metadata__": {"sha256": 3}}', b"[" * 9999]
)
def test_a_header_without_metadata_is_refused(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "a"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(InputError, match="its header"):
        read_sealed(path)


def test_a_file_without_a_seal_and_none_at_all_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, str(tmp_path / "a"), metadata={"who": "me"})
    with pytest.raises(InputError, match="has no checksum"):
        read_sealed(tmp_path / "a")
    with pytest.raises(InputError, match="does not exist"):
        read_sealed(tmp_path / "b")
    with pytest.raises(InputError, match="cannot be read"):
        read_sealed(tmp_path)
