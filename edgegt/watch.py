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

_STATUS = Path("/proc/self/status")
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


class MemoryWatch:
    """What a budget is compared with. `gpu`: the run computes on CUDA; `unified`: the profile's GPU shares its memory.

    The peak of a shared memory is the sum of both peaks, which may lie apart in time: never less than the true one.
    """

    def __init__(self, gpu: bool, unified: bool = False) -> None:
        self._cuda: Any = None
        self._host = unified or not gpu
        if gpu:
            import torch

            self._cuda = torch.cuda

    def now(self) -> int:
        """Bytes held now."""
        return self._sum(resident_bytes, self._cuda and self._cuda.memory_reserved)

    def peak(self) -> int:
        """Largest number of bytes held so far."""
        return self._sum(peak_resident_bytes, self._cuda and self._cuda.max_memory_reserved)

    def _sum(self, resident: Callable[[], int], reserved: Callable[[], int] | None) -> int:
        """Resident memory (or the context's allowance where host memory is not counted) and the allocator's."""
        return (resident() if self._host else _CONTEXT_BYTES) + (int(reserved()) if reserved else 0)
