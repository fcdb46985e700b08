"""Plans from a config.json alone: any profile, no weights, and what the page of a plan says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig, OPTConfig, Qwen2Config

from edgegt.errors import InputError
from edgegt.log import Log
from edgegt.options import RunOptions
from edgegt.outlook import PROXY, look_ahead, outlook_text
from edgegt.profile import profile_names

CONFIGS = {
    "Llama-2-7B": (LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                               num_attention_heads=32, vocab_size=32000), 6_738_415_616),
    "Qwen2.5-1.5B": (Qwen2Config(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                                 num_attention_heads=12, num_key_value_heads=2, vocab_size=151936,
                                 tie_word_embeddings=True), 1_543_714_304),
    "OPT-2.7B": (OPTConfig(hidden_size=2560, ffn_dim=10240, num_hidden_layers=32, num_attention_heads=32,
                           word_embed_proj_dim=2560), 2_651_596_800),
}  # fmt: skip


def _folder(tmp_path: Path, name: str) -> str:
    CONFIGS[name][0].save_pretrained(tmp_path / name)
    return str(tmp_path / name)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_large_shape_is_planned_without_weights(name: str, tmp_path: Path) -> None:
    outlook = look_ahead(RunOptions(device="jetson-agx-orin-64gb", model=_folder(tmp_path, name)), Log(quiet=True))
    assert outlook["model"]["parameters"] == CONFIGS[name][1]
    assert outlook["fits"] and outlook["selected"]
    predicted, budget = outlook["predicted"], outlook["budget"]
    assert predicted["flops"]["expected"] <= budget["flops"]
    assert predicted["peak_bytes"]["expected"] <= budget["memory_bytes"]
    for key in ("flops", "peak_bytes", "step_s"):
        assert predicted[key]["low"] <= predicted[key]["expected"] <= predicted[key]["high"]
    assert outlook["importance"] == PROXY and "default" in outlook["batch"]
    assert json.loads(json.dumps(outlook)) == outlook


def test_what_does_not_fit_is_said_with_the_smallest_that_would(tmp_path: Path) -> None:
    model = _folder(tmp_path, "Llama-2-7B")
    outlook = look_ahead(RunOptions(device="jetson-orin-nano-8gb", model=model), Log(quiet=True))
    assert not outlook["fits"] and not outlook["selected"]
    assert outlook["smallest_bytes"] > outlook["budget"]["memory_bytes"]
    assert "fits       no" in outlook_text(outlook)
    enough = f"{outlook['smallest_bytes'] // 2**20 + 1}MiB"
    assert look_ahead(RunOptions(device="jetson", model=model, memory=enough), Log(quiet=True))["fits"]


@pytest.mark.slow
@pytest.mark.parametrize("device", profile_names())
def test_every_profile_answers(device: str, tmp_path: Path) -> None:
    for name in CONFIGS:
        outlook = look_ahead(RunOptions(device=device, model=_folder(tmp_path, name)), Log(quiet=True))
        assert outlook["fits"] == (outlook["smallest_bytes"] <= outlook["budget"]["memory_bytes"])


def test_full_is_not_planned(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to plan"):
        look_ahead(RunOptions(device="jetson", strategy="full", model=_folder(tmp_path, "OPT-2.7B")), Log(quiet=True))
