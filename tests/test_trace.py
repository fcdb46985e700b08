"""The cost table against what really runs: torch's FLOP counter on transformers' float model, and saved storages."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig, Qwen3MoeConfig, T5Config

from edgegt.cost import BatchShape, CostTable
from edgegt.data import Batch
from edgegt.errors import InputError
from edgegt.model import Int8Model
from edgegt.optimizer import AdamW
from edgegt.selection import Trainables
from edgegt.trace import trace
from tiny_models import FAMILIES, batch_of, float_model, load, save_model, some_selections

FLOPS_TOLERANCE = 1e-3
SAVED_TOLERANCE = 0.02
_tables: dict[str, CostTable] = {}


def table_of(family: str) -> CostTable:
    if family not in _tables:
        _tables[family] = trace(FAMILIES[family]())
    return _tables[family]


def executed_flops(model: Any, shape: BatchShape) -> int:
    """What FlopCounterMode counts for one forward and backward with the head on `kept` positions."""
    ids = torch.randint(3, 300, (shape.rows, shape.tokens))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    counter = FlopCounterMode(display=False)
    with counter:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=shape.kept).logits
        logits.sum().backward()
    model.zero_grad(set_to_none=True)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_of_a_selection_are_those_that_the_float_model_executes(family: str) -> None:
    table, model = table_of(family), float_model(FAMILIES[family](), untied=True)
    parameters = dict(model.named_parameters())
    shape = BatchShape(2, 24, 10)
    for selected in some_selections([weight.name for weight in table.weights], 9):
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in selected)
        counted = executed_flops(model, shape)
        assert table.train_work(table.mask(selected)).at(shape) == pytest.approx(counted, rel=FLOPS_TOLERANCE), selected


@pytest.mark.parametrize("family", FAMILIES)
def test_full_work_is_full_fine_tuning_with_the_head_everywhere(family: str) -> None:
    model = float_model(FAMILIES[family](), untied=True)
    everywhere = BatchShape(3, 17, 17)
    counted = executed_flops(model, everywhere)
    assert table_of(family).full_work().at(everywhere) == pytest.approx(counted, rel=FLOPS_TOLERANCE)
    assert table_of(family).full_work().at(BatchShape(3, 17, 4)) == table_of(family).full_work().at(everywhere)


def forward_flops(model: Any, shape: BatchShape) -> int:
    ids = torch.randint(3, 300, (shape.rows, shape.tokens))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False, logits_to_keep=shape.kept)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_work_holds_for_shapes_that_were_not_traced(family: str) -> None:
    model = float_model(FAMILIES[family](), untied=True)
    for shape in (BatchShape(1, 5, 1), BatchShape(4, 40, 7), BatchShape(2, 100, 100)):
        assert table_of(family).forward.at(shape) == pytest.approx(forward_flops(model, shape), rel=FLOPS_TOLERANCE)


def kept_bytes(model: Int8Model, batch: Batch, stay: set[int]) -> int:
    """Bytes of distinct storages that autograd keeps for the logits' backward, without what lives anyway."""
    storages: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in stay:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        logits = model.module(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids,
            use_cache=False, logits_to_keep=batch.shape.kept,
        ).logits  # fmt: skip
    model.inputs.clear()
    del logits
    return sum(storages.values())


def permanent(model: Int8Model) -> set[int]:
    """Storages of parameters, buffers and planes, and the batch's own."""
    held = [*model.module.parameters(), *model.module.buffers()]
    for linear in model.linears.values():
        held += [part for part in (linear.weight.q, linear.weight.scale, linear.weight.low) if part is not None]
    return {tensor.untyped_storage().data_ptr() for tensor in held}


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_bytes_are_the_storages_that_the_int8_model_keeps(family: str, tmp_path: Path) -> None:
    config = FAMILIES[family]()
    save_model(tmp_path / "model", config)
    model, table = load(tmp_path / "model", tmp_path / "cache"), table_of(family)
    trainables = Trainables(model, AdamW(False), tmp_path / "parked")
    batch = batch_of(4)
    ratios = []
    for selected in some_selections([weight.name for weight in table.weights], 6):
        trainables.select(selected)
        inputs = {t.untyped_storage().data_ptr() for t in (batch.input_ids, batch.attention_mask, batch.position_ids)}
        measured = kept_bytes(model, batch, permanent(model) | inputs)
        predicted = table.saved_work(table.mask(selected)).at(batch.shape)
        ratios.append((predicted / measured if measured else 1.0, measured, predicted, sorted(selected)[:3]))
    for ratio, measured, predicted, selected in ratios:
        assert 1 - SAVED_TOLERANCE <= ratio <= 1 + SAVED_TOLERANCE, (measured, predicted, selected)


def test_stages_are_the_weights_that_read_one_input() -> None:
    stage = {weight.name: weight.stage for weight in table_of("llama").weights}
    layer = "model.layers.1."
    attention = {stage[f"{layer}self_attn.{name}_proj.weight"] for name in "qkv"}
    gated = {stage[f"{layer}mlp.{name}_proj.weight"] for name in ("gate", "up")}
    alone = {stage[f"{layer}self_attn.o_proj.weight"], stage[f"{layer}mlp.down_proj.weight"], stage["lm_head.weight"]}
    assert len(attention) == len(gated) == 1
    assert len(attention | gated | alone) == 5
    assert stage["model.layers.0.self_attn.q_proj.weight"] not in attention


def test_the_tied_head_is_a_weight_of_its_own_and_the_embedding_is_not() -> None:
    tied, untied = table_of("llama"), table_of("llama-untied")
    assert [weight.name for weight in tied.weights if weight.kind == "head"] == ["lm_head.weight"]
    assert not [weight.name for weight in tied.weights if "embed" in weight.name]
    assert tied.weights == untied.weights
    assert tied.paths == untied.paths
    head = next(weight for weight in tied.weights if weight.kind == "head")
    assert untied.parameters - tied.parameters == head.numel
    assert head.dw.token == 0
    assert head.dw.kept == 2 * head.numel


def test_base_and_float_bytes_are_those_of_the_tensors() -> None:
    table = table_of("llama")
    model = float_model(FAMILIES["llama"]())
    assert table.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert table.float_bytes == 4 * table.parameters
    assert table.blocks == 3
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    exact = sum(p.numel() + 2 * p.shape[0] for p in matrices) + 4 * sum(p.numel() for p in vectors)
    assert exact <= table.base_bytes <= 1.02 * exact


def test_conv1d_shapes_are_out_by_in() -> None:
    shapes = {weight.name: weight.shape for weight in table_of("gpt2").weights}
    assert shapes["transformer.h.0.attn.c_attn.weight"] == (192, 64)
    assert shapes["transformer.h.0.mlp.c_proj.weight"] == (64, 256)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_table_survives_json(family: str) -> None:
    table = table_of(family)
    assert CostTable.from_json(json.loads(json.dumps(table.to_json()))) == table


def test_tracing_needs_no_weights_and_leaves_the_config_alone() -> None:
    config = FAMILIES["llama"]()
    before = copy.deepcopy(config.to_dict())
    config.num_hidden_layers, config.hidden_size = 2, 8192
    config.intermediate_size, config.vocab_size = 28672, 128256
    table = trace(config)
    assert table.parameters > 10**9
    config.num_hidden_layers, config.hidden_size = 3, 64
    config.intermediate_size, config.vocab_size = 96, 320
    assert config.to_dict() == before


@pytest.mark.parametrize(
    "config",
    [
        MixtralConfig(vocab_size=100, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                      num_key_value_heads=2, num_local_experts=4),
        Qwen3MoeConfig(vocab_size=100, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_experts=4,
                       num_attention_heads=2, num_key_value_heads=2, moe_intermediate_size=16),
        T5Config(vocab_size=100, d_model=32, d_ff=32, num_layers=2, num_heads=2, d_kv=16),
    ],
    ids=["mixtral", "qwen3-moe", "t5"],
)  # fmt: skip
def test_what_is_not_a_dense_decoder_is_refused_in_one_line(config: Any) -> None:
    with pytest.raises(InputError) as refusal:
        trace(config)
    text = str(refusal.value)
    assert "\n" not in text
    assert "decoder-only" in text
