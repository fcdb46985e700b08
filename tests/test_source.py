"""The model as it lies on disk or on the hub: whatever is damaged is named in one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgegt.errors import InputError
from edgegt.source import open_source, read_config
from tiny_models import FAMILIES, load, save_model

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"hidden_size": "64"}, "'hidden_size' expected int, got str"),
        ({"vocab_size": None}, "'vocab_size' expected int"),
        ({"num_attention_heads": 5}, "number of attention heads"),
        ({"model_type": "nosuch", "architectures": {"a": 1}}, "unknown"),
    ],
)
def test_a_config_with_a_wrong_field_names_the_field(change: dict[str, object], expected: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64, **change}))
    with pytest.raises(InputError, match=expected) as refusal:
        read_config(str(tmp_path))
    assert "config.json" in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("kind", ["gemma3"])
def test_what_can_be_planned_and_not_trained_yet_is_refused_for_a_run_only(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(InputError, match="edgegt plans but does not train yet: give a") as refusal:
        read_config(str(tmp_path))
    assert f"'{kind}'" in str(refusal.value) and "\n" not in str(refusal.value)
    assert read_config(str(tmp_path), for_run=False).model_type == kind


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"weight_map": ["a"]}', '{"weight_map": {"a": 3}}'])
def test_a_damaged_index_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match=r"index\.json: .*weight_map.*: fetch the model again") as refusal:
        open_source(str(tmp_path))
    assert "\n" not in str(refusal.value)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_model(folder, FAMILIES["llama"](), max_shard_size="60KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-50])
    with pytest.raises(InputError, match=rf"{shard.name}: .* cannot be read") as refusal:
        load(folder, tmp_path / "cache")
    assert "\n" not in str(refusal.value)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def in_the_hubs_cache(hub: Path, files: Path) -> None:
    """Files as huggingface_hub keeps those of owner/tiny."""
    home = hub / "models--owner--tiny"
    shutil.copytree(files, home / "snapshots" / ("a" * 40))
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("a" * 40)


def told(program: str, hub: Path) -> str:
    """What a program prints that sees only this hub cache; huggingface_hub reads its place at import."""
    env = {**os.environ, "HF_HUB_CACHE": str(hub), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_hub_model_has_the_name_of_its_id_and_its_config_alone_is_enough_to_plan(tmp_path: Path) -> None:
    save_model(tmp_path / "model", FAMILIES["llama"]())
    in_the_hubs_cache(tmp_path / "whole", tmp_path / "model")
    program = "from edgegt.source import *; print(open_source('owner/tiny').name, read_config('owner/tiny').model_type)"
    assert told(program, tmp_path / "whole") == "tiny llama\n"
    (tmp_path / "model" / "model.safetensors").unlink()
    in_the_hubs_cache(tmp_path / "config", tmp_path / "model")
    program = "from edgegt.source import *; print(read_config('owner/tiny').hidden_size)"
    assert told(program, tmp_path / "config") == "64\n"
