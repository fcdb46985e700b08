"""`edgegt calibrate`: measure this machine in under a minute and write its device profile.

A shipped profile has peaks of a product; a calibrated one has the rates that training reached on this very machine, and
`edgegt run` and `edgegt plan` take them as reached. What cannot be measured (watts, temperature ceiling, how much to
leave to other programs) is carried over from the profile that `--device auto` finds, and said.
"""

from __future__ import annotations

import datetime
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgegt.calibrated import Measured, Place, profile_text
from edgegt.device import resolve_device, training_rate_text
from edgegt.errors import InputError
from edgegt.host import read_host, usable_cores
from edgegt.profile import load_profile
from edgegt.rates import of_profile
from edgegt.units import MIB, format_bytes

if TYPE_CHECKING:
    import torch

DEFAULT_FILE = "calibrated.toml"
TOKENS = 512
STORAGE_BYTES = 256 * MIB
LEAST_STORAGE_BYTES = 8 * MIB
_CHUNK = 4 * MIB
_LABELS = {
    "int8": "int8 linears", "int8_back": "int8, backward", "dw": "weight gradients", "attention": "attention",
    "float32": "float32 products", "forward_bytes": "elementwise", "backward_bytes": "elementwise, backward",
    "logits": "loss, logits", "optimizer": "8-bit optimizer, elements",
    "optimizer_float32": "float32 optimizer, elements", "dispatch_s": "dispatch of a layer",
    "update_s": "update of a tensor",
}  # fmt: skip


@dataclass(frozen=True)
class Effort:
    """How long and how large. piece_s: seconds per piece of a step; the others in bytes."""

    piece_s: float
    bandwidth_bytes: int
    storage_bytes: int
    width: int


FULL = Effort(1.0, 64 * MIB, STORAGE_BYTES, 1024)
QUICK = Effort(0.03, 8 * MIB, 16 * MIB, 256)


def calibrate(output: Path, force: bool = False, quick: bool = False, threads: int | None = None) -> dict[str, Any]:
    """Measure, write the profile to `output` and read it back; returns what was found as plain data.

    quick: a few seconds, smaller and less sure. threads: of torch, by default those of a run.
    Raises: InputError when the file exists and `force` is not given, or its name does not end in .toml.
    """
    output = Path(output)
    _check_output(output, force)
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or usable_cores())
    try:
        measured = _measure(QUICK if quick else FULL)
    finally:
        torch.set_num_threads(before)
    host = read_host()
    nearest = resolve_device("auto", host)
    here = Place(host, nearest.profile, shutil.disk_usage(_cache()).free, datetime.date.today().isoformat())
    text = profile_text(output.stem, measured, here)
    _write(output, text)
    written = load_profile(output)
    expected = of_profile(nearest.profile)
    return {
        "profile": str(output),
        "compared_with": nearest.profile.name,
        "notice": nearest.notice,
        "backend": measured.backend,
        "memory": {"total_bytes": written.memory_bytes, "available_bytes": host.available_bytes,
                   "budget_bytes": written.budget_bytes},
        "gpu": measured.gpu,
        "measured": vars(measured.rates) | {"bandwidth": measured.bandwidth, "storage": measured.storage}
        | measured.half,
        "expected": vars(expected) | {"bandwidth": nearest.profile.power.bandwidth_bytes_per_s,
                                      "storage": nearest.profile.storage_bytes_per_s},
        "storage_how": measured.storage_how,
        "carried_over": sorted(key for key, source in written.sources.items() if source.startswith("carried over")),
        "quick": quick,
    }  # fmt: skip


def findings_text(findings: dict[str, Any]) -> str:
    """The findings for a person: what was measured, beside what the profile of `auto` would have expected."""
    name, memory = findings["compared_with"], findings["memory"]
    measured, expected = findings["measured"], findings["expected"]
    rows = [("", "MEASURED", f"FROM {name}")]
    rows += [
        (label, training_rate_text(key, measured[key]), training_rate_text(key, expected[key]))
        for key, label in _LABELS.items()
    ]
    rows += [(f"{key} products", training_rate_text("float", measured[key]), "") for key in ("bf16", "fp16")
             if key in measured]  # fmt: skip
    speeds = (("bandwidth", "memory bandwidth"), ("storage", "storage read"))
    rows += [(label, _speed(measured[key]), _speed(expected[key])) for key, label in speeds]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{label:<{widths[0]}}  {here:>{widths[1]}}  {there:>{widths[2]}}" for label, here, there in rows]
    return "\n".join([
        *lines,
        "",
        f"int8       {findings['backend']}" + (f" on {findings['gpu']}" if findings["gpu"] else ", no CUDA GPU"),
        f"memory     {format_bytes(memory['total_bytes'])}, {format_bytes(memory['available_bytes'])} available now, "
        f"default budget {format_bytes(memory['budget_bytes'])}",
        f"storage    {findings['storage_how']}",
        f"not measured, carried over from {name}: {', '.join(findings['carried_over'])}",
        *(["quick: smaller and shorter, less sure than without --quick"] if findings["quick"] else []),
        f"written to {findings['profile']}; use it as --device {shlex.quote(findings['profile'])}",
    ])  # fmt: skip


def _measure(effort: Effort) -> Measured:
    """Everything, one after the other: measured together they would slow each other down."""
    import torch

    from edgegt.optimizer import eight_bit_works
    from edgegt.quant import choose_backend
    from edgegt.speed import of_machine

    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    _cache().mkdir(parents=True, exist_ok=True)
    backend = choose_backend(device, _cache()).backend
    eight_bit = eight_bit_works(device, backend.kernels) is None
    rates = of_machine(backend, device, effort.width, TOKENS, eight_bit, piece_s=effort.piece_s)
    storage, how = storage_read(_cache(), effort.storage_bytes)
    properties: Any = torch.cuda.get_device_properties(0) if gpu else None
    return Measured(
        backend=backend.name,
        width=effort.width,
        rates=rates,
        half=_half_rates(device, effort) if gpu else {},
        bandwidth=_bandwidth(device, effort),
        storage=storage,
        storage_how=how,
        gpu=str(properties.name) if gpu else None,
        gpu_bytes=int(properties.total_memory) if gpu else 0,
        gpu_unified=bool(properties.is_integrated) if gpu else False,
        capability=f"{properties.major}.{properties.minor}" if gpu else "",
    )


def _half_rates(device: torch.device, effort: Effort) -> dict[str, float]:
    """FLOP/s of square 16-bit products on a GPU."""
    import torch

    from edgegt.speed import seconds_of

    found, size = {}, 2 * effort.width
    for name, kind in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        a = torch.ones(size, size, device=device, dtype=kind)
        found[name] = 2 * size**3 / seconds_of(partial(torch.mm, a, a), device, effort.piece_s)
    return found


def _bandwidth(device: torch.device, effort: Effort) -> float:
    """Bytes/s of scaling one array into another, both larger than caches where memory allows."""
    import torch

    from edgegt.speed import seconds_of

    read = torch.ones(effort.bandwidth_bytes // 4, device=device)
    written = torch.empty_like(read)
    spent = seconds_of(lambda: torch.mul(read, 1.5, out=written), device, effort.piece_s)
    return 2 * effort.bandwidth_bytes / spent


def storage_read(folder: Path, size_bytes: int) -> tuple[float | None, str]:
    """Bytes/s of reading a temporary file in `folder`, and how far the number can be trusted; the file is removed.

    It takes at most a quarter of what is free; None and the reason when that is too little or the disk refuses.
    """
    size = min(size_bytes, shutil.disk_usage(folder).free // 4) // _CHUNK * _CHUNK
    if size < LEAST_STORAGE_BYTES:
        return None, f"not measured, the disk of {folder} is nearly full"
    try:
        with _temporary_file(folder, size) as (file, dropped):
            buffer = memoryview(bytearray(_CHUNK))
            started, left = time.perf_counter(), size
            while left > 0:
                count = os.readv(file, [buffer])
                if count == 0:
                    break
                left -= count
            spent = time.perf_counter() - started
    except OSError as error:
        return None, f"not measured, {error.strerror or error}"
    how = "dropped from the page cache before" if dropped else "perhaps from the page cache, so an upper bound"
    return size / max(spent, 1e-9), f"{size // MIB} MiB read, {how}"


@contextmanager
def _temporary_file(folder: Path, size: int) -> Iterator[tuple[int, bool]]:
    """Descriptor of a file of random bytes, on the disk, at its start; and whether the page cache has let go of it."""
    file, path = tempfile.mkstemp(prefix="calibrate-", suffix=".tmp", dir=folder)
    try:
        block = os.urandom(_CHUNK)
        for _ in range(size // _CHUNK):
            written = 0
            while written < len(block):
                written += os.write(file, block[written:])
        os.fsync(file)
        dropped = hasattr(os, "posix_fadvise")
        if dropped:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.lseek(file, 0, os.SEEK_SET)
        yield file, dropped
    finally:
        os.close(file)
        Path(path).unlink(missing_ok=True)


def _check_output(output: Path, force: bool) -> None:
    if output.suffix != ".toml":
        raise InputError(f"--output '{output}' must end in .toml, so that --device takes it; write {DEFAULT_FILE}")
    if output.stem != " ".join(output.stem.split()):
        raise InputError(f"--output '{output}' has spaces that a profile's name cannot have; write {DEFAULT_FILE}")
    if output.is_dir():
        raise InputError(f"--output '{output}' is a folder; give the name of a file in it")
    if output.exists() and not force:
        raise InputError(f"--output '{output}' exists and is kept; give --force to replace it, or another name")


def _write(output: Path, text: str) -> None:
    """The file at once: a profile that is half written would be refused later."""
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(output)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _cache() -> Path:
    from edgegt.cache import cache_dir

    return cache_dir()


def _speed(rate: float | None) -> str:
    return "-" if rate is None else training_rate_text("storage_bytes", rate)
