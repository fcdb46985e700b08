"""What the machine feels: temperature, battery, throttling and power, read from the kernel's own files.

    temperature   the hottest sensor of the processor itself: coretemp, k10temp and their like, x86_pkg_temp, and zones
                  such as CPU-therm, gpu-thermal, cpu_thermal, soc0-thermal. A Jetson's tj-thermal is the largest of all
                  of these and is read alone. Drives, network cards, PMIC-Die (which always says 100 C) and acpitz
                  (often a constant) are not the processor. With a GPU of its own, that GPU's temperature instead
    battery       batteries of the machine, not those of a mouse, and whether any mains or USB supply is online
    throttled     events since boot: of the processor's heat, and of over-current on a Jetson; None without counters
    power         the GPU's board where it has one; else INA3221 rails (a whole Jetson); else RAPL (an x86 package,
                  usually readable by root only), as energy over the time between two reads

Files are found once and read afterwards. psutil is asked only where the kernel has no such folders (macOS, Windows,
BSD). Nothing raises: a sensor that fails is None. Paths are parameters, for a machine made of files.
"""

from __future__ import annotations

import ctypes
import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil

HWMON = Path("/sys/class/hwmon")
THERMAL = Path("/sys/class/thermal")
CPUS = Path("/sys/devices/system/cpu")
POWER_SUPPLY = Path("/sys/class/power_supply")
POWERCAP = Path("/sys/class/powercap")

LOWEST_C, HIGHEST_C = -40.0, 150.0  # what a working sensor can say
_PROCESSOR = re.compile(
    r"coretemp|k8temp|k10temp|zenpower|via-cputemp|x86-pkg-temp|"
    r"(cpu|gpu|soc|tj|cv|npu|package|big|little|cluster)[a-z0-9-]*-therm(al)?"
)
_WHOLE_BOARD = ("VDD_IN", "POM_5V_IN", "VIN")
_SHORTEST_S = 0.1  # between two reads of an energy counter


@dataclass(frozen=True)
class Reading:
    """One look at the sensors; None is not known. on_battery: None without a battery; throttled: events since boot."""

    temperature_c: float | None = None
    on_battery: bool | None = None
    battery_percent: float | None = None
    throttled: int | None = None
    power_w: float | None = None


class Sensors(Protocol):
    """What can be asked how the machine feels; never raises."""

    def read(self) -> Reading: ...

    def power_mode(self) -> str | None: ...


class Gpu(Protocol):
    """A GPU with a thermometer of its own; None where it does not answer."""

    def temperature_c(self) -> float | None: ...

    def power_w(self) -> float | None: ...


class MachineSensors:
    """The sensors of this machine. gpu: the GPU that the run computes on, if it is not part of the processor.

    portable: where temperature and battery are asked without the kernel's folders, a module such as psutil.
    """

    def __init__(
        self,
        gpu: Gpu | None = None,
        hwmon: Path = HWMON,
        thermal: Path = THERMAL,
        cpus: Path = CPUS,
        power_supply: Path = POWER_SUPPLY,
        powercap: Path = POWERCAP,
        nvpmodel: str = "nvpmodel",
        portable: Any = psutil,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        chips = _entries(hwmon, "hwmon*")
        self._gpu = gpu
        self._temperatures = _temperature_files(chips, _entries(thermal, "thermal_zone*"))
        self._rails = _rails(chips)
        self._counters = [
            *_entries(cpus, "cpu[0-9]*/thermal_throttle/core_throttle_count"),
            *_entries(cpus, "cpu[0-9]*/thermal_throttle/package_throttle_count"),
            *(path for chip in chips for path in _entries(chip, "oc*_event_cnt")),
        ]
        supplies = [(path, _word(path / "type")) for path in _entries(power_supply, "*")]
        own = [(path, kind) for path, kind in supplies if _word(path / "scope") != "Device"]
        self._batteries = [path for path, kind in own if kind == "Battery"]
        self._mains = [path / "online" for path, kind in own if kind == "Mains" or kind.startswith("USB")]
        self._energy = _Energy(_entries(powercap, "intel-rapl:*"), clock)
        self._nvpmodel = nvpmodel
        kernel = hwmon.is_dir() or thermal.is_dir()
        self._ask_heat = None if kernel else _working(getattr(portable, "sensors_temperatures", None))
        self._ask_battery = None if power_supply.is_dir() else _working(getattr(portable, "sensors_battery", None))

    def read(self) -> Reading:
        """All sensors now. Never raises; on Linux about 10 us for each file."""
        on_battery, percent = self._battery()
        return Reading(self._temperature(), on_battery, percent, self._throttled(), self._power())

    def power_mode(self) -> str | None:
        """The power mode of a Jetson, '15W', as `nvpmodel -q` says it; None elsewhere. Starts a program: ask once."""
        program = shutil.which(self._nvpmodel)
        if program is None:
            return None
        try:
            done = subprocess.run([program, "-q"], capture_output=True, text=True, errors="replace", timeout=5)
        except (OSError, subprocess.SubprocessError):
            return None
        match = re.search(r"^NV Power Mode: *(\S.*?)\s*$", done.stdout, flags=re.MULTILINE)
        return match[1] if match else None

    def _temperature(self) -> float | None:
        if self._gpu is not None:
            return _hottest([self._gpu.temperature_c()])
        for files in self._temperatures:
            found = _hottest(None if (value := _number(path)) is None else value / 1000 for path in files)
            if found is not None:
                return found
        chips = _ask(self._ask_heat)
        if not isinstance(chips, dict):
            return None
        ours = [sensor for name, sensors in chips.items() if _is_processor(name) for sensor in sensors]
        return _hottest(_float(getattr(sensor, "current", None)) for sensor in ours)

    def _battery(self) -> tuple[bool | None, float | None]:
        if self._batteries:
            return self._on_battery(), self._percent()
        found = _ask(self._ask_battery)
        plugged, percent = getattr(found, "power_plugged", None), _float(getattr(found, "percent", None))
        return (None if plugged is None else not plugged), _within(percent, 0, 100)

    def _on_battery(self) -> bool | None:
        """False with any supply online or any battery charging; else True where none is, or one is discharging."""
        online = [value for path in self._mains if (value := _number(path)) is not None]
        status = [word for path in self._batteries if (word := _word(path / "status"))]
        if any(online) or "Charging" in status:
            return False
        if online or "Discharging" in status:
            return True
        return False if {"Full", "Not charging"} & set(status) else None

    def _percent(self) -> float | None:
        """Of all batteries together, weighted by their size where each tells it."""
        levels = [_within(_number(path / "capacity"), 0, 100) for path in self._batteries]
        sizes = [_number(path / "energy_full") or 0.0 for path in self._batteries]
        if not all(sizes):
            sizes = [1.0] * len(levels)
        known = [(level, size) for level, size in zip(levels, sizes, strict=True) if level is not None]
        whole = sum(size for _, size in known)
        return sum(level * size for level, size in known) / whole if whole > 0 else None

    def _throttled(self) -> int | None:
        counts = [value for path in self._counters if (value := _number(path)) is not None and value >= 0]
        return int(sum(counts)) if counts else None

    def _power(self) -> float | None:
        if self._gpu is not None:
            return _within(self._gpu.power_w(), 0, 10_000)
        rails = [volt * ampere for rail in self._rails for volt, ampere in [map(_number, rail)] if volt and ampere]
        return sum(rails) / 1e6 if rails else self._energy.power_w()


class _Energy:
    """Energy counters in microjoules as power, between two calls at least 0.1 s apart."""

    def __init__(self, folders: Iterable[Path], clock: Callable[[], float]) -> None:
        packages = [folder for folder in folders if _word(folder / "name").startswith("package")]
        self._counters = [(path / "energy_uj", _number(path / "max_energy_range_uj")) for path in packages]
        self._clock = clock
        self._last: tuple[float, list[float | None]] | None = None
        self._power_w: float | None = None

    def power_w(self) -> float | None:
        """Watts since the call before; a counter that began again at 0 is continued from its largest value."""
        if not self._counters:
            return None
        now = self._clock()
        if self._last is not None and now - self._last[0] < _SHORTEST_S:
            return self._power_w
        values = [_number(path) for path, _ in self._counters]
        self._power_w = None if self._last is None else self._difference(values, self._last[1], now - self._last[0])
        self._last = now, values
        return self._power_w

    def _difference(self, values: list[float | None], before: list[float | None], seconds: float) -> float | None:
        spent = []
        for (_, largest), value, old in zip(self._counters, values, before, strict=True):
            if value is not None and old is not None and value < old:
                value = None if largest is None else value + largest
            if value is not None and old is not None:
                spent.append(value - old)
        return sum(spent) / 1e6 / seconds if spent else None


class NvidiaGpu:
    """The CUDA device of this run, by NVML, the library that comes with NVIDIA's driver."""

    def __init__(self, library: Any, handle: Any) -> None:
        self._library, self._handle = library, handle

    def temperature_c(self) -> float | None:
        """Of the die, in degrees Celsius."""
        return self._ask("nvmlDeviceGetTemperature", ctypes.c_uint(0))

    def power_w(self) -> float | None:
        """Of the whole card, in watts."""
        milliwatts = self._ask("nvmlDeviceGetPowerUsage")
        return None if milliwatts is None else milliwatts / 1000

    def _ask(self, function: str, *which: Any) -> float | None:
        value = ctypes.c_uint()
        try:
            failed = getattr(self._library, function)(self._handle, *which, ctypes.byref(value))
        except (AttributeError, OSError):
            return None
        return None if failed else float(value.value)


def nvidia_gpu(load: Callable[[str], Any] = ctypes.CDLL) -> NvidiaGpu | None:
    """CUDA device 0 where torch is already imported and its driver tells its temperature; None otherwise.

    A Jetson's driver does not: there the GPU is part of the processor, and its zones are files.
    """
    torch = sys.modules.get("torch")
    try:
        if torch is None or not torch.cuda.is_available():
            return None
        uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
        library = load("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
        handle = ctypes.c_void_p()
        if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)):
            return None
    except (AttributeError, OSError, RuntimeError):
        return None
    gpu = NvidiaGpu(library, handle)
    return None if gpu.temperature_c() is None else gpu


def _temperature_files(chips: Iterable[Path], zones: Iterable[Path]) -> list[list[Path]]:
    """Files of the processor's temperature in groups: the first group that answers is the one to believe."""
    found = [(_plain(_word(zone / "type")), zone / "temp") for zone in zones]
    junction = [path for name, path in found if name.startswith("tj-") and _is_processor(name)]
    ours = [path for name, path in found if _is_processor(name)]
    for chip in chips:
        name = _plain(_word(chip / "name"))
        if _is_processor(name) and name not in dict(found):  # zones are shown a second time as chips
            ours += _chip_files(chip)
    return [files for files in (junction, ours) if files]


def _chip_files(chip: Path) -> list[Path]:
    """Of Intel's cores only the package, which is their maximum; of AMD's, not Tctl (it may be offset) beside Tdie."""
    files = _entries(chip, "temp*_input") or _entries(chip, "device/temp*_input")
    labels = {path: _word(path.with_name(path.name.replace("_input", "_label"))) for path in files}
    best = [path for path, label in labels.items() if label.startswith("Package")]
    if "Tdie" in labels.values():
        best = [path for path, label in labels.items() if label != "Tctl"]
    return best or files


def _rails(chips: Iterable[Path]) -> list[tuple[Path, Path]]:
    """Files of millivolts and milliamperes of the whole board, or of all rails that feed it where no rail is that."""
    rails: dict[str, tuple[Path, Path]] = {}
    for chip in chips:
        for channel in (1, 2, 3) if _word(chip / "name") == "ina3221" else ():
            label = _word(chip / f"in{channel}_label")
            if label and label != "NC" and not label.startswith("VDDQ_"):  # VDDQ is fed by VIN_SYS_5V0
                rails[label] = (chip / f"in{channel}_input", chip / f"curr{channel}_input")
    whole = [rails[label] for label in _WHOLE_BOARD if label in rails]
    return whole[:1] or list(rails.values())


def _is_processor(name: str) -> bool:
    return _PROCESSOR.fullmatch(_plain(name)) is not None


def _plain(name: str) -> str:
    """'CPU-therm' and 'cpu_thermal' in one spelling."""
    return name.lower().replace("_", "-")


def _hottest(values: Iterable[float | None]) -> float | None:
    """The largest that a working sensor can say."""
    return max((value for value in values if value is not None and LOWEST_C <= value <= HIGHEST_C), default=None)


def _within(value: float | None, lowest: float, highest: float) -> float | None:
    return value if value is not None and lowest <= value <= highest else None


def _float(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _working(function: Callable[[], Any] | None) -> Callable[[], Any] | None:
    """The function, where it has anything to say."""
    return function if _ask(function) else None


def _ask(function: Callable[[], Any] | None) -> Any:
    """What a function of another library returns; None where there is none or it fails, in whatever way."""
    try:
        return None if function is None else function()
    except Exception:
        return None


def _entries(folder: Path, pattern: str) -> list[Path]:
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []


def _word(path: Path) -> str:
    """A file's text without its ends, '' when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip().strip("\0")
    except OSError:
        return ""


def _number(path: Path) -> float | None:
    """A file's finite number, None when it holds none or cannot be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            value = float(file.read(64) or b"")
    except (OSError, ValueError):
        return None
    return value if math.isfinite(value) else None
