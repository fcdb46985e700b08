"""Machines made of files: which sensors count as the processor's, and nothing that is broken ever raises."""

from __future__ import annotations

import ctypes
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgegt.sensors import MachineSensors, Reading, nvidia_gpu

NOTHING = SimpleNamespace()  # a psutil that has no sensors at all
ZONE, CHIP, BATTERY = "thermal/thermal_zone{}/{}", "hwmon/hwmon{}/{}", "power_supply/{}/{}"


def zones(**temperatures: object) -> dict[str, object]:
    """Thermal zones by type; an underscore stands for a dash."""
    files: dict[str, object] = {}
    for index, (name, value) in enumerate(temperatures.items()):
        files |= {ZONE.format(index, "type"): name.replace("_", "-"), ZONE.format(index, "temp"): value}
    return files


def chip(index: int, name: str, **files: object) -> dict[str, object]:
    return {CHIP.format(index, "name"): name} | {CHIP.format(index, key): value for key, value in files.items()}


def supply(name: str, **files: object) -> dict[str, object]:
    return {BATTERY.format(name, key): value for key, value in files.items()}


def machine(root: Path, files: Mapping[str, object], **more: Any) -> MachineSensors:
    """Sensors of a machine that has these files and nothing else."""
    for folder in ("hwmon", "thermal", "cpu", "power_supply", "powercap"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{value}\n")
    return MachineSensors(
        hwmon=root / "hwmon", thermal=root / "thermal", cpus=root / "cpu", power_supply=root / "power_supply",
        powercap=root / "powercap", **{"nvpmodel": str(root / "nvpmodel"), "portable": NOTHING, **more},
    )  # fmt: skip


JETSON_NANO = zones(AO_therm=52000, CPU_therm=41500, GPU_therm=43000, PLL_therm=44000, PMIC_Die=100000,
                    thermal_fan_est=42500)  # fmt: skip
ORIN = (
    zones(cpu_thermal=51000, gpu_thermal=49500, cv0_thermal=-256000, soc0_thermal=50100, tj_thermal=52200)
    | chip(0, "cpu_thermal", temp1_input=99000)
    | chip(1, "ina3221", in1_label="VDD_IN", in1_input=5000, curr1_input=1800, in2_label="VDD_CPU_GPU_CV",
           in2_input=5000, curr2_input=700, in3_label="VDD_SOC", in3_input=5000, curr3_input=300,
           in7_label="sum of shunt voltages")
    | chip(2, "soctherm_oc", oc1_event_cnt=0, oc2_event_cnt=4, oc3_event_cnt=1)
)  # fmt: skip
AGX = chip(0, "ina3221", in1_label="VDD_GPU_SOC", in1_input=12000, curr1_input=500, in2_label="VDD_CPU_CV",
           in2_input=12000, curr2_input=250, in3_label="NC", in3_input=9, curr3_input=9) | chip(
    1, "ina3221", in1_label="VIN_SYS_5V0", in1_input=5000, curr1_input=600, in2_label="VDDQ_VDD2_1V8AO",
    in2_input=5000, curr2_input=100)  # fmt: skip
LAPTOP = (
    zones(acpitz=27800, INT3400_Thermal=20000, x86_pkg_temp=71000, iwlwifi_1=88000)
    | chip(0, "nvme", temp1_input=93850)
    | chip(1, "coretemp", temp1_input=73000, temp1_label="Package id 0", temp2_input=78000, temp2_label="Core 0")
    | supply("AC", type="Mains", online=0)
    | supply("BAT0", type="Battery", status="Discharging", capacity=64, energy_full=50_000_000)
    | supply("BAT1", type="Battery", status="Not charging", capacity=10, energy_full=25_000_000)
    | supply("hidpp_battery_0", type="Battery", scope="Device", status="Discharging", capacity=3)
    | {f"cpu/cpu{core}/thermal_throttle/{kind}_throttle_count": 10 * core + 1 for core in (0, 1)
       for kind in ("core", "package")}
)  # fmt: skip
DESKTOP = (
    chip(0, "k10temp", temp1_input=95000, temp1_label="Tctl", temp2_input=68000, temp2_label="Tdie",
         temp3_input=61000, temp3_label="Tccd1")
    | chip(1, "amdgpu", temp1_input=99000) | chip(2, "r8169_0_300:00", temp1_input=98000)
    | supply("hidpp_battery_0", type="Battery", scope="Device", status="Discharging", capacity=3)
)  # fmt: skip
MACHINES: dict[str, tuple[Mapping[str, object], Reading]] = {
    "Jetson Nano": (JETSON_NANO, Reading(43.0)),
    "Jetson Orin Nano": (ORIN, Reading(52.2, throttled=5, power_w=9.0)),
    "Jetson Orin without tj": ({k: v for k, v in ORIN.items() if "zone4" not in k}, Reading(51.0, None, None, 5, 9.0)),
    "Jetson whose tj fails": (ORIN | {ZONE.format(4, "temp"): ""}, Reading(51.0, None, None, 5, 9.0)),
    "Jetson AGX Orin, no rail of the whole": (AGX, Reading(power_w=12.0)),
    "laptop": (LAPTOP, Reading(73.0, True, 46.0, 24)),
    "laptop on mains": (LAPTOP | supply("AC", online=1), Reading(73.0, False, 46.0, 24)),
    "laptop on USB-C": (LAPTOP | supply("ucsi", type="USB", online=1), Reading(73.0, False, 46.0, 24)),
    "desktop with a wireless mouse": (DESKTOP, Reading(68.0)),
    "AMD without Tdie": (chip(0, "k10temp", temp1_input=70125, temp1_label="Tctl"), Reading(70.125)),
    "two sockets": (zones(x86_pkg_temp=60000) | {ZONE.format(9, "type"): "x86_pkg_temp", ZONE.format(9, "temp"): 66000},
                    Reading(66.0)),
    "Raspberry Pi": (zones(cpu_thermal=58900) | chip(0, "cpu_thermal", temp1_input=58900), Reading(58.9)),
    "RK3588": (zones(bigcore0_thermal=60000, littlecore_thermal=55000, center_thermal=90000), Reading(60.0)),
    "nothing": ({}, Reading()),
    "battery alone, discharging": (supply("BAT0", type="Battery", status="Discharging", capacity=5),
                                   Reading(None, True, 5.0)),
    "battery alone, full": (supply("BAT0", type="Battery", status="Full", capacity=100), Reading(None, False, 100.0)),
    "battery alone, silent": (supply("BAT0", type="Battery", status="Unknown", capacity="n/a"), Reading()),
    "battery at an absurd level": (supply("B", type="Battery", status="Charging", capacity=255), Reading(None, False)),
    "broken files": (
        zones(cpu_thermal="", gpu_thermal="nan", soc_thermal="inf", cpu1_thermal=-273000, cpu2_thermal=1000000)
        | chip(0, "coretemp", temp1_input="x" * 500)
        | chip(1, "ina3221", in1_label="VDD_IN", in1_input="?", curr1_input=5)
        | supply("BAT0", type="Battery") | supply("AC", type="Mains", online="yes")
        | {"cpu/cpu0/thermal_throttle/core_throttle_count": "-", "powercap/intel-rapl:0/name": "package-0"},
        Reading(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MACHINES)
def test_what_a_machine_feels(name: str, tmp_path: Path) -> None:
    files, expected = MACHINES[name]
    assert machine(tmp_path, files).read() == expected


def test_sensors_are_read_again_each_time_and_may_vanish(tmp_path: Path) -> None:
    sensors = machine(tmp_path, LAPTOP)
    assert sensors.read().temperature_c == 73.0
    (tmp_path / ZONE.format(2, "temp")).write_text("84000\n")
    assert sensors.read().temperature_c == 84.0
    for path in tmp_path.rglob("*"):
        if path.is_file():
            path.unlink()
    assert sensors.read() == Reading()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
def test_files_that_only_root_may_read_are_not_known(tmp_path: Path) -> None:
    sensors = machine(tmp_path, LAPTOP)
    for path in tmp_path.rglob("temp*"):
        path.chmod(0)
    assert sensors.read() == Reading(None, True, 46.0, 24)


def test_a_folder_in_the_place_of_a_file_is_no_sensor(tmp_path: Path) -> None:
    (tmp_path / ZONE.format(0, "temp")).mkdir(parents=True)
    (tmp_path / BATTERY.format("BAT0", "capacity")).mkdir(parents=True)
    files = {ZONE.format(0, "type"): "cpu-thermal"} | supply("BAT0", type="Battery", status="Discharging")
    assert machine(tmp_path, files).read() == Reading(on_battery=True)


def test_energy_counters_become_power_and_wrap_around(tmp_path: Path) -> None:
    now, package = [0.0], "powercap/intel-rapl:{}/{}"
    files: dict[str, object] = {}
    for index, name in (("0", "package-0"), ("1", "package-1"), ("0:0", "core"), ("2", "psys")):
        values = {"name": name, "energy_uj": 1_000_000, "max_energy_range_uj": 100_000_000}
        files |= {package.format(index, key): value for key, value in values.items()}
    sensors = machine(tmp_path, files, clock=lambda: now[0])

    def power(at: float, *counters: int | None) -> float | None:
        now[0] = at
        for index, value in enumerate(counters):
            path = tmp_path / package.format(index, "energy_uj")
            path.write_text("" if value is None else f"{value}\n")
        return sensors.read().power_w

    assert power(0) is None, "one read is no difference"
    assert power(2, 21_000_000, 11_000_000) == pytest.approx((20 + 10) / 2)
    assert power(2.01, 90_000_000, 90_000_000) == pytest.approx(15), "too soon: the power before"
    assert power(4, 1_000_000, 11_000_000) == pytest.approx((100 - 21 + 1 + 0) / 2), "the first counter began again"
    assert power(5, None, 12_000_000) == pytest.approx(1.0), "of those that answer"
    assert power(6, 5_000_000, None) is None, "no counter was read twice"


def test_energy_that_began_again_from_an_unknown_largest_value_is_not_known(tmp_path: Path) -> None:
    now, counter = [0.0], "powercap/intel-rapl:0/energy_uj"
    files = {"powercap/intel-rapl:0/name": "package-0", counter: 9_000_000}
    sensors = machine(tmp_path, files, clock=lambda: now[0])
    for at, value, expected in ((0, 9_000_000, None), (1, 3_000_000, None), (2, 5_000_000, 2.0)):
        now[0] = at
        (tmp_path / counter).write_text(str(value))
        assert sensors.read().power_w == expected


class Portable:
    """psutil on a system without the kernel's folders."""

    def __init__(self, heat: Any, battery: Any) -> None:
        self.heat, self.battery, self.asked = heat, battery, 0

    def sensors_temperatures(self) -> Any:
        self.asked += 1
        if isinstance(self.heat, Exception):
            raise self.heat
        return self.heat

    def sensors_battery(self) -> Any:
        if isinstance(self.battery, Exception):
            raise self.battery
        return self.battery


def spot(current: float) -> Any:
    return SimpleNamespace(label="", current=current)


def cell(percent: Any, plugged: Any) -> Any:
    return SimpleNamespace(percent=percent, power_plugged=plugged)


@pytest.mark.parametrize(("heat", "battery", "expected"), [
    ({"coretemp": [spot(61.0), spot(64.0)], "nvme": [spot(90.0)]}, None, Reading(64.0)),
    ({"coretemp": [spot(math.nan)]}, cell(70, False), Reading(None, True, 70.0)),
    ({}, cell(98.5, True), Reading(None, False, 98.5)),
    (OSError("no"), cell(None, None), Reading()),
    (KeyError("no"), RuntimeError("no"), Reading()),
    ("text", cell(1000, True), Reading(None, False)),
])  # fmt: skip
def test_elsewhere_psutil_is_asked(heat: Any, battery: Any, expected: Reading, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    portable = Portable(heat, battery)
    sensors = MachineSensors(
        hwmon=nowhere, thermal=nowhere, cpus=nowhere, power_supply=nowhere, powercap=nowhere, portable=portable
    )  # fmt: skip
    assert sensors.read() == expected
    assert machine(tmp_path, {}, portable=portable).read() == Reading(), "never where the kernel has its folders"


def test_a_sensor_that_begins_to_fail_is_none(tmp_path: Path) -> None:
    portable = Portable({"coretemp": [spot(61.0)]}, cell(70, True))
    sensors = MachineSensors(hwmon=tmp_path / "no", thermal=tmp_path / "no", power_supply=tmp_path / "no",
                             cpus=tmp_path, powercap=tmp_path, portable=portable)  # fmt: skip
    assert sensors.read() == Reading(61.0, False, 70.0)
    portable.heat = portable.battery = OSError("gone")
    assert sensors.read() == Reading()


@pytest.mark.skipif(os.name != "posix", reason="a shell script stands for nvpmodel")
@pytest.mark.parametrize(("script", "mode"), [
    ("echo 'NVPM WARN: Fan mode is not set!'; echo 'NV Power Mode: 15W'; echo 0", "15W"),
    ("echo 'NV Power Mode: MAXN SUPER '; echo 2; exit 1", "MAXN SUPER"),
    ("echo 'NV Power Mode:'; echo 0", None),
    ("echo nothing; printf '\\377\\376'", None),
    (None, None),
])  # fmt: skip
def test_the_power_mode_is_what_nvpmodel_says(script: str | None, mode: str | None, tmp_path: Path) -> None:
    if script is not None:
        (tmp_path / "nvpmodel").write_text(f'#!/bin/sh\n[ "$1" = -q ] || exit 9\n{script}\n')
        (tmp_path / "nvpmodel").chmod(0o755)
    assert machine(tmp_path, {}).power_mode() == mode


def test_a_program_that_cannot_be_started_has_no_power_mode(tmp_path: Path) -> None:
    (tmp_path / "nvpmodel").write_text("#!/nowhere/at/all\n")
    (tmp_path / "nvpmodel").chmod(0o755)
    assert machine(tmp_path, {}).power_mode() is None


class Nvml:
    """NVIDIA's library for one card, whose functions return 0 or the number of an error."""

    def __init__(self, failing: str = "") -> None:
        self.failing, self.uuid = failing, b""

    def nvmlInit_v2(self) -> int:
        return int(self.failing == "init")

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:
        self.uuid = uuid
        return int(self.failing == "handle")

    def nvmlDeviceGetTemperature(self, handle: ctypes.c_void_p, sensor: ctypes.c_uint, value: Any) -> int:
        value._obj.value = 67
        return 3 * int(self.failing == "temperature")

    def nvmlDeviceGetPowerUsage(self, handle: ctypes.c_void_p, value: Any) -> int:
        value._obj.value = 115_250
        return 3 * int(self.failing == "power")


def with_cuda(monkeypatch: pytest.MonkeyPatch, there: bool = True) -> None:
    cuda = SimpleNamespace(
        is_available=lambda: there, get_device_properties=lambda index: SimpleNamespace(uuid=f"uuid-of-{index}")
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))


def test_a_card_is_asked_instead_of_the_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_cuda(monkeypatch)
    library = Nvml()
    gpu = nvidia_gpu(lambda name: library)
    assert library.uuid == b"GPU-uuid-of-0"
    assert machine(tmp_path, LAPTOP, gpu=gpu).read() == Reading(67.0, True, 46.0, 24, 115.25)
    library.failing = "temperature"
    assert machine(tmp_path / "bare", {}, gpu=gpu).read() == Reading(power_w=115.25), "not the processor's instead"
    library.failing = "power"
    assert machine(tmp_path / "bare", {}, gpu=gpu).read() == Reading(67.0)


@pytest.mark.parametrize("failing", ["init", "handle", "temperature", "library", "symbol", "cuda", "torch"])
def test_no_card_where_anything_is_missing(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_cuda(monkeypatch, there=failing != "cuda")
    if failing == "torch":
        monkeypatch.delitem(sys.modules, "torch")

    def load(name: str) -> Any:
        if failing == "library":
            raise OSError(name)
        return SimpleNamespace() if failing == "symbol" else Nvml(failing)

    assert nvidia_gpu(load) is None


def test_a_read_is_cheap(tmp_path: Path) -> None:
    files = LAPTOP | {f"cpu/cpu{core}/thermal_throttle/core_throttle_count": 0 for core in range(16)}
    sensors = machine(tmp_path, files)
    started = time.process_time()
    for _ in range(50):
        sensors.read()
    assert (time.process_time() - started) / 50 < 0.005


def test_the_machine_at_hand_is_read_without_raising() -> None:
    reading = MachineSensors().read()
    assert reading.temperature_c is None or 0 < reading.temperature_c < 120
    assert reading.battery_percent is None or 0 <= reading.battery_percent <= 100
