"""No state of another row, another base or other tensors below is ever used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgegt.data import Example, collate
from edgegt.data.batches import shape_of
from edgegt.frozen import FrozenPrefix, NotKept
from edgegt.loss import kept_hidden
from edgegt.model import Int8Model
from edgegt.prefix import Rows
from edgegt.selection import Resting
from edgegt.skipping import Skipper
from edgegt.trace import trace
from tiny_models import CPU, FAMILIES, examples, load, save_model

BOUNDARY, COUNT = 2, 6
PLAN: Any = SimpleNamespace(boundary=BOUNDARY, cache_first=0, micro_batch=2)


def never() -> bool:
    return False


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Int8Model:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder / "llama", FAMILIES["llama"]())
    return load(folder / "llama", folder / "cache")


def prefix_of(model: Int8Model, folder: Path, rows: Sequence[Example], numerics: str = "torch") -> FrozenPrefix:
    order = [(0.0, tuple(range(len(rows))))] * 2
    kept = Rows([row.inputs for row in rows], order, [shape_of(rows)] * 2, 64, 4, 1 << 30, 1e9)
    return FrozenPrefix(model, trace(FAMILIES["llama"]()), folder, kept, tuple(rows), 0, numerics)


def output(model: Int8Model, rows: Sequence[Example], prefix: FrozenPrefix | None = None) -> torch.Tensor:
    with torch.no_grad():
        if prefix is None:
            return kept_hidden(model.module, collate(rows, 0), CPU)
        with prefix.used():
            return kept_hidden(model.module, collate(rows, 0), CPU)


@pytest.fixture(scope="module")
def filled(model: Int8Model, tmp_path_factory: pytest.TempPathFactory) -> FrozenPrefix:
    prefix = prefix_of(model, tmp_path_factory.mktemp("hidden"), examples(COUNT))
    assert prefix.ready(PLAN, {}, never)
    return prefix


@given(st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_changed_row_is_computed_and_the_others_are_read(
    model: Int8Model, filled: FrozenPrefix, data: st.DataObject
) -> None:
    rows = examples(COUNT)
    which = data.draw(st.integers(0, COUNT - 1))
    place = data.draw(st.integers(0, len(rows[which].prompt) - 1))
    prompt = list(rows[which].prompt)
    prompt[place] = (prompt[place] + data.draw(st.integers(1, 300))) % 320
    rows[which] = replace(rows[which], prompt=tuple(prompt))
    hits, expected = filled.hits, output(model, rows)
    found = output(model, rows, filled)
    assert filled.hits - hits == COUNT - 1
    there = collate(rows, 0).labels != -100
    assert torch.allclose(found[there], expected[there], atol=2e-2, rtol=2e-2)
    assert torch.allclose(found[which][there[which]], expected[which][there[which]], atol=1e-4)


def test_a_row_alone_and_padded_is_the_same_row(model: Int8Model, filled: FrozenPrefix) -> None:
    rows, hits = examples(COUNT), filled.hits
    for part in (rows[:1], rows[3:], rows):
        output(model, part, filled)
    assert filled.hits - hits == 1 + 3 + COUNT


def test_what_the_states_depend_on_makes_other_states(model: Int8Model, tmp_path: Path) -> None:
    rows = examples(COUNT)
    seal = {"model.layers.0.mlp.up_proj.weight": Resting(tmp_path / "a", "1" * 64)}
    other = {"model.layers.0.mlp.up_proj.weight": Resting(tmp_path / "a", "2" * 64)}
    above = {"model.layers.2.mlp.up_proj.weight": Resting(tmp_path / "a", "3" * 64)}

    def identity(resting: dict[str, Resting], numerics: str = "torch", plan: Any = PLAN) -> str:
        prefix = prefix_of(model, tmp_path / "hidden", rows, numerics)
        assert prefix.ready(plan, resting, never)
        return next((tmp_path / "hidden").iterdir()).name  # the states of others are deleted

    found = [identity({}), identity(seal), identity(other), identity({}, "native")]
    found.append(identity({}, plan=SimpleNamespace(**vars(PLAN) | {"boundary": 1})))
    assert identity(above) == found[0]
    before, model.fingerprint = model.fingerprint, "another base"
    found.append(identity({}))
    model.fingerprint = before
    assert len(set(found)) == len(found)


def test_states_are_made_once_and_counted_once(model: Int8Model, tmp_path: Path) -> None:
    rows, spent = examples(COUNT), []
    for again in (False, True):  # the second process finds the files and counts what they took
        prefix, before = prefix_of(model, tmp_path / "hidden", rows), model.meter.total
        if again:
            changed = {path: path.stat().st_mtime_ns for path in (tmp_path / "hidden").glob("*/*")}
        assert prefix.ready(PLAN, {}, never)
        spent.append(model.meter.total - before)
        assert prefix.ready(PLAN, {}, never)
        assert model.meter.total - before == spent[-1]
    assert spent[0] == spent[1] > 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "hidden").glob("*/*")} == changed
    resumed = prefix_of(model, tmp_path / "hidden", rows)
    resumed.restore(prefix.state())
    before = model.meter.total
    assert resumed.ready(PLAN, {}, never)
    assert model.meter.total == before  # its checkpoint had them


def test_a_signal_ends_the_filling_and_a_strange_model_keeps_nothing(model: Int8Model, tmp_path: Path) -> None:
    prefix = prefix_of(model, tmp_path, examples(COUNT))
    assert not prefix.ready(PLAN, {}, lambda: True)
    assert not list(tmp_path.glob("*/rows-*"))
    prefix = prefix_of(model, tmp_path, examples(COUNT))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Skipper, "differs", lambda *given: 0.3)
        with pytest.raises(NotKept, match=r"differs by 3.0e-01"):
            prefix.ready(PLAN, {}, never)
        patch.setattr(Skipper, "differs", lambda *given: int("x"))
        with pytest.raises(NotKept, match="does not run without its lowest layers"):
            prefix.ready(PLAN, {}, never)
    with prefix.used():  # nothing is kept: everything runs
        assert torch.equal(output(model, examples(2)), output(model, examples(2)))
