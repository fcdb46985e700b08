"""A mixture of experts through a whole run: planned, trained, broken off and resumed, its patch put into the base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen2MoeConfig

import runs
from edgegt import disk
from edgegt.cli import main
from edgegt.patch import read_patch
from tiny_models import save_model

pytestmark = pytest.mark.skipif(not runs.HERE, reason="no stories260K or no E2E rows under shared/data")
STEPS = 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random mixture of two layers with the tokenizer of stories260K."""
    folder = tmp_path_factory.mktemp("mixture") / "mixture"
    config = Qwen2MoeConfig(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, num_experts=6, num_experts_per_tok=2,
        moe_intermediate_size=48, shared_expert_intermediate_size=48, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    save_model(folder, config)
    AutoTokenizer.from_pretrained(runs.STORIES).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.some_rows(tmp_path_factory.mktemp("rows"), 80)


def words(out: Path, model: Path, rows: Path, *more: str) -> list[str]:
    options = ["--steps", str(STEPS), "--lr", "5e-3", "--memory", "2GiB", "--quiet", "--no-examples", "--rho", "0.9"]
    return runs.words(out, *options, "--eval-rows", "8", *more, model=model, data=rows)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: Path, rows: Path) -> Path:
    """An uninterrupted run of two rounds."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(words(folder, model, rows)) == 0
    return folder


def test_a_run_learns_within_its_budgets_and_as_predicted(whole: Path) -> None:
    run, losses = runs.read(whole, "run.json"), runs.read(whole, "eval.json")
    assert losses["after"]["loss"] < 0.98 * losses["before"]["loss"]
    assert run["measured"]["flops"] == pytest.approx(run["predicted"]["flops"], rel=0.02)
    assert run["measured"]["flops"] <= run["budget"]["flops"]
    assert run["measured"]["peak_bytes"] <= run["budget"]["memory_bytes"]
    assert run["measured"]["probe_flops"] > 0
    measured = {one["name"]: one["importance"] for one in runs.read(whole, "plan-0.json")["candidates"]}
    assert all(value > 0 for name, value in measured.items() if ".experts." in name or name.endswith("mlp.gate.weight"))
    tensors, _ = read_patch(whole / "patch.safetensors")
    trained = {name.removeprefix("model.layers.1.mlp.") for name in tensors}
    assert trained & {"experts.gate_up_proj", "experts.down_proj"}
    assert tensors["model.layers.1.mlp.experts.gate_up_proj"].shape == (6 * 2 * 48, 64)


def test_the_patch_gives_the_base_what_the_run_ended_with(
    whole: Path, model: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(whole), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["loss"] == pytest.approx(runs.read(whole, "eval.json")["after"]["loss"], rel=1e-6)
    ask = ["generate", "--model", str(model), "--tokens", "8", "--patch", str(whole / "patch.safetensors"), "name[A]"]
    assert main(ask) == 0


def test_a_run_that_died_goes_on_with_the_same_bits(
    whole: Path, model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Died(BaseException):
        pass

    add = disk.Lines.add

    def until(self: disk.Lines, tree: dict[str, Any]) -> None:
        add(self, tree)
        if tree.get("step") == 5 and "loss" in tree:
            raise Died

    with monkeypatch.context() as patch:
        patch.setattr(disk.Lines, "add", until)
        with pytest.raises(Died):
            main(words(tmp_path / "run", model, rows, "--checkpoint-every", "2"))
    assert main(["run", "--resume", str(tmp_path / "run"), "--quiet"]) == 0
    ours, theirs = (load_file(str(folder / "patch.safetensors")) for folder in (tmp_path / "run", whole))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_full_fine_tuning_counts_what_is_predicted_and_leaves_a_patch(
    model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert main(words(folder, model, rows, "--strategy", "full", "--rho", "1")) == 0
    run, losses = runs.read(folder, "run.json"), runs.read(folder, "eval.json")
    assert run["measured"]["flops_ratio"] == pytest.approx(1.0, rel=0.02)
    assert losses["after"]["loss"] < 0.98 * losses["before"]["loss"]
    capsys.readouterr()
    assert main(["eval", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(losses["after"]["loss"], rel=0.01)


def test_a_plan_needs_the_config_alone(model: Path, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model.parent / "config").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (model.parent / "config" / name).write_bytes((model / name).read_bytes())
    options = ["--device", "jetson", "--data", str(rows), "--columns", "prompt=mr,completion=ref", "--steps", "8"]
    assert main(["plan", "--model", str(model.parent / "config"), *options]) == 0
    out = capsys.readouterr().out
    assert "Qwen2MoeForCausalLM" in out and "fits       yes" in out
