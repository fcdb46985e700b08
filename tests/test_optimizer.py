"""AdamW by name: equal to torch's in float, close to it in 8 bits, states that survive a file; schedules, clipping."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgegt.cache import cache_dir
from edgegt.errors import NotFinite
from edgegt.memory import SMALL_TENSOR
from edgegt.native import Kernels, compiler_words, library
from edgegt.optimizer import AdamW, Moments, clip, clip_together, eight_bit_works, round_into, schedule

CPU = torch.device("cpu")
COMPILED = Kernels(library(cache_dir())) if compiler_words() else None
KERNELS = [
    pytest.param(
        None,
        id="bitsandbytes",
        marks=pytest.mark.skipif(eight_bit_works(CPU) is not None, reason="its 8-bit AdamW does not run here"),
    ),
    pytest.param(
        COMPILED, id="compiled", marks=pytest.mark.skipif(COMPILED is None, reason="no C compiler here"),
    ),
]  # fmt: skip
by_either = pytest.mark.parametrize("kernels", KERNELS)
EIGHT_BIT_OR_NOT = pytest.mark.parametrize(
    ("eight_bit", "kernels"),
    [pytest.param(False, None, id="float"), *(pytest.param(True, *p.values, id=p.id, marks=p.marks) for p in KERNELS)],
)


def gradients(shape: tuple[int, ...], count: int, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * 10 ** (step % 3 - 1) for step in range(count)]


def trained(optimizer: AdamW, shape: tuple[int, ...], steps: int, lr: float = 1e-2) -> torch.Tensor:
    parameter = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for gradient in gradients(shape, steps):
        optimizer.update("w", parameter, gradient, lr)
    return parameter


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(3,), (40, 130), (3, 70_001)])
def test_ten_float_steps_are_torchs(shape: tuple[int, ...], weight_decay: float) -> None:
    reference = torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    theirs = torch.optim.AdamW([reference], lr=1e-2, weight_decay=weight_decay)
    for gradient in gradients(shape, 10):
        reference.grad = gradient.clone()
        theirs.step()
    ours = trained(AdamW(False, weight_decay), shape, 10)
    torch.testing.assert_close(ours, reference.detach(), rtol=1e-6, atol=1e-6)


@by_either
@pytest.mark.parametrize("shape", [(64, 64), (300, 301), (70_001,)])
def test_8_bit_steps_are_close_to_float_steps(shape: tuple[int, ...], kernels: Kernels | None) -> None:
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    optimizer = AdamW(True, 0.01, kernels=kernels)
    ours, theirs = trained(optimizer, shape, 10), trained(AdamW(False, 0.01), shape, 10)
    assert optimizer.states["w"].first.dtype == torch.uint8
    assert float((ours - theirs).norm() / (theirs - start).norm()) < 0.1
    assert bool(torch.isfinite(ours).all())


@by_either
def test_8_bit_states_take_two_bytes_per_element_and_small_tensors_stay_float(kernels: Kernels | None) -> None:
    optimizer = AdamW(True, kernels=kernels)
    for name, count in (("large", 16 * SMALL_TENSOR), ("small", SMALL_TENSOR - 1)):
        optimizer.update(name, torch.zeros(count), torch.ones(count), 1e-3)
    large = optimizer.states["large"].tensors()
    assert sum(t.nbytes for key, t in large.items() if key != "step") == (2 + 8 / 256) * 16 * SMALL_TENSOR
    assert optimizer.states["small"].first.dtype == torch.float32
    assert optimizer.states["small"].absmax1 is None


@EIGHT_BIT_OR_NOT
def test_states_survive_a_file_bit_for_bit(eight_bit: bool, kernels: Kernels | None, tmp_path: Path) -> None:
    shape = (90, 91)
    straight = AdamW(eight_bit, kernels=kernels)
    there = trained(straight, shape, 3)
    save_file(straight.states["w"].tensors(), str(tmp_path / "state.safetensors"))
    again = AdamW(eight_bit, kernels=kernels)
    again.states["w"] = Moments.from_tensors(load_file(str(tmp_path / "state.safetensors")))
    assert again.states["w"].step == 3
    here = there.clone()
    for gradient in gradients(shape, 4, seed=5):
        straight.update("w", there, gradient.clone(), 1e-2)
        again.update("w", here, gradient.clone(), 1e-2)
    assert torch.equal(here, there)
    for key, value in straight.states["w"].tensors().items():
        assert torch.equal(value, again.states["w"].tensors()[key]), key


def after_heavy_tails(optimizer: AdamW, count: int = 8192) -> torch.Tensor:
    """The weights after 300 steps of gradients whose sizes span orders of magnitude and fall tenfold at the end."""
    draw = torch.Generator().manual_seed(0)
    scale = torch.exp(2 * torch.randn(count, generator=draw))
    mean, weights = 0.3 * scale * torch.randn(count, generator=draw).sign(), torch.zeros(count)
    for step in range(300):
        gradient = mean + scale * torch.randn(count, generator=draw)
        optimizer.update("w", weights, gradient * (1 if step < 200 else 0.1), 1e-3)
    return weights


@pytest.mark.skipif(COMPILED is None, reason="no C compiler here")
def test_compiled_8_bit_weights_stay_near_float_ones_over_many_steps() -> None:
    expected, found = after_heavy_tails(AdamW(False)), after_heavy_tails(AdamW(True, kernels=COMPILED))
    assert float((found - expected).norm() / expected.norm()) < 0.2
    assert torch.equal(after_heavy_tails(AdamW(True, kernels=COMPILED)), found)
    other = after_heavy_tails(AdamW(True, seed=1, kernels=COMPILED))
    assert not torch.equal(other, found) and float((other - expected).norm() / expected.norm()) < 0.2


@pytest.mark.skipif(COMPILED is None, reason="no C compiler here")
def test_compiled_8_bit_steps_stand_extremes() -> None:
    gradient = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-44, 15, 5000)
    gradient[::7] = 0
    optimizer, weights = AdamW(True, kernels=COMPILED), torch.zeros(5000)
    for sign in (1, 0, -1, 1):
        optimizer.update("w", weights, sign * gradient, 1e-3)
    assert bool(torch.isfinite(weights).all()) and bool((weights[::7] == 0).all())
    assert float(weights.abs().max()) < 4 * 1e-2


def test_random_rounding_gives_a_neighbour_and_the_mean_is_the_value() -> None:
    values = torch.tensor([1.0, -1.0, 1 + 2**-9, -1 - 2**-9, 3.14159, 1e-30, -2.5e20, 0.0, 1e-40])
    draws, draw = 100_000, torch.Generator().manual_seed(0)
    rounded = torch.empty(len(values), draws, dtype=torch.bfloat16)
    round_into(rounded.view(-1), values[:, None].repeat(1, draws).view(-1), draw)
    down = (values.view(torch.int32) >> 16 << 16).view(torch.float32)
    up = ((values.view(torch.int32) >> 16) + 1 << 16).view(torch.float32)
    exact = values == down
    found = rounded.float()
    assert bool(((found == down[:, None]) | (found == up[:, None]) & ~exact[:, None]).all())
    bit = (up - down).abs()
    error = (found.double().mean(1) - values.double()).abs()
    assert bool((error <= 5 * bit.double() / 2 / math.sqrt(draws)).all()), "five standard deviations at most"


@EIGHT_BIT_OR_NOT
def test_a_bfloat16_tensor_keeps_updates_far_below_its_last_bit(eight_bit: bool, kernels: Kernels | None) -> None:
    # At 1.5 the last bit is 2**-7 and an update of 1e-4 is a 78th of it: rounding to nearest would never move.
    parameter = torch.full((300, 300), 1.5, dtype=torch.bfloat16)
    optimizer = AdamW(eight_bit, kernels=kernels)
    for _ in range(20):
        optimizer.update("w", parameter, torch.ones(300, 300), 1e-4)
    assert float(parameter.double().mean()) == pytest.approx(1.5 - 20e-4, rel=0, abs=1e-4)
    assert optimizer.states["w"].first.dtype == (torch.uint8 if eight_bit else torch.float32)


@EIGHT_BIT_OR_NOT
def test_bfloat16_steps_are_float_steps_but_for_the_rounding(eight_bit: bool, kernels: Kernels | None) -> None:
    start = torch.randn(300, 301, generator=torch.Generator().manual_seed(0)).bfloat16()
    ends = []
    for parameter in (start.clone(), start.float()):
        optimizer = AdamW(eight_bit, 0.01, kernels=kernels)
        for gradient in gradients((300, 301), 10):
            optimizer.update("w", parameter, gradient, 1e-2)
        ends.append(parameter.float())
    # Each of ten roundings is off by less than one bit, 2**-7 of the value at most.
    assert bool(((ends[0] - ends[1]).abs() <= 10 * 2**-7 * (ends[1].abs() + 0.1)).all())
    assert float((ends[0] - ends[1]).mean().abs()) < 1e-4


def test_random_bits_depend_on_seed_name_and_step_alone(tmp_path: Path) -> None:
    def end(seed: int, name: str, others: bool = False, cut: bool = False) -> torch.Tensor:
        optimizer = AdamW(False, seed=seed)
        parameter, other = torch.ones(70_000, dtype=torch.bfloat16), torch.ones(9, dtype=torch.bfloat16)
        for step, gradient in enumerate(gradients((70_000,), 4)):
            if others:
                torch.rand(3)
                optimizer.update("other", other, torch.ones(9), 1e-3)
            if cut and step == 2:
                save_file(optimizer.states[name].tensors() | {"master": parameter}, str(tmp_path / "state"))
                saved = load_file(str(tmp_path / "state"))
                optimizer, parameter = AdamW(False, seed=seed), saved["master"].clone()
                optimizer.states[name] = Moments.from_tensors(saved)
            optimizer.update(name, parameter, gradient, 1e-3)
        return parameter

    state = torch.get_rng_state()
    reference = end(7, "w")
    assert torch.equal(torch.get_rng_state(), state), "torch's own generator is left alone"
    assert torch.equal(end(7, "w", others=True), reference)
    assert torch.equal(end(7, "w", cut=True), reference)
    assert not torch.equal(end(8, "w"), reference)
    assert not torch.equal(end(7, "v"), reference)


def test_every_tensor_counts_its_own_steps() -> None:
    optimizer = AdamW(False)
    first, late = torch.zeros(4), torch.zeros(4)
    for _ in range(5):
        optimizer.update("first", first, torch.ones(4), 1e-2)
    optimizer.update("late", late, torch.ones(4), 1e-2)
    assert [optimizer.states[name].step for name in ("first", "late")] == [5, 1]
    # AdamW's first step is lr * sign(gradient), whenever it comes
    torch.testing.assert_close(late, torch.full((4,), -1e-2), rtol=1e-4, atol=0)


def test_a_zero_learning_rate_moves_nothing() -> None:
    parameter = torch.ones(5)
    AdamW(False, 0.5).update("w", parameter, torch.ones(5), 0.0)
    assert torch.equal(parameter, torch.ones(5))


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_the_learning_rate_warms_up_and_never_exceeds_its_peak(kind: str) -> None:
    rates = [schedule(kind, 2.0, step, 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert max(rates) == rates[9] == pytest.approx(2.0)
    assert all(rate > 0 for rate in rates)
    after = rates[10:]
    assert after == sorted(after, reverse=True)


def test_schedules_end_where_they_say() -> None:
    assert schedule("linear", 1.0, 99, 100, 0.0) == pytest.approx(0.01)
    assert schedule("linear", 1.0, 50, 100, 0.0) == pytest.approx(0.5)
    assert schedule("cosine", 1.0, 50, 100, 0.0) == pytest.approx(0.5)
    assert schedule("cosine", 1.0, 25, 100, 0.0) == pytest.approx(0.5 + math.sqrt(0.5) / 2)
    assert schedule("cosine", 1.0, 99, 100, 0.0) < 1e-3
    assert {schedule("constant", 3.0, step, 10, 0.0) for step in range(10)} == {3.0}
    assert schedule("linear", 1.0, 0, 1, 0.03) == 1.0


def test_clipping_scales_only_what_is_too_long() -> None:
    gradient = torch.tensor([3.0, 4.0])
    assert clip(gradient, 10.0) == pytest.approx(5.0)
    assert torch.equal(gradient, torch.tensor([3.0, 4.0]))
    assert clip(gradient, 1.0) == pytest.approx(5.0)
    torch.testing.assert_close(gradient, torch.tensor([0.6, 0.8]))


def test_joint_clipping_is_torchs() -> None:
    ours = [torch.randn(5, 3), torch.randn(7), torch.randn(2, 2)]
    theirs = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in ours]
    for parameter, gradient in zip(theirs, ours, strict=True):
        parameter.grad = gradient.clone()
    expected = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    assert clip_together(ours, 0.5) == pytest.approx(float(expected), rel=1e-5)
    for parameter, gradient in zip(theirs, ours, strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_told_before_anything_is_scaled(bad: float) -> None:
    whole, spoilt = torch.tensor([3.0, 4.0]), torch.tensor([1.0, bad])
    with pytest.raises(NotFinite, match=r"^the gradient of h\.0\.w is not finite \(its norm is (nan|inf)\)$"):
        clip(spoilt, 1.0, "h.0.w")
    with pytest.raises(NotFinite, match=r"^the gradient is not finite \(its norm is (nan|inf)\)$"):
        clip_together([whole, spoilt], 1.0)
    assert torch.equal(whole, torch.tensor([3.0, 4.0])) and float(spoilt[0]) == 1.0
