"""An int8 model in a loop of one's own: it learns as a float model does, and its patch is one of edgegt's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from edgegt import InputError, load_int8_model
from edgegt.architecture import auto_class, untie_head
from edgegt.patch import apply_patch, read_patch
from tiny_classifiers import LABELS, save_classifier
from tiny_models import FAMILIES, MIXTURES, batch_of, save_model

LR = 3e-3


def inputs_of(seed: int) -> dict[str, torch.Tensor]:
    """Random rows as transformers wants them, everything learned but the padding on the left."""
    batch = batch_of(4, seed)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels}


def steps(model: Any, parameters: list[Any], count: int, optimizer: Any = None) -> list[float]:
    optimizer = optimizer or torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)
    losses = []
    for step in range(count):
        loss = model(**inputs_of(step % 2)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def some_of(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if ".2." in name or name in ("lm_head.weight", "model.norm.weight")]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_learns_as_a_float_model_does(tmp_path: Path, family: str) -> None:
    """Ten steps of AdamW, beside the same tensors of transformers' float model; gradients come in 8 bits here."""
    save_model(tmp_path, (FAMILIES | MIXTURES)[family]())
    model = load_int8_model(tmp_path)
    reference = auto_class(model.module.config).from_pretrained(tmp_path, dtype=torch.float32)
    if reference.config.tie_word_embeddings:
        untie_head(reference)
    chosen = some_of(model.names)
    assert len(chosen) > 5
    model.select(chosen)
    assert model.selected == tuple(chosen)
    reference.requires_grad_(False)
    twins = [reference.get_parameter(name).requires_grad_(True) for name in chosen]
    ours = steps(model, model.trainable_parameters(), 10)
    theirs = steps(reference.eval(), twins, 10)
    assert ours == pytest.approx(theirs, rel=0.04)
    assert ours[-1] < 0.9 * ours[0]


def test_what_is_not_selected_stays_and_what_returns_goes_on(tmp_path: Path) -> None:
    save_model(tmp_path, FAMILIES["llama"]())
    model = load_int8_model(tmp_path)
    head, norm, up = "lm_head.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
    model.select([head, norm])
    first = model.trainable_parameters()
    optimizer = torch.optim.AdamW(first, lr=LR)
    steps(model, [], 3, optimizer)
    trained = [parameter.detach().clone() for parameter in first]
    loss = model(**inputs_of(0)).loss.item()
    model.select(())
    assert model(**inputs_of(0)).loss.item() == loss
    model.select([up])
    steps(model, model.trainable_parameters(), 3)
    assert all(torch.equal(one, other) for one, other in zip(first, trained, strict=True))
    model.select([head, up])
    again = model.trainable_parameters()
    assert again[0] is first[0]  # so that an optimizer's states of it still hold
    steps(model, [], 1, optimizer)
    assert not torch.equal(again[0], trained[0]) and torch.equal(first[1], trained[1])


def test_planes_follow_whatever_changes_a_master(tmp_path: Path) -> None:
    """A step that hides the change from autograd's versions, and a value that is put in by hand."""
    save_model(tmp_path, FAMILIES["llama"]())
    model = load_int8_model(tmp_path)
    model.select(["lm_head.weight"])
    (master,) = model.trainable_parameters()
    loss = model(**inputs_of(0)).loss
    loss.backward()
    master.data.sub_(master.grad)  # as kernels of optimizers do
    assert model(**inputs_of(0)).loss.item() != loss.item()
    with torch.no_grad():
        master.zero_()
        assert float(model(**inputs_of(0)).logits.abs().max()) == 0.0


def test_the_patch_is_read_by_edgegt(tmp_path: Path) -> None:
    save_model(tmp_path / "model", FAMILIES["llama"]())
    model = load_int8_model(tmp_path / "model")
    with pytest.raises(InputError, match="nothing was selected"):
        model.save_patch(tmp_path / "empty.safetensors")
    model.select(some_of(model.names))
    steps(model, model.trainable_parameters(), 2)
    model.select(["model.layers.0.mlp.up_proj.weight"])
    model.save_patch(tmp_path / "patch.safetensors", separator="\n")
    assert read_patch(tmp_path / "patch.safetensors")[1]["separator"] == "\n"
    again = load_int8_model(tmp_path / "model")
    apply_patch(again._model, tmp_path / "patch.safetensors")
    with torch.no_grad():
        assert torch.equal(model(**inputs_of(0)).logits, again(**inputs_of(0)).logits)


def test_a_new_head_of_a_classifier_is_always_trained(tmp_path: Path) -> None:
    save_classifier(tmp_path, "bert", fresh=True)
    model = load_int8_model(tmp_path, LABELS)
    model.select(["bert.encoder.layer.2.output.dense.weight"])
    assert set(model.selected) > {"classifier.weight", "classifier.bias"}
    ids = torch.arange(3, 27).reshape(4, 6)
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=LR)
    losses = []
    for _ in range(16):
        loss = model(input_ids=ids, labels=torch.tensor([0, 1, 2, 0])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_a_name_that_cannot_be_trained(tmp_path: Path) -> None:
    save_model(tmp_path, FAMILIES["llama"]())
    model = load_int8_model(tmp_path)
    with pytest.raises(InputError, match=r"'lm_head.wieght' cannot be trained.*lm_head.weight"):
        model.select(["lm_head.wieght"])
