"""Make freed tensors leave the process, so that resident memory is what is in use and can be predicted.

glibc raises the size from which it maps memory separately up to 32 MiB, after which short- and long-lived tensors share
one heap that fragments: the same step then peaks 10 to 40 % higher and memory stays resident afterwards. A fixed
threshold of 256 KiB returns every larger tensor; huge pages make the repeated mapping cheap.
"""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_THRESHOLD_BYTES = 1 << 18


def return_freed_memory() -> bool:
    """Set glibc's thresholds and ask torch for huge pages; call before importing torch. False where there is no glibc."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if not sys.platform.startswith("linux"):
        return False
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(set_option(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES) and set_option(_M_TRIM_THRESHOLD, _THRESHOLD_BYTES))


def trim() -> None:
    """Give back what the heap holds and nobody uses; called between the phases of a run (a few milliseconds)."""
    if sys.platform.startswith("linux"):
        try:
            ctypes.CDLL(None).malloc_trim(0)
        except (OSError, AttributeError):
            return
