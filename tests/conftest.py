"""One setting for all tests: a cache of their own, no network, one torch thread, quiet libraries."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest

_CACHE = tempfile.TemporaryDirectory(prefix="edgegt-tests-")

# Before anything imports torch or transformers, which read these once; commands run by tests inherit them.
os.environ["EDGEGT_CACHE"] = _CACHE.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["MPLBACKEND"] = "agg"


@pytest.fixture(scope="session", autouse=True)
def _clean_cache() -> Iterator[None]:
    """The cache of the session goes when the session ends."""
    yield
    _CACHE.cleanup()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Two torch threads on a busy machine can be many times slower than one; a run may set its own number."""
    import torch

    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu skip, visibly, where there is no CUDA."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
