"""The loop says what transformers' generate says, token by token; what is kept of a prompt changes no logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from edgegt.decoding import decode, fit
from edgegt.engine import TorchEngine
from edgegt.sampling import Sampling
from tiny_models import CPU, EVERY, FAMILIES, PAIRS, float_model, load, save_model

IDS = (1, 17, 40, 9, 33, 250, 101, 12, 77, 5, 61, 18, 90)
GREEDY = Sampling()
NEW = 14


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Loaded models by family, made when they are first asked for."""
    return {"": tmp_path_factory.mktemp("engine")}


def module_of(models: dict[str, Any], family: str) -> Any:
    if family not in models:
        folder: Path = models[""]
        save_model(folder / family, EVERY[family]())
        models[family] = load(folder / family, folder / "cache").module
    return models[family]


def engine_of(models: dict[str, Any], family: str) -> TorchEngine:
    return TorchEngine(module_of(models, family), (2,), CPU)


@pytest.mark.parametrize("family", list(EVERY))
def test_greedy_tokens_are_those_of_generate(models: dict[str, Any], family: str) -> None:
    from transformers import DynamicCache, EncoderDecoderCache

    engine = engine_of(models, family)
    pair = {"past_key_values": EncoderDecoderCache(DynamicCache(), DynamicCache())} if family in PAIRS else {}
    engine.module.generation_config.forced_eos_token_id = None  # BART's last token, whatever it would have been
    ids = torch.tensor([IDS])
    theirs = engine.module.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=2,
        pad_token_id=0, **pair,
    )[0, 1 if family in PAIRS else len(IDS) :]  # fmt: skip
    ours = list(decode(engine, IDS, NEW, GREEDY))
    assert ours == theirs.tolist()
    assert len(set(ours)) > 1 or len(ours) == NEW


def test_an_encoder_decoder_begins_as_its_files_demand(models: dict[str, Any]) -> None:
    engine = TorchEngine(module_of(models, "bart"), (2,), CPU, 7)
    assert next(decode(engine, IDS, NEW, GREEDY)) == 7
    drawn = [next(decode(engine, IDS, NEW, Sampling(temperature=100, seed=seed))) for seed in range(4)]
    assert drawn == [7] * 4


@pytest.mark.parametrize("family", list(EVERY))
def test_a_prompt_that_begins_like_the_last_one_gives_the_same_logits(models: dict[str, Any], family: str) -> None:
    # In int8 the last bit of a sum in another order can move an input to the next of its 255 steps.
    exact = float_model(EVERY[family](), attention=None)
    for module, most in ((exact, 1e-5), (module_of(models, family), 0.02)):
        kept, fresh = TorchEngine(module, (2,), CPU), TorchEngine(module, (2,), CPU)
        kept.prefill(IDS[:9])
        for token in IDS[9:11]:
            kept.step(token)
        for prompt in (IDS, (*IDS[:4], 7, 8, *IDS[6:]), (*IDS[:4], 7, 8, *IDS[6:]), IDS[:2], (9, 9), IDS):
            again, expected = kept.prefill(prompt), fresh_logits(fresh, prompt)
            assert float((again - expected).norm()) <= most * float(expected.norm())


def fresh_logits(engine: TorchEngine, ids: tuple[int, ...]) -> torch.Tensor:
    engine._read, engine._cache, engine._encoded = [], None, None
    logits = engine.prefill(ids)
    assert engine.reused == 0
    return logits


@pytest.mark.parametrize("family", list(FAMILIES))
def test_what_is_known_is_not_computed_again(models: dict[str, Any], family: str) -> None:
    engine = engine_of(models, family)
    engine.prefill(IDS[:5])
    engine.prefill((*IDS[:5], 3))
    assert engine.reused == 5
    engine.prefill((*IDS[:3], 3))
    assert engine.reused == 3
    engine.prefill(IDS)
    engine.prefill((*IDS[:5], 3))
    # of a sliding window of 8 that has been filled nothing can be taken back
    assert engine.reused == (0 if family.startswith("gemma") else 5)


def test_an_engine_that_was_broken_off_reads_anew(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    engine, fresh = engine_of(models, "llama"), engine_of(models, "llama")
    engine.prefill(IDS[:6])
    layer = engine.module.model.layers[2]
    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            engine.step(3)
    assert torch.equal(engine.prefill(IDS), fresh_logits(fresh, IDS))
    assert engine.reused == 0


def test_only_the_last_position_meets_the_head(models: dict[str, Any]) -> None:
    engine, seen = engine_of(models, "llama"), []
    head = engine.module.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[:-1].numel()))
    engine.prefill(IDS)
    engine.step(4)
    handle.remove()
    assert seen == [1, 1]


def test_prompt_and_answer_fit_the_positions(models: dict[str, Any]) -> None:
    decoder, pair = engine_of(models, "llama"), engine_of(models, "bart")
    long = tuple(range(3, 203))
    assert fit(decoder, long, 64) == (long[-112:], 16)
    assert fit(decoder, long[:100], 64) == (long[:100], 28)
    assert fit(decoder, long[:3], 500) == (long[:3], 125)
    assert fit(pair, long, 500) == ((*long[:127], long[-1]), 127)
    assert fit(engine_of(models, "bloom"), long, 500) == (long, 500)
    read, most = fit(decoder, long, 64)
    assert len(list(decode(decoder, read, most, GREEDY))) <= 16
