"""The tool that breaks runs off: what it counts, and where it writes it. The trials themselves run for an hour."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
DOCUMENT = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def tool(name: str) -> ModuleType:
    return importlib.import_module(name)


def test_every_way_has_its_place_in_the_document() -> None:
    reliability = tool("reliability")
    for way in reliability.WAYS:
        text = reliability.put_in(DOCUMENT, way, "| new |")
        assert f"<!-- {way} -->\n| new |\n<!-- end -->" in text
        assert text.count("<!-- end -->") == DOCUMENT.count("<!-- end -->")
    with pytest.raises(ValueError, match="no place for 'nothing'"):
        reliability.put_in(DOCUMENT, "nothing", "")


def test_kills_are_counted_by_what_they_hit() -> None:
    kill = tool("reliability_kill")
    found = [
        kill.Kill("training", 7, 5, True), kill.Kill("training", 9, None, False, "patch differ"),
        kill.Kill("exporting", 240, 240, True), kill.Kill("exporting", 240, None, True),
    ]  # fmt: skip
    lines = kill.table(found).splitlines()
    assert "| training | 2 | 1 | 1 | 0 | 1 |" in lines
    assert "| exporting | 2 | 1 | 0 | 1 | 2 |" in lines
    assert lines[-1] == "| all | 4 | 2 | 1 | 1 | 3 |"


def test_a_disk_is_full_from_a_write_on(tmp_path: Path) -> None:
    from edgegt.disk import DiskError, write_text

    faults = tool("reliability_faults")
    whole = faults.Disk()
    with faults.on(whole):
        for name in "abc":
            write_text(tmp_path / name, name * 10)
    assert [name.split(".")[1] for name in whole.writes] == ["a", "b", "c"]
    with faults.on(faults.Disk(2)):
        write_text(tmp_path / "a", "new")
        for name in "bc":
            with pytest.raises(DiskError, match="No space left"):
                write_text(tmp_path / name, "new")
    assert [(tmp_path / name).read_text() for name in "abc"] == ["new", "b" * 10, "c" * 10]


def test_full_disks_are_counted_by_kind_of_file() -> None:
    faults = tool("reliability_faults")
    found = [
        faults.Full(".state-000003.safetensors.1.tmp", "edgegt: ...", True, True, ""),
        faults.Full(".plan-1.json.1.tmp", "edgegt: ...", True, True, ""),
        faults.Full(".0123456789abcdef-7.safetensors.1.tmp", "two lines", False, False, "said 2 lines"),
    ]
    lines = faults.table_of_full(found).splitlines()
    assert "| checkpoint | 1 | 1 | 1 | 0 | 1 |" in lines and "| plan | 1 | 1 | 1 | 0 | 1 |" in lines
    assert "| tensors at rest | 1 | 0 | 0 | 1 | 0 |" in lines and lines[-1] == "| all | 3 | 2 | 2 | 1 | 2 |"


def test_a_slope_is_that_of_the_line_through_the_points() -> None:
    memory = tool("reliability_memory")
    assert memory._slope([(step, 3 * step + 100) for step in range(50)]) == pytest.approx(3)
    assert memory._slope([(step, 100 + step % 2) for step in range(50)]) == pytest.approx(0, abs=0.01)
