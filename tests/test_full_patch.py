"""What full fine-tuning leaves can be used: its patch on the int8 base computes what its float model computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import runs
from edgegt.cli import main
from edgegt.errors import InputError
from edgegt.full import whole_patch
from edgegt.loss import supervised_loss
from edgegt.model import Int8Model
from edgegt.patch import apply_patch, save_patch
from edgegt.use import load_subject
from tiny_models import CPU, EVERY, FAMILIES, batch_of, load, logits_of, save_model, start_of


def trained(model: Any, start: int | None = None) -> Any:
    """The float model after two large steps on every tensor."""
    for seed in range(2):
        batch = batch_of(4, seed=seed, start=start)
        (supervised_loss(model, batch, CPU) / batch.supervised).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(0.02 * parameter.grad.sign())
        model.zero_grad()
    return model


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", ["llama", "llama-untied", "gpt2", "opt", "gpt-neox", "qwen2-moe", "t5", "bart"])
def test_the_patch_of_a_whole_model_gives_its_logits(family: str, tmp_path: Path) -> None:
    module = save_model(tmp_path / "model", EVERY[family]())
    model: Int8Model = load(tmp_path / "model", tmp_path / "cache")
    trained(module, start_of(family))
    batch = batch_of(5, seed=9, start=start_of(family))
    path = tmp_path / "patch.safetensors"
    save_patch(path, whole_patch(module), model.fingerprint, "model", "0")
    expected = logits_of(module, batch)
    assert off(logits_of(model.module, batch), expected) > 0.2
    apply_patch(model, path)
    assert off(logits_of(model.module, batch), expected) < 0.03
    if model.tied:
        assert model.linears[model.head].weight is model.module.get_input_embeddings().weight


def test_nothing_is_changed_by_a_patch_with_one_wrong_tensor(tmp_path: Path) -> None:
    module = save_model(tmp_path / "model", FAMILIES["opt"]())
    model = load(tmp_path / "model", tmp_path / "cache")
    batch = batch_of(5, seed=9)
    before = logits_of(model.module, batch)
    path = tmp_path / "patch.safetensors"
    good = {name: item.get() + 1 for name, item in whole_patch(module).items()}
    for name in ("model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight", "model.decoder.nothing"):
        assert name in good or name.endswith("nothing")
        save_patch(path, {**good, name: torch.zeros(3, 3)}, model.fingerprint, "model", "0")
        with pytest.raises(InputError, match=name.replace(".", r"\.")):
            apply_patch(model, path)
        assert torch.equal(logits_of(model.module, batch), before)


@pytest.mark.skipif(not runs.HERE, reason="no stories260K or no E2E rows under shared/data")
def test_a_full_run_is_evaluated_and_asked_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for key, value in runs.environment(tmp_path / "cache").items():
        monkeypatch.setenv(key, value)
    folder, rows = tmp_path / "run", runs.some_rows(tmp_path, 80)
    more = ["--strategy", "full", "--steps", "4", "--lr", "3e-3", "--memory", "2GiB", "--quiet", "--eval-rows", "8"]
    assert main(runs.words(folder, *more, data=rows)) == 0
    capsys.readouterr()
    monkeypatch.chdir("/")
    assert main(["eval", str(folder), "--json"]) == 0
    again, saved = json.loads(capsys.readouterr().out), runs.read(folder, "eval.json")
    assert saved["after"]["loss"] < 0.95 * saved["before"]["loss"]
    assert again["loss"] == pytest.approx(saved["after"]["loss"], rel=0.01)
    assert main(["eval", str(folder), "--data", str(rows), "--json"]) == 0  # the run's own columns
    assert json.loads(capsys.readouterr().out)["rows"] == 80
    for subject in ((str(folder), None, None), (None, str(runs.STORIES), str(folder / "patch.safetensors"))):
        assert load_subject(*subject).separator == "\n"
    options = runs.read(folder, "options.json")
    (folder / "options.json").write_text(json.dumps({**options, "of_another_version": 1}))
    assert main(["generate", str(folder), "name[Alimentum]", "--tokens", "4"]) == 0
    assert main(["eval", str(folder), "--max-length", "64"]) == 2
    assert "--columns, --format and --max-length go with --data" in capsys.readouterr().err
    (folder / "run.json").write_text("{}")
    assert main(["eval", str(folder)]) == 2
    assert "run.json is damaged (no 'model')" in capsys.readouterr().err
