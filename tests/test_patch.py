"""The patch: what was trained comes back bit for bit, onto the right base only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from edgegt.errors import InputError
from edgegt.loss import supervised_loss
from edgegt.model import Int8Model
from edgegt.optimizer import AdamW
from edgegt.patch import apply_patch, read_patch, save_patch
from edgegt.selection import Trainables
from tiny_models import FAMILIES, batch_of, load, save_model


def trained(folder: Path, rounds: list[list[str]]) -> Trainables:
    """Two steps with each of these selections."""
    trainables = Trainables(load(folder, folder.parent / "cache"), AdamW(False), folder.parent / "parked")
    model = trainables.model
    for names in rounds:
        trainables.select(names)
        for seed in range(2):
            batch = batch_of(4, seed=seed)
            (supervised_loss(model.module, batch, model.device) / batch.supervised).backward()
            for name, parameter in trainables.live.items():
                assert parameter.grad is not None
                gradient, parameter.grad = parameter.grad, None
                trainables.step(name, gradient, 1e-2)
            model.inputs.clear()
    return trainables


def logits(model: Int8Model) -> torch.Tensor:
    batch = batch_of(5, seed=9)
    with torch.no_grad():
        return model.module(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", FAMILIES["llama"]())
    return tmp_path / "model"


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen2"])
def test_a_patched_base_computes_bit_for_bit_what_training_ended_with(family: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_model(folder, FAMILIES[family]())
    model = load(folder, tmp_path / "cache")
    names = [*model.linears, *model.vectors]
    trainables = trained(folder, [names[::5], [*names[1::4], model.head]])
    save_patch(tmp_path / "patch.safetensors", trainables.masters(), model.fingerprint, "model", "0")
    untouched = logits(model)
    apply_patch(model, tmp_path / "patch.safetensors")
    assert torch.equal(logits(model), logits(trainables.model))
    assert not torch.equal(logits(model), untouched)
    assert not any(parameter.requires_grad for parameter in model.module.parameters())


def test_a_patch_comes_back_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "patch.safetensors"
    tensors = {"b": torch.randn(3, 4), "a": torch.randn(7), "c": torch.randn(4, 3).t()}
    save_patch(path, tensors, "f" * 64, "model", "1.2.3", "\n")
    found, about = read_patch(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert about == {"format": "1", "fingerprint": "f" * 64, "model": "model", "edgegt": "1.2.3", "separator": "\n"}
    assert [item.name for item in tmp_path.iterdir()] == ["patch.safetensors"]


def test_a_patch_of_another_base_is_refused(folder: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "other", FAMILIES["llama"](), seed=5)
    model, other = load(folder, tmp_path / "cache"), load(tmp_path / "other", tmp_path / "cache")
    path = tmp_path / "patch.safetensors"
    save_patch(path, {"lm_head.weight": torch.zeros(320, 64)}, model.fingerprint, "model", "0")
    before = logits(other)
    with pytest.raises(InputError, match=f"another base.*{model.fingerprint[:12]}.*{other.fingerprint[:12]}.*--model"):
        apply_patch(other, path)
    assert torch.equal(logits(other), before)


@pytest.mark.parametrize("size", [0, 5, 60, 400])
def test_a_damaged_patch_is_refused(size: int, tmp_path: Path) -> None:
    path = tmp_path / "patch.safetensors"
    save_patch(path, {"a": torch.randn(100)}, "f" * 64, "model", "0")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match=r"patch\.safetensors' is damaged") as refusal:
        read_patch(path)
    assert "\n" not in str(refusal.value)


def test_what_is_not_a_patch_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3)}, str(tmp_path / "model.safetensors"))
    with pytest.raises(InputError, match="is not an edgegt patch"):
        read_patch(tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="does not exist"):
        read_patch(tmp_path / "nothing.safetensors")


def test_a_tensor_that_the_model_lacks_or_of_another_shape_is_refused(folder: Path, tmp_path: Path) -> None:
    model = load(folder, tmp_path / "cache")
    path = tmp_path / "patch.safetensors"
    for tensors in ({"model.layers.9.mlp.up_proj.weight": torch.zeros(96, 64)}, {"lm_head.weight": torch.zeros(3, 3)},
                    {"model.norm.weight": torch.zeros(3)}):  # fmt: skip
        save_patch(path, tensors, model.fingerprint, "model", "0")
        with pytest.raises(InputError, match=next(iter(tensors)).replace(".", r"\.")):
            apply_patch(model, path)
