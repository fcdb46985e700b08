"""What a budget is compared with on a CPU, on a GPU and on shared memory; what is given back between phases."""

from __future__ import annotations

import os

import psutil
import pytest
import torch

from edgegt.host import usable_cores
from edgegt.process import trim
from edgegt.watch import MemoryWatch, peak_resident_bytes, resident_bytes

GIB = 2**30


class FakeCuda:
    """CUDA with 3 GiB reserved now, 5 GiB at the peak, and a count of emptied caches."""

    def __init__(self, initialized: bool = True) -> None:
        self.initialized, self.emptied = initialized, 0

    def memory_reserved(self) -> int:
        return 3 * GIB

    def max_memory_reserved(self) -> int:
        return 5 * GIB

    def is_initialized(self) -> bool:
        return self.initialized

    def empty_cache(self) -> None:
        self.emptied += 1


@pytest.mark.parametrize("unified", [False, True])
def test_a_run_on_the_cpu_is_its_resident_memory(unified: bool) -> None:
    watch = MemoryWatch(gpu=False, unified=unified)
    assert abs(watch.now() - resident_bytes()) < GIB // 16
    assert 0 < watch.now() <= watch.peak() + GIB // 16
    assert abs(watch.peak() - peak_resident_bytes()) < GIB // 16


def test_a_gpu_with_memory_of_its_own_is_the_allocator_and_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "cuda", FakeCuda())
    watch = MemoryWatch(gpu=True, unified=False)
    assert 3 * GIB < watch.now() < 3.5 * GIB
    assert watch.peak() - watch.now() == 2 * GIB


def test_shared_memory_is_resident_and_reserved_memory_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "cuda", FakeCuda())
    watch = MemoryWatch(gpu=True, unified=True)
    assert abs(watch.now() - 3 * GIB - resident_bytes()) < GIB // 16
    assert abs(watch.peak() - 5 * GIB - peak_resident_bytes()) < GIB // 16


@pytest.mark.parametrize("initialized", [False, True])
def test_trimming_empties_cudas_cache_only_where_cuda_runs(initialized: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(initialized)
    monkeypatch.setattr(torch, "cuda", cuda)
    trim()
    assert cuda.emptied == int(initialized)


def test_a_process_pinned_to_one_core_uses_one(monkeypatch: pytest.MonkeyPatch) -> None:
    physical = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    assert 1 <= usable_cores() <= physical
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3}, raising=False)
    assert usable_cores() == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(1000)))
    assert usable_cores() == physical
    monkeypatch.delattr(os, "sched_getaffinity")
    assert usable_cores() == physical
