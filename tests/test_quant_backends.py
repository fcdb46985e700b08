"""The contract that every int8 backend passes on every device here, the int8 planes, and how a backend is chosen."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from edgegt.errors import EdgegtError, InputError
from edgegt.quant import (
    BACKENDS,
    Backend,
    BackendCheck,
    ReferenceBackend,
    check_backends,
    choose_backend,
    dequantize,
    quantize_rows,
    refresh_planes,
    split_planes,
)
from edgegt.quant.backend import FILE_NAME, check, choose
from edgegt.quant.torch_backend import TorchBackend, padded_int_mm

MAKERS = {**BACKENDS, "reference": ReferenceBackend}
SHAPES = [(64, 256, 192), (800, 256, 688), (1, 64, 64), (3, 5, 7), (33, 67, 129), (17, 1, 1), (0, 16, 8)]


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
    return check({name: MAKERS[name]}, device)[0]


@pytest.fixture(params=list(MAKERS))
def backend(request: pytest.FixtureRequest, device: torch.device) -> Backend:
    result = checked(request.param, device)
    if not result.ok and request.param == "bitsandbytes":
        pytest.skip(f"bitsandbytes is unavailable on {device.type}: {result.error}")
    assert result.ok, result.error
    return MAKERS[request.param]()


def relative(value: Tensor, reference: Tensor) -> float:
    reference = reference.double().cpu()
    return float((value.double().cpu() - reference).norm() / reference.norm().clamp_min(1e-300))


def int8(rows: int, columns: int, device: torch.device) -> Tensor:
    return torch.randint(-127, 128, (rows, columns), dtype=torch.int8).to(device)


@pytest.mark.parametrize("shape", SHAPES)
def test_products_equal_float64_products(backend: Backend, device: torch.device, shape: tuple[int, int, int]) -> None:
    n, k, out = shape
    q, weight, qd = int8(n, k, device), int8(out, k, device), int8(n, out, device)
    scale, weight_scale = torch.rand(n).to(device), torch.rand(out).to(device)
    y = backend.product(q, scale, weight, weight_scale)
    dx = backend.product_back(qd, scale, weight)
    assert y.shape == (n, out) and y.dtype == torch.float32
    assert dx.shape == (n, k) and dx.dtype == torch.float32
    wide = weight.double().cpu()
    assert relative(y, (q.double().cpu() @ wide.t()) * scale.cpu()[:, None] * weight_scale.cpu()) < 1e-4
    assert relative(dx, (qd.double().cpu() @ wide) * scale.cpu()[:, None]) < 1e-4


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("shape", [(800, 256), (1, 7), (1300, 1024), (0, 8)])
def test_tokens_are_within_half_a_step(
    backend: Backend, device: torch.device, shape: tuple[int, int], columns: bool
) -> None:
    x = torch.randn(shape, device=device)
    if shape[0] > 4:
        x[1], x[2] = 0, x[2] * 1e4
    factor = torch.rand(shape[1], device=device) if columns else None
    before = x.clone()
    q, scale = backend.quantize_tokens(x, factor)
    meant = x if factor is None else x * factor
    assert q.dtype == torch.int8 and q.shape == shape and scale.dtype == torch.float32 and scale.shape == shape[:1]
    assert int(q.int().abs().max()) == 127 if shape[0] else q.numel() == 0
    assert bool(((q * scale[:, None] - meant).abs() <= 0.501 * scale[:, None] + 1e-12).all())
    assert torch.equal(x, before)
    again = backend.quantize_tokens(x, factor)
    assert torch.equal(again[0], q) and torch.equal(again[1], scale)


def test_strided_and_half_precision_tokens(backend: Backend, device: torch.device) -> None:
    x = torch.randn(48, 40, device=device)
    q, _ = backend.quantize_tokens(x.t())
    assert torch.equal(q, backend.quantize_tokens(x.t().contiguous())[0])
    low, scale = backend.quantize_tokens(x.bfloat16())
    assert relative(low * scale[:, None], x.bfloat16()) < 0.01
    expanded = torch.ones((), device=device).expand(20, 24)
    q, scale = backend.quantize_tokens(expanded)
    assert bool((q == 127).all()) and torch.allclose(scale, torch.full_like(scale, 1 / 127))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_token_that_is_not_finite_spoils_its_own_row_only(backend: Backend, device: torch.device, bad: float) -> None:
    x = torch.randn(40, 16, device=device)
    x[3, 5] = bad
    y = backend.product(*backend.quantize_tokens(x), int8(24, 16, device), torch.ones(24, device=device))
    assert not torch.isfinite(y[3]).any()
    assert torch.isfinite(y[:3]).all() and torch.isfinite(y[4:]).all()


@pytest.mark.parametrize("shape", [(1, 5, 7), (31, 8, 8), (33, 67, 129), (40, 64, 64)])
def test_padding_changes_no_product(shape: tuple[int, int, int]) -> None:
    n, k, out = shape
    a, weight, back = int8(n, k, torch.device("cpu")), *[int8(out, k, torch.device("cpu")) for _ in range(2)]
    assert torch.equal(padded_int_mm(a, weight.t()), torch._int_mm(a, weight.t()))
    grad = int8(n, out, torch.device("cpu"))
    assert torch.equal(padded_int_mm(grad, back), torch._int_mm(grad, back))


@pytest.mark.parametrize("shape", [(40, 64, 64), (33, 67, 129)])
def test_cuda_gets_row_major_times_column_major(shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    n, k, out = shape
    seen: list[tuple[int, int]] = []
    plain = torch._int_mm

    def spy(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        seen.append((a.stride(1), b.stride(0)))
        return plain(a, b)

    monkeypatch.setattr(torch, "_int_mm", spy)
    q, grad, weight = (int8(*size, torch.device("cpu")) for size in ((n, k), (n, out), (out, k)))
    padded_int_mm(q, weight.t())
    padded_int_mm(grad, weight)
    padded_int_mm(grad.t().contiguous().t(), weight)
    assert seen == [(1, 1)] * 3


def test_rows_fit_int8_whatever_their_size(device: torch.device) -> None:
    w = torch.randn(600, 500) * torch.logspace(-40, 30, 600)[:, None]
    w[3] = 0
    weight = quantize_rows(w.to(device))
    assert weight.scale.dtype == torch.bfloat16 and weight.low is None
    assert int(weight.q.int().abs().max()) <= 127 and not bool(weight.q[3].any())
    error = (dequantize(weight).cpu() - w).abs()
    assert bool((error <= 0.5001 * weight.scale.float().cpu()[:, None]).all())
    assert weight.nbytes <= 1.05 * w.numel()


def test_two_planes_hold_sixteen_bits_and_chunks_do_not_matter(device: torch.device) -> None:
    w = torch.randn(70, 300, device=device)
    weight = split_planes(w)
    assert weight.low is not None
    bound = weight.scale.float()[:, None] / 500
    assert bool(((dequantize(weight) - w).abs() <= bound).all())
    other = split_planes(w, chunk_rows=7)
    assert other.low is not None
    assert torch.equal(other.q, weight.q) and torch.equal(other.low, weight.low)
    assert torch.equal(quantize_rows(w, chunk_rows=3).q, weight.q)
    out = torch.empty(70, 300, device=device)
    assert dequantize(weight, out) is out and torch.equal(out, dequantize(weight))


def test_the_second_plane_keeps_a_tiny_update_that_int8_loses() -> None:
    base = quantize_rows(0.02 * torch.randn(256, 512))
    w, scale = dequantize(base), base.scale.float()[:, None]
    update = 1e-4 * torch.randn(256, 512)
    weight = split_planes(w)
    low = weight.low
    before = dequantize(weight)
    refresh_planes(weight, w + update, chunk_rows=100)
    assert weight.low is low, "the planes are rewritten in place"
    kept = dequantize(weight) - before
    lost = float((kept - update).pow(2).sum() / update.pow(2).sum())
    moved = ((w + update) / scale).round() * scale - w
    surviving = float((moved * update).sum() / update.pow(2).sum())
    assert lost < 0.1
    assert (moved != 0).float().mean() < 0.1 and surviving < 0.5


def test_values_that_cannot_be_quantised_are_named() -> None:
    w = torch.ones(4, 4)
    w[2, 1] = float("nan")
    with pytest.raises(InputError, match="row 2 of a weight holds NaN or infinity"):
        quantize_rows(w)
    with pytest.raises(InputError, match=r"shape \(4,\).*a float matrix"):
        quantize_rows(torch.ones(4))
    with pytest.raises(EdgegtError, match="a trained tensor holds NaN or infinity"):
        refresh_planes(split_planes(torch.ones(4, 4)), w)


class WrongBackend(TorchBackend):
    """Runs, and is wrong by one percent."""

    name = "wrong"

    def product(self, q: Tensor, scale: Tensor, weight_q: Tensor, weight_scale: Tensor) -> Tensor:
        return super().product(q, scale, weight_q, weight_scale) * 1.01


class BrokenBackend(TorchBackend):
    """Imports, and fails when a kernel runs."""

    name = "broken"

    def product_back(self, q: Tensor, scale: Tensor, weight_q: Tensor) -> Tensor:
        raise RuntimeError("no kernel image is available for execution on the device\nmore")


def absent() -> Backend:
    raise ModuleNotFoundError("No module named 'absent'")


def test_checks_tell_what_works() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    found = {item.name: item for item in check_backends("cpu")}
    assert torch.equal(torch.get_rng_state(), state)
    assert list(found) == list(BACKENDS)
    torch_check = found["torch"]
    assert torch_check.ok and torch_check.gflops is not None and torch_check.gflops > 0
    assert torch_check.relative_error is not None and torch_check.relative_error < 1e-5


def test_a_backend_that_fails_or_disagrees_is_left_out_with_the_reason(tmp_path: Path) -> None:
    makers = {"absent": absent, "broken": BrokenBackend, "wrong": WrongBackend, "torch": TorchBackend}
    results = check(makers, torch.device("cpu"))
    assert [item.ok for item in results] == [False, False, False, True]
    choice = choose(makers, torch.device("cpu"), tmp_path)
    assert choice.backend.name in ("torch", "reference")
    assert choice.lines[:3] == (
        "int8 backend 'absent' left out: ModuleNotFoundError: No module named 'absent'",
        "int8 backend 'broken' left out: RuntimeError: no kernel image is available for execution on the device",
        "int8 backend 'wrong' left out: its results are off by 1.0e-02 (allowed 1e-03)",
    )


def test_without_any_kernel_the_float_reference_runs_and_it_is_said(tmp_path: Path) -> None:
    choice = choose({"broken": BrokenBackend}, torch.device("cpu"), tmp_path)
    assert choice.backend.name == "reference"
    assert choice.lines[-1].startswith("no int8 kernel beats float32 on this machine")


def test_the_choice_is_stored_read_and_made_anew_when_the_file_is_corrupt(tmp_path: Path) -> None:
    calls: list[str] = []

    def counted() -> Backend:
        calls.append("made")
        return TorchBackend()

    cache = tmp_path / "new" / "cache"
    first = choose({"torch": counted}, torch.device("cpu"), cache)
    made = len(calls)
    stored = (cache / FILE_NAME).read_text()
    second = choose({"torch": counted}, torch.device("cpu"), cache)
    assert (second.backend.name, second.lines, second.note) == (first.backend.name, first.lines, first.note)
    assert len(calls) - made <= 1, "the second time nothing is measured"
    (cache / FILE_NAME).write_text(stored[:40])
    third = choose({"torch": counted}, torch.device("cpu"), cache)
    assert "cannot be read" in third.lines[0] and "chosen anew" in third.lines[0]
    assert json.loads((cache / FILE_NAME).read_text())["choices"]
    assert [path.name for path in cache.iterdir()] == [FILE_NAME], "no temporary file stays behind"


@pytest.mark.parametrize("content", ["[]", '{"format": 3, "choices": 3}', "\x00", '{"choices": {}}'])
def test_any_content_of_the_choice_file_is_survived(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE_NAME).write_text(content)
    choice = choose({"torch": TorchBackend}, torch.device("cpu"), tmp_path)
    assert "cannot be read" in choice.lines[0]
    assert not choose({"torch": TorchBackend}, torch.device("cpu"), tmp_path).lines[1:]


def test_a_stored_backend_that_no_longer_loads_is_replaced(tmp_path: Path) -> None:
    choose({"torch": TorchBackend}, torch.device("cpu"), tmp_path)
    path = tmp_path / FILE_NAME
    content = json.loads(path.read_text())
    for entry in content["choices"].values():
        entry["backend"] = "absent"
    path.write_text(json.dumps(content))
    choice = choose({"absent": absent, "torch": TorchBackend}, torch.device("cpu"), tmp_path)
    assert "no longer loads (ModuleNotFoundError" in choice.lines[0]
    assert choice.backend.name in ("torch", "reference")


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    choice = choose_backend("cpu", tmp_path / "file")
    assert any("cannot be written" in line for line in choice.lines)
