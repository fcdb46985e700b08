"""Memory of this process, now and at its peak, as the operating system counts it.

On a discrete GPU the budget is device memory, so the allocator's figures are reported there instead.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import psutil

_STATUS = Path("/proc/self/status")


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
    """What a budget is compared with: resident memory, or device memory on a discrete GPU."""

    def __init__(self, discrete_gpu: bool) -> None:
        self._cuda: Any = None
        if discrete_gpu:
            import torch

            self._cuda = torch.cuda

    def now(self) -> int:
        """Bytes held now."""
        return int(self._cuda.memory_reserved()) + self._context() if self._cuda else resident_bytes()

    def peak(self) -> int:
        """Largest number of bytes held so far."""
        return int(self._cuda.max_memory_reserved()) + self._context() if self._cuda else peak_resident_bytes()

    def _context(self) -> int:
        """Device memory that the process holds outside the allocator: an allowance for the CUDA context."""
        return 400 * 2**20
