"""Plans from a config.json alone: any profile, no weights, and what the page of a plan says."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, LlamaConfig, OPTConfig, Qwen2Config, T5Config

from edgegt.budget import Need, check_memory, smallest_bytes
from edgegt.cost import BatchShape
from edgegt.device import Resolved
from edgegt.errors import BudgetError, InputError
from edgegt.log import Log
from edgegt.options import RunOptions
from edgegt.outlook import (
    DEFAULT_HEAD_ROWS,
    PROXY,
    _ranges,
    batches_of,
    look_ahead,
    outlook_text,
    prospect,
    prospect_of,
)
from edgegt.profile import load_profile, profile_names, profiles_dir
from edgegt.trace import trace
from edgegt.units import MIB

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
    outlook = look_ahead(RunOptions(device="jetson-orin-nano-8gb", model=model, cache="off"), Log(quiet=True))
    assert not outlook["fits"] and not outlook["selected"]
    assert outlook["smallest_bytes"] > outlook["budget"]["memory_bytes"]
    assert "fits       no" in outlook_text(outlook)
    enough = f"{outlook['smallest_bytes'] // 2**20 + 1}MiB"
    assert look_ahead(RunOptions(device="jetson", model=model, memory=enough, cache="off"), Log(quiet=True))["fits"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_every_profile_answers(name: str, tmp_path: Path) -> None:
    config, model = CONFIGS[name][0], _folder(tmp_path, name)
    table = trace(config)
    for device in profile_names():
        options, profile = RunOptions(device=device, model=model), load_profile(profiles_dir() / f"{device}.toml")
        batches = batches_of(options, model, config)
        resolved = Resolved(profile, None, False)
        outlook = prospect_of(options, resolved, profile.budget_bytes, table, config, name, batches).outlook
        assert outlook["fits"] == (outlook["smallest_bytes"] <= outlook["budget"]["memory_bytes"])


def _small(tmp_path: Path, **changes: Any) -> str:
    """A small Llama's folder: its head has many more rows than the default batch has different tokens."""
    settings = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}
    LlamaConfig(**settings, vocab_size=4 * DEFAULT_HEAD_ROWS, **changes).save_pretrained(tmp_path / "small")
    return str(tmp_path / "small")


def _look(model: str, **changes: Any) -> dict[str, Any]:
    return look_ahead(RunOptions(device="jetson-orin-nano-8gb", model=model, steps=10, **changes), Log(quiet=True))


def test_what_is_decided_is_said_in_the_tree_and_in_the_text(tmp_path: Path) -> None:
    outlook = _look(_small(tmp_path), memory="720MiB")
    predicted, budget, text = outlook["predicted"], outlook["budget"], outlook_text(outlook)
    assert sum(outlook["memory"].values()) == predicted["peak_bytes"]["expected"] <= budget["memory_bytes"]
    assert outlook["micro_batch"] * outlook["accumulation"] >= 8
    assert set(outlook["formats"]) == {"master", "states"} and isinstance(outlook["recompute"], list)
    assert f"micro-batch {outlook['micro_batch']}" in text
    assert f"{outlook['formats']['master']} masters, {outlook['formats']['states']} AdamW states" in text
    assert (f"{len(outlook['recompute'])} of 4 layers recomputed" in text) == bool(outlook["recompute"])
    assert ("no layer recomputed" in text) == (not outlook["recompute"])
    assert outlook["head"] and ("rows of the head" in text or "the whole head" in text)
    assert "8192 different tokens" in outlook["batch"]
    assert predicted["energy_j"]["expected"] == pytest.approx(
        predicted["watts"] * (predicted["train_s"]["expected"] + predicted["probe_s"])
    )
    assert predicted["tokens_per_s"] == pytest.approx(10 * 8 * 256 / predicted["train_s"]["expected"])
    for word in ("trained", "how", "FLOPs", "memory", "time", "energy", "tokens/s", "best possible choice"):
        assert word in text


def test_few_rows_of_the_head_are_trained_where_the_whole_does_not_fit(tmp_path: Path) -> None:
    model = _small(tmp_path)
    enough = _look(model)["smallest_bytes"] // MIB + 50
    outlook = _look(model, memory=f"{enough}MiB")
    assert outlook["head_rows"] == DEFAULT_HEAD_ROWS and "8192 rows of the head" in outlook_text(outlook)
    assert outlook["trained_parameters"] < outlook["model"]["parameters"]


def test_a_base_that_does_not_fit_is_streamed_where_hidden_states_are_kept(tmp_path: Path) -> None:
    wide = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 5, "num_attention_heads": 4}
    LlamaConfig(**wide, vocab_size=1000).save_pretrained(tmp_path / "wide")
    model = str(tmp_path / "wide")
    whole = _look(model, cache="auto")
    least = _look(model, cache="off")["smallest_bytes"]
    assert whole["fits"] and not whole["streamed"] and "streamed" not in outlook_text(whole)
    assert "; each row twice" in whole["batch"]
    memory = f"{least // MIB - 10}MiB"
    refused = _look(model, memory=memory, cache="off")["refusal"]
    found = re.search(r"; with --cache auto (\d+)MiB would do$", refused)
    assert found is not None and int(found[1]) * MIB < least
    for enough in (memory, f"{found[1]}MiB"):
        outlook = _look(model, memory=enough, cache="auto")
        assert outlook["fits"] and outlook["streamed"] and outlook["boundary"] > 0
        assert outlook["memory"]["base"] < outlook["model"]["base_bytes"] - 9 * MIB
        assert outlook["predicted"]["peak_bytes"]["expected"] <= outlook["budget"]["memory_bytes"]
        assert "; the base streamed, " in outlook_text(outlook)
        assert any("the int8 base is streamed (" in note for note in outlook["notes"])
    less = _look(model, memory=f"{int(found[1]) - 1}MiB", cache="auto")
    assert not less["fits"] and f"the smallest budget that would do is {found[1]} MiB" in less["refusal"]
    assert "for what stays of the streamed int8 model" in less["refusal"]


@pytest.mark.slow
def test_llama_2_7b_is_streamed_on_an_orin_nano(tmp_path: Path) -> None:
    outlook = _look(_folder(tmp_path, "Llama-2-7B"), cache="auto")
    assert outlook["fits"] and outlook["streamed"]
    assert outlook["budget"]["memory_bytes"] == 5 * 2**30 < outlook["model"]["base_bytes"]
    assert outlook["predicted"]["peak_bytes"]["expected"] <= 5 * 2**30
    assert outlook["memory"]["base"] < outlook["model"]["base_bytes"] / 4
    assert outlook["predicted"]["tokens_per_s"] > 0


def test_no_budget_below_the_peak_of_preparation_is_promised(tmp_path: Path) -> None:
    model = _small(tmp_path)
    options = RunOptions(device="jetson-orin-nano-8gb", model=model, steps=10)
    config = AutoConfig.from_pretrained(model)
    schedule = batches_of(options, model, config).schedule
    need = Need(trace(config), 300 * MIB, config.vocab_size, BatchShape(1, 64, 32))
    least = smallest_bytes(options, need, schedule)
    high = dataclasses.replace(need, prepared_bytes=least + 7 * MIB)
    assert smallest_bytes(options, high, schedule) == least + 7 * MIB
    check_memory(least + 7 * MIB, options, high, schedule)
    with pytest.raises(BudgetError, match=f"{math.ceil(least / MIB) + 7} MiB") as refused:
        check_memory(least + 6 * MIB, options, high, schedule)
    assert refused.value.smallest_bytes == (math.ceil(least / MIB) + 7) * MIB


def test_time_and_energy_are_budgets(tmp_path: Path) -> None:
    model = _small(tmp_path)
    free = _look(model)
    assert free["budget"]["seconds"] is None
    whole = free["predicted"]["train_s"]["expected"] + free["predicted"]["probe_s"]
    held = _look(model, time=f"{0.8 * whole:.6f}s")
    assert held["budget"]["seconds"] == pytest.approx(0.8 * whole)
    assert held["predicted"]["train_s"]["expected"] + held["predicted"]["probe_s"] <= 0.8 * whole * (1 + 1e-6)
    assert "at most" in outlook_text(held)
    joules = 0.8 * whole * free["predicted"]["watts"]
    assert _look(model, energy=f"{joules:.6f}J")["budget"]["seconds"] == pytest.approx(0.8 * whole, rel=1e-4)
    refused = _look(model, time="0.01s")
    assert not refused["fits"] and "--time" in refused["refusal"]


def test_an_encoder_decoder_is_planned(tmp_path: Path) -> None:
    T5Config(
        vocab_size=320, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_decoder_layers=3, num_heads=4,
        decoder_start_token_id=0,
    ).save_pretrained(tmp_path / "t5")  # fmt: skip
    outlook = _look(str(tmp_path / "t5"))
    assert outlook["fits"] and "256 encoder and 64 decoder tokens" in outlook["batch"]
    rate = 10 * 8 * (256 + 64) / outlook["predicted"]["train_s"]["expected"]
    assert outlook["predicted"]["tokens_per_s"] == pytest.approx(rate)


def test_a_prospect_holds_what_its_outlook_was_made_of(tmp_path: Path) -> None:
    found = prospect(RunOptions(device="jetson-orin-nano-8gb", model=_small(tmp_path), steps=10), Log(quiet=True))
    assert found.plan is not None
    assert list(found.plan.selected) == found.outlook["selected"]
    assert found.problem.flops + found.probe_flops == found.outlook["budget"]["flops"]
    assert found.plan.flops + found.probe_flops == found.outlook["predicted"]["flops"]["expected"]


def test_layers_are_said_as_ranges() -> None:
    assert _ranges([7, 0, 1, 2, 3]) == "0 to 3, 7"
    assert _ranges([]) == ""


def test_full_is_not_planned(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to plan"):
        look_ahead(RunOptions(device="jetson", strategy="full", model=_folder(tmp_path, "OPT-2.7B")), Log(quiet=True))
