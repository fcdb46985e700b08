"""Memory of torch's large tensors on the CPU, used again within a step instead of asked for anew (`allocator.cpp`)."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

from edgegt.native.build import allocator
from edgegt.process import on_trim


@cache
def reuse_memory(folder: Path) -> None:
    """From now on, in this process. folder: the cache. Raises: EdgegtError when it cannot be compiled here."""
    library = allocator(folder)
    library.install.restype = library.trim.restype = None
    library.install()
    on_trim(library.trim)


def reused_bytes(folder: Path) -> tuple[int, int, int]:
    """Bytes that are held, in use, and most in use since the last trim. Raises: as reuse_memory."""
    library = allocator(folder)
    library.state.argtypes, library.state.restype = [ctypes.c_int], ctypes.c_int64
    held, used, most = (int(library.state(what)) for what in range(3))
    return held, used, most
