"""Where edgegt keeps what it can make again: quantised bases, compiled kernels, choices made by measuring."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """$EDGEGT_CACHE, else the user's cache folder."""
    given = os.environ.get("EDGEGT_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else base / "edgegt"
