"""Calibrating writes a profile that is valid, recognised and read back as measured, and replaces nothing unasked."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgegt import calibrate as module
from edgegt.calibrate import calibrate, findings_text, storage_read
from edgegt.calibrated import Measured, Place, profile_text
from edgegt.cli import main
from edgegt.device import explain, resolve_device
from edgegt.errors import InputError
from edgegt.host import Host, read_host
from edgegt.profile import load_profile, profiles_dir
from edgegt.rates import Rates, of_profile
from edgegt.units import GIB, MIB

LAPTOP = Host("Linux", "x86_64", 'A "quoted" CPU @ 2.40GHz', 4, 16 * GIB, 9 * GIB)
RATES = Rates(3.1e11, 2.2e11, 8.7e10, 6.5e10, 1.4e11, 2.3e9, 9.1e8, 1.5e8, 2.9e7, 1.8e-3, 8.5e-5, 4.4e8)
ON_CPU = Measured("torch", 1024, RATES, {}, 1.2e10, 1.9e9, "read", None, 0, False, "")
CARD = replace(
    ON_CPU, half={"bf16": 6.1e13, "fp16": 6.2e13}, gpu="NVIDIA GeForce RTX 9999", gpu_bytes=12 * GIB, capability="8.6"
)


def place(host: Host = LAPTOP, nearest: str = "laptop-x86-16gb", free_bytes: int = 100 * GIB) -> Place:
    return Place(host, load_profile(profiles_dir() / f"{nearest}.toml"), free_bytes, "2026-01-02")


def written(folder: Path, measured: Measured, where: Place) -> Path:
    path = folder / "mine.toml"
    path.write_text(profile_text("mine", measured, where), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return calibrate(tmp_path_factory.mktemp("calibrated") / "this one.toml", quick=True, threads=1)


def test_the_profile_is_read_back_as_measured(found: dict[str, Any]) -> None:
    profile = load_profile(Path(found["profile"]))
    assert profile.calibrated and profile.name == "this one"
    for name, rate in vars(of_profile(profile)).items():
        assert rate == pytest.approx(found["measured"][name], rel=1e-3) and rate > 0, name
    assert profile.bandwidth_bytes_per_s == pytest.approx(found["measured"]["bandwidth"], rel=1e-3)
    assert profile.storage_bytes_per_s > 0


def test_every_number_says_whether_it_was_measured(found: dict[str, Any]) -> None:
    profile = load_profile(Path(found["profile"]))
    assert all(text.startswith(("measured by edgegt calibrate, ", "carried over from profile "))
               for text in profile.sources.values())  # fmt: skip
    assert {"power.default.watts", "thermal.ceiling"} <= set(found["carried_over"])
    assert all(key not in found["carried_over"] for key in profile.sources if key.startswith("rates."))


def test_the_device_recognises_its_own_profile_and_explains_it(found: dict[str, Any]) -> None:
    resolved = resolve_device(found["profile"], read_host())
    assert resolved.on_board and resolved.notice is None
    text = explain(resolved.profile)
    assert all(key in text for key in resolved.profile.sources)


def test_findings_are_plain_and_fit_a_terminal(found: dict[str, Any]) -> None:
    assert json.loads(json.dumps(found)) == found
    text = findings_text(found)
    assert found["compared_with"] in text and "carried over" in text and found["storage_how"] in text
    assert all(len(line) <= 100 for line in text.splitlines()[:14])
    assert "'" in text.splitlines()[-1], "a name with a space is quoted for the shell"


def test_a_file_that_exists_is_kept_unless_forced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "here.toml"
    path.write_text("mine")
    with pytest.raises(InputError, match=r"here\.toml' exists and is kept; give --force"):
        calibrate(path, quick=True)
    assert path.read_text() == "mine"
    monkeypatch.setattr(module, "_measure", lambda effort: ON_CPU)
    calibrate(path, force=True, threads=1)
    assert load_profile(path).calibrated and list(tmp_path.iterdir()) == [path]


def test_a_name_that_device_would_not_take_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must end in \.toml"):
        calibrate(tmp_path / "mine.txt", quick=True)


def test_the_command_prints_only_json_and_refuses_with_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_measure", lambda effort: ON_CPU)
    words = ["calibrate", "--quick", "--json", "--output", str(tmp_path / "a.toml")]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["measured"]["int8"] == RATES.int8
    assert main(words) == 2
    assert "--force" in capsys.readouterr().err


def test_a_processor_keeps_its_memory_and_a_name_with_quotes(tmp_path: Path) -> None:
    profile = load_profile(written(tmp_path, ON_CPU, place()))
    assert profile.match["cpu"] == (LAPTOP.cpu,) and profile.kind == "laptop" and profile.unified
    assert (profile.memory_bytes, profile.budget_bytes) == (16 * GIB, 9 * GIB)
    assert vars(of_profile(profile)) == pytest.approx(vars(RATES), rel=1e-4)
    assert resolve_device(str(profile.path), LAPTOP).on_board


def test_a_card_is_a_device_of_its_own(tmp_path: Path) -> None:
    profile = load_profile(written(tmp_path, CARD, place()))
    assert (profile.kind, profile.unified, profile.memory_bytes) == ("geforce", False, 12 * GIB)
    assert profile.compute_capability == "8.6" and profile.rates_flops_per_s["bf16"] == 6.1e13
    assert resolve_device(str(profile.path), replace(LAPTOP, cuda_name=CARD.gpu, cuda_bytes=12 * GIB)).on_board
    board = load_profile(written(tmp_path, replace(CARD, gpu_unified=True), place(nearest="jetson-orin-nano-8gb")))
    assert (board.kind, board.unified, board.memory_bytes) == ("jetson", True, 16 * GIB)
    assert board.power.name == "15W" and [mode.name for mode in board.power_modes] == ["15W"]


def test_rates_of_any_size_are_written_so_that_they_can_be_read(tmp_path: Path) -> None:
    for factor in (1e-5, 1.0, 1e4):
        rates = Rates(**{key: value * (factor if value > 1 else 1 / factor) for key, value in vars(RATES).items()})
        profile = load_profile(written(tmp_path, replace(ON_CPU, rates=rates), place()))
        assert of_profile(profile).float32 == pytest.approx(rates.float32, rel=0.01)


def test_the_cache_is_at_most_half_of_the_free_disk(tmp_path: Path) -> None:
    assert load_profile(written(tmp_path, ON_CPU, place(free_bytes=2 * GIB))).cache_bytes == GIB


def test_storage_is_read_and_the_file_removed(tmp_path: Path) -> None:
    rate, how = storage_read(tmp_path, 8 * MIB)
    assert rate is not None and rate > 0 and "8 MiB" in how and "page cache" in how
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_said_and_the_number_carried_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10, 10, 20 * MIB))
    rate, how = storage_read(tmp_path, 256 * MIB)
    assert rate is None and "nearly full" in how
    profile = load_profile(written(tmp_path, replace(ON_CPU, storage=None, storage_how=how), place()))
    assert profile.storage_bytes_per_s == 2e9
    assert profile.sources["storage.read"].startswith("carried over from profile laptop-x86-16gb: not measured")
