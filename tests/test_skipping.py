"""Models without their lowest layers compute the same, in every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from edgegt.cost import BatchShape
from edgegt.errors import EdgegtError
from edgegt.loss import supervised_loss
from edgegt.model import Int8Model
from edgegt.skipping import AGREES, Skipper
from edgegt.trace import trace
from tiny_classifiers import ENCODERS, classes_batch, load_classifier, save_classifier
from tiny_models import CPU, FAMILIES, batch_of, load, save_model

FEW = ("llama", "gemma2", "bloom")


def model_of(family: str, tmp_path: Path) -> Int8Model:
    save_model(tmp_path / "model", FAMILIES[family]())
    return load(tmp_path / "model", tmp_path / "cache")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_same_without_its_lowest_layers(family: str, tmp_path: Path) -> None:
    model = model_of(family, tmp_path)
    for boundary in (1, 3):
        assert Skipper(model.module, boundary).differs(batch_of(4), CPU) == 0.0


@pytest.mark.parametrize("family", FEW)
def test_loss_and_gradients_are_the_same_bits(family: str, tmp_path: Path) -> None:
    model, batch = model_of(family, tmp_path), batch_of(4)
    skipper = Skipper(model.module, 2)
    trained = {name: p for name, p in model.vectors.items() if ".2." in name or "norm.weight" in name[:20]}
    for parameter in trained.values():
        parameter.requires_grad_(True)

    def gradients() -> tuple[Tensor, dict[str, Tensor]]:
        loss = supervised_loss(model.module, batch, CPU)
        loss.backward()
        found = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
        for parameter in trained.values():
            parameter.grad = None
        return loss.detach(), found

    expected, whole = gradients()
    states = skipper.capture(batch, CPU)
    with skipper.skipping(lambda ids, mask, compute: states * mask.unsqueeze(-1)):
        found, some = gradients()
    assert whole and torch.equal(found, expected)
    assert all(torch.equal(some[name], gradient) for name, gradient in whole.items())
    assert torch.equal(gradients()[0], expected)  # and everything is back in its place


@pytest.mark.parametrize("family", FEW)
def test_rows_that_are_not_kept_are_computed_and_counted(family: str, tmp_path: Path) -> None:
    model, batch, boundary = model_of(family, tmp_path), batch_of(5), 2
    table, skipper = trace(FAMILIES[family]()), Skipper(model.module, boundary)
    with torch.no_grad():
        expected = supervised_loss(model.module, batch, CPU)
        whole = model.meter.total
        supervised_loss(model.module, batch, CPU)
        whole = model.meter.total - whole
    kept = skipper.capture(batch, CPU)

    def some(ids: Tensor, mask: Tensor, compute: Callable[[list[int]], Tensor]) -> Tensor:
        out = kept * mask.unsqueeze(-1)
        out[[1, 4]] = compute([1, 4])
        return out

    before = model.meter.total
    with torch.no_grad(), skipper.skipping(some):
        found = supervised_loss(model.module, batch, CPU)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    saved = table.below(boundary).at(BatchShape(3, batch.shape.tokens, batch.shape.kept))
    assert model.meter.total - before == whole - saved


def test_a_model_that_gives_something_else_is_noticed(tmp_path: Path) -> None:
    model = model_of("llama", tmp_path)
    skipper = Skipper(model.module, 2)
    assert skipper.differs(batch_of(4), CPU) <= AGREES
    layer = skipper.layers[1]
    forward, calls = layer.forward, []

    def drifting(*args: object, **named: object) -> Tensor:
        calls.append(None)
        out: Tensor = forward(*args, **named)
        return out + (len(calls) > 1)

    layer.forward = drifting
    assert skipper.differs(batch_of(4), CPU) > AGREES
    skipper.layers.reverse()
    skipper.layers[-1] = torch.nn.Identity()
    with pytest.raises(EdgegtError, match="in order"):
        skipper.capture(batch_of(2), CPU)


@pytest.mark.parametrize("family", [*ENCODERS, "llama", "gpt2"])
def test_classifiers_too(family: str, tmp_path: Path) -> None:
    save_classifier(tmp_path / "model", family, True)
    model = load_classifier(tmp_path / "model", tmp_path / "cache")
    assert Skipper(model.module, 1).differs(classes_batch(family), CPU) == 0.0
