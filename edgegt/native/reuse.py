"""Memory of torch's large tensors on the CPU, used again within a step instead of asked for anew (`allocator.cpp`)."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from edgegt.native.build import allocator
from edgegt.process import on_trim

# torch has one allocator: whatever cache it was compiled into, it is installed once.
_INSTALLED: list[Any] = []


def reuse_memory(folder: Path) -> None:
    """From now on, in this process. folder: the cache. Raises: EdgegtError when it cannot be compiled here."""
    if _INSTALLED:
        return
    library = allocator(folder)
    library.install.restype = library.trim.restype = None
    library.state.argtypes, library.state.restype = [ctypes.c_int], ctypes.c_int64
    library.install()
    on_trim(library.trim)
    _INSTALLED.append(library)


def reused_bytes() -> tuple[int, int, int]:
    """Bytes that are held, in use, and most in use since the last trim; zeros before reuse_memory."""
    if not _INSTALLED:
        return 0, 0, 0
    held, used, most = (int(_INSTALLED[0].state(what)) for what in range(3))
    return held, used, most
