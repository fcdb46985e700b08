"""What full fine-tuning leaves can be used: its patch on the int8 base computes what its float model computes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import runs
from edgegt import home
from edgegt.budget import Need
from edgegt.cli import main
from edgegt.cost import BatchShape
from edgegt.errors import InputError
from edgegt.full import full_terms, whole_patch
from edgegt.job import Schedule
from edgegt.loss import supervised_loss
from edgegt.model import Int8Model
from edgegt.options import RunOptions
from edgegt.patch import apply_patch, open_patch, save_patch
from edgegt.subject import load_subject
from edgegt.trace import trace
from tiny_models import CPU, EVERY, FAMILIES, VOCABULARY, batch_of, float_model, load, logits_of, save_model, start_of


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


def saved_bytes(model: Any, read: int, written: int) -> int:
    """What autograd keeps of 2 rows, weights aside, with their logits."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ids = [torch.randint(3, VOCABULARY, (2, length)) for length in (read, written)]
        model(input_ids=ids[0], decoder_input_ids=ids[1], use_cache=False).logits.logsumexp(-1).sum()
    return sum(storage.nbytes() for storage in held.values())


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_memory_follows_both_sides_of_an_encoder_decoder(family: str) -> None:
    """Long answers to short prompts need their room, and long prompts with short answers no room for logits."""
    config = EVERY[family]()
    table, model = trace(config), float_model(config, None)
    for read, written in ((8, 100), (100, 8)):
        shape = BatchShape(2, read, written)
        need = Need(table, 0, VOCABULARY, shape)
        setup: Any = SimpleNamespace(
            need=need, options=RunOptions(batch_size=2), schedule=Schedule(((0.0, (0, 1)),), (shape,), (1,))
        )
        terms = full_terms(setup, 2)
        measured = saved_bytes(model, read, written)
        assert 0.9 * measured < terms["activations"] + terms["logits"] < 3 * measured
        assert terms["logits"] == 12 * 2 * written * VOCABULARY
        inputs = sum(layer.input_bytes.at(shape) for layer in table.layers)
        block = max(table.layer_bytes(index).at(shape) for index in range(table.blocks))
        assert need.probe_bytes(shape) > inputs + block


def test_a_head_of_its_own_is_trained_apart_even_where_it_equals_the_embedding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers would tie FLAN-T5's then, and the patch would lack what the int8 model has apart."""
    config = EVERY["flan-t5"]()
    config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id = 1024, 0, 1, 2
    save_model(tmp_path / "model", config)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((home.MODEL / name).read_bytes())
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(home.TRAIN.read_text(encoding="utf-8").splitlines(keepends=True)[:40]), encoding="utf-8")
    words = ["run", "--device", "jetson", "--model", str(tmp_path / "model"), "--data", str(rows), "--steps", "3"]
    words += ["--strategy", "full", "--memory", "2GiB", "--output", str(tmp_path / "run"), "--no-examples", "--quiet"]
    assert main(words) == 0
    patch = open_patch(tmp_path / "run" / "patch.safetensors")
    assert {"lm_head.weight", "shared.weight"} <= set(patch.names)
    assert not torch.equal(patch.values("lm_head.weight"), patch.values("shared.weight"))
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run"), "--json"]) == 0
    after = runs.read(tmp_path / "run", "eval.json")["after"]["loss"]
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(after, rel=0.01)
