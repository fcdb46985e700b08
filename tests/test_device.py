"""Device profiles: every shipped one is sane, every wrong one is refused in one line, every machine finds its own."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from edgegt import host as host_module
from edgegt.device import devices_json, explain, list_lines, resolve_device
from edgegt.errors import InputError
from edgegt.host import Host, available_bytes, board_model, cpu_name, read_host
from edgegt.profile import KINDS, Profile, load_profile, profile_names, profiles_dir

GIB = 2**30
LAPTOP = Host("Linux", "x86_64", "Intel(R) Core(TM) i5-1135G7", 4, 16 * GIB, 9 * GIB)
ORIN_NANO = "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
REQUIRED = """jetson-nano-4gb jetson-xavier-nx-8gb jetson-xavier-nx-16gb jetson-agx-xavier-32gb jetson-orin-nano-4gb
jetson-orin-nano-8gb jetson-orin-nx-8gb jetson-orin-nx-16gb jetson-agx-orin-32gb jetson-agx-orin-64gb
jetson-thor-t4000-64gb jetson-thor-t5000-128gb apple-m1-8gb apple-m1-16gb apple-m2-8gb apple-m2-16gb apple-m3-8gb
apple-m3-16gb apple-m4-16gb laptop-x86-8gb laptop-x86-16gb raspberry-pi-5-4gb raspberry-pi-5-8gb raspberry-pi-5-16gb
rtx-3060-12gb gtx-1660-6gb""".split()


def shipped(name: str) -> Profile:
    return load_profile(profiles_dir() / f"{name}.toml")


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    text = str(error.value)
    assert "\n" not in text and ";" in text, text
    return text


# ---- contract over every shipped profile


def test_the_devices_that_were_promised_are_there() -> None:
    assert set(REQUIRED) <= set(profile_names())
    assert sum(name.startswith(("rtx-", "gtx-")) for name in profile_names()) >= 8
    names = profile_names()
    assert names.index("raspberry-pi-5-8gb") < names.index("raspberry-pi-5-16gb")


@pytest.mark.parametrize("name", profile_names())
def test_shipped_profile_is_sane(name: str) -> None:
    profile = shipped(name)
    assert profile.name == name and profile.kind in KINDS
    assert name.endswith(f"-{profile.memory_bytes // GIB}gb") and profile.memory_bytes % GIB == 0
    assert 0 < profile.budget_bytes <= profile.memory_bytes - profile.reserved_bytes
    assert profile.rho == 0.5 and 60 <= profile.ceiling_c <= 100
    assert 10e9 <= profile.bandwidth_bytes_per_s <= 2e12
    assert 10e6 <= profile.storage_bytes_per_s < profile.bandwidth_bytes_per_s
    assert profile.unified == (profile.kind != "geforce")
    rates = profile.rates_flops_per_s
    assert 1e11 <= rates["fp32"] <= rates.get("fp16", rates["fp32"]) <= rates.get("int8", 1e16)
    assert profile.power.default and 3 <= profile.power.watts <= 500
    assert profile.power.bandwidth_bytes_per_s == profile.bandwidth_bytes_per_s
    assert all(0.05 < mode.rate_scale < 2.5 for mode in profile.power_modes)
    assert profile.rate("int8") <= max(rates.values()) and profile.rate("bf16") > 0


@pytest.mark.parametrize("name", profile_names())
def test_every_number_of_a_shipped_profile_has_a_graded_source(name: str) -> None:
    profile = shipped(name)
    for key, text in profile.sources.items():
        assert re.match(r"S: |T: |K, not seen: ", text), (name, key, text)
    numbers = re.findall(r'^\w+ = (?:"\d[\d.]* \S+"|[\d.]+)$', profile.path.read_text(encoding="utf-8"), re.M)
    assert len(profile.sources) == len([line for line in numbers if not line.startswith(("name", "title"))])


@pytest.mark.parametrize("name", profile_names())
def test_explain_shows_every_number_with_its_source_within_100_columns(name: str) -> None:
    profile = shipped(name)
    text = explain(profile)
    flat = " ".join(text.split())
    for key, source in profile.sources.items():
        assert key in text and " ".join(source.split()) in flat, key
    assert all(len(line) <= 100 for line in text.splitlines() if not line.startswith("File: "))


def test_datasheet_numbers_arrive_in_base_units() -> None:
    orin = shipped("jetson-orin-nano-8gb")
    assert (orin.memory_bytes, orin.budget_bytes) == (8 * GIB, 5 * GIB)
    assert orin.rates_flops_per_s["int8"] == 20e12 and orin.bandwidth_bytes_per_s == 68e9
    modes = {mode.name: mode for mode in orin.power_modes}
    assert orin.power.name == "15W" and orin.rate("int8") == 20e12
    assert modes["MAXN_SUPER"].bandwidth_bytes_per_s == 102e9
    assert round(modes["MAXN_SUPER"].rate_scale * 20) == 33
    agx = shipped("jetson-agx-orin-64gb")
    assert agx.rates_flops_per_s["int8"] == 85e12 and agx.rate("int8") == pytest.approx(0.24 * 85e12)


def test_a_missing_number_format_runs_as_a_wider_one() -> None:
    assert shipped("gtx-1660-6gb").rate("bf16") == shipped("gtx-1660-6gb").rates_flops_per_s["fp32"]
    assert shipped("apple-m1-8gb").rate("int8") == 2.6e12
    with pytest.raises(KeyError):
        shipped("apple-m1-8gb").rate("fp7")


def test_json_is_plain_and_complete() -> None:
    tree = devices_json()
    assert [profile["name"] for profile in tree] == profile_names()
    assert json.loads(json.dumps(tree)) == tree
    assert tree[0]["power_modes"][0]["watts"] > 0 and tree[0]["sources"]["memory.total"]


def test_the_list_has_one_line_per_device_within_100_columns() -> None:
    lines = list_lines()
    assert [line.split()[0] for line in lines[1 : 1 + len(profile_names())]] == profile_names()
    assert max(map(len, lines)) <= 100 and any("edgegt devices show" in line for line in lines)


# ---- wrong profiles: one line with file, key, value, remedy

BAD = [
    ('total = "8 GiB"', 'totl = "8 GiB"', 'memory.totl = "8 GiB"', "did you mean 'total'"),
    ("[memory]", "[memroy]", "[memroy]", "did you mean 'memory'"),
    ('total = "8 GiB"', "", "memory.total = (missing)", 'write "8 GiB"'),
    ('total = "8 GiB"', "total = 8", "memory.total = 8", 'write "8 GiB"'),
    ('total = "8 GiB"', 'total = "8"', 'memory.total = "8"', 'write "8 GiB"'),
    ('total = "8 GiB"', 'total = "8 GB/s"', 'memory.total = "8 GB/s"', "unit 'GB/s' is wrong"),
    ('total = "8 GiB"', 'total = "4 GB of RAM"', 'memory.total = "4 GB of RAM"', "GiB or MiB"),
    ('total = "8 GiB"', 'total = "0 GiB"', 'memory.total = "0 GiB"', "not positive"),
    ('total = "8 GiB"', 'total = "-8 GiB"', 'memory.total = "-8 GiB"', "positive number"),
    ('total = "8 GiB"', "total = 2024-01-01", "memory.total = 2024-01-01", 'write "8 GiB"'),
    ('bandwidth = "68 GB/s"', 'bandwidth = "68 GiB"', 'memory.bandwidth = "68 GiB"', "GB/s or MB/s"),
    ('int8 = "20 TOPS"', 'int8 = "20 TFLOPS"', 'rates.int8 = "20 TFLOPS"', "TOPS or GOPS"),
    ('fp16 = "10 TFLOPS"', 'fp16 = "10 TOPS"', 'rates.fp16 = "10 TOPS"', "TFLOPS or GFLOPS"),
    ('fp16 = "10 TFLOPS"', 'fp61 = "10 TFLOPS"', 'rates.fp61 = "10 TFLOPS"', "did you mean 'fp16'"),
    ('fp16 = "10 TFLOPS"', 'fp16 = "10 TFLOPS"\ndispatch = "2 s"', 'rates.dispatch = "2 s"', "us or ms"),
    ('fp16 = "10 TFLOPS"', 'fp16 = "10 TFLOPS"\noptimizer = "9 MB/s"', 'rates.optimizer = "9 MB/s"', "M/s or G/s"),
    ("unified = true", "unified = true\ncalibrated = 1", "device.calibrated = 1", "true or false"),
    ('watts = "7 W"', 'watts = "7 kW"', 'power.7W.watts = "7 kW"', "unit 'kW' is wrong"),
    ('watts = "7 W"', 'wats = "7 W"', 'power.7W.wats = "7 W"', "did you mean 'watts'"),
    ('name = "7W"', 'name = "15W"', 'power 2, name = "15W"', "own name"),
    ('name = "7W"', 'name = "7 W"', 'power 1, name = "7 W"', "letters"),
    ("default = true", "", "power, default = []", "default = true"),
    ("default = true", "default = 1", "power.15W.default = 1", "true or false"),
    ("default = true", 'default = true\nbandwidth = "9 GB/s"', 'power.15W.bandwidth = "9 GB/s"', "remove"),
    ("rate_scale = 0.65", "rate_scale = 0", "power.7W.rate_scale = 0", "above 0"),
    ("rho = 0.5", "rho = 0", "budget.rho = 0", "at most 1"),
    ("rho = 0.5", "rho = 2", "budget.rho = 2", "at most 1"),
    ("rho = 0.5", "rho = true", "budget.rho = true", "write 0.5"),
    ("rho = 0.5", "rho = nan", "budget.rho = NaN", "write 0.5"),
    ('memory = "5 GiB"', 'memory = "6 GiB"', 'budget.memory = "6 GiB"', "lower it"),
    ('ceiling = "85 C"', 'ceiling = "85 F"', 'thermal.ceiling = "85 F"', "unit 'F' is wrong"),
    ('kind = "jetson"', 'kind = "jetsn"', 'device.kind = "jetsn"', "did you mean 'jetson'"),
    ("unified = true", 'unified = "yes"', 'device.unified = "yes"', "true or false"),
    ('name = "jetson-orin-nano-8gb"', 'name = "other"', 'device.name = "other"', 'write "jetson-orin-nano-8gb"'),
    ('device_tree = ["Orin Nano"]', 'device_tree = "Orin"', 'match.device_tree = "Orin"', "list of texts"),
    ('memory.total = "S: datasheet DS-11105-001"', "", "sources.memory.total = (missing)", "add memory.total"),
    ('memory.total = "S: ', 'memory.totall = "S: ', "sources.memory.totall = ", "did you mean 'memory.total'"),
    ('memory.total = "S: datasheet DS-11105-001"', 'memory.total = ""', 'sources.memory.total = ""', "datasheet"),
]


@pytest.mark.parametrize(("good", "bad", "shown", "remedy"), BAD, ids=[shown for _, _, shown, _ in BAD])
def test_a_wrong_profile_is_refused_in_one_line(tmp_path: Path, good: str, bad: str, shown: str, remedy: str) -> None:
    text = (profiles_dir() / "jetson-orin-nano-8gb.toml").read_text(encoding="utf-8")
    assert good in text
    path = tmp_path / "jetson-orin-nano-8gb.toml"
    path.write_text(text.replace(good, bad, 1), encoding="utf-8")
    with pytest.raises(InputError) as error:
        load_profile(path)
    message = one_line(error)
    assert message.startswith(f"{path}: {shown}") and remedy in message, message


def test_a_file_that_is_not_a_profile_is_refused_in_one_line(tmp_path: Path) -> None:
    for name, content in (("a.toml", b"[memory\n"), ("b.toml", b"\xff\xfe"), ("c.toml", b"power = 3"), ("d.toml", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError) as error:
            load_profile(tmp_path / name)
        assert name in one_line(error)
    for path in (tmp_path / "absent.toml", tmp_path):
        with pytest.raises(InputError) as error:
            load_profile(path)
        assert "cannot be read" in one_line(error)


# ---- which profile --device means


def board(model: str, gib: float) -> Host:
    return replace(LAPTOP, machine="aarch64", cpu="aarch64", model=model, total_bytes=int(gib * GIB))


@pytest.mark.parametrize(
    ("model", "visible", "name"),
    [
        (ORIN_NANO, 7.4, "jetson-orin-nano-8gb"),
        ("NVIDIA Orin Nano Developer Kit", 3.4, "jetson-orin-nano-4gb"),
        ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", 15.3, "jetson-orin-nx-16gb"),
        ("NVIDIA Jetson Orin NX Engineering Reference Developer Kit", 7.4, "jetson-orin-nx-8gb"),
        ("NVIDIA Jetson AGX Orin Developer Kit", 61.3, "jetson-agx-orin-64gb"),
        ("NVIDIA Jetson AGX Orin Developer Kit", 29.9, "jetson-agx-orin-32gb"),
        ("NVIDIA Jetson Xavier NX Developer Kit", 6.8, "jetson-xavier-nx-8gb"),
        ("Jetson-AGX", 31.2, "jetson-agx-xavier-32gb"),
        ("NVIDIA Jetson Nano Developer Kit", 3.9, "jetson-nano-4gb"),
        ("NVIDIA Jetson AGX Thor Developer Kit", 122.8, "jetson-thor-t5000-128gb"),
    ],
)
def test_a_jetson_knows_itself_by_model_and_memory(model: str, visible: float, name: str) -> None:
    for text in ("jetson", "auto", name):
        found = resolve_device(text, board(model, visible))
        assert found.profile.name == name and found.on_board
    notice = resolve_device("auto", board(model, visible)).notice
    assert notice is not None and name in notice and model in notice


def test_jetson_elsewhere_is_the_orin_nano_and_says_so() -> None:
    expected = "not on a Jetson: using the profile of jetson-orin-nano-8gb; time is predicted for it, and measured here"
    for host in (LAPTOP, board("Raspberry Pi 5 Model B Rev 1.0", 7.9)):
        found = resolve_device("jetson", host)
        assert (found.profile.name, found.notice, found.on_board) == ("jetson-orin-nano-8gb", expected, False)
    unknown = resolve_device("jetson", board("NVIDIA Jetson TX2 Developer Kit", 7.7))
    assert not unknown.on_board and "no profile for the board 'NVIDIA Jetson TX2" in (unknown.notice or "")


def test_auto_tells_cards_apart_by_their_whole_name_and_memory() -> None:
    def card(name: str, gib: float) -> str:
        return resolve_device("auto", replace(LAPTOP, cuda_name=name, cuda_bytes=int(gib * GIB))).profile.name

    assert card("NVIDIA GeForce RTX 3060", 11.7) == "rtx-3060-12gb"
    assert card("NVIDIA GeForce RTX 3060 Laptop GPU", 5.8) == "rtx-3060-laptop-6gb"
    assert card("NVIDIA GeForce RTX 4070 Ti", 11.7) == "laptop-x86-16gb"
    small = resolve_device("auto", replace(LAPTOP, cuda_name="NVIDIA GeForce RTX 3060", cuda_bytes=8 * GIB))
    assert small.on_board and "12.00 GiB" in (small.notice or ""), "the 8 GB variant must be told about"


def test_auto_finds_apple_raspberry_and_laptops() -> None:
    def named(host: Host) -> tuple[str, bool]:
        found = resolve_device("auto", host)
        assert found.notice is not None and found.notice.startswith("auto: ") and found.profile.name in found.notice
        return found.profile.name, found.on_board

    apple = replace(LAPTOP, system="Darwin", machine="arm64", cpu="Apple M1", total_bytes=8 * GIB)
    assert named(apple) == ("apple-m1-8gb", True)
    assert named(replace(apple, cpu="Apple M1 Pro", total_bytes=32 * GIB)) == ("apple-m1-pro-32gb", True)
    assert named(board("Raspberry Pi 5 Model B Rev 1.0", 3.95)) == ("raspberry-pi-5-4gb", True)
    assert named(LAPTOP) == ("laptop-x86-16gb", False)
    assert named(replace(LAPTOP, total_bytes=int(7.6 * GIB))) == ("laptop-x86-8gb", False)
    assert named(replace(LAPTOP, limit_bytes=6 * GIB)) == ("laptop-x86-8gb", False)


def test_a_path_is_read_and_a_name_elsewhere_gets_a_notice(tmp_path: Path) -> None:
    text = (profiles_dir() / "raspberry-pi-5-8gb.toml").read_text(encoding="utf-8")
    path = tmp_path / "mine.toml"
    path.write_text(text.replace('name = "raspberry-pi-5-8gb"', 'name = "mine"'), encoding="utf-8")
    assert resolve_device(str(path), board("Raspberry Pi 5 Model B", 7.9)).on_board
    away = resolve_device(str(path), LAPTOP)
    assert away.profile.path == path and not away.on_board and "'mine'" in (away.notice or "")
    assert resolve_device("rtx-3060-12gb", LAPTOP).notice is not None


def test_an_unknown_name_gets_the_nearest_and_how_to_list() -> None:
    cases = (("jetson-orin-nano-8g", "jetson-orin-nano-8gb"), ("RTX-3060-12GB", "rtx-3060-12gb"), ("jetsn", "jetson"))
    for text, near in cases:
        with pytest.raises(InputError) as error:
            resolve_device(text, LAPTOP)
        message = one_line(error)
        assert f"'{text}'" in message and f"did you mean '{near}'" in message and "`edgegt devices`" in message
    with pytest.raises(InputError) as error:
        resolve_device("zzz", LAPTOP)
    assert "did you mean" not in one_line(error)


# ---- the machine at hand, made of files


def make_group(folder: Path, names: tuple[str, str, str], limit: str, used: int, reclaimable: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {reclaimable}\n")


def test_board_model_drops_the_nul(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.write_bytes(ORIN_NANO.encode() + b"\0")
    assert board_model(model) == ORIN_NANO
    model.write_bytes(b"\0")
    assert board_model(model) is None and board_model(tmp_path / "absent") is None


def test_available_memory_is_the_least_of_kernel_and_control_groups(tmp_path: Path) -> None:
    meminfo, cgroup, root = tmp_path / "meminfo", tmp_path / "cgroup", tmp_path / "fs"
    meminfo.write_text(f"MemTotal: {8 * 2**20} kB\nMemFree: 100 kB\nMemAvailable: {5 * 2**20} kB\n")
    assert available_bytes(meminfo, tmp_path / "absent", root) == 5 * GIB

    cgroup.write_text("0::/outer/inner\n")
    make_group(root / "outer" / "inner", host_module._V2_FILES, "max", GIB, 0)
    assert available_bytes(meminfo, cgroup, root) == 5 * GIB
    make_group(root / "outer", host_module._V2_FILES, str(4 * GIB), 2 * GIB, GIB)
    assert available_bytes(meminfo, cgroup, root) == 3 * GIB, "page cache in the group's use is free to take"

    cgroup.write_text("9:name=systemd:/\n4:cpu,memory:/gone/in/container\n0::/\n")
    make_group(root / "memory", host_module._V1_FILES, str(2 * GIB), 3 * GIB, 0)
    assert available_bytes(meminfo, cgroup, root) == 0
    make_group(root / "memory", host_module._V1_FILES, "9223372036854771712", 3 * GIB, 0)
    assert available_bytes(meminfo, cgroup, root) == 5 * GIB


def test_read_host_puts_the_facts_together(tmp_path: Path) -> None:
    model, cpuinfo, meminfo, cgroup = (tmp_path / name for name in ("model", "cpuinfo", "meminfo", "cgroup"))
    model.write_bytes(ORIN_NANO.encode() + b"\0")
    cpuinfo.write_text("processor\t: 0\nmodel name\t: ARMv8 Processor rev 1 (v8l)\n")
    meminfo.write_text(f"MemTotal: {7607 * 1024} kB\nMemAvailable: {5120 * 1024} kB\n")
    cgroup.write_text("0::/\n")
    make_group(tmp_path / "fs", host_module._V2_FILES, str(4 * GIB), GIB, 0)
    host = read_host(model, cpuinfo, meminfo, cgroup, tmp_path / "fs")
    assert (host.model, host.cpu) == (ORIN_NANO, "ARMv8 Processor rev 1 (v8l)")
    assert (host.total_bytes, host.available_bytes) == (7607 * 2**20, 3 * GIB)
    assert (host.limit_bytes, host.usable_bytes) == (4 * GIB, 4 * GIB)
    found = resolve_device("jetson", host)
    assert found.profile.name == "jetson-orin-nano-8gb" and found.on_board, "a container does not change the board"


def test_this_machine_can_be_read() -> None:
    host = read_host()
    assert 0 < host.available_bytes <= host.total_bytes and host.cores >= 1 and host.cpu == cpu_name()
    assert json.loads(json.dumps(host.to_json()))["total_bytes"] == host.total_bytes
    assert resolve_device("auto", host).profile.name in profile_names()
