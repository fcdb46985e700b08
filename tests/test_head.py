"""The head in chunks: its loss and gradients are those of torch's cross-entropy on whole logits, in bounded memory."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CohereConfig, Gemma2Config, GraniteConfig, HyperCLOVAXConfig

import edgegt.chunks
from edgegt.chunks import HEAD_CHUNK_ELEMENTS, chunk_positions
from edgegt.errors import InputError
from edgegt.flops import FlopMeter
from edgegt.head import LogitMap, base_model, head_loss, logit_map, verify_head
from edgegt.loss import kept_hidden, supervised_loss
from edgegt.quant import BACKENDS, Backend, InputCache, Int8Linear, ReferenceBackend, quantize_rows, split_planes
from tiny_models import _GROUPED, CPU, EVERY, batch_of, load, logits_of, save_model, start_of

VOCABULARY, WIDTH = 75, 24
MAPS = {
    "plain": {}, "cap": {"final_logit_softcapping": 1.5}, "factor": {"logit_scale": 0.3},
    "both": {"logits_scaling": 4.0, "final_logit_softcapping": 0.7},
}  # fmt: skip


class Exact:
    """A backend that quantises nothing."""

    name = "exact"

    def quantize_tokens(self, x: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x, torch.ones(x.shape[0])


class FloatHead:
    """A head in float32, as the contract says it."""

    def __init__(self, master: Tensor, bias: Tensor | None) -> None:
        self.out_features, self.backend, self.master, self.bias = master.shape[0], Exact(), master, bias

    def logits(self, q: Tensor, scale: Tensor) -> Tensor:
        logits = q @ self.master.detach().t()
        return logits if self.bias is None else logits + self.bias.detach()

    def input_gradient(self, dy: Tensor, evenly: bool = False) -> Tensor:
        return dy @ self.master.detach()

    def master_gradient(self, dy: Tensor, q: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
        return dy.t() @ q if out is None else out.addmm_(dy.t(), q)


class Live(TorchDispatchMode):
    """The most bytes of storages that were made inside and alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.sizes:
                storage = tensor.untyped_storage()
                if any(isinstance(a, Tensor) and a.untyped_storage()._cdata == storage._cdata for a in args):
                    continue
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return out


def module_of(head: Any, **config: float) -> Any:
    text = SimpleNamespace(**config)
    return SimpleNamespace(get_output_embeddings=lambda: head, config=SimpleNamespace(get_text_config=lambda: text))


def int8_head(vocabulary: int, width: int, backend: Backend, meter: FlopMeter | None = None) -> Int8Linear:
    weight = quantize_rows(torch.randn(vocabulary, width, generator=torch.Generator().manual_seed(1)))
    return Int8Linear(weight, backend=backend, inputs=InputCache(), name="head", meter=meter)


def labels_of(n: int, vocabulary: int, ignored: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(vocabulary, (n,), generator=draw)
    labels[torch.randperm(n, generator=draw)[:ignored]] = -100
    return labels


@pytest.fixture
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Chunks of this many positions of the small vocabulary."""
    monkeypatch.setattr(edgegt.chunks, "HEAD_CHUNK_ELEMENTS", request.param * VOCABULARY)
    monkeypatch.setattr(edgegt.chunks, "SMALLEST_CHUNK", 1)
    return int(request.param)


def test_a_chunk_holds_four_million_logits_or_sixteen_positions() -> None:
    assert HEAD_CHUNK_ELEMENTS == 2**22
    assert chunk_positions(32_000, 1000) == 132
    assert chunk_positions(256_000, 1000) == 17
    assert chunk_positions(10**9, 1000) == 16
    assert chunk_positions(256_000, 3) == 3
    assert chunk_positions(100, 7) == 7
    assert chunk_positions(100, 0) == 1
    assert chunk_positions(32_000, 1000, trained=2**26) == 132  # a gradient of 256 MiB: 16 MiB are a sixteenth of it
    assert chunk_positions(32_000, 1000, trained=2**28) == 525


@pytest.mark.parametrize("config", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("chunk", [1, 7, 1000], indirect=True)
@pytest.mark.parametrize("ignored", [0, 9])
@pytest.mark.usefixtures("chunk")
def test_loss_and_gradients_are_those_of_whole_logits(config: dict[str, float], ignored: int) -> None:
    torch.manual_seed(0)
    hidden, master, bias = (torch.randn(*shape, requires_grad=True) for shape in ((4, 8, WIDTH), (75, WIDTH), (75,)))
    labels = labels_of(32, VOCABULARY, ignored).reshape(4, 8)
    logits = hidden @ master.t() + bias
    logits = logits * config.get("logit_scale", 1.0) / config.get("logits_scaling", 1.0)
    if cap := config.get("final_logit_softcapping"):
        logits = cap * torch.tanh(logits / cap)
    expected = cross_entropy(logits.reshape(32, -1), labels.reshape(-1), reduction="sum")
    gradients = torch.autograd.grad(0.37 * expected, (hidden, master, bias))
    module, lse = module_of(FloatHead(master, bias), **config), torch.empty(32 - ignored)
    found = head_loss(module, hidden, labels, lse)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(lse, logits.logsumexp(-1)[labels != -100])
    for mine, reference in zip(torch.autograd.grad(0.37 * found, (hidden, master, bias)), gradients, strict=True):
        torch.testing.assert_close(mine, reference, rtol=2e-4, atol=2e-6)
    with torch.no_grad():
        torch.testing.assert_close(head_loss(module, hidden, labels), expected)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_only_what_is_asked_for_is_differentiated(wanted: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    operands = [
        torch.randn(*shape, requires_grad=i in wanted) for i, shape in enumerate([(5, WIDTH), (75, WIDTH), (75,)])
    ]
    head_loss(module_of(FloatHead(operands[1], operands[2])), operands[0], labels_of(5, VOCABULARY, 1)).backward()
    assert [operand.grad is not None for operand in operands] == [i in wanted for i in range(3)]


def test_without_a_label_the_loss_and_its_gradients_are_zero() -> None:
    hidden, master = torch.randn(6, WIDTH, requires_grad=True), torch.randn(VOCABULARY, WIDTH, requires_grad=True)
    loss = head_loss(module_of(FloatHead(master, None)), hidden, torch.full((6,), -100))
    loss.backward()
    assert not loss.detach().any()
    assert torch.equal(hidden.grad, torch.zeros(6, WIDTH)) and not master.grad.any()


def test_ignored_positions_get_no_gradient_and_may_hold_anything() -> None:
    hidden = torch.randn(4, WIDTH)
    hidden[1] = float("nan")
    hidden.requires_grad_()
    loss = head_loss(module_of(FloatHead(torch.randn(75, WIDTH), None)), hidden, torch.tensor([3, -100, 0, 74]))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(hidden.grad).all() and not hidden.grad[1].any()


def test_the_loss_is_differentiated_once() -> None:
    hidden = torch.randn(4, WIDTH, requires_grad=True)
    loss = head_loss(module_of(FloatHead(torch.randn(75, WIDTH), None)), hidden, labels_of(4, VOCABULARY, 0))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        loss.backward()


def test_large_logits_and_hidden_states_in_bfloat16() -> None:
    hidden, master = 100 * torch.randn(6, WIDTH), 100 * torch.randn(VOCABULARY, WIDTH)
    labels = labels_of(6, VOCABULARY, 0)
    expected = cross_entropy(hidden @ master.t(), labels, reduction="sum")
    torch.testing.assert_close(head_loss(module_of(FloatHead(master, None)), hidden, labels), expected)
    half = hidden.to(torch.bfloat16).requires_grad_()
    head_loss(module_of(int8_head(VOCABULARY, WIDTH, BACKENDS["torch"]())), half, labels).backward()
    assert half.grad is not None and half.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["frozen", "trained", "rows"])
@pytest.mark.parametrize("chunk", [7], indirect=True)
@pytest.mark.parametrize("name", list(BACKENDS))
@pytest.mark.usefixtures("chunk")
def test_an_int8_head_gives_what_its_forward_gives(kind: str, name: str) -> None:
    torch.manual_seed(0)
    head = int8_head(VOCABULARY, WIDTH, BACKENDS[name]())
    if kind == "trained":
        head.promote(torch.randn(VOCABULARY, WIDTH))
    elif kind == "rows":
        head.promote_rows(torch.randn(4, WIDTH), torch.tensor([0, 3, 40, 74]))
    hidden, labels = torch.randn(40, WIDTH, requires_grad=True), labels_of(40, VOCABULARY, 13)
    operands = [hidden] if head.master is None else [hidden, head.master]
    expected = cross_entropy(head(hidden), labels, reduction="sum")
    gradients = torch.autograd.grad(expected, operands)
    found = head_loss(module_of(head), hidden, labels)
    torch.testing.assert_close(found, expected)
    for mine, reference in zip(torch.autograd.grad(found, operands), gradients, strict=True):
        # the head rounds dy evenly, its forward's gradient to the nearest; dw is formed from dy in integers by both
        assert float((mine - reference).norm() / reference.norm()) < 2e-2


def test_the_meter_counts_labelled_positions() -> None:
    meter = FlopMeter()
    head = int8_head(VOCABULARY, WIDTH, BACKENDS["torch"](), meter)
    module, labels = module_of(head), labels_of(40, VOCABULARY, 13)
    product = 2 * 27 * VOCABULARY * WIDTH
    with torch.no_grad():
        head_loss(module, torch.randn(40, WIDTH), labels)
    assert meter.by_kind == {"forward": product}
    head_loss(module, torch.randn(40, WIDTH, requires_grad=True), labels).backward()
    assert meter.by_kind == {"forward": 2 * product, "dx": product}
    head.promote(torch.randn(VOCABULARY, WIDTH))
    head_loss(module, torch.randn(40, WIDTH), labels).backward()
    assert meter.by_kind == {"forward": 3 * product, "dx": product, "dw": product, "low_plane": product}
    assert meter.total == 5 * product


@pytest.mark.parametrize("name", [*BACKENDS, "reference"])
@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("config", [MAPS["plain"], MAPS["cap"]], ids=["plain", "cap"])
def test_a_chunk_takes_nine_bytes_per_logit(name: str, planes: int, config: dict[str, float]) -> None:
    vocabulary, width, n = 2**15, 256, 512
    head = int8_head(vocabulary, width, ReferenceBackend() if name == "reference" else BACKENDS[name]())
    if planes == 2:
        head.restore(split_planes(torch.randn(vocabulary, width)))
    hidden, labels = torch.randn(n, width, requires_grad=True), labels_of(n, vocabulary, 0)
    logits = vocabulary * chunk_positions(vocabulary, n)
    assert logits == HEAD_CHUNK_ELEMENTS < n * vocabulary
    gc.collect()
    with Live() as live:
        head_loss(module_of(head, **config), hidden, labels).backward()
    assert 4 * logits < live.peak <= 9 * logits + 4 * n * width + 2**20


def test_a_bfloat16_master_gets_a_float32_gradient() -> None:
    head = int8_head(VOCABULARY, WIDTH, BACKENDS["torch"]())
    head.promote(torch.randn(VOCABULARY, WIDTH).to(torch.bfloat16))
    head_loss(module_of(head), torch.randn(9, WIDTH), labels_of(9, VOCABULARY, 2)).backward()
    assert head.master is not None and head.master.grad is not None
    assert head.master.grad.dtype == torch.float32 and head.master.grad.shape == (VOCABULARY, WIDTH)


def test_the_masters_gradient_is_one_buffer_and_given_away() -> None:
    vocabulary, width, n = 4096, 256, 64
    head = int8_head(vocabulary, width, BACKENDS["torch"]())
    head.promote(torch.randn(vocabulary, width))
    with Live() as live:
        head_loss(module_of(head), torch.randn(n, width), labels_of(n, vocabulary, 0)).backward()
    assert 4 * vocabulary * width < live.peak < 1.6 * 4 * vocabulary * width + 9 * n * vocabulary


@pytest.mark.parametrize("family", EVERY)
def test_every_family_has_the_loss_of_its_own_logits(family: str, tmp_path: Path) -> None:
    save_model(tmp_path / "model", EVERY[family]())
    model = load(tmp_path / "model", tmp_path / "cache")
    batch = batch_of(6, start=start_of(family))
    with torch.no_grad():
        expected = cross_entropy(logits_of(model.module, batch).flatten(0, 1), batch.labels.flatten(), reduction="sum")
        found = supervised_loss(model.module, batch, CPU)
    assert kept_hidden(model.module, batch, CPU).shape[:2] == batch.labels.shape
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    before = model.meter.total
    verify_head(model.module, model.linears[model.head], CPU)
    assert model.meter.total == before


POST = {
    "gemma2": (
        Gemma2Config(**_GROUPED, head_dim=16, attn_logit_softcapping=None, final_logit_softcapping=0.05),
        LogitMap(1.0, 0.05),
    ),
    "cohere": (CohereConfig(**_GROUPED, logit_scale=0.0625), LogitMap(0.0625)),
    "granite": (GraniteConfig(**_GROUPED, logits_scaling=4.0), LogitMap(0.25)),
}


@pytest.mark.parametrize("family", POST)
def test_caps_and_factors_of_real_architectures(family: str, tmp_path: Path) -> None:
    config, expected = POST[family]
    save_model(tmp_path / "model", config)
    model = load(tmp_path / "model", tmp_path / "cache")
    assert logit_map(model.module) == expected
    verify_head(model.module, model.linears[model.head], CPU)


def test_logits_processed_in_another_way_are_refused(tmp_path: Path) -> None:
    """HyperCLOVA X multiplies by the number that Granite divides by."""
    save_model(tmp_path / "model", HyperCLOVAXConfig(**_GROUPED, logits_scaling=4.0))
    with pytest.raises(InputError, match=r"post-processes its logits .* differ by 9\.4e-01 .* give another model"):
        load(tmp_path / "model", tmp_path / "cache")


def test_a_model_without_a_base_is_refused() -> None:
    with pytest.raises(InputError, match="Linear has no base model below its head"):
        base_model(torch.nn.Linear(2, 2))
