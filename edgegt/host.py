"""What this machine is and how much memory it has left, read without importing anything heavy.

A profile says what a device should be; this file says what the machine at hand is. Available memory is the kernel's
MemAvailable, not free memory (on boards with unified memory the difference is the page cache, gigabytes), and never
more than what is left under the memory limit of the control group, which is all that a container gets. The paths are
parameters, so that tests can hand in a machine made of files.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

DEVICE_TREE = Path("/proc/device-tree/model")
CPUINFO = Path("/proc/cpuinfo")
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/proc/self/cgroup")
CGROUP_ROOT = Path("/sys/fs/cgroup")

# limit, usage, and the reclaimable file pages that usage includes, in the two versions of control groups
_V1_FILES = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2_FILES = ("memory.max", "memory.current", "inactive_file")


@dataclass(frozen=True)
class Host:
    """This machine. `model` is its device-tree model; `limit_bytes` the tightest control-group limit, if any.

    `total_bytes` is what the kernel sees of the physical memory; `cuda_*` are None unless torch is already imported.
    """

    system: str
    machine: str
    cpu: str
    cores: int
    total_bytes: int
    available_bytes: int
    limit_bytes: int | None = None
    model: str | None = None
    cuda_name: str | None = None
    cuda_bytes: int | None = None

    @property
    def usable_bytes(self) -> int:
        """Memory that this process could ever have: physical memory or the control group's limit."""
        return self.total_bytes if self.limit_bytes is None else min(self.total_bytes, self.limit_bytes)

    def to_json(self) -> dict[str, Any]:
        """A plain dict."""
        return asdict(self)


def read_host(
    device_tree: Path = DEVICE_TREE,
    cpuinfo: Path = CPUINFO,
    meminfo: Path = MEMINFO,
    cgroup: Path = CGROUP,
    cgroup_root: Path = CGROUP_ROOT,
) -> Host:
    """The facts of this machine, now."""
    total, _ = _memory(meminfo)
    groups = list(_groups(cgroup, cgroup_root))
    cuda_name, cuda_bytes = _cuda()
    return Host(
        system=platform.system(),
        machine=platform.machine(),
        cpu=cpu_name(cpuinfo),
        cores=psutil.cpu_count(logical=False) or psutil.cpu_count() or 1,
        total_bytes=total,
        available_bytes=available_bytes(meminfo, cgroup, cgroup_root),
        limit_bytes=min((limit for limit, _ in groups if limit < total), default=None),
        model=board_model(device_tree),
        cuda_name=cuda_name,
        cuda_bytes=cuda_bytes,
    )


def usable_cores() -> int:
    """Physical cores that this process may use, at least 1: fewer than the machine has where it is pinned to some."""
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = min(cores, len(os.sched_getaffinity(0)))
    return max(1, cores)


def available_bytes(meminfo: Path = MEMINFO, cgroup: Path = CGROUP, cgroup_root: Path = CGROUP_ROOT) -> int:
    """Bytes that can be allocated now without swapping: MemAvailable, or less where a control group says so."""
    left = [max(0, limit - used) for limit, used in _groups(cgroup, cgroup_root)]
    return min([_memory(meminfo)[1], *left])


def board_model(device_tree: Path = DEVICE_TREE) -> str | None:
    """The device-tree model, 'NVIDIA Jetson Orin Nano Developer Kit', or None on machines without one."""
    text = _read(device_tree)
    return (text.replace("\0", " ").strip() or None) if text is not None else None


def cpu_name(cpuinfo: Path = CPUINFO) -> str:
    """The processor's name: 'Apple M1', 'Intel(R) Core(TM) i5-1135G7 @ 2.40GHz', or the architecture."""
    for line in (_read(cpuinfo) or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip()
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        except (OSError, subprocess.SubprocessError):
            return platform.machine()
        return done.stdout.strip() or platform.machine()
    return platform.processor() or platform.machine()


def _memory(meminfo: Path) -> tuple[int, int]:
    """Total and available bytes, from the kernel's table where there is one, else from psutil."""
    found: dict[str, int] = {}
    for line in (_read(meminfo) or "").splitlines():
        key, _, value = line.partition(":")
        words = value.split()
        if words and words[0].isdigit():
            found[key] = int(words[0]) * 1024
    if "MemTotal" in found and "MemAvailable" in found:
        return found["MemTotal"], found["MemAvailable"]
    memory = psutil.virtual_memory()
    return int(memory.total), int(memory.available)


def _groups(cgroup: Path, root: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) bytes of this process's control group and of every group above it that has a limit.

    Inside a container the path in /proc/self/cgroup is often the host's and absent below `root`; what exists counts.
    """
    for line in (_read(cgroup) or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, inside = rest.partition(":")
        if "memory" in controllers.split(","):
            base, names = root / "memory", _V1_FILES
        elif number == "0" and not controllers:
            base, names = root, _V2_FILES
        else:
            continue
        steps = [step for step in inside.split("/") if step not in ("", "..")]
        for depth in range(len(steps), -1, -1):
            found = _limit_and_use(base.joinpath(*steps[:depth]), names)
            if found is not None:
                yield found


def _limit_and_use(folder: Path, names: tuple[str, str, str]) -> tuple[int, int] | None:
    """A group's limit and its use without reclaimable file pages; None when it has no limit ('max')."""
    limit, used = (_read(folder / names[0]) or "").strip(), (_read(folder / names[1]) or "").strip()
    if not (limit.isdigit() and used.isdigit()):
        return None
    reclaimable = 0
    for line in (_read(folder / "memory.stat") or "").splitlines():
        key, _, value = line.partition(" ")
        if key == names[2] and value.strip().isdigit():
            reclaimable = int(value)
    return int(limit), max(0, int(used) - reclaimable)


def _cuda() -> tuple[str | None, int | None]:
    """Name and bytes of CUDA device 0 when torch is already imported and sees one; torch is never imported here."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None, None
    return str(torch.cuda.get_device_name(0)), int(torch.cuda.get_device_properties(0).total_memory)


def _read(path: Path) -> str | None:
    """The text of a file of the kernel, or None when it is not there or cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
