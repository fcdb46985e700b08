"""Mixtures of experts: what they compute and learn is what transformers' float model does, from either form of file."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    MixtralConfig,
    OlmoeConfig,
    PhimoeConfig,
    conversion_mapping,
)
from transformers.core_model_loading import MergeModulelist, Transpose, WeightConverter

from edgegt.cost import BatchShape
from edgegt.errors import InputError
from edgegt.experts import use_experts
from edgegt.flops import FlopMeter
from edgegt.loss import supervised_loss
from edgegt.model import Int8Model
from edgegt.optimizer import AdamW
from edgegt.quant import (
    Backend,
    InputCache,
    Int8Experts,
    NativeBackend,
    ReferenceBackend,
    Routing,
    TorchBackend,
    combine,
    dequantize,
    quantize_rows,
    spread,
)
from edgegt.rates import dispatches
from edgegt.selection import Trainables
from edgegt.trace import trace
from live_tensors import LiveTensors
from test_trace import executed_flops
from tiny_models import CPU, MIXTURES, batch_of, float_model, load, save_model, some_selections

UP, DOWN = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"
SMALL = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 2}  # fmt: skip
EXPERTS, OUT, IN, TOKENS, EACH = 5, 24, 16, 40, 2


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.detach() - expected.detach()).norm() / expected.detach().norm())


def layer_of(rows: int, width: int, seed: int, meter: FlopMeter | None = None) -> Int8Experts:
    """Random experts, every row [rows, width] of each trained."""
    master = torch.randn(EXPERTS * rows, width, generator=torch.Generator().manual_seed(seed))
    layer = Int8Experts(
        quantize_rows(master), experts=EXPERTS, backend=ReferenceBackend(), inputs=InputCache(), meter=meter
    )
    layer.promote(master)
    return layer


def some_routing(unused: int) -> torch.Tensor:
    """int64 [TOKENS, EACH]: different experts for each token, never the unused one."""
    draw = random.Random(0)
    others = [expert for expert in range(EXPERTS) if expert != unused]
    return torch.tensor([draw.sample(others, EACH) for _ in range(TOKENS)])


def gate(y: torch.Tensor) -> torch.Tensor:
    left, right = y.chunk(2, -1)
    return torch.nn.functional.gelu(left) * right


def in_float(
    x: torch.Tensor, experts: torch.Tensor, shares: torch.Tensor, first: torch.Tensor, second: torch.Tensor
) -> torch.Tensor:
    """Token by token, [n, in]."""
    rows = []
    for token, chosen, share in zip(x, experts.tolist(), shares, strict=True):
        made = [second[expert] @ gate(first[expert] @ token) for expert in chosen]
        rows.append((torch.stack(made) * share[:, None]).sum(0))
    return torch.stack(rows)


def test_products_and_gradients_are_those_of_float_experts() -> None:
    meter = FlopMeter()
    up, down = layer_of(2 * OUT, IN, 1, meter), layer_of(IN, OUT, 2, meter)
    draw = torch.Generator().manual_seed(3)
    x, dout = torch.randn(TOKENS, IN, generator=draw), torch.randn(TOKENS, IN, generator=draw)
    experts, shares = some_routing(unused=3), torch.rand(TOKENS, EACH, generator=draw)
    leaves = [x.clone().requires_grad_(), shares.clone().requires_grad_()]
    exact = [x.clone().requires_grad_(), shares.clone().requires_grad_()]
    weights = [dequantize(layer.weight).unflatten(0, (EXPERTS, -1)).requires_grad_() for layer in (up, down)]
    routing, order = Routing.of(experts, EXPERTS)
    found = combine(spread(leaves[0], up, routing), leaves[1].reshape(-1)[order], down, routing, gate)
    expected = in_float(exact[0], experts, exact[1], *weights)
    assert off(found, expected) < 0.03
    assert up.master is not None and down.master is not None
    ours = torch.autograd.grad(found, [*leaves, up.master, down.master], dout)
    theirs = torch.autograd.grad(expected, [*exact, *weights], dout)
    for mine, other in zip(ours, theirs, strict=True):
        assert off(mine, other.reshape(mine.shape)) < 0.03
    for gradient in ours[2:]:
        per_expert = gradient.unflatten(0, (EXPERTS, -1)).abs().sum((1, 2))
        assert float(per_expert[3]) == 0 and int((per_expert > 0).sum()) == EXPERTS - 1
    once = 2 * TOKENS * EACH * 3 * OUT * IN
    assert meter.by_kind == {"forward": once, "low_plane": once, "dx": once, "dw": once}


@pytest.mark.parametrize("alone", ["x", "share", "up", "down"])
def test_only_what_is_needed_is_computed_and_kept(alone: str) -> None:
    meter = FlopMeter()
    up, down = layer_of(2 * OUT, IN, 1, meter), layer_of(IN, OUT, 2, meter)
    x, shares = torch.randn(TOKENS, IN), torch.rand(TOKENS * EACH)
    for layer, name in ((up, "up"), (down, "down")):
        assert layer.master is not None
        layer.master.requires_grad_(alone == name)
    x.requires_grad_(alone == "x")
    shares.requires_grad_(alone == "share")
    routing, order = Routing.of(some_routing(unused=0), EXPERTS)
    saved: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = combine(spread(x, up, routing), shares[order], down, routing, gate)
    kept = {tensor.data_ptr(): tensor.nbytes for tensor in saved}
    out.sum().backward()
    pairs, first, second = TOKENS * EACH, 2 * TOKENS * EACH * 2 * OUT * IN, 2 * TOKENS * EACH * OUT * IN
    index, share, y = 8 * pairs, 4 * pairs, 4 * pairs * 2 * OUT
    bytes_of = {
        "x": index + share + y, "up": index + share + y + TOKENS * (IN + 4), "down": index + share + pairs * (OUT + 4),
        "share": index + pairs * (IN + 4) + 8 * pairs,  # and the order of the shares
    }  # fmt: skip
    flops = {"x": (first + second, 0), "up": (second, first), "down": (0, second), "share": (0, 0)}
    assert sum(kept.values()) == bytes_of[alone]
    assert (meter.by_kind["dx"], meter.by_kind["dw"]) == flops[alone]


class Exact(ReferenceBackend):
    """Tokens stay in float, so that nothing is left of the difference to a float model with the same weights."""

    def quantize_tokens(
        self, x: torch.Tensor, columns: torch.Tensor | None = None, evenly: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return (x if columns is None else x * columns).double(), torch.ones(x.shape[0])


def everything_trained(model: Int8Model) -> dict[str, torch.nn.Parameter]:
    """Every tensor as a parameter, and every matrix in the int8 plane that it had while it was frozen."""
    for linear in model.linears.values():
        frozen = linear.weight
        linear.promote(dequantize(frozen))
        linear.weight = frozen
    masters = {name: linear.master for name, linear in model.linears.items() if linear.master is not None}
    return masters | {name: vector.requires_grad_() for name, vector in model.vectors.items()}


def same_in_float(model: Int8Model, config: Any) -> Any:
    """transformers' float model with the weights that the int8 planes stand for."""
    twin = float_model(config)
    parameters = dict(twin.named_parameters())
    embedding = model.module.get_input_embeddings().weight
    with torch.no_grad():
        parameters["model.embed_tokens.weight"].copy_(dequantize(embedding))
        for name, linear in model.linears.items():
            parameters[name].copy_(dequantize(linear.weight).reshape(parameters[name].shape))
        for name, vector in model.vectors.items():
            parameters[name].copy_(vector)
    return twin


def loss_of(module: Any, seed: int) -> torch.Tensor:
    batch = batch_of(8, seed)
    return supervised_loss(module, batch, CPU) / batch.supervised


def untied(family: str) -> Any:
    config = MIXTURES[family]()
    config.tie_word_embeddings = False
    return config


@pytest.mark.parametrize("family", MIXTURES)
def test_every_gradient_is_that_of_transformers_where_nothing_is_rounded(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the router too, and with tokens that share an expert, and experts that no token has."""

    def in_float(pairs: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty(pairs, width, dtype=torch.float64), torch.empty(pairs)

    monkeypatch.setattr("edgegt.quant.experts._room", in_float)
    save_model(tmp_path / "model", untied(family))
    model = load(tmp_path / "model", tmp_path / "cache", Exact())
    twin, live = same_in_float(model, untied(family)), everything_trained(model)
    theirs = dict(twin.named_parameters())
    for seed in range(2):
        found, expected = loss_of(model.module, seed), loss_of(twin, seed)
        assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
        found.backward()
        expected.backward()
        model.inputs.clear()
    for name, parameter in live.items():
        gradient, reference = parameter.grad, theirs[name].grad
        assert gradient is not None and reference is not None
        assert off(gradient, reference.reshape(gradient.shape)) < 1e-4, name
    for name in (name for name in live if ".experts." in name):
        assert float(live[name].grad.norm()) > 0


@pytest.mark.parametrize("backend", [TorchBackend, NativeBackend])
def test_int8_gradients_are_close_to_those_of_transformers(backend: Callable[[], Backend], tmp_path: Path) -> None:
    twin = save_model(tmp_path / "model", untied("qwen2-moe"))
    model = load(tmp_path / "model", tmp_path / "cache", backend())
    trainables = Trainables(model, AdamW(False), tmp_path / "parked")
    trainables.select([*model.linears, *model.vectors])
    loss_of(model.module, 1).backward()
    loss_of(twin, 1).backward()
    errors = {}
    for name, parameter in twin.named_parameters():
        if name in trainables.live:
            gradient = trainables.live[name].grad
            assert gradient is not None and parameter.grad is not None
            errors[name] = off(gradient, parameter.grad.reshape(gradient.shape))
    assert max(errors.values()) < 0.2
    mixture = [error for name, error in errors.items() if ".experts." in name or name.endswith("mlp.gate.weight")]
    dense = [error for name, error in errors.items() if "layers.1.mlp" in name or ".shared_expert." in name]
    assert sum(mixture) / len(mixture) < 2 * sum(dense) / len(dense)


def test_flops_of_a_selection_are_those_that_transformers_executes() -> None:
    """With the norm of the shares; the other two are among the families of tests/test_trace.py."""
    config = MIXTURES["qwen3-moe"]()
    table, model, shape = trace(config), float_model(config, untied=True), BatchShape(2, 24, 10)
    for selected in some_selections([weight.name for weight in table.weights], 12):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in selected)
        counted = executed_flops(model, shape)
        assert table.train_work(table.mask(selected)).at(shape) == pytest.approx(counted, rel=1e-3), selected


OTHERS: dict[str, Callable[[], Any]] = {
    "olmoe": lambda: OlmoeConfig(**SMALL, num_experts=6, num_experts_per_tok=2),
    "a router made of a linear": lambda: PhimoeConfig(
        **SMALL, num_local_experts=4, num_experts_per_tok=2
    ),
    "a parameter that is never trained": lambda: Ernie4_5_MoeConfig(
        **SMALL, moe_num_experts=6, moe_k=2, moe_intermediate_size=16, moe_num_shared_experts=1
    ),
    "groups of experts": lambda: DeepseekV3Config(
        **SMALL, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=16,
        n_shared_experts=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
        first_k_dense_replace=1, n_group=2, topk_group=1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", OTHERS)
def test_families_that_share_the_form_are_traced_and_loaded(family: str, tmp_path: Path) -> None:
    config, shape = OTHERS[family](), BatchShape(2, 24, 10)
    table, twin = trace(config), float_model(config, untied=True)
    for selected in some_selections([weight.name for weight in table.weights], 2):
        for name, parameter in twin.named_parameters():
            parameter.requires_grad_(name in selected)
        counted = executed_flops(twin, shape)
        assert table.train_work(table.mask(selected)).at(shape) == pytest.approx(counted, rel=1e-3), selected
    reference = save_model(tmp_path / "model", config)
    model = load(tmp_path / "model", tmp_path / "cache")
    assert {weight.name for weight in table.weights} == {*model.linears, *model.vectors}
    batch = batch_of(6, vocabulary=320)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    with torch.no_grad():
        expected, found = (module(**inputs).logits for module in (reference, model.module))
    assert off(found, expected) < 0.04


def test_a_stack_is_one_weight_and_its_router_stays_in_float() -> None:
    table = trace(MIXTURES["qwen2-moe"]())
    weights = {weight.name: weight for weight in table.weights}
    up, down, router = weights[UP], weights[DOWN], weights["model.layers.0.mlp.gate.weight"]
    assert (up.kind, up.shape, up.experts, up.dw.token) == ("linear", (6 * 64, 64), 6, 2 * 2 * 64 * 64)
    assert (down.kind, down.shape, down.experts, down.dw.token) == ("linear", (6 * 64, 32), 6, 2 * 2 * 64 * 32)
    assert (router.kind, router.shape, router.experts, router.dw.token) == ("vector", (6, 64), 1, 2 * 6 * 64)
    assert weights["model.layers.0.mlp.shared_expert_gate.weight"].kind == "linear"
    assert dispatches(table) == pytest.approx(3 + 2 * 2 * 6 / 7)  # two of its three layers have experts


@pytest.mark.parametrize("family", MIXTURES)
def test_files_with_a_tensor_per_expert_and_files_with_stacks_give_one_model(family: str, tmp_path: Path) -> None:
    twin = save_model(tmp_path / "single", MIXTURES[family]())
    save_model(tmp_path / "stacked", MIXTURES[family](), save_original_format=False)
    stored = [set(load_file(str(tmp_path / form / "model.safetensors"))) for form in ("single", "stacked")]
    assert not any(name in stored[0] for name in (UP, DOWN)) and {UP, DOWN} <= stored[1]
    single, stacked = (load(tmp_path / form, tmp_path / "cache") for form in ("single", "stacked"))
    assert single.store.directory != stacked.store.directory
    for name, linear in single.linears.items():
        other = stacked.linears[name].weight
        assert torch.equal(linear.weight.q, other.q) and torch.equal(linear.weight.scale, other.scale), name
    rows = torch.tensor([0, 31, 32, 97, 130, 191])
    for name in (UP, DOWN):
        expected = twin.get_parameter(name).detach().flatten(0, 1)
        for model in (single, stacked):
            assert torch.equal(model.original(name), expected)
            assert torch.equal(model.original(name, rows), expected[rows])
            assert model.original(name).is_contiguous()


def test_the_float_stack_never_exists_while_it_is_made_int8_or_read(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=320, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=16, num_experts_per_tok=2, tie_word_embeddings=False,
    )  # fmt: skip
    save_model(tmp_path / "model", config)
    with LiveTensors() as live:
        model = load(tmp_path / "model", tmp_path / "cache")
        peak = live.peak
    stack = 16 * 512 * 128
    assert peak < 1.5 * (stack + stack // 2) + 4 * stack / 16 + 2**20
    with LiveTensors() as live:
        master = model.original(UP)
        assert live.peak < 4 * stack * (1 + 3 / 16) + 8 * len(master) * 2


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite the tensors of a saved model."""
    path = folder / "model.safetensors"
    tensors = load_file(str(path))
    change(tensors)
    save_file(tensors, str(path), {"format": "pt"})


@pytest.mark.parametrize("form", [True, False])
def test_files_with_fewer_experts_than_the_config_says_are_refused(form: bool, tmp_path: Path) -> None:
    save_model(tmp_path / "model", MIXTURES["mixtral"](), save_original_format=form)

    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".layers.2." in name and "experts" in name]:
            if ".experts.3." in name:
                del tensors[name]
            elif not form:
                tensors[name] = tensors[name][:3].contiguous()

    changed(tmp_path / "model", shorten)
    expected = r"has 576 rows of 'model\.layers\.2\.mlp\.experts\.gate_up_proj' in \d tensors, its config 768: fetch"
    with pytest.raises(InputError, match=expected):
        load(tmp_path / "model", tmp_path / "cache")


def test_a_missing_part_of_one_expert_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "model", MIXTURES["mixtral"]())
    changed(tmp_path / "model", lambda tensors: tensors.pop("model.layers.1.block_sparse_moe.experts.2.w3.weight"))
    with pytest.raises(InputError, match=r"has 672 rows of 'model\.layers\.1\.mlp\.experts\.gate_up_proj'"):
        load(tmp_path / "model", tmp_path / "cache")


def test_a_merger_that_is_not_understood_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "model", MIXTURES["qwen3-moe"]())
    known = conversion_mapping.get_model_conversion_mapping

    def turned(model: Any) -> list[Any]:
        stored, steps = "mlp.experts.*.down_proj.weight", known(model)
        other = WeightConverter(stored, "mlp.experts.down_proj", [MergeModulelist(dim=0), Transpose(1, 2)])
        return [other if stored in step.source_patterns else step for step in steps]

    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", turned)
    expected = r"'model\.layers\.0\.mlp\.experts\.down_proj' would be made from '.*' in a way that edgegt does not know"
    with pytest.raises(InputError, match=expected):
        load(tmp_path / "model", tmp_path / "cache")


def test_experts_that_compute_something_else_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = float_model(OlmoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2))
    use_experts(model)
    kind = type(model.model.layers[0].mlp.experts)
    theirs = kind.forward.__wrapped__

    def twice(self: Any, *inputs: torch.Tensor) -> torch.Tensor:
        return 2 * theirs(self, *inputs)

    monkeypatch.setattr(kind.forward, "__wrapped__", twice)
    with pytest.raises(InputError, match=r"'model\.layers\.0\.mlp\.experts' have a form of their own"):
        use_experts(model)


def test_a_stack_is_dropped_and_selected_again_without_loss(tmp_path: Path) -> None:
    save_model(tmp_path / "model", MIXTURES["qwen3-moe"]())
    ends = []
    for pause in (False, True):
        model = load(tmp_path / "model", tmp_path / "cache")
        trainables = Trainables(model, AdamW(False), tmp_path / f"parked-{pause}")
        trainables.select([UP, DOWN, "model.layers.0.mlp.gate.weight"])
        for step in range(4):
            loss_of(model.module, step).backward()
            for name, parameter in trainables.live.items():
                gradient, parameter.grad = parameter.grad, None
                assert gradient is not None
                trainables.step(name, gradient, 5e-3)
            model.inputs.clear()
            if pause and step == 1:
                names = list(trainables.live)
                trainables.select([])
                trainables.select(names)
        ends.append({name: parameter.detach().clone() for name, parameter in trainables.live.items()})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert not torch.equal(ends[0][UP], model.original(UP))
