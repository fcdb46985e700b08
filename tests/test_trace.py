"""The cost table against what really runs: torch's FLOP counter on transformers' float model, and saved storages."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from transformers import Gemma3Config, GptOssConfig, JetMoeConfig, MambaConfig, SwitchTransformersConfig

from edgegt.architecture import stacks_of
from edgegt.cost import BatchShape, CostTable, Work
from edgegt.errors import InputError
from edgegt.graph import noting_layers, read_graph
from edgegt.model import Int8Model
from edgegt.optimizer import AdamW
from edgegt.selection import Trainables
from edgegt.trace import trace
from tiny_models import EVERY, FAMILIES, float_model, load, save_model, some_selections

FLOPS_TOLERANCE = 1e-3
SAVED_TOLERANCE = 0.02
# Their attention is traced as one product after the other and keeps masks that the running one shares: never less.
OWN_ATTENTION, OWN_ATTENTION_TOLERANCE = ("gemma2", "falcon-alibi"), 0.10
SELECTIONS = 100
BETWEEN = ("encoder.final_layer_norm", "model.decoder.layernorm_embedding")
SMALL = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip
DECODERS = ("decoder.block.0", "model.decoder.layers.0")
_tables: dict[str, CostTable] = {}


def table_of(family: str) -> CostTable:
    if family not in _tables:
        _tables[family] = trace(EVERY[family]())
    return _tables[family]


def some_inputs(model: Any, shape: BatchShape) -> dict[str, torch.Tensor | int]:
    """Random ids with one padded row; an encoder-decoder's kept positions are the decoder's own."""
    ids = torch.randint(3, 300, (shape.rows, shape.tokens))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    inputs: dict[str, torch.Tensor | int] = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        return inputs | {"decoder_input_ids": torch.randint(3, 300, (shape.rows, shape.kept))}
    return inputs | {"logits_to_keep": shape.kept, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


class Counter(TorchDispatchMode):
    """FlopCounterMode's formulas without its account by module, which takes most of its time."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def get_total_flops(self) -> int:
        return self.flops

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


def executed_flops(model: Any, shape: BatchShape, counter: Any = None) -> int:
    """What torch's formulas count for one forward and backward with the head on `kept` positions."""
    inputs = some_inputs(model, shape)
    counter = counter or Counter()
    with counter:
        model(**inputs, use_cache=False).logits.sum().backward()
    model.zero_grad(set_to_none=True)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("family", EVERY)
def test_the_quick_counter_counts_what_flop_counter_mode_counts(family: str) -> None:
    model = float_model(EVERY[family](), untied=True)
    shape = BatchShape(2, 24, 10)
    assert executed_flops(model, shape) == executed_flops(model, shape, FlopCounterMode(display=False))


@pytest.mark.parametrize("family", EVERY)
def test_flops_of_a_selection_are_those_that_the_float_model_executes(family: str) -> None:
    table, model = table_of(family), float_model(EVERY[family](), untied=True)
    parameters = dict(model.named_parameters())
    shape = BatchShape(2, 24, 10)
    for selected in some_selections([weight.name for weight in table.weights], SELECTIONS - 3):
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in selected)
        counted = executed_flops(model, shape)
        assert table.train_work(table.mask(selected)).at(shape) == pytest.approx(counted, rel=FLOPS_TOLERANCE), selected


@pytest.mark.parametrize("family", EVERY)
def test_flops_of_recomputed_layers_are_those_that_checkpointing_executes(family: str) -> None:
    """torch may stop before the end of a layer; a whole forward is what the table promises.

    The lowest layer that takes part is not recomputed at all where only its last bias is trained, which keeps nothing.
    """
    table, model = table_of(family), float_model(EVERY[family](), untied=True)
    parameters, layers = dict(model.named_parameters()), layers_in(model)
    shape, draw = BatchShape(2, 24, 10), random.Random(0)
    for selected in some_selections([weight.name for weight in table.weights], 5):
        again = draw.sample(range(table.blocks), draw.randint(1, table.blocks))
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in selected)
        with recomputing(layers, again), set_checkpoint_early_stop(False):
            counted = executed_flops(model, shape)
        mask = table.mask(selected)
        part = sorted(index for index in again if table.layers[index].weights & mask)
        below = table.layers[part[0]].weights & mask if part else 0
        kinds = {weight.kind for bit, weight in enumerate(table.weights) if below >> bit & 1}
        spared = part[1:] if kinds == {"vector"} else again
        predicted = [table.train_work(mask, layers).at(shape) for layers in (again, spared)]
        assert min(abs(one - counted) for one in predicted) <= FLOPS_TOLERANCE * counted, (selected, again)


@pytest.mark.parametrize("family", EVERY)
def test_full_work_is_full_fine_tuning_with_the_head_everywhere(family: str) -> None:
    model, table = float_model(EVERY[family](), untied=True), table_of(family)
    everywhere, fewer = BatchShape(3, 17, 17), BatchShape(3, 17, 4)
    assert table.full_work().at(everywhere) == pytest.approx(executed_flops(model, everywhere), rel=FLOPS_TOLERANCE)
    if table.encoder_decoder:
        assert table.full_work().at(fewer) == pytest.approx(executed_flops(model, fewer), rel=FLOPS_TOLERANCE)
    else:
        assert table.full_work().at(fewer) == table.full_work().at(everywhere)


def forward_flops(model: Any, shape: BatchShape) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**some_inputs(model, shape), use_cache=False)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("family", EVERY)
def test_forward_work_holds_for_shapes_that_were_not_traced(family: str) -> None:
    model = float_model(EVERY[family](), untied=True)
    for shape in (BatchShape(1, 5, 1), BatchShape(4, 40, 7), BatchShape(2, 100, 100), BatchShape(2, 9, 31)):
        if shape.kept <= shape.tokens or model.config.is_encoder_decoder:
            counted = forward_flops(model, shape)
            assert table_of(family).forward.at(shape) == pytest.approx(counted, rel=FLOPS_TOLERANCE), shape


def layers_in(model: Any) -> list[Any]:
    return [layer for name, _ in stacks_of(model) for layer in model.get_submodule(name)]


@contextmanager
def recomputing(
    layers: list[Any],
    again: list[int],
    saved: list[torch.Tensor] | None = None,
    given: list[torch.Tensor] | None = None,
) -> Iterator[None]:
    """These layers run under torch's checkpointing. The inputs of those that take part go to `given`, not to `saved`.

    torch saves the inputs of all, and forgets them with a layer that has nothing to recompute.
    """

    def held(forward: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            before = len(saved or ())
            out = checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
            if saved is not None:
                del saved[before:]
            if given is not None and any(tensor.requires_grad for tensor in tensors_in(out)):
                given.extend(tensors_in((args, kwargs)))
            return out

        return run

    for index in again:
        layers[index].forward = held(layers[index].forward)
    try:
        yield
    finally:
        for index in again:
            del layers[index].forward


def tensors_in(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def sizes_of(tensors: list[torch.Tensor], stay: set[int]) -> dict[int, int]:
    """Bytes by storage, without those that live anyway."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr() not in stay}


def permanent(model: Int8Model, inputs: dict[str, Any]) -> set[int]:
    """Storages of parameters, buffers and planes, and the batch's own."""
    held = [*model.module.parameters(), *model.module.buffers(), *tensors_in(inputs)]
    for linear in model.linears.values():
        held += [part for part in (linear.weight.q, linear.weight.scale, linear.weight.low) if part is not None]
    return {tensor.untyped_storage().data_ptr() for tensor in held}


def kept_bytes(model: Int8Model, inputs: dict[str, Any], again: list[int]) -> tuple[int, int]:
    """Bytes of distinct storages kept for the logits' backward: those of single layers, and those and all layers' own.

    The latter, masks and rotations that every layer is given and the encoder's states, live as long as their forward.
    """
    saved: list[torch.Tensor] = []
    given: list[torch.Tensor] = []
    offered: list[dict[int, int]] = []
    stay = permanent(model, inputs)
    layers = layers_in(model.module)
    with recomputing(layers, again, saved, given), noting_layers(layers) as spans:

        def note(tensor: torch.Tensor) -> torch.Tensor:
            saved.append(tensor)
            return tensor

        with saved_tensors_hooks(note, lambda tensor: tensor):
            logits = model.module(**inputs, use_cache=False).logits
        for span in spans:
            offered.append(sizes_of(span.inputs, stay))
    model.inputs.clear()
    shared = {key: size for one in offered for key, size in one.items() if sum(key in each for each in offered) > 1}
    kept = sizes_of(saved, stay)
    single = kept | {key: size for key, size in sizes_of(given, stay).items() if key not in shared}
    del logits
    return sum(single.values()), sum((single | shared).values())


@pytest.mark.parametrize("family", EVERY)
def test_saved_bytes_are_the_storages_that_the_int8_model_keeps(family: str, tmp_path: Path) -> None:
    """One row for encoder-decoders: T5's position bias is one for all rows, and a table counts everything per row."""
    table, model = table_of(family), int8_model(family, tmp_path)
    trainables = Trainables(model, AdamW(False), tmp_path / "parked")
    shape = BatchShape(1, 24, 10) if table.encoder_decoder else BatchShape(4, 24, 10)
    inputs, draw = some_inputs(model.module, shape), random.Random(1)
    for selected in some_selections([weight.name for weight in table.weights], 6):
        trainables.select(selected)
        for again in ([], draw.sample(range(table.blocks), draw.randint(1, table.blocks)), list(range(table.blocks))):
            least, most = kept_bytes(model, inputs, again)
            if not (again or table.encoder_decoder):
                most = least
            predicted = table.saved_work(table.mask(selected), again).at(shape)
            above = OWN_ATTENTION_TOLERANCE if family in OWN_ATTENTION else SAVED_TOLERANCE
            low, high = least * (1 - SAVED_TOLERANCE), most * (1 + above)
            assert low <= predicted <= high, (predicted, least, most, sorted(selected)[:3], again)


def int8_model(family: str, folder: Path) -> Int8Model:
    save_model(folder / "model", EVERY[family]())
    return load(folder / "model", folder / "cache")


@pytest.mark.parametrize("family", EVERY)
def test_layers_add_up_to_the_model(family: str) -> None:
    table = table_of(family)
    beside = [w.dw for w in table.weights if w.block == table.blocks]
    assert sum((layer.forward for layer in table.layers), sum(beside, Work())) == table.forward
    everything = (1 << len(table.weights)) - 1
    shared = [path.saved_bytes for path in table.paths if path.block < 0]
    own = sum((table.layer_bytes(index) for index in range(table.blocks)), Work())
    assert own + sum(shared, Work()) == table.saved_work(everything)
    inputs = sum((layer.input_bytes for layer in table.layers), Work())
    assert table.saved_work(everything, range(table.blocks)) == sum(shared, inputs)


@pytest.mark.parametrize("family", EVERY)
def test_a_layer_is_reached_by_the_weights_in_and_below_it(family: str) -> None:
    """An encoder's layers are reached by neither its own last norm nor the decoder's first."""
    table = table_of(family)
    between = {w.name for w in table.weights if w.name.startswith(BETWEEN)}
    encoders = next((w.block for w in table.weights if w.name.startswith(DECODERS)), 0)
    for index, layer in enumerate(table.layers):
        expected = {weight.name for weight in table.weights if weight.block <= index}
        expected -= between if index < encoders else set()
        reached = {weight.name for bit, weight in enumerate(table.weights) if layer.weights >> bit & 1}
        assert reached == expected
        assert layer.input_bytes.at(BatchShape(1, 30, 30)) >= 30 * 4 * EVERY[family]().hidden_size
        assert layer.input_bytes.at(BatchShape(1, 30, 30)) < table.layer_bytes(index).at(BatchShape(1, 30, 30))


def test_layers_of_one_shape_cost_the_same() -> None:
    table = table_of("llama")
    assert len({layer.forward for layer in table.layers}) == 1
    assert {layer.input_bytes for layer in table.layers} == {Work(token=4 * 64)}
    assert len({table.layer_bytes(index) for index in range(1, table.blocks)}) == 1


def test_an_encoder_decoder_numbers_the_encoders_layers_first() -> None:
    table = table_of("flan-t5")
    block = {weight.name: weight.block for weight in table.weights}
    assert table.blocks == 5
    assert block["encoder.block.1.layer.0.SelfAttention.q.weight"] == 1
    assert block["encoder.final_layer_norm.weight"] == 1
    assert block["decoder.block.0.layer.0.SelfAttention.q.weight"] == 2
    assert block["decoder.final_layer_norm.weight"] == block["lm_head.weight"] == 5


def test_training_the_encoder_takes_the_gradient_through_every_cross_attention() -> None:
    table = table_of("t5")
    encoder = table.train_work(table.mask(["encoder.final_layer_norm.weight"]))
    head = table.train_work(table.mask(["lm_head.weight"]))
    keys_and_values = 3 * 2 * 2 * 64 * 64
    assert encoder.token - head.token == keys_and_values
    assert encoder.cross - table.forward.cross > table.forward.cross


def test_t5s_relative_positions_and_embeddings_are_frozen_and_counted_once() -> None:
    table, model = table_of("t5"), float_model(EVERY["t5"]())
    assert table.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert not [weight.name for weight in table.weights if "relative" in weight.name or "shared" in weight.name]


def test_a_model_of_several_is_traced_as_its_language_model() -> None:
    text = FAMILIES["gemma3"]()
    assert trace(Gemma3Config(text_config=text.to_dict())) == table_of("gemma3")


def test_stages_are_the_weights_that_read_one_input() -> None:
    stage = {weight.name: weight.stage for weight in table_of("llama").weights}
    layer = "model.layers.1."
    attention = {stage[f"{layer}self_attn.{name}_proj.weight"] for name in "qkv"}
    gated = {stage[f"{layer}mlp.{name}_proj.weight"] for name in ("gate", "up")}
    alone = {stage[f"{layer}self_attn.o_proj.weight"], stage[f"{layer}mlp.down_proj.weight"], stage["lm_head.weight"]}
    assert len(attention) == len(gated) == 1
    assert len(attention | gated | alone) == 5
    assert stage["model.layers.0.self_attn.q_proj.weight"] not in attention


def test_weights_that_read_one_tensor_at_different_times_are_no_stage() -> None:
    """Falcon's attention and feed-forward read one norm, and the input's int8 form is made again in between."""
    stage = {weight.name: weight.stage for weight in table_of("falcon").weights}
    layer = "transformer.h.1."
    assert stage[f"{layer}self_attention.query_key_value.weight"] != stage[f"{layer}mlp.dense_h_to_4h.weight"]
    stage = {weight.name: weight.stage for weight in table_of("t5").weights}
    cross = [[stage[f"decoder.block.{k}.layer.1.EncDecAttention.{name}.weight"] for name in "qkv"] for k in range(2)]
    assert all(k == v != q for q, k, v in cross)
    assert cross[0][1] != cross[1][1]


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


@pytest.mark.parametrize("family", EVERY)
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
    ("config", "found"),
    [
        (GptOssConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, head_dim=16), "have a bias"),
        (JetMoeConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, kv_channels=16), "has 3 dimensions"),
        (MambaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2), "has 3 dimensions"),
    ],
    ids=["experts with biases", "experts of another form", "convolutions"],
)  # fmt: skip
def test_stacked_weights_that_are_not_understood_are_refused_in_one_line(config: Any, found: str) -> None:
    with pytest.raises(InputError, match=found) as refusal:
        trace(config)
    assert "\n" not in str(refusal.value)
    assert "layers.0." in str(refusal.value)


def test_a_model_whose_own_code_cannot_be_traced_is_refused_by_name() -> None:
    config = SwitchTransformersConfig(
        vocab_size=320, d_model=64, d_ff=96, num_layers=2, num_heads=4, d_kv=16, num_experts=4,
        num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, decoder_start_token_id=0,
    )  # fmt: skip
    with pytest.raises(InputError, match="'switch_transformers' cannot be traced") as refusal:
        trace(config)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("shared", "expected"), [("mlp", "used more than once"), ("", "not each once")])
def test_layers_that_share_weights_are_refused_in_one_line(shared: str, expected: str) -> None:
    model = float_model(FAMILIES["llama"](), untied=True)
    layers = model.model.layers
    if shared:
        setattr(layers[1], shared, getattr(layers[0], shared))
    else:
        layers[1] = layers[0]
    with noting_layers(list(layers)) as spans:
        logits = model(**some_inputs(model, BatchShape(2, 8, 4)), use_cache=False).logits
    with pytest.raises(InputError, match=expected) as refusal:
        read_graph(model, logits, spans)
    assert "\n" not in str(refusal.value)
