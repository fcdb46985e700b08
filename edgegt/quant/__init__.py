"""8-bit weights and the linear layer that computes and trains with them.

Backends are exchangeable: each offers the same three operations (`Backend`), passes tests/test_quant_backends.py and is
one class and one row here. Which one runs on a machine is measured, not assumed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from edgegt.quant import backend as _backend
from edgegt.quant.backend import Backend, BackendCheck, Choice, ReferenceBackend, fastest
from edgegt.quant.bnb_backend import BitsandbytesBackend
from edgegt.quant.embedding import Int8Embedding
from edgegt.quant.experts import Int8Experts, Routing, combine, spread
from edgegt.quant.linear import InputCache, Int8Linear, Meter, Probe
from edgegt.quant.native_backend import NativeBackend
from edgegt.quant.rows import TrainedRows, index_fault
from edgegt.quant.torch_backend import TorchBackend
from edgegt.quant.weight import Int8Weight, dequantize, quantize_rows, refresh_planes, split_planes

__all__ = [
    "BACKENDS",
    "Backend",
    "BackendCheck",
    "Choice",
    "InputCache",
    "Int8Embedding",
    "Int8Experts",
    "Int8Linear",
    "Int8Weight",
    "Meter",
    "NativeBackend",
    "Probe",
    "ReferenceBackend",
    "Routing",
    "TorchBackend",
    "TrainedRows",
    "backends_of",
    "check_backends",
    "choose_backend",
    "combine",
    "dequantize",
    "fastest",
    "index_fault",
    "quantize_rows",
    "refresh_planes",
    "split_planes",
    "spread",
]

BACKENDS: dict[str, Callable[[], Backend]] = {
    "torch": TorchBackend,
    "bitsandbytes": BitsandbytesBackend,
    "native": NativeBackend,
}
_ONLY_ON = {"native": "cpu"}


def backends_of(device: torch.device) -> dict[str, Callable[[], Backend]]:
    """Those that can run on devices of this type at all."""
    return {name: make for name, make in BACKENDS.items() if _ONLY_ON.get(name, device.type) == device.type}


def check_backends(device: torch.device | str) -> list[BackendCheck]:
    """Run every backend's kernels, compare them with float products and time them (for `edgegt doctor`)."""
    return _backend.check(backends_of(torch.device(device)), torch.device(device))


def choose_backend(device: torch.device | str, cache_dir: Path, wanted: str | None = None) -> Choice:
    """The fastest backend whose kernels agree here, measured once per machine and version (`backend.json`).

    wanted: the one that was chosen before, which is taken if it loads.
    """
    device = torch.device(device)
    return _backend.choose(backends_of(device), device, cache_dir, wanted)
