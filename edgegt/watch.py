"""Memory of this process, now and at its peak, as its budget counts it.

    CPU                             resident memory, from the operating system
    GPU with memory of its own      device memory: what torch's allocator reserved, and an allowance for the context
    GPU that shares the memory      both: resident memory and what the allocator reserved, since allocations of a
                                    Jetson's GPU are in general not resident memory of the process

A unified profile on a machine whose GPU has memory of its own is counted as the third, as on the board it stands for.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from edgegt.host import available_bytes

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
_CONTEXT_BYTES = 400 * 2**20


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """Largest resident memory of this process so far.

    Linux: VmHWM, which belongs to this program alone (getrusage also remembers the parent that started it).
    """
    if _STATUS.is_file():
        match = re.search(r"VmHWM:\s+(\d+) kB", _STATUS.read_text(encoding="ascii"))
        if match:
            return int(match[1]) * 1024
    info = psutil.Process().memory_info()
    windows = getattr(info, "peak_wset", None)
    if windows is not None:
        return int(windows)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


def restart_peak_resident() -> bool:
    """Forget the largest resident memory so far, where the system can (Linux); returns whether it could."""
    try:
        _RESET.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


class MemoryWatch:
    """What a budget is compared with. `gpu`: the run computes on CUDA; `unified`: the profile's GPU shares its memory.

    The peak of a shared memory is the sum of both peaks, which may lie apart in time: never less than the true one.
    """

    def __init__(self, gpu: bool, unified: bool = False) -> None:
        self._cuda: Any = None
        self._before = 0
        self._host = unified or not gpu
        if gpu:
            import torch

            self._cuda = torch.cuda

    def now(self) -> int:
        """Bytes held now."""
        return self._sum(resident_bytes, self._cuda and self._cuda.memory_reserved)

    def restart_peak(self) -> None:
        """Measure the peak anew from now on; `peak_ever` remembers."""
        self._before = self.peak_ever()
        if self._host:
            restart_peak_resident()
        if self._cuda is not None:
            self._cuda.reset_peak_memory_stats()

    def remember(self, peak_bytes: int) -> None:
        """Count the peak of an earlier process of the same run."""
        self._before = max(self._before, peak_bytes)

    def peak_ever(self) -> int:
        """Largest number of bytes held so far."""
        return max(self._before, self.peak())

    def available(self) -> int:
        """Bytes that can be had now beside those held: on a GPU with memory of its own, of that."""
        if self._cuda is not None and not self._host:
            return int(self._cuda.mem_get_info()[0])
        return available_bytes()

    def hold(self, budget_bytes: int) -> None:
        """Have CUDA's allocator refuse more than the budget, so that it is an error and not a reset."""
        if self._cuda is None:
            return
        mine = budget_bytes - (resident_bytes() if self._host else _CONTEXT_BYTES)
        total = int(self._cuda.get_device_properties(0).total_memory)
        self._cuda.set_per_process_memory_fraction(min(1.0, max(0.01, mine / total)))

    def peak(self) -> int:
        """Largest number of bytes held so far, or since `restart_peak`."""
        return self._sum(peak_resident_bytes, self._cuda and self._cuda.max_memory_reserved)

    def _sum(self, resident: Callable[[], int], reserved: Callable[[], int] | None) -> int:
        """Resident memory (or the context's allowance where host memory is not counted) and the allocator's."""
        return (resident() if self._host else _CONTEXT_BYTES) + (int(reserved()) if reserved else 0)
