"""The memory guard: it steps back in time, lets ordinary runs alone, and does not repeat itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import pytest

from edgegt.guard import EVERY_S, LESS, RESERVE_BYTES, MemoryGuard, StepBack
from edgegt.units import GIB, MIB
from edgegt.watch import MemoryWatch, peak_resident_bytes, resident_bytes


@dataclass
class World:
    """A process that holds `held` bytes, with a peak, on a machine with `left` bytes beside them."""

    held: int = 500 * MIB
    top: int = 600 * MIB
    left: int = 8 * GIB
    now: float = 0.0
    restarts: int = 0

    def restart_peak(self) -> None:
        self.restarts += 1
        self.top = self.held


def guarded(world: World, budget: int = GIB) -> MemoryGuard:
    class Watch:
        now = staticmethod(lambda: world.held)
        peak = staticmethod(lambda: world.top)
        restart_peak = staticmethod(world.restart_peak)

    return MemoryGuard(cast(MemoryWatch, Watch()), budget, lambda: world.left, lambda: world.now)


def test_with_enough_memory_nothing_happens() -> None:
    world = World(left=300 * MIB + RESERVE_BYTES)
    guarded(world).check(800 * MIB)


def test_too_little_for_what_the_plan_still_asks_for_is_a_step_back_to_what_is_left() -> None:
    world = World(left=300 * MIB + RESERVE_BYTES - 1)
    with pytest.raises(StepBack, match=r"the machine has 348\.0 MiB of memory left, and the plan asks for 300") as back:
        guarded(world).check(800 * MIB)
    assert back.value.budget_bytes == 800 * MIB - 1
    assert (back.value.torn, back.value.guess, back.value.must) == (False, False, True)


def test_the_budget_never_grows() -> None:
    world = World(left=100 * MIB)
    with pytest.raises(StepBack) as back:
        guarded(world, 520 * MIB).check(700 * MIB)
    assert back.value.budget_bytes == 520 * MIB


def test_the_machine_is_asked_a_few_times_a_second_at_most() -> None:
    world = World()
    guard = guarded(world)
    guard.check(800 * MIB)
    world.left = 0
    guard.check(800 * MIB)
    world.now += EVERY_S
    with pytest.raises(StepBack):
        guard.check(800 * MIB)


def test_a_peak_above_the_budget_is_taken_off_the_next_plan_once() -> None:
    world = World(top=1000 * MIB)
    guard = guarded(world, 980 * MIB)
    with pytest.raises(StepBack, match=r"used 1000\.0 MiB, which is 20\.0 MiB above its budget") as back:
        guard.check(800 * MIB)
    assert (back.value.budget_bytes, back.value.guess, back.value.must) == (780 * MIB, True, False)
    world.now += 1
    guard.check(800 * MIB)
    world.now, world.top = world.now + 1, 1010 * MIB
    with pytest.raises(StepBack, match=r"10\.0 MiB above"):
        guard.check(800 * MIB)


def test_after_a_step_back_the_peak_counts_anew() -> None:
    world = World(top=1000 * MIB, held=700 * MIB)
    guard = guarded(world, 1100 * MIB)
    guard.lower(900 * MIB)
    assert world.restarts == 1
    guard.check(800 * MIB)
    world.now, world.top = 1.0, 901 * MIB
    with pytest.raises(StepBack, match="above its budget"):
        guard.check(800 * MIB)


def test_an_allocation_that_failed_leaves_less_of_what_was_to_be_added() -> None:
    world = World(held=500 * MIB)
    back = guarded(world).failed("no memory", 700 * MIB, torn=True)
    assert back.budget_bytes == 500 * MIB + int(LESS * 200 * MIB)
    assert (back.torn, back.guess, back.must) == (True, True, True)
    world.left = 60 * MIB
    assert guarded(world).failed("no memory", 700 * MIB, torn=False).budget_bytes == 560 * MIB - RESERVE_BYTES


def test_a_peak_can_be_measured_anew() -> None:
    watch = MemoryWatch(gpu=False)
    block = bytearray(64 * MIB)
    block[::4096] = b"x" * len(block[::4096])
    before = peak_resident_bytes()
    del block
    watch.restart_peak()
    assert watch.peak_ever() >= before - MIB  # the kernel counts in batches
    if watch.peak() < before - 32 * MIB:  # where the system forgets on demand
        assert watch.peak() >= resident_bytes() - 8 * MIB
    assert watch.available() > 0


@pytest.mark.gpu
def test_cuda_refuses_more_than_the_budget() -> None:
    import torch

    watch = MemoryWatch(gpu=True)
    torch.cuda.init()
    watch.hold(GIB)
    try:
        with pytest.raises(torch.cuda.OutOfMemoryError):
            torch.empty(2 * GIB, dtype=torch.uint8, device="cuda")
        assert torch.empty(256 * MIB, dtype=torch.uint8, device="cuda").numel() == 256 * MIB
        assert 0 < watch.available() <= torch.cuda.get_device_properties(0).total_memory
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
