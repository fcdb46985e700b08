"""Seconds are a sum over choices, grow with every choice, and agree with the FLOPs they stand for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from edgegt.cost import BatchShape, Block, CostTable, Path, Totals, Weight, Work
from edgegt.profile import load_profile, profile_names, profiles_dir
from edgegt.quant import TorchBackend
from edgegt.rates import Rates, joules, of_profile, seconds_for_energy
from edgegt.speed import Speed, of_machine
from edgegt.speed import of_profile as of_profile_by_its_old_name

EVEN = Rates(1e9, 1e9, 1e9, 1e9, 1e9, 1e9, 1e9, 1e9, 1e6, dispatch_s=1e-3, update_s=1e-4)
SHAPES = (BatchShape(4, 32, 8), BatchShape(4, 48, 16))
TOTALS = Totals.of(SHAPES)
TABLE = CostTable(
    blocks=2,
    weights=(
        Weight("low", "linear", 0, (64, 32), 0, Work(token=4096)),
        Weight("norm", "vector", 1, (32,), -1, Work()),
        Weight("high", "linear", 1, (32, 64), 1, Work(token=4096)),
        Weight("head", "head", 2, (500, 32), 2, Work(kept=32000)),
    ),
    paths=(
        Path(0b0001, Work(token=4096, pair=128), Work(token=256), 0),
        Path(0b0111, Work(token=8192), Work(token=512), 1),
        Path(0b1111, Work(kept=32000), Work(kept=128)),
    ),
    layers=(
        Block(Work(token=8192, pair=256), Work(token=128), 0b0001),
        Block(Work(token=8192, pair=256), Work(token=128), 0b0111),
    ),
    forward=Work(token=16384, pair=512, kept=32000),
    head=Work(kept=32000),
    parameters=30_000,
    base_bytes=40_000,
    float_bytes=120_000,
)


@pytest.mark.parametrize("mask", [0b0000, 0b0001, 0b0100, 0b1010, 0b1111])
@pytest.mark.parametrize("again", [(), (1,), (0, 1)])
def test_a_run_is_the_sum_of_its_choices(mask: int, again: tuple[int, ...]) -> None:
    chosen = [weight for bit, weight in enumerate(TABLE.weights) if mask >> bit & 1]
    paths = [path for path in TABLE.paths if path.weights & mask]
    layers = [TABLE.layers[index] for index in again if TABLE.layers[index].weights & mask]
    expected = (
        EVEN.fixed_s(TABLE, TOTALS, 2, 4)
        + sum(EVEN.trained_s(weight, TOTALS, 2) for weight in chosen)
        + sum(EVEN.path_s(path, TOTALS) for path in paths)
        + sum(EVEN.layer_s(layer, TOTALS) for layer in layers)
    )
    assert EVEN.run_s(TABLE, mask, TOTALS, 2, 4, again) == pytest.approx(expected)


@pytest.mark.parametrize("mask", [0b0001, 0b0100, 0b1111])
def test_with_one_rate_the_products_take_the_seconds_of_their_flops(mask: int) -> None:
    endless = dict.fromkeys(("forward_bytes", "backward_bytes", "logits", "optimizer"), 1e30)
    only = replace(EVEN, **endless, dispatch_s=0, update_s=0)
    chosen = [weight for bit, weight in enumerate(TABLE.weights) if mask >> bit & 1]
    second_planes = sum(weight.dw.over(TOTALS) for weight in chosen)
    flops = TABLE.train_work(mask, (0, 1)).over(TOTALS) + second_planes
    assert only.run_s(TABLE, mask, TOTALS, 2, 2, (0, 1)) == pytest.approx(flops / 1e9)
    assert only.full_step_s(TABLE, SHAPES[0]) == pytest.approx(TABLE.full_work().at(SHAPES[0]) / 1e9)
    assert only.probe_s(TABLE, TOTALS) == pytest.approx(TABLE.probe_work().over(TOTALS) / 1e9)


def test_each_rate_counts_where_it_should() -> None:
    before = EVEN.run_s(TABLE, 0b1111, TOTALS, 2, 4, (0,))
    for name in vars(EVEN):
        slower = getattr(EVEN, name) * (2 if name.endswith("_s") else 0.5)
        after = replace(EVEN, **{name: slower}).run_s(TABLE, 0b1111, TOTALS, 2, 4, (0,))
        assert after > before or (name in ("float32", "optimizer_float32") and after == before), name


def test_more_is_never_faster() -> None:
    alone = EVEN.run_s(TABLE, 0b0100, TOTALS, 2, 2)
    assert EVEN.run_s(TABLE, 0b0101, TOTALS, 2, 2) > alone
    assert EVEN.run_s(TABLE, 0b0100, TOTALS, 2, 8) > alone
    assert EVEN.run_s(TABLE, 0b0100, TOTALS, 2, 2, (1,)) > alone
    assert EVEN.run_s(TABLE, 0b0100, TOTALS, 2, 2, (0,)) == alone, "a layer below the path is not recomputed"


def test_a_step_is_a_run_of_one_step() -> None:
    assert EVEN.step_s(TABLE, 0b0101, SHAPES[0], 2) == EVEN.run_s(TABLE, 0b0101, Totals.of(SHAPES[:1]), 1, 2)


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_has_rates_and_watts(name: str) -> None:
    profile = load_profile(profiles_dir() / f"{name}.toml")
    rates = of_profile(profile)
    assert all(value > 0 for value in vars(rates).values())
    assert rates.int8 == pytest.approx(0.3 * profile.rate("int8"))
    assert seconds_for_energy(profile, joules(profile, 90.0)) == pytest.approx(90.0)
    assert joules(profile, 2.0) == 2.0 * profile.power.watts


def test_rates_of_a_calibrated_profile_are_taken_as_reached() -> None:
    profile = load_profile(profiles_dir() / "laptop-x86-16gb.toml")
    reached = of_profile(replace(profile, calibrated=True, training_rates={"optimizer": 5e6, "dispatch_s": 1e-4}))
    assert (reached.int8, reached.float32) == (profile.rate("int8"), profile.rate("fp32"))
    assert (reached.optimizer, reached.dispatch_s) == (5e6, 1e-4)
    assert reached.forward_bytes > of_profile(profile).forward_bytes


def test_this_machine_has_positive_rates_and_its_random_state_stays() -> None:
    state = torch.random.get_rng_state()
    rates = of_machine(TorchBackend(), torch.device("cpu"), 64, 128, eight_bit=False, piece_s=0.005)
    assert all(value > 0 for value in vars(rates).values())
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(("width", "tokens"), [(1, 1), (48, 7), (5000, 3)])
def test_odd_sizes_can_be_measured(width: int, tokens: int) -> None:
    rates = of_machine(TorchBackend(), torch.device("cpu"), width, tokens, eight_bit=False, piece_s=1e-4)
    assert all(value > 0 for value in vars(rates).values())


def test_the_names_that_other_modules_use_stay() -> None:
    assert Speed is Rates and of_profile_by_its_old_name is of_profile
