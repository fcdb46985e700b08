"""Hidden states on disk: close to what was given, complete or not there, and never another row's."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgegt.cost import BatchShape
from edgegt.errors import EdgegtError
from edgegt.hidden import HiddenStore, decode, encode, identity_of, key_of
from edgegt.prefix import Rows

WIDTH = 24
Named = list[list[tuple[str, int]]]


def states(tokens: int, seed: int = 0, width: int = WIDTH) -> torch.Tensor:
    """Numbers with a few that are a thousand times as large, as residual streams have them."""
    draw = torch.Generator().manual_seed(seed)
    found = torch.randn((tokens, width), generator=draw)
    found[:, 3] *= 1000
    return found


def filled(folder: Path, identity: str = "a" * 64, code: str = "float16") -> tuple[HiddenStore, Named]:
    store = HiddenStore(folder, identity, WIDTH, code)
    named = [[("k0", 2), ("k1", 5)], [("k2", 3)]]
    store.write(0, named, [states(7), states(3, 1)], {"forward": 12})
    return store, named


@pytest.mark.parametrize(("code", "error"), [("float16", 5e-4), ("int8", 5e-3)])
def test_a_state_is_close_to_what_was_given(code: str, error: float, tmp_path: Path) -> None:
    store, _ = filled(tmp_path, code=code)
    found = torch.cat([store.read("k0"), store.read("k1")])
    largest = states(7).abs().amax(1, keepdim=True)
    assert float(((found - states(7)) / largest).abs().max()) <= error
    assert torch.equal(store.read("k2"), decode(*encode(states(3, 1), code)))
    assert store.hits == 3
    assert store.read_bytes == 10 * (WIDTH * (2 if code == "float16" else 1) + 4)


def test_small_numbers_beside_large_ones_keep_their_precision() -> None:
    given_states = torch.tensor([[60000.0, 1e-3, -3.0], [1e-30, 1e-31, 0.0], [0.0, 0.0, 0.0], [3e38, 1.0, 2.0]])
    found = decode(*encode(given_states, "float16"))
    assert float((found - given_states)[0].abs()[1]) < 1e-3 * 60000 / 2**20
    assert torch.allclose(found[1:3], given_states[1:3], rtol=1e-3, atol=0)
    assert found.isfinite().all()
    with pytest.raises(EdgegtError, match="not all finite"):
        encode(torch.tensor([[float("inf")]]), "float16")


def test_a_file_is_found_again_by_the_same_rows_only(tmp_path: Path) -> None:
    store, named = filled(tmp_path)
    expected = store.read("k1")
    again = HiddenStore(tmp_path, "a" * 64, WIDTH)
    assert again.missing(["k0", "k9"]) == [0, 1]
    assert again.open(0, named) == {"forward": 12}
    assert torch.equal(again.read("k1"), expected)
    for identity, rows in (("b" * 64, named), ("a" * 64, [[("k0", 2), ("k7", 5)], [("k2", 3)]])):
        filled(tmp_path)
        other = HiddenStore(tmp_path, identity, WIDTH)
        assert other.open(0, rows) is None
        assert not other.places
        assert not list(tmp_path.glob("rows-*"))


@pytest.mark.parametrize("damage", ["flip", "cut", "half", "gone"])
def test_a_damaged_file_counts_as_not_there(damage: str, tmp_path: Path) -> None:
    store, named = filled(tmp_path)
    path = next(tmp_path.glob("rows-*"))
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-5] ^= 4
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:-3])
    elif damage == "half":
        path.rename(tmp_path / f".{path.name}.1.tmp")
    else:
        path.unlink()
    assert HiddenStore(tmp_path, "a" * 64, WIDTH).open(0, named) is None
    assert not list(tmp_path.glob("*"))
    with pytest.raises(EdgegtError, match="cannot be read"):
        store.read("k0")


@given(st.lists(st.integers(0, 2**20), min_size=1, max_size=40), st.data())
@settings(max_examples=200, deadline=None)
def test_any_change_of_tokens_changes_the_key(tokens: list[int], data: st.DataObject) -> None:
    identity, at = identity_of("base", 3, []), data.draw(st.integers(0, len(tokens) - 1))
    changed = [*tokens]
    changed[at] += data.draw(st.integers(1, 9))
    others = [changed, tokens[:at] + tokens[at + 1 :], [0, *tokens], [*tokens, tokens[-1]]]
    assert len({key_of(identity, tuple(row)) for row in (tokens, *others)}) == 1 + len({*map(tuple, others)})
    assert key_of(identity, tuple(tokens)) == key_of(identity, tokens)
    for other in (("base2", 3, []), ("base", 4, []), ("base", 3, [("w", "seal")])):
        assert key_of(identity_of(*other), tokens) != key_of(identity, tokens)


@pytest.mark.parametrize("seed", range(6))
def test_files_take_no_more_than_their_layout_says(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    count, size, width = draw.randint(3, 60), draw.choice([1, 3, 8]), draw.choice([8, 400, 3000])
    inputs = [(row, *range(draw.randint(1, 30))) for row in range(count)]
    order = [(0.0, (row,)) for row in range(count) for _ in range(2)]
    shapes = [BatchShape(1, len(inputs[row]), 1) for _, (row,) in order]
    limit = draw.choice([20_000, 200_000, 1 << 30])
    rows = Rows(inputs, order, shapes, width, size, limit, 1e9)
    layout, store = rows.layout(0), HiddenStore(tmp_path, "c" * 64, width)
    for number, file in enumerate(layout.files):
        named = [[(str(row), len(inputs[row])) for row in batch] for batch in file]
        made = [torch.ones((sum(tokens for _, tokens in batch), width)) for batch in named]
        store.write(number, named, made, {"forward": 10**15, "attention": 10**14})
    assert store.nbytes <= layout.nbytes <= limit
    assert layout.rows or limit == 20_000
