"""AdamW by name: equal to torch's in float, close to it in 8 bits, states that survive a file; schedules, clipping."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgegt.errors import EdgegtError
from edgegt.memory import SMALL_TENSOR
from edgegt.optimizer import AdamW, Moments, clip, clip_together, eight_bit_works, schedule

CPU = torch.device("cpu")
needs_8bit = pytest.mark.skipif(eight_bit_works(CPU) is not None, reason="bitsandbytes' 8-bit AdamW does not run here")


def gradients(shape: tuple[int, ...], count: int, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * 10 ** (step % 3 - 1) for step in range(count)]


def trained(optimizer: AdamW, shape: tuple[int, ...], steps: int, lr: float = 1e-2) -> torch.Tensor:
    parameter = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for gradient in gradients(shape, steps):
        optimizer.update("w", parameter, gradient, lr)
    return parameter


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(3,), (40, 130)])
def test_ten_float_steps_are_torchs(shape: tuple[int, ...], weight_decay: float) -> None:
    reference = torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    theirs = torch.optim.AdamW([reference], lr=1e-2, weight_decay=weight_decay)
    for gradient in gradients(shape, 10):
        reference.grad = gradient.clone()
        theirs.step()
    ours = trained(AdamW(False, weight_decay), shape, 10)
    torch.testing.assert_close(ours, reference.detach(), rtol=1e-6, atol=1e-6)


@needs_8bit
@pytest.mark.parametrize("shape", [(64, 64), (300, 301), (70_001,)])
def test_8_bit_steps_are_close_to_float_steps(shape: tuple[int, ...]) -> None:
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    optimizer = AdamW(True, 0.01)
    ours, theirs = trained(optimizer, shape, 10), trained(AdamW(False, 0.01), shape, 10)
    assert optimizer.states["w"].first.dtype == torch.uint8
    assert float((ours - theirs).norm() / (theirs - start).norm()) < 0.1
    assert bool(torch.isfinite(ours).all())


@needs_8bit
def test_8_bit_states_take_two_bytes_per_element_and_small_tensors_stay_float() -> None:
    optimizer = AdamW(True)
    for name, count in (("large", 16 * SMALL_TENSOR), ("small", SMALL_TENSOR - 1)):
        optimizer.update(name, torch.zeros(count), torch.ones(count), 1e-3)
    large = optimizer.states["large"].tensors()
    assert sum(t.nbytes for key, t in large.items() if key != "step") == (2 + 8 / 256) * 16 * SMALL_TENSOR
    assert optimizer.states["small"].first.dtype == torch.float32
    assert optimizer.states["small"].absmax1 is None


@pytest.mark.parametrize("eight_bit", [False, pytest.param(True, marks=needs_8bit)])
def test_states_survive_a_file_bit_for_bit(eight_bit: bool, tmp_path: Path) -> None:
    shape = (90, 91)
    straight = AdamW(eight_bit)
    there = trained(straight, shape, 3)
    save_file(straight.states["w"].tensors(), str(tmp_path / "state.safetensors"))
    again = AdamW(eight_bit)
    again.states["w"] = Moments.from_tensors(load_file(str(tmp_path / "state.safetensors")))
    assert again.states["w"].step == 3
    here = there.clone()
    for gradient in gradients(shape, 4, seed=5):
        straight.update("w", there, gradient.clone(), 1e-2)
        again.update("w", here, gradient.clone(), 1e-2)
    assert torch.equal(here, there)
    for key, value in straight.states["w"].tensors().items():
        assert torch.equal(value, again.states["w"].tensors()[key]), key


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
def test_a_gradient_that_is_not_finite_stops_the_run_before_anything_is_scaled(bad: float) -> None:
    whole, spoilt = torch.tensor([3.0, 4.0]), torch.tensor([1.0, bad])
    with pytest.raises(EdgegtError, match=r"^the gradient of h\.0\.w is not finite .*; lower --lr and run again$"):
        clip(spoilt, 1.0, "h.0.w")
    with pytest.raises(
        EdgegtError, match=r"^the gradient is not finite \(its norm is (nan|inf)\), nothing was updated"
    ):
        clip_together([whole, spoilt], 1.0)
    assert torch.equal(whole, torch.tensor([3.0, 4.0])) and float(spoilt[0]) == 1.0
