"""Importance: it leaves everything as found, and equals the same statistic of a float model's gradients."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from edgegt.architecture import layers_of
from edgegt.cost import BatchShape
from edgegt.data import Batch, collate, split_micro
from edgegt.importance import importance
from edgegt.loss import supervised_loss
from edgegt.memory import Surroundings
from edgegt.model import Int8Model
from edgegt.optimizer import AdamW
from edgegt.planner import Problem, plan
from edgegt.quant import dequantize
from edgegt.selection import Trainables
from edgegt.trace import trace
from tiny_models import FAMILIES, VOCABULARY, batch_of, examples, float_model, load, save_model

COMPARED = ("llama", "gpt2", "opt")


def model_of(family: str, folder: Path) -> Int8Model:
    if not (folder / "model").exists():
        save_model(folder / "model", FAMILIES[family]())
    return load(folder / "model", folder / "cache")


def measure(model: Int8Model, batches: list[Batch]) -> dict[str, float]:
    return importance(model, batches, model.module.get_submodule(layers_of(model.module)[0]))


def batches_of(seed: int = 0, rows: int = 8, count: int = 2, vocabulary: int = VOCABULARY) -> list[Batch]:
    rows_of_one_length = examples(rows * count, seed, vocabulary)
    return [collate(rows_of_one_length[start : start + rows], 0) for start in range(0, rows * count, rows)]


def float_twin(model: Int8Model, family: str) -> Any:
    """transformers' float model, untied, holding the int8 model's dequantised weights."""
    twin = float_model(FAMILIES[family](), untied=True)
    parameters = dict(twin.named_parameters())
    with torch.no_grad():
        for name, linear in model.linears.items():
            value = dequantize(linear.weight)
            parameters[name].copy_(value if parameters[name].shape == value.shape else value.t())
        for name, vector in model.vectors.items():
            parameters[name].copy_(vector)
        for name, module in model.module.named_modules():
            if type(module).__name__ == "Int8Embedding":
                parameters[f"{name}.weight"].copy_(dequantize(module.weight))
            elif "Positional" in type(module).__name__ or name.endswith("wpe"):
                parameters[f"{name}.weight"].copy_(module.weight)
    return twin


def float_gradients(twin: Any, batch: Batch, supervised: int) -> dict[str, torch.Tensor]:
    twin.zero_grad(set_to_none=True)
    (supervised_loss(twin, batch, torch.device("cpu")) / supervised).backward()
    return {name: p.grad.clone() for name, p in twin.named_parameters() if p.grad is not None}


def cross(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a * b.sign()).sum() + (b * a.sign()).sum())


def reference(twin: Any, batches: list[Batch], model: Int8Model) -> dict[str, float]:
    """The documented statistic, from two separate passes per batch (linears), or one per batch (vectors)."""
    values = dict.fromkeys([*model.linears, *model.vectors], 0.0)
    whole: list[dict[str, torch.Tensor]] = []
    for batch in batches:
        halves = split_micro(batch, batch.shape.rows // 2)
        first, second = (float_gradients(twin, half, batch.supervised) for half in halves)
        for name in model.linears:
            values[name] += cross(first[name], second[name]) / len(batches)
        whole.append({name: first[name] + second[name] for name in model.vectors})
    for even, odd in zip(whole[::2], whole[1::2], strict=True):
        for name in model.vectors:
            values[name] += cross(even[name], odd[name]) / len(batches)
    return {name: max(0.0, value) for name, value in values.items()}


def correlation(left: list[float], right: list[float]) -> float:
    return float(torch.corrcoef(torch.tensor([left, right], dtype=torch.float64))[0, 1])


@pytest.mark.parametrize("family", COMPARED)
def test_importance_is_that_of_a_float_model_with_the_same_weights(family: str, tmp_path: Path) -> None:
    """Few different tokens, so that the halves agree; to random ids a random model's gradients are little but noise.

    The ratio is off by as much as the noise of int8 activations turns signs.
    """
    model = model_of(family, tmp_path)
    batches = batches_of(rows=16, count=4, vocabulary=12)
    found, expected = measure(model, batches), reference(float_twin(model, family), batches, model)
    assert found.keys() == expected.keys()
    for kind in (model.linears, model.vectors):
        assert correlation([found[name] for name in kind], [expected[name] for name in kind]) > 0.99
        ratio = sum(found[name] for name in kind) / sum(expected[name] for name in kind)
        assert 0.92 < ratio < 1.08


def test_everything_is_left_as_found(tmp_path: Path) -> None:
    model = model_of("llama", tmp_path)
    trainables = Trainables(model, AdamW(False), tmp_path / "parked")
    up, norm = "model.layers.1.mlp.up_proj.weight", "model.layers.2.input_layernorm.weight"
    trainables.select([up, norm, model.head])
    trainables.step(up, torch.randn(96, 64), 1e-3)
    trainables.step(norm, torch.randn(64), 1e-3)
    tensors = {f"{name}.{part}": getattr(linear.weight, part) for name, linear in model.linears.items()
               for part in ("q", "scale", "low") if getattr(linear.weight, part) is not None}  # fmt: skip
    tensors |= {f"parameter {name}": parameter.data for name, parameter in model.module.named_parameters()}
    tensors |= {f"state {name} {key}": value for name, moments in trainables.optimizer.states.items()
                for key, value in moments.tensors().items()}  # fmt: skip
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    flags = {name: parameter.requires_grad for name, parameter in model.module.named_parameters()}
    forwards = [vars(layer).get("forward") for layer in model.module.model.layers]
    random_state = torch.get_rng_state()
    measure(model, batches_of())
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())
    assert {name: parameter.requires_grad for name, parameter in model.module.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in model.module.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [vars(layer).get("forward") for layer in model.module.model.layers] == forwards
    assert all(linear.probe is None for linear in model.linears.values())
    assert not model.module.training


def test_it_leaves_everything_as_found_when_it_fails(tmp_path: Path) -> None:
    model = model_of("llama", tmp_path)
    broken = replace(batch_of(4), labels=torch.full((4, 2), VOCABULARY + 5))
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        measure(model, [broken, broken])
    assert all(linear.probe is None for linear in model.linears.values())
    assert not any(parameter.requires_grad for parameter in model.module.parameters())


def test_it_is_the_same_twice_and_while_tensors_are_trained(tmp_path: Path) -> None:
    model = model_of("llama", tmp_path)
    first = measure(model, batches_of())
    assert measure(model, batches_of()) == first
    trainables = Trainables(model, AdamW(False), tmp_path / "parked")
    trainables.select(["model.layers.1.mlp.up_proj.weight"])
    again = measure(model, batches_of())
    # the promoted weight now acts in 16 bits instead of 8
    assert correlation(list(again.values()), list(first.values())) > 0.999


@pytest.mark.parametrize("family", FAMILIES)
def test_its_flops_are_the_cost_tables(family: str, tmp_path: Path) -> None:
    model = model_of(family, tmp_path)
    batches = batches_of()
    expected = trace(FAMILIES[family]()).probe_work().total([batch.shape for batch in batches])
    measure(model, batches)
    assert model.meter.total == pytest.approx(expected, rel=0.02)


def test_other_data_give_other_importances_and_permuting_them_changes_the_plan(tmp_path: Path) -> None:
    model, table = model_of("llama", tmp_path), trace(FAMILIES["llama"]())
    values = measure(model, batches_of(seed=0))
    others = measure(model, batches_of(seed=77, vocabulary=40))
    assert correlation(list(values.values()), list(others.values())) < 0.9999
    shapes = (BatchShape(8, 24, 8),) * 10
    budget = int(0.5 * table.full_work().total(shapes))

    def chosen(values: dict[str, float]) -> tuple[str, ...]:
        problem = Problem(table, values, shapes, budget, 2**30, Surroundings(2**20), VOCABULARY, 8)
        return plan(problem).selected

    names = [weight.name for weight in table.weights]
    reverse = dict(zip(names, [values[name] for name in reversed(names)], strict=True))
    assert chosen(values) != chosen(reverse)
    assert chosen(values) == chosen(dict(values))


def test_no_gradient_of_a_weights_size_is_kept(tmp_path: Path) -> None:
    model = model_of("llama", tmp_path)
    gc.collect()
    older = {id(found) for found in gc.get_objects() if issubclass(type(found), torch.Tensor)}
    measure(model, batches_of())
    sizes = {linear.weight.q.numel() for linear in model.linears.values()}
    gc.collect()
    kept = [
        tuple(found.shape)
        for found in gc.get_objects()
        if issubclass(type(found), torch.Tensor) and id(found) not in older and found.is_floating_point()
    ]
    assert not [shape for shape in kept if torch.Size(shape).numel() in sizes]


def test_importance_is_never_negative_and_the_upper_layers_matter(tmp_path: Path) -> None:
    values = measure(model_of("llama", tmp_path), batches_of())
    assert all(value >= 0 for value in values.values())
    assert values["lm_head.weight"] > 0
