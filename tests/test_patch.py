"""The patch: what was trained comes back bit for bit, onto the right base only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from edgegt.errors import InputError
from edgegt.loss import supervised_loss
from edgegt.memory import Formats
from edgegt.model import Int8Model
from edgegt.optimizer import AdamW
from edgegt.patch import apply_patch, read_patch, save_patch
from edgegt.selection import Trainables
from tiny_models import EVERY, FAMILIES, batch_of, load, logits_of, save_model, start_of


def trained(
    folder: Path, rounds: list[list[str]], master: str = "float32", head_rows: torch.Tensor | None = None,
    start: int | None = None,
) -> Trainables:  # fmt: skip
    """Two steps with each of these selections."""
    trainables = Trainables(load(folder, folder.parent / "cache"), AdamW(False), folder.parent / "parked")
    trainables.configure(Formats(master, "float32"), head_rows)
    model = trainables.model
    for names in rounds:
        trainables.select(names)
        for seed in range(2):
            batch = batch_of(4, seed=seed, start=start)
            (supervised_loss(model.module, batch, model.device) / batch.supervised).backward()
            for name, parameter in trainables.live.items():
                assert parameter.grad is not None
                gradient, parameter.grad = parameter.grad, None
                trainables.step(name, gradient, 1e-2)
            model.inputs.clear()
    return trainables


def logits(model: Int8Model, start: int | None = None) -> torch.Tensor:
    return logits_of(model.module, batch_of(5, seed=9, start=start))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", FAMILIES["llama"]())
    return tmp_path / "model"


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen2", "t5", "bart"])
def test_a_patched_base_computes_bit_for_bit_what_training_ended_with(family: str, tmp_path: Path) -> None:
    start, folder = start_of(family), tmp_path / "model"
    save_model(folder, EVERY[family]())
    model = load(folder, tmp_path / "cache")
    names = [*model.linears, *model.vectors]
    trainables = trained(folder, [names[::5], [*names[1::4], model.head]], start=start)
    save_patch(tmp_path / "patch.safetensors", trainables.masters(), model.fingerprint, "model", "0")
    untouched = logits(model, start)
    apply_patch(model, tmp_path / "patch.safetensors")
    assert torch.equal(logits(model, start), logits(trainables.model, start))
    assert not torch.equal(logits(model, start), untouched)
    assert not any(parameter.requires_grad for parameter in model.module.parameters())


@pytest.mark.parametrize("master", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "llama-untied", "gpt2"])
def test_trained_rows_come_back_bit_for_bit(family: str, master: str, tmp_path: Path) -> None:
    folder, path = tmp_path / "model", tmp_path / "patch.safetensors"
    save_model(folder, FAMILIES[family]())
    model = load(folder, tmp_path / "cache")
    names, rows = [*model.linears, *model.vectors], torch.arange(7, 320, 3)
    trainables = trained(folder, [[*names[::5], model.head], names[1::4]], master, rows)
    save_patch(path, trainables.masters(), model.fingerprint, "model", "0")
    tensors, about = read_patch(path)
    assert about["format"] == "sealed 2" and torch.equal(tensors[f"{model.head}|rows"], rows)
    assert tensors[model.head].shape == (len(rows), 64)
    assert all(value.dtype in (torch.float32, torch.int64) for value in tensors.values())
    table = model.module.get_input_embeddings().weight
    plane = table.q.clone()
    apply_patch(model, path)
    assert torch.equal(logits(model), logits(trainables.model))
    assert model.module.get_input_embeddings().weight is table and torch.equal(table.q, plane)


HEAD = "lm_head.weight"
TWO = torch.tensor([3, 5])


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({HEAD: torch.ones(2, 64)}, r"\(2, 64\), 'model' as \(320, 64\)"),
        ({f"{HEAD}|rows": TWO}, "without the values of these rows"),
        ({HEAD: torch.ones(2, 64), f"{HEAD}|rows": torch.tensor([3, 320])}, "from 3 to 320, the rows from 0 to 319"),
        ({HEAD: torch.ones(2, 64), f"{HEAD}|rows": torch.tensor([-1, 5])}, "from -1 to 5"),
        ({HEAD: torch.ones(2, 64), f"{HEAD}|rows": torch.tensor([5, 3])}, "not sorted"),
        ({HEAD: torch.ones(2, 64), f"{HEAD}|rows": torch.ones(2)}, r"torch\.float32"),
        ({HEAD: torch.ones(3, 64), f"{HEAD}|rows": TWO}, r"\(3, 64\), 'model' with these rows as \(2, 64\)"),
        ({HEAD: torch.ones(2, 63), f"{HEAD}|rows": TWO}, r"\(2, 63\)"),
        ({"model.norm.weight": torch.ones(2), "model.norm.weight|rows": TWO}, "only the rows of a linear"),
        ({HEAD: torch.full((2, 64), torch.nan), f"{HEAD}|rows": TWO}, "not all finite"),
        ({HEAD: torch.ones(320, 64, dtype=torch.int32)}, r"torch\.int32"),
    ],
)  # fmt: skip
def test_bad_rows_are_refused_and_nothing_is_changed(
    tensors: dict[str, torch.Tensor], reason: str, folder: Path, tmp_path: Path
) -> None:
    model, path = load(folder, tmp_path / "cache"), tmp_path / "patch.safetensors"
    before = logits(model)
    good = {
        "model.layers.0.mlp.up_proj.weight": torch.ones(96, 64),
        "model.layers.0.input_layernorm.weight": torch.ones(64),
    }
    save_patch(path, good | tensors, model.fingerprint, "model", "0")
    with pytest.raises(InputError, match=reason) as refusal:
        apply_patch(model, path)
    assert "\n" not in str(refusal.value) and "take the patch from the run folder again" in str(refusal.value)
    assert torch.equal(logits(model), before)


def test_a_patch_comes_back_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "patch.safetensors"
    tensors = {"b": torch.randn(3, 4), "a": torch.randn(7), "c": torch.randn(4, 3).t()}
    save_patch(path, tensors, "f" * 64, "model", "1.2.3", "\n")
    found, about = read_patch(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert about == {
        "format": "sealed 1",
        "fingerprint": "f" * 64,
        "model": "model",
        "edgegt": "1.2.3",
        "separator": "\n",
    }
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
