"""The int8 linear against a float linear that holds the dequantised weights, for every backend and device here."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from edgegt.quant import (
    BACKENDS,
    Backend,
    BackendCheck,
    InputCache,
    Int8Embedding,
    Int8Linear,
    Int8Weight,
    dequantize,
    quantize_rows,
)
from edgegt.quant.backend import check, weight_gradient
from edgegt.quant.torch_backend import TorchBackend

SHAPES = [(800, 256, 688), (64, 64, 1536), (33, 67, 129), (1, 96, 40)]


@pytest.fixture(autouse=True)
def _two_threads_and_a_seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(min(2, threads))
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return torch.device(request.param)


@cache
def checked(name: str, device: torch.device) -> BackendCheck:
    return check({name: BACKENDS[name]}, device)[0]


@pytest.fixture(params=list(BACKENDS))
def backend(request: pytest.FixtureRequest, device: torch.device) -> Backend:
    result = checked(request.param, device)
    if not result.ok and request.param == "bitsandbytes":
        pytest.skip(f"bitsandbytes is unavailable on {device.type}: {result.error}")
    assert result.ok, result.error
    return BACKENDS[request.param]()


class CountingMeter:
    """FLOPs by kind."""

    def __init__(self) -> None:
        self.flops: dict[str, int] = {}

    def add(self, kind: str, flops: int) -> None:
        self.flops[kind] = self.flops.get(kind, 0) + flops


def make(
    backend: Backend, device: torch.device, size: tuple[int, int], *, bias: bool = False, trained: bool = False
) -> Int8Linear:
    inner, out = size
    w = (torch.randn(out, inner) / math.sqrt(inner)).to(device)
    offset = torch.randn(out, device=device) if bias else None
    layer = Int8Linear(quantize_rows(w), offset, backend=backend, inputs=InputCache(), name="layer")
    if trained:
        layer.promote(w)
    return layer


def twin(layer: Int8Linear) -> nn.Linear:
    """The float layer that holds the dequantised weight."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device=layer.weight.device)
    with torch.no_grad():
        linear.weight.copy_(dequantize(layer.weight))
        if layer.bias is not None:
            linear.bias.copy_(layer.bias)
    return linear


def snr_db(value: Tensor, reference: Tensor) -> float:
    reference = reference.detach().double()
    noise = (value.detach().double() - reference).pow(2).sum()
    return float(10 * torch.log10(reference.pow(2).sum() / noise.clamp_min(1e-300)))


def saved_by(forward: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """The output, and the bytes of the distinct storages that autograd keeps for it."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        return forward(), sum(kept.values())


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_against_the_float_twin(
    backend: Backend, device: torch.device, shape: tuple[int, int, int], trained: bool
) -> None:
    n, inner, out = shape
    layer = make(backend, device, (inner, out), bias=True, trained=trained)
    linear = twin(layer)
    assert layer.bias is not None
    layer.bias.requires_grad_(trained)
    x = torch.randn(n, inner, device=device, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    dy = torch.randn(n, out, device=device)
    y, expected = layer(x), linear(other)
    y.backward(dy)
    expected.backward(dy)
    assert x.grad is not None and other.grad is not None and linear.weight.grad is not None
    assert snr_db(y.detach(), expected) >= 30
    assert snr_db(x.grad, other.grad) >= 20
    if trained:
        assert layer.master is not None and layer.master.grad is not None
        assert layer.bias.grad is not None and linear.bias.grad is not None
        assert snr_db(layer.master.grad, linear.weight.grad) >= 30
        assert torch.allclose(layer.bias.grad, linear.bias.grad, atol=1e-3)


def test_odd_inputs(backend: Backend, device: torch.device) -> None:
    layer = make(backend, device, (48, 40), bias=True)
    linear = twin(layer)
    x = torch.randn(4, 9, 48, device=device)
    x[1, 2] = 0
    x[2, 3] *= 1e4
    y, expected = layer(x), linear(x)
    assert y.shape == (4, 9, 40) and layer.bias is not None
    assert torch.equal(y[1, 2], layer.bias)
    for row in range(4):
        assert snr_db(y[row], expected[row]) >= 30
    ordinary = torch.ones(4, 9, dtype=torch.bool, device=device)
    ordinary[2, 3] = False
    assert snr_db(y[ordinary], expected[ordinary]) >= 30, "an outlier token costs the others nothing"
    strided = torch.randn(48, 36, device=device).t()
    assert torch.equal(layer(strided), layer(strided.contiguous()))
    assert layer(torch.empty(2, 0, 48, device=device)).shape == (2, 0, 40)
    half = layer(x.bfloat16())
    assert half.dtype == torch.bfloat16 and snr_db(half, expected) >= 30
    with torch.inference_mode():
        made_inside = x + 0
        assert torch.equal(layer(made_inside), y)


def test_no_tokens_give_zero_gradients(backend: Backend, device: torch.device) -> None:
    layer = make(backend, device, (16, 8), trained=True)
    x = torch.empty(0, 16, device=device, requires_grad=True)
    layer(x).sum().backward()
    assert layer.master is not None and layer.master.grad is not None and x.grad is not None
    assert not bool(layer.master.grad.any()) and x.grad.shape == (0, 16)


def test_frozen_keeps_nothing_and_trained_keeps_one_byte_per_element(backend: Backend, device: torch.device) -> None:
    x = torch.randn(64, 48, device=device, requires_grad=True)
    frozen, trained = make(backend, device, (48, 40)), make(backend, device, (48, 40), trained=True)
    y, kept = saved_by(lambda: frozen(x))
    assert y.requires_grad and kept == 0
    y, kept = saved_by(lambda: trained(x.detach()))
    assert y.requires_grad and kept == 64 * 48 + 64 * 4
    with torch.no_grad():
        assert not trained(x).requires_grad
    assert not frozen(x.detach()).requires_grad


def test_a_stage_quantises_its_input_once(backend: Backend, device: torch.device) -> None:
    inputs = InputCache()
    layers = [make(backend, device, (48, 40), trained=True) for _ in range(3)]
    for layer in layers:
        layer.inputs = inputs
    x = torch.randn(2, 32, 48, device=device)
    held: list[int] = []

    def stage() -> Tensor:
        outputs = []
        for layer in layers:
            outputs.append(layer(x))
            held.append(inputs.quantize(x, backend)[0].data_ptr())
        return torch.cat(outputs)

    _, kept = saved_by(stage)
    assert kept == 64 * 48 + 64 * 4 and len(set(held)) == 1


def test_the_input_cache_sees_changes_and_forgets(device: torch.device) -> None:
    cache, backend = InputCache(), TorchBackend()
    x = torch.randn(32, 16, device=device)
    first = cache.quantize(x, backend)
    assert cache.quantize(x, backend) is first
    x[0] = 5
    second = cache.quantize(x, backend)
    assert second is not first and torch.equal(second[0], backend.quantize_tokens(x)[0])
    assert cache.quantize(x.clone(), backend) is not second
    third = cache.quantize(x, backend)
    cache.clear()
    assert cache.quantize(x, backend) is not third


def test_promote_train_demote_and_restore_lose_nothing(backend: Backend, device: torch.device) -> None:
    layer = make(backend, device, (96, 64), bias=True)
    frozen, x = layer.weight, torch.randn(40, 96, device=device)
    base = layer(x)
    master = dequantize(frozen) + 1e-3 * torch.randn(64, 96, device=device)
    layer.promote(master)
    assert layer.master is not None and layer.master.data_ptr() == master.data_ptr()
    assert [name for name, _ in layer.named_parameters()] == ["master", "bias"]
    optimizer = torch.optim.SGD([layer.master], lr=0.1)
    layer(x).pow(2).mean().backward()
    optimizer.step()
    layer.refresh()
    trained = layer(x)
    returned = layer.demote()
    assert torch.equal(layer(x), trained) and layer.master is None
    assert returned.data_ptr() == master.data_ptr() and not returned.requires_grad
    planes = layer.weight
    layer.promote(returned)
    assert torch.equal(layer(x), trained) and planes is not layer.weight
    assert torch.equal(layer.master.detach(), returned)
    layer.restore(frozen)
    assert torch.equal(layer(x), base) and layer.master is None
    with pytest.raises(RuntimeError, match="promote it first"):
        layer.refresh()


def test_a_tiny_update_reaches_the_output(backend: Backend, device: torch.device) -> None:
    layer = make(backend, device, (256, 128))
    base = dequantize(layer.weight)
    layer.promote(base.clone())
    x = torch.randn(300, 256, device=device)
    before = layer(x).detach()
    update = 1e-4 * torch.randn(128, 256, device=device)
    assert layer.master is not None
    with torch.no_grad():
        layer.master.add_(update)
    layer.refresh()
    q, scale = layer.inputs.quantize(x, backend)
    change = (q.double() * scale[:, None]) @ update.double().t()
    assert snr_db(layer(x).detach() - before, change) > 10
    layer.restore(quantize_rows(base + update))
    assert snr_db(layer(x) - before, change) < 3, "a single plane loses it"


def test_a_probe_sees_every_gradient_and_forms_none(backend: Backend, device: torch.device) -> None:
    layer, reference = make(backend, device, (48, 40)), make(backend, device, (48, 40))
    reference.weight = layer.weight
    reference.promote(dequantize(layer.weight))
    meter = layer.meter = CountingMeter()
    seen: dict[str, Tensor] = {}

    def probe(name: str, dy: Tensor, q: Tensor, scale: Tensor) -> None:
        seen[name] = backend.weight_gradient(dy, q, scale)

    x, weight = torch.randn(3, 20, 48, device=device), torch.randn(40, device=device)
    reference(x).mul(weight).sum().backward()
    assert reference.master is not None and reference.master.grad is not None
    layer.probe = probe
    (layer(x) * weight).sum().backward()  # nothing below needs a gradient, and still the probe is reached
    assert torch.equal(seen["layer"], reference.master.grad)
    assert "dx" not in meter.flops and list(layer.parameters()) == []
    seen.clear()
    below = x.clone().requires_grad_()
    (layer(below) * weight).sum().backward()
    assert torch.equal(seen["layer"], reference.master.grad) and below.grad is not None
    layer.probe = None
    assert not layer(x).requires_grad


def test_executed_flops_are_metered(backend: Backend, device: torch.device) -> None:
    x = torch.randn(4, 25, 48, device=device, requires_grad=True)
    layer = make(backend, device, (48, 40))
    one = 2 * 100 * 48 * 40
    meter = layer.meter = CountingMeter()
    layer(x).sum().backward()
    assert meter.flops == {"forward": one, "dx": one}
    layer.promote(dequantize(layer.weight))
    meter = layer.meter = CountingMeter()
    layer(x).sum().backward()
    assert meter.flops == {"forward": one, "low_plane": one, "dx": one, "dw": one}


def test_its_products_alone_are_those_of_autograd(backend: Backend, device: torch.device) -> None:
    layer = make(backend, device, (96, 64), bias=True, trained=True)
    x = torch.randn(50, 96, device=device, requires_grad=True)
    dy = torch.randn(50, 64, device=device)
    y = layer(x)
    y.backward(dy)
    assert layer.master is not None and layer.master.grad is not None and x.grad is not None
    q, scale = backend.quantize_tokens(x.detach())
    meter = layer.meter = CountingMeter()
    assert torch.equal(layer.logits(q, scale), y)
    assert torch.equal(layer.input_gradient(dy), x.grad)
    assert torch.equal(layer.master_gradient(dy, q, scale), layer.master.grad)
    dw = weight_gradient(dy, q, scale)  # in float32
    assert snr_db(layer.master.grad, dw) > 36
    total = torch.ones_like(dw)
    for part in (slice(20), slice(20, None)):
        assert layer.master_gradient(dy[part], q[part], scale[part], total) is total
    assert snr_db(total - 1, dw) > 36
    one = 2 * 50 * 96 * 64
    assert meter.flops == {"forward": one, "low_plane": one, "dx": one, "dw": 2 * one}


def test_a_bfloat16_master_has_a_float32_gradient(backend: Backend, device: torch.device) -> None:
    layer = make(backend, device, (96, 64))
    master = dequantize(layer.weight).bfloat16()
    layer.promote(master)
    assert layer.master is not None and layer.master.dtype == torch.bfloat16
    assert snr_db(dequantize(layer.weight), master.float()) > 80
    x, dy = torch.randn(50, 96, device=device), torch.randn(50, 64, device=device)
    for _ in range(2):
        layer(x).backward(dy)
    expected = 2 * layer.master_gradient(dy, *backend.quantize_tokens(x))
    assert layer.master.grad is not None
    if hasattr(layer.master, "grad_dtype"):
        assert torch.equal(layer.master.grad, expected)
    else:
        assert snr_db(layer.master.grad, expected) > 40


def test_runs_repeat_bit_for_bit(backend: Backend, device: torch.device) -> None:
    layer = make(backend, device, (96, 64), trained=True)
    results = []
    for _ in range(2):
        layer.inputs.clear()
        layer.zero_grad()
        x = torch.linspace(-3, 3, 50 * 96, device=device).sin().reshape(50, 96).requires_grad_()
        y = layer(x)
        y.pow(2).sum().backward()
        assert layer.master is not None and layer.master.grad is not None and x.grad is not None
        results.append((y.detach(), x.grad, layer.master.grad.clone()))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_gradients_are_the_same_under_recomputation(backend: Backend, device: torch.device) -> None:
    layer = make(backend, device, (48, 40), trained=True)
    grads = []
    for recompute in (False, True):
        layer.zero_grad()
        x = torch.ones(30, 48, device=device).cumsum(0).sin().requires_grad_()
        y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        y.pow(2).sum().backward()
        assert layer.master is not None and layer.master.grad is not None and x.grad is not None
        grads.append((layer.master.grad.clone(), x.grad))
    assert all(torch.equal(first, second) for first, second in zip(*grads, strict=True))


def test_long_batches_sum_over_token_chunks(device: torch.device) -> None:
    q = torch.randint(-127, 128, (2500, 16), dtype=torch.int8, device=device)
    scale, dy = torch.rand(2500, device=device), torch.randn(2500, 8, device=device)
    expected = dy.double().t() @ (q.double() * scale.double()[:, None])
    assert snr_db(weight_gradient(dy, q, scale), expected) > 100


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_a_read_only_mapped_weight_is_used_in_place(tmp_path: Path) -> None:
    device = torch.device("cpu")
    w = torch.randn(64, 48)
    weight = quantize_rows(w)
    path = tmp_path / "q.bin"
    path.write_bytes(bytes(weight.q.reshape(-1).view(torch.uint8).tolist()))
    with path.open("rb") as file:
        mapped = torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=torch.int8).view(64, 48)
    layer = Int8Linear(Int8Weight(mapped, weight.scale), backend=TorchBackend(), inputs=InputCache())
    assert layer.weight.q.data_ptr() == mapped.data_ptr()
    x = torch.randn(20, 48, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert x.grad is not None and bool(x.grad.any())
    layer.promote(w)
    layer(x).sum().backward()
    layer.refresh()
    assert torch.equal(mapped, weight.q), "training never writes to the base"
    layer.restore(Int8Weight(mapped, weight.scale))
    assert torch.equal(layer(x), y)
    table = Int8Embedding(Int8Weight(mapped, weight.scale))
    assert torch.equal(table(torch.tensor([3])), dequantize(weight)[3:4]) and device.type == "cpu"
