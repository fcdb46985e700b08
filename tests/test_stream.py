"""A base of which one layer is in memory at a time: the same bits, and as little memory as the planner counts."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from edgegt.architecture import all_layers
from edgegt.cost import CostTable
from edgegt.errors import BudgetError
from edgegt.importance import importance
from edgegt.loss import kept_hidden, supervised_loss
from edgegt.memory import Surroundings
from edgegt.model import Int8Model
from edgegt.planner import Problem, plan, smallest
from edgegt.recompute import recomputed
from edgegt.stream import BaseStream
from edgegt.trace import trace
from test_prefix import problem as problem_of
from test_prefix import rows
from tiny_classifiers import classes_batch, load_classifier, save_classifier
from tiny_models import CPU, FAMILIES, batch_of, load, save_model

FEW = ("llama", "gpt2", "bloom", "mixtral")


def pair_of(family: str, tmp_path: Path) -> tuple[Int8Model, Int8Model]:
    """The same model, whole and streamed."""
    save_model(tmp_path / "model", FAMILIES[family]())
    return load(tmp_path / "model", tmp_path / "cache"), load(tmp_path / "model", tmp_path / "cache", streams=True)


def stream_of(model: Int8Model) -> BaseStream:
    assert model.stream is not None
    return model.stream


def there(model: Int8Model) -> list[int]:
    """The layers that are in memory."""
    stream = stream_of(model)
    return [
        index
        for index, members in enumerate(stream.linears)
        if not all(one.weight.q.is_meta for one in members.values())
    ]


@pytest.mark.parametrize(
    "family", [family if family in FEW else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]
)
def test_every_family_gives_the_same_with_one_layer_there(family: str, tmp_path: Path) -> None:
    whole, model = pair_of(family, tmp_path)
    batch, stream = batch_of(4), stream_of(model)
    with torch.no_grad():
        assert torch.equal(kept_hidden(model.module, batch, CPU), kept_hidden(whole.module, batch, CPU))
    assert there(model) == [2]
    table = trace(FAMILIES[family]())
    sizes = [sum(one.weight.nbytes for one in members.values()) for members in stream.linears]
    assert sizes == list(table.layer_bytes_int8)
    assert stream.most_bytes == max(sizes) and stream.spared_bytes == sum(sizes) - max(sizes)
    stream.leave()
    assert there(model) == [] and stream.there_bytes == 0


@pytest.mark.parametrize("first", [0, 1, 3])
@pytest.mark.parametrize("family", FEW)
def test_loss_and_gradients_are_the_same_bits(family: str, first: int, tmp_path: Path) -> None:
    found: list[dict[str, Tensor]] = []
    for model in pair_of(family, tmp_path):
        trained = {name: p for name, p in model.vectors.items() if ".2." in name}
        for parameter in trained.values():
            parameter.requires_grad_(True)
        again = recomputed(all_layers(model.module), [1, 2])
        with stream_of(model).from_layer(first) if model.stream else nullcontext(), again:
            loss = supervised_loss(model.module, batch_of(4), CPU)
            loss.backward()
            if model.stream:
                assert there(model) == [index for index in range(3) if index >= first or index == 2]
        found.append({name: p.grad for name, p in trained.items() if p.grad is not None} | {"": loss.detach()})
    assert len(found[0]) > 1 and found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert there(model) == []  # and recomputing left what brings a layer in
    kept_hidden(model.module, batch_of(4), CPU)
    assert there(model) == [2]


def test_importance_is_the_same_and_needs_one_layer_at_a_time(tmp_path: Path) -> None:
    whole, model = pair_of("llama", tmp_path)
    batches = [batch_of(4, seed) for seed in (1, 2)]
    found = [importance(one, batches, all_layers(one.module)) for one in (whole, model)]
    assert found[0] == found[1]
    assert stream_of(model).most_bytes == max(trace(FAMILIES["llama"]()).layer_bytes_int8)


def test_a_classifier_too(tmp_path: Path) -> None:
    save_classifier(tmp_path / "model", "bert", True)
    found = []
    for streams in (False, True):
        model = load_classifier(tmp_path / "model", tmp_path / "cache", streams=streams)
        with torch.no_grad():
            found.append(supervised_loss(model.module, classes_batch("bert"), CPU))
    assert torch.equal(*found)
    assert len(there(model)) == 1


def test_what_is_trained_stays_and_what_is_put_back_goes(tmp_path: Path) -> None:
    model = pair_of("llama", tmp_path)[1]
    name = "model.layers.0.mlp.down_proj.weight"
    kept_hidden(model.module, batch_of(2), CPU)
    model.linears[name].promote(model.original(name))
    kept_hidden(model.module, batch_of(2), CPU)
    assert not model.linears[name].weight.q.is_meta and there(model) == [0, 2]
    model.reset(name)
    kept_hidden(model.module, batch_of(2), CPU)
    assert there(model) == [2]


def test_a_layer_that_is_away_is_an_error_and_no_wrong_number(tmp_path: Path) -> None:
    model = pair_of("llama", tmp_path)[1]
    stream_of(model).leave()
    with pytest.raises(RuntimeError, match=r"up_proj\.weight: the weight is not in memory"):
        model.linears["model.layers.0.mlp.up_proj.weight"](torch.ones(2, 64))


def resident(folder: Path) -> int:
    """Bytes of this folder's files that are resident in this process."""
    text = Path("/proc/self/smaps").read_text(encoding="utf-8")
    parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", text, flags=re.MULTILINE)
    mine = (part for part in parts if str(folder) in part.partition("\n")[0])
    return sum(1024 * int(size) for part in mine for size in re.findall(r"^Rss:\s+(\d+) kB", part, re.MULTILINE))


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages as Linux tells them")
def test_pages_of_a_layer_that_is_let_go_are_not_resident(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=320, hidden_size=256, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=4,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    save_model(tmp_path / "model", config)
    whole, model = (
        load(tmp_path / "model", tmp_path / f"cache-{streams}", streams=streams) for streams in (False, True)
    )
    for one in (whole, model):
        kept_hidden(one.module, batch_of(2), CPU)
    layers, outside = trace(config).layer_bytes_int8, 2**18
    assert resident(tmp_path / "cache-False") >= sum(layers)
    assert max(layers) <= resident(tmp_path / "cache-True") <= max(layers) + outside
    with stream_of(model).from_layer(2):
        kept_hidden(model.module, batch_of(2), CPU)
        kept_hidden(model.module, batch_of(2), CPU)
        assert sum(layers[2:]) <= resident(tmp_path / "cache-True") <= sum(layers[2:]) + max(layers) + outside
    assert resident(tmp_path / "cache-True") <= outside


def streamed(rho: float = 0.9, memory: int = 1 << 40, epochs: int = 3) -> Problem:
    found = problem_of(rows(epochs), rho)
    table = replace(found.table, base_bytes=150_000 + sum(found.table.layer_bytes_int8))
    return replace(found, table=table, memory_bytes=memory, streams=True)


def boundaries(problem: Problem) -> Iterator[tuple[int, int]]:
    return ((b, problem.at(b).base_bytes) for b in range(problem.table.blocks + 1))


def test_each_boundary_counts_what_is_in_memory_there() -> None:
    problem = streamed()
    table: CostTable = problem.table
    layer = table.layer_bytes_int8[0]
    assert layer == 2 * (200 * 100 + 400)
    assert dict(boundaries(problem)) == {
        0: table.base_bytes, 1: table.base_bytes, 2: table.base_bytes - layer, 3: table.base_bytes - 2 * layer,
    }  # fmt: skip
    assert {size for _, size in boundaries(replace(problem, streams=False))} == {table.base_bytes}
    assert problem.boundaries == [0, 1, 2, 3]


def test_the_smallest_budget_works_and_a_byte_less_does_not() -> None:
    problem = streamed()
    least = smallest(problem).memory_bytes
    assert least < smallest(replace(problem, streams=False)).memory_bytes
    found = plan(replace(problem, memory_bytes=least))
    assert found.peak_bytes <= least and found.boundary > 1
    assert found.memory["base"] == problem.at(found.boundary).base_bytes
    assert any("the int8 base is streamed (" in note for note in found.notes)
    with pytest.raises(BudgetError) as told:
        plan(replace(problem, memory_bytes=least - 1))
    assert told.value.smallest_bytes == least


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_a_plan_keeps_its_budget_with_the_base_that_its_boundary_has(share: float) -> None:
    problem = streamed(rho=0.7)
    least, most = smallest(problem).memory_bytes, smallest(replace(problem, streams=False)).memory_bytes + 10**6
    found = plan(replace(problem, memory_bytes=int(least + share * (most - least))))
    lowest = min(weight.block for weight in problem.table.weights if weight.name in found.selected)
    assert found.boundary <= lowest
    assert sum(found.memory.values()) == found.peak_bytes <= int(least + share * (most - least))


def test_reading_the_base_again_takes_time_in_the_plan() -> None:
    problem = streamed()
    at = problem.at(2)
    assert at.streamed_bytes == sum(problem.table.layer_bytes_int8[:2])  # one group is enough for so few rows
    assert problem.at(0).streamed_bytes == 0 == replace(problem, streams=False).at(2).streamed_bytes
    some = replace(problem_of(rows(limit=7000), 0.9), streams=True).at(2)
    assert some.footing is not None and some.footing.misses > 0
    assert some.streamed_bytes == (1 + some.footing.misses) * sum(problem.table.layer_bytes_int8[:2])
    assert Surroundings(0).streamed == 0
