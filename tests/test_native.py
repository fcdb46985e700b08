"""The compiled kernels against float64 and torch, the same bits with one thread and two; and how they are compiled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from edgegt.cache import cache_dir
from edgegt.errors import EdgegtError
from edgegt.native import Kernels, build, compiler_words
from edgegt.quant import BACKENDS, choose_backend, quantize_rows, split_planes
from edgegt.quant.backend import quantize_columns, quantize_tokens

SHAPES = [(1, 1), (3, 5), (33, 67), (257, 300), (1024, 577)]
EMPTY = [(0, 8), (8, 0), (0, 0)]
BAD = [float("nan"), float("inf"), -float("inf")]
needs_compiler = pytest.mark.skipif(not compiler_words(), reason="no C compiler here")


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    if not compiler_words():
        pytest.skip("no C compiler here")
    return Kernels(build.library(cache_dir()))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(found: Tensor, expected: Tensor, tolerance: float = 2e-6) -> bool:
    """Within `tolerance` of the largest, float64."""
    largest = expected.abs().max().clamp_min(1e-30) if expected.numel() else 1.0
    return found.shape == expected.shape and bool(((found.double() - expected).abs() <= tolerance * largest).all())


@pytest.mark.parametrize("evenly", [False, True])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, *EMPTY])
def test_rows_are_quantised_as_by_torch(kernels: Kernels, shape: tuple[int, int], columns: bool, evenly: bool) -> None:
    x, factor = drawn(*shape), drawn(2 * shape[1], seed=1)[::2] if columns else None
    q, scale = kernels.quantize_rows(x, factor, evenly)
    assert q.shape == shape and scale.shape == shape[:1]
    if 0 in shape:
        return
    expected = quantize_tokens(x, factor, evenly)
    torch.testing.assert_close(scale, expected[1], rtol=1e-6, atol=0)
    assert int((q.int() - expected[0].int()).abs().max()) <= 1
    assert float((q != expected[0]).float().mean()) <= 1e-3
    if not columns:
        assert torch.equal(kernels.quantize_rows(x.t().contiguous().t(), evenly=evenly)[0], q)


@pytest.mark.parametrize("shape", [*SHAPES, *EMPTY])
def test_columns_are_quantised_as_by_torch(kernels: Kernels, shape: tuple[int, int]) -> None:
    x, tokens = drawn(*shape), drawn(shape[0], seed=1)
    q, scale = kernels.quantize_columns(x, tokens)
    assert q.shape == shape and scale.shape == shape[1:]
    if 0 in shape:
        return
    expected = quantize_columns(x, tokens)
    torch.testing.assert_close(scale, expected[1], rtol=1e-6, atol=0)
    assert int((q.int() - expected[0].int()).abs().max()) <= 1
    assert float((q != expected[0]).float().mean()) <= 1e-3
    meant = x.double() * tokens.double()[:, None]
    assert bool(((q * scale.double() - meant).abs() <= 1.001 * scale).all())


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_far_below_a_step_is_not_lost_from_a_sum(kernels: Kernels, compiled: bool) -> None:
    x = (0.05 + 0.02 * drawn(20_000, 7)).mul_(1 / 127)
    x[123] = 1
    expected = x.double().sum(0)
    nearest = (x * 127).round().double().sum(0) / 127
    assert bool(((nearest - expected).abs() > 0.5 * expected).all()), "rounding to nearest loses nearly all of it"
    q, scale = (kernels.quantize_columns if compiled else quantize_columns)(x, torch.ones(20_000))
    assert bool(((q.double().sum(0) * scale - expected).abs() < 0.03 * expected).all())
    q, scale = (kernels.quantize_rows if compiled else quantize_tokens)(x.t(), None, True)
    assert bool(((q.double().sum(1) * scale - expected).abs() < 0.03 * expected).all())


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, *EMPTY])
def test_products_are_scaled_in_their_own_memory(kernels: Kernels, shape: tuple[int, int], low: bool) -> None:
    high, more = ((drawn(*shape, seed=seed) * 1e5).int() for seed in (0, 1))
    rows, columns, bias = drawn(shape[0], seed=2), drawn(shape[1], seed=3), drawn(shape[1], seed=4)
    wide = high.double() + (more.double() / 254 if low else 0)
    y = kernels.scale_product(high.clone(), more if low else None, rows, columns, bias)
    assert close(y, rows.double()[:, None] * wide * columns.double() + bias.double())
    alone = kernels.scale_product(high, None, rows, None, None)
    assert alone.data_ptr() == high.data_ptr() and alone.dtype == torch.float32
    if not low:
        assert close(alone, rows.double()[:, None] * wide)


@pytest.mark.parametrize("shape", SHAPES)
def test_planes_are_those_of_torch_bit_for_bit(kernels: Kernels, shape: tuple[int, int]) -> None:
    w = drawn(*shape) * torch.logspace(-40, 30, shape[0])[:, None]
    expected, planes = split_planes(w), split_planes(torch.ones(shape))
    assert planes.low is not None and expected.low is not None
    assert kernels.split_planes(w, planes.q, planes.low, planes.scale)
    assert torch.equal(planes.q, expected.q) and torch.equal(planes.low, expected.low)
    assert torch.equal(planes.scale, expected.scale) and torch.equal(planes.q, quantize_rows(w).q)


@pytest.mark.parametrize("bad", BAD)
def test_what_is_not_finite_ends_in_the_scale(kernels: Kernels, bad: float) -> None:
    x, ones = drawn(33, 67), torch.ones(33)
    x[5, 60] = bad
    q, rows = kernels.quantize_rows(x)
    assert (~torch.isfinite(rows)).nonzero().flatten().tolist() == [5]
    q, columns = kernels.quantize_columns(x, ones)
    assert (~torch.isfinite(columns)).nonzero().flatten().tolist() == [60] and int(q.int().abs().max()) <= 127
    planes = split_planes(torch.ones(33, 67))
    assert planes.low is not None
    assert not kernels.split_planes(x, planes.q, planes.low, planes.scale)
    assert not bool(torch.isfinite(kernels.silu_mul(x, torch.ones_like(x))).all()) or bad == float("inf")
    assert not bool(torch.isfinite(kernels.rms_norm(x, torch.ones(67), 0.0, 1e-6)[0][5]).all())


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (33, 67), (2, 50, 577)])
def test_norms_and_their_gradients(kernels: Kernels, shape: tuple[int, ...], offset: float) -> None:
    x, weight, dy = drawn(*shape), drawn(shape[-1], seed=1), drawn(*shape, seed=2)
    wide = x.double().requires_grad_()
    expected = torch.nn.functional.rms_norm(wide, shape[-1:], weight.double() + offset, 0.1)
    expected.backward(dy.double())
    y, rstd = kernels.rms_norm(x, weight, offset, 0.1)
    assert close(y, expected.detach()) and close(rstd, (wide.detach().square().mean(-1) + 0.1).rsqrt().flatten())
    assert wide.grad is not None
    assert close(kernels.rms_norm_back(dy, x, weight, offset, rstd), wide.grad, 1e-5)


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (33, 67), (2, 50, 577)])
def test_gates_and_their_gradients(kernels: Kernels, shape: tuple[int, ...]) -> None:
    values = [drawn(*shape, seed=seed) * 3 for seed in range(3)]
    gate, up, dy = (value.double().requires_grad_() for value in values)
    expected = torch.nn.functional.silu(gate) * up
    expected.backward(dy.detach())
    assert close(kernels.silu_mul(*values[:2]), expected.detach())
    found = kernels.silu_mul_back(values[2], *values[:2])
    assert gate.grad is not None and up.grad is not None
    assert close(found[0], gate.grad) and close(found[1], up.grad)


def test_the_sigmoid_keeps_its_digits_far_from_zero(kernels: Kernels) -> None:
    gate = torch.linspace(-100, 100, 20_001)
    expected = gate.double() * torch.sigmoid(gate.double())
    error = (kernels.silu_mul(gate, torch.ones_like(gate)) - expected).abs()
    assert bool((error <= 1e-5 * expected.abs() + 1e-35).all())


def turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.double().chunk(2, -1)
    return x * cosine.double()[:, None] + torch.cat((-second, first), -1) * sine.double()[:, None]


@pytest.mark.parametrize("layout", ["heads first", "tokens first", "cut", "expanded"])
@pytest.mark.parametrize("angles", ["one", "each"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (3, 2, 1, 6), (2, 3, 5, 8), (5, 4, 33, 70)])
def test_rotations_and_their_transpose(
    kernels: Kernels, shape: tuple[int, int, int, int], angles: str, layout: str
) -> None:
    rows, heads, tokens, size = shape
    made = {
        "heads first": drawn(*shape),
        "tokens first": drawn(rows, tokens, heads, size).transpose(1, 2),
        "cut": drawn(rows, tokens, heads, 3 * size)[..., size : 2 * size].transpose(1, 2),
        "expanded": torch.full((), 1.5).expand(shape),
    }
    x, other = made[layout], drawn(*shape, seed=1)
    each = rows if angles == "each" else 1
    cosine, sine = (drawn(size, tokens, each, seed=seed).transpose(0, 2) for seed in (2, 3))  # not contiguous
    y = kernels.rotate(x, cosine, sine)
    assert close(y, turned(x, cosine, sine))
    back = kernels.rotate(other.transpose(2, 3).contiguous().transpose(2, 3), cosine, sine, back=True)
    assert float((y.double() * other).sum()) == pytest.approx(float((x * back.double()).sum()), rel=1e-5, abs=1e-4)


def test_results_do_not_depend_on_threads(kernels: Kernels) -> None:
    x, weight, token, dy = drawn(301, 577), drawn(577, seed=1), drawn(301, seed=2), drawn(301, 577, seed=3)
    heads, angles = drawn(3, 4, 50, 64).transpose(1, 2), drawn(1, 4, 64)

    def everything() -> list[Tensor]:
        planes = split_planes(torch.ones(301, 577))
        assert planes.low is not None
        kernels.split_planes(x, planes.q, planes.low, planes.scale)
        y, rstd = kernels.rms_norm(x, weight, 1.0, 1e-6)
        n = 80_000
        adam = [weight.repeat(n // 577 + 1)[:n].clone(), x.reshape(-1)[:n].clone(), *torch.zeros(2, n).byte()]
        largest = torch.zeros(-(-n // 256)), torch.zeros(-(-n // 256))
        for step in range(3):
            kernels.adamw_8bit(*adam, largest, (1e-3, 0.9, 0.999, 1e-8, 1e-5), 7 * step)
        product = (x * 1e4).int()
        return [
            *kernels.quantize_rows(x, weight, True), *kernels.quantize_columns(x, token), planes.q, planes.low,
            planes.scale, y, rstd, kernels.rms_norm_back(dy, x, weight, 1.0, rstd), kernels.silu_mul(x, dy),
            *adam, *largest,
            *kernels.silu_mul_back(dy, x, y), *(kernels.rotate(heads, angles, angles, back) for back in (False, True)),
            kernels.scale_product(product, product.clone(), token, weight, weight),
        ]  # fmt: skip

    one = everything()
    torch.set_num_threads(2)
    assert all(torch.equal(first, second) for first, second in zip(one, everything(), strict=True))


@pytest.fixture
def _no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.delenv("CC", raising=False)
    build.library.cache_clear()


@pytest.mark.usefixtures("_no_compiler")
def test_without_a_compiler_its_names_are_said(tmp_path: Path) -> None:
    with pytest.raises(EdgegtError, match=r"no C compiler was found \(cc, gcc, clang, or \$CC\)"):
        build.library(tmp_path)


@pytest.mark.usefixtures("_no_compiler")
def test_without_a_compiler_another_backend_is_used_and_it_is_said(tmp_path: Path) -> None:
    choice = choose_backend("cpu", tmp_path)
    assert choice.backend.name in {*BACKENDS, "reference"} - {"native"}
    lines = [line for line in choice.lines if "native" in line]
    assert len(lines) == 1 and lines[0].startswith("int8 backend 'native' left out: EdgegtError: no C compiler")


def test_a_compiler_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails = tmp_path / "broken-cc"
    fails.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "k.c:1: error: no luck" >&2\nexit 1\n')
    fails.chmod(0o755)
    for command, said in (("false", "'false' could not"), (str(fails), "could not compile kernels.c: .*no luck")):
        monkeypatch.setenv("CC", command)
        with pytest.raises(EdgegtError, match=said):
            build.library(tmp_path / "cache")
    assert list((tmp_path / "cache").rglob("*.so")) == []


@needs_compiler
def test_a_library_is_compiled_once_and_again_when_its_file_is_broken(tmp_path: Path) -> None:
    def made(cache: Path) -> Path:
        build.library.cache_clear()
        assert Kernels(build.library(cache)).quantize_rows(torch.ones(1, 3))[0].tolist() == [[127] * 3]
        (path,) = (cache / build.FOLDER).iterdir()
        return path

    path = made(tmp_path / "one")
    before = path.stat()
    assert made(tmp_path / "one").stat().st_mtime_ns == before.st_mtime_ns
    broken = tmp_path / "two" / build.FOLDER / path.name
    broken.parent.mkdir(parents=True)
    broken.write_bytes(path.read_bytes()[:10])
    assert made(tmp_path / "two") == broken and broken.stat().st_size == before.st_size


def integers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


@pytest.fixture
def products(kernels: Kernels) -> Kernels:
    if not kernels.products:
        pytest.skip("no dot product of int8 that is known on this processor")
    return kernels


# Below, at and above a tile, a panel, a strip, the depth of a block (1536) and the height of a task (512); single rows.
SIZES = [
    (1, 1, 1), (12, 32, 4), (13, 33, 5), (11, 31, 3), (70, 150, 90), (7, 40, 1536), (9, 65, 1537), (25, 20, 4000),
    (600, 34, 1600), (130, 700, 260), (0, 4, 4), (4, 0, 4), (4, 4, 0), (1, 37, 70), (1, 32, 64), (1, 601, 1539),
]  # fmt: skip


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products_are_the_exact_sums_times_their_scales(products: Kernels, size: tuple[int, int, int]) -> None:
    n, m, k = size
    a, b, low = integers(n, k), integers(m, k, seed=1), integers(m, k, seed=2)
    scale, columns = drawn(n, seed=3).abs(), drawn(m, seed=4).abs()
    high, rest = a.double() @ b.double().t(), a.double() @ low.double().t()
    expected = high * scale.double()[:, None]
    by_columns = columns.double()
    assert close(products.multiply(a, scale, b, columns), expected * by_columns)
    both = (high + rest / 254) * scale.double()[:, None] * by_columns
    assert close(products.multiply(a, scale, b, columns, low), both)
    assert close(products.multiply_back(a, scale, b.t().contiguous()), expected)
    assert close(products.multiply_turned(a.t().contiguous(), scale, b.t().contiguous()), expected)
    before = drawn(n, m, seed=5)
    after = products.multiply_turned(a.t().contiguous(), scale, b.t().contiguous(), before.clone())
    assert close(after, expected + before.double())


@pytest.mark.parametrize("size", [(70, 150, 90), (600, 34, 1600), (1024, 576, 64), (1, 601, 1539)], ids=str)
def test_products_have_the_same_bits_on_every_number_of_threads(products: Kernels, size: tuple[int, int, int]) -> None:
    n, m, k = size
    a, b, low = integers(n, k), integers(m, k, seed=1), integers(m, k, seed=2)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            y = products.multiply(a, drawn(n), b, drawn(m), low)
            dx = products.multiply_back(a, drawn(n), b.t().contiguous())
            found.append((y, dx, products.multiply_turned(a.t().contiguous(), drawn(n), b.t().contiguous())))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for others in found[1:] for x, y in zip(found[0], others, strict=True))


def test_products_of_the_largest_integers_do_not_overflow(products: Kernels) -> None:
    a, b = torch.full((3, 70_000), -127, dtype=torch.int8), torch.full((5, 70_000), 127, dtype=torch.int8)
    for rows in (3, 1):
        y = products.multiply(a[:rows], torch.ones(rows), b, torch.ones(5))
        assert torch.equal(y, torch.full((rows, 5), -127.0 * 127 * 70_000))
        both = products.multiply(a[:rows], torch.ones(rows), b, torch.ones(5), b)
        assert close(both, torch.full((rows, 5), -127.0 * 127 * 70_000 * (1 + 1 / 254), dtype=torch.float64))


def test_a_single_row_has_the_bits_that_it_has_among_others(products: Kernels) -> None:
    a, b, low = integers(5, 1100), integers(333, 1100, seed=1), integers(333, 1100, seed=2)
    scale, columns = drawn(5, seed=3), drawn(333, seed=4)
    for more in (None, low):
        together = products.multiply(a, scale, b, columns, more)
        alone = [products.multiply(a[row : row + 1], scale[row : row + 1], b, columns, more) for row in range(5)]
        assert torch.equal(torch.cat(alone), together)


@pytest.mark.parametrize("shape", [(3, 5), (257, 300)])
def test_bfloat16_masters_have_the_planes_of_their_float32_values(kernels: Kernels, shape: tuple[int, int]) -> None:
    master = drawn(*shape).to(torch.bfloat16)
    expected = split_planes(master)
    found = [torch.empty(shape, dtype=torch.int8), torch.empty(shape, dtype=torch.int8)]
    scale = torch.empty(shape[0], dtype=torch.bfloat16)
    assert kernels.split_planes(master, *found, scale)
    assert torch.equal(scale, expected.scale) and torch.equal(found[0], expected.q)
    assert int((found[1].int() - expected.low.int()).abs().max()) <= 1


def test_a_bfloat16_tensor_is_updated_as_a_float32_one_and_rounded_without_bias(kernels: Kernels) -> None:
    n, rates = 1 << 16, (1e-3, 0.9, 0.999, 1e-8, 0.0)
    start, gradient = torch.full((n,), 1.0), drawn(n).sign()
    states = [[torch.zeros(n, dtype=torch.uint8), torch.zeros(n, dtype=torch.uint8)] for _ in range(2)]
    largest = [(torch.zeros(n // 256), torch.zeros(n // 256)) for _ in range(2)]
    whole, half = start.clone(), start.to(torch.bfloat16)
    kernels.adamw_8bit(whole, gradient, *states[0], largest[0], rates, 7)
    kernels.adamw_8bit(half, gradient, *states[1], largest[1], rates, 7)
    assert torch.equal(states[0][0], states[1][0]) and torch.equal(states[0][1], states[1][1])
    # Every element is one of the two bfloat16 beside its value, and the mean over many is the value.
    step = torch.where(whole < 1, 2.0**-8, 2.0**-7)
    assert bool(((half.float() - whole).abs() < step).all())
    assert len(half.unique()) > 2
    for up in (True, False):
        mine = (whole > 1) == up
        spread = float(step[mine].mean() * 0.5 / mine.sum() ** 0.5)
        assert abs(float((half.float() - whole)[mine].mean())) < 5 * spread
