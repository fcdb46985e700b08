"""The int8 model: no float matrix lives in it, and it computes what transformers' float model computes."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from edgegt.architecture import all_layers, positions_of, untie_head
from edgegt.evaluate import answer
from edgegt.job import within_positions
from edgegt.loss import supervised_loss
from edgegt.model import Int8Model
from edgegt.options import RunOptions
from edgegt.quant import Int8Embedding, Int8Linear, dequantize
from edgegt.sampling import Defaults
from tiny_models import EVERY, FAMILIES, SHARED, batch_of, load, logits_of, save_model, start_of

STORIES = SHARED / "data" / "models" / "stories260K"


@pytest.mark.parametrize("family", EVERY)
def test_int8_logits_are_close_to_float_logits(family: str, tmp_path: Path) -> None:
    reference = save_model(tmp_path / "model", EVERY[family]())
    model = load(tmp_path / "model", tmp_path / "cache")
    batch = batch_of(6, start=start_of(family))
    expected, found = logits_of(reference, batch), logits_of(model.module, batch)
    assert found.shape == expected.shape
    assert float((found - expected).norm() / expected.norm()) < 0.04


@pytest.mark.parametrize("family", EVERY)
def test_a_frozen_model_holds_no_float_matrix_of_a_linear(family: str, tmp_path: Path) -> None:
    save_model(tmp_path / "model", EVERY[family]())
    gc.collect()
    older = {id(found) for found in gc.get_objects() if issubclass(type(found), torch.Tensor)}
    model = load(tmp_path / "model", tmp_path / "cache")
    gc.collect()
    sizes = {tuple(linear.weight.shape) for linear in model.linears.values()}
    sizes |= {shape[::-1] for shape in sizes}
    numbers = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor) and id(found) not in older]
    lingering = [tuple(t.shape) for t in numbers if t.is_floating_point() and tuple(t.shape) in sizes]
    assert not lingering
    kinds = [module for module in model.module.modules() if isinstance(module, (Int8Linear, Int8Embedding))]
    assert len(kinds) >= len(model.linears) + 1
    assert not any(parameter.requires_grad for parameter in model.module.parameters())
    assert not any(parameter.is_meta for parameter in model.module.parameters())


def test_a_tied_head_and_the_embedding_are_one_tensor_until_the_head_is_trained(tmp_path: Path) -> None:
    save_model(tmp_path / "model", FAMILIES["llama"]())
    model = load(tmp_path / "model", tmp_path / "cache")
    embedding, head = model.module.get_input_embeddings(), model.linears[model.head]
    assert model.tied
    assert embedding.weight is head.weight
    assert not [key for key in model.store.files if key.startswith("lm_head")]
    before, batch = logits_of(model.module, batch_of(3)), batch_of(3)
    rows = embedding(batch.input_ids).clone()
    head.promote(model.original(model.head))
    assert head.weight is not embedding.weight
    head.master.data.mul_(2)
    head.refresh()
    assert torch.equal(embedding(batch.input_ids), rows)
    ratio = logits_of(model.module, batch).norm() / before.norm()
    assert float(ratio) == pytest.approx(2, rel=0.01)


def test_an_untied_head_is_stored_on_its_own(tmp_path: Path) -> None:
    save_model(tmp_path / "model", FAMILIES["llama-untied"]())
    model = load(tmp_path / "model", tmp_path / "cache")
    assert not model.tied
    assert f"{model.head}.q" in model.store.files
    tensors = load_file(str(tmp_path / "model" / "model.safetensors"))
    assert torch.equal(model.original(model.head), tensors["lm_head.weight"])


def test_a_head_that_the_files_have_apart_is_not_the_embedding_whatever_the_config_says(tmp_path: Path) -> None:
    """transformers does not tie them either, and FLAN-T5's config says tied since T5Config cannot say otherwise."""
    for family in ("llama", "flan-t5"):
        folder = tmp_path / family
        reference = save_model(folder, EVERY[family]())
        untie_head(reference)
        with torch.no_grad():
            reference.get_output_embeddings().weight.normal_()
        reference.save_pretrained(folder)
        model = load(folder, tmp_path / "cache")
        assert not model.tied
        batch = batch_of(6, start=start_of(family))
        expected, found = logits_of(reference, batch), logits_of(model.module, batch)
        assert float((found - expected).norm() / expected.norm()) < 0.04


def test_gpt2s_conv1d_is_a_linear_with_its_weight_transposed(tmp_path: Path) -> None:
    save_model(tmp_path / "model", FAMILIES["gpt2"]())
    model = load(tmp_path / "model", tmp_path / "cache")
    name = "transformer.h.1.attn.c_attn.weight"
    stored = load_file(str(tmp_path / "model" / "model.safetensors"))[name]
    assert torch.equal(model.original(name), stored.t())
    assert torch.equal(model.original(name), model.original(name).contiguous())
    error = dequantize(model.linears[name].weight) - stored.t()
    assert float(error.norm() / stored.norm()) < 0.01
    assert "transformer.h.1.attn.c_attn.bias" in model.vectors
    assert "transformer.wpe.weight" not in {*model.linears, *model.vectors}


@pytest.mark.parametrize("family", EVERY)
def test_linears_and_vectors_are_the_weights_of_the_cost_table(family: str, tmp_path: Path) -> None:
    from edgegt.trace import trace

    save_model(tmp_path / "model", EVERY[family]())
    model, table = load(tmp_path / "model", tmp_path / "cache"), trace(EVERY[family]())
    assert {weight.name for weight in table.weights} == {*model.linears, *model.vectors}
    for weight in table.weights:
        held = model.vectors[weight.name] if weight.kind == "vector" else model.linears[weight.name].weight
        assert tuple(held.shape) == weight.shape, weight.name
    assert len(all_layers(model.module)) == table.blocks


def test_a_master_starts_from_int8_when_the_source_has_gone_and_says_so(tmp_path: Path) -> None:
    save_model(tmp_path / "model", FAMILIES["llama"]())
    model = load(tmp_path / "model", tmp_path / "cache")
    (tmp_path / "model" / "model.safetensors").unlink()
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(model.original(name), dequantize(model.linears[name].weight))
    assert name in model.notes[0]


def test_padding_changes_nothing(tmp_path: Path) -> None:
    save_model(tmp_path / "model", FAMILIES["gpt2"]())
    model: Int8Model = load(tmp_path / "model", tmp_path / "cache")
    from edgegt.data import collate
    from tiny_models import examples

    rows = examples(5)
    with torch.no_grad():
        together = float(supervised_loss(model.module, collate(rows, 0), model.device))
        alone = sum(float(supervised_loss(model.module, collate([row], 0), model.device)) for row in rows)
    assert together == pytest.approx(alone, rel=1e-4)


def test_stories_in_int8_writes_the_story_that_the_float_model_writes(tmp_path: Path) -> None:
    if not STORIES.is_dir():
        pytest.skip("no stories260K under shared/data")
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()
    model = load(STORIES, tmp_path / "cache")
    batch = batch_of(64, vocabulary=512)
    expected, found = logits_of(reference, batch), logits_of(model.module, batch)
    assert float((found - expected).norm() / expected.norm()) < 0.03
    same = found.argmax(-1) == expected.argmax(-1)  # random ids are no story: many a choice is close
    assert float(same.float().mean()) > 0.93


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_answers_stay_within_the_positions_of_the_model(family: str, tmp_path: Path) -> None:
    """GPT-2 and BART look positions up: a prompt and an answer beyond them would be an IndexError."""
    save_model(tmp_path / "model", EVERY[family]())
    model = load(tmp_path / "model", tmp_path / "cache")

    class Words:
        pad_token_id, eos_token_id = 0, 2

        def batch_decode(self, ids: torch.Tensor, skip_special_tokens: bool) -> list[str]:
            return [" ".join(map(str, row.tolist())) for row in ids]

    prompts = [list(range(3, 3 + length)) for length in (125, 40, 200)]
    answers = answer(model.module, Words(), prompts, 96, 2, torch.device("cpu"))
    ends = Defaults(None, tuple(int(text.split()[1]) for text in answers), 7)
    for text in answer(model.module, Words(), prompts, 96, 2, torch.device("cpu"), ends):
        begun = text.split()[start_of(family) is not None :]
        assert begun[0] == "7" if family == "bart" else len([one for one in begun if int(one) in ends.eos]) >= 1
    most = 96 + (start_of(family) is not None)  # a decoder's start is decoded too
    assert all(1 <= len(text.split()) <= most for text in answers)


def test_rows_are_no_longer_than_the_positions_of_the_model() -> None:
    config = FAMILIES["gpt2"]()
    assert positions_of(config) == 128
    assert within_positions(RunOptions(max_length=512), positions_of(config)).max_length == 128
    assert within_positions(RunOptions(max_length=64), positions_of(config)).max_length == 64
    assert within_positions(RunOptions(max_length=512), None).max_length == 512
