"""What works on this machine: kernels that were run and compared, memory that was seen, where things are kept."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from edgegt.units import format_bytes
from edgegt.version import __version__

if TYPE_CHECKING:
    import torch

    from edgegt.quant import BackendCheck

_PACKAGES = ("torch", "transformers", "bitsandbytes", "safetensors", "scipy", "psutil")


def examine() -> dict[str, Any]:
    """Run every int8 backend and the 8-bit optimizer here, and read the machine. `ok`: edgegt can train here."""
    import torch

    from edgegt.cache import cache_dir
    from edgegt.device import resolve_device
    from edgegt.host import read_host
    from edgegt.optimizer import eight_bit_works
    from edgegt.quant import BACKENDS, check_backends, fastest

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    host = read_host()
    checks = check_backends(device)
    used = fastest(checks)
    optimizer = eight_bit_works(device, BACKENDS[used.name]().kernels if used.ok else None)
    return {
        "ok": can_train(checks, device),
        "version": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "device": resolve_device("auto", host).profile.name,
        "computes_on": str(device),
        "cpu": host.cpu,
        "gpu": host.cuda_name,
        "threads": torch.get_num_threads(),
        "memory": {"total_bytes": host.total_bytes, "available_bytes": host.available_bytes,
                   "limit_bytes": host.limit_bytes},
        "backends": [{"name": check.name, "ok": check.ok, "error": check.error,
                      "relative_error": check.relative_error, "gflops": check.gflops} for check in checks],
        "backend": used.name if used.ok else "reference",
        "optimizer_8bit": {"ok": optimizer is None, "error": optimizer or ""},
        "cache": str(cache_dir()),
        "offline": bool(os.environ.get("HF_HUB_OFFLINE")),
    }  # fmt: skip


def can_train(checks: Sequence[BackendCheck], device: torch.device, *, reference: Any = None) -> bool:
    """Whether int8 weights can be multiplied here: by a backend of those checked, or by float products.

    reference: makes the backend with float products; by default edgegt's own.
    """
    from edgegt.quant.backend import ReferenceBackend, check

    if any(item.ok for item in checks):
        return True
    return check({"reference": reference or ReferenceBackend}, device)[0].ok


def findings_text(findings: dict[str, Any]) -> str:
    """The findings for a person: one line each, with what a failure means."""
    memory = findings["memory"]
    lines = [
        f"edgegt {findings['version']}, Python {findings['python']}, "
        + ", ".join(f"{name} {version}" for name, version in findings["packages"].items()),
        f"machine     {findings['cpu']}" + (f", {findings['gpu']}" if findings["gpu"] else ", no CUDA GPU"),
        f"profile     {findings['device']} (--device auto)",
        f"memory      {format_bytes(memory['available_bytes'])} available of {format_bytes(memory['total_bytes'])}"
        + (f", limited to {format_bytes(memory['limit_bytes'])}" if memory["limit_bytes"] else ""),
    ]
    for check in findings["backends"]:
        state = (
            f"works, error {check['relative_error']:.1e}, {check['gflops']:.0f} GFLOP/s with {findings['threads']} "
            "threads"
            if check["ok"]
            else f"does not work: {check['error']}; the other backend or float products are used"
        )
        lines.append(f"int8        {check['name']}: {state}")
    lines.append(f"int8        {findings['backend']} is used")
    optimizer = findings["optimizer_8bit"]
    lines.append(
        "AdamW       8-bit states work" if optimizer["ok"] else f"AdamW       float32 states ({optimizer['error']})"
    )
    lines.append(f"cache       {findings['cache']}")
    if not findings["ok"]:
        lines.append("result      edgegt cannot train here: neither int8 kernels nor float products work")
    return "\n".join(lines)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"
