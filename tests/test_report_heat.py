"""Heat, power and events in the report: drawn where they are known, nowhere else, and never in the way of the page."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from edgegt.report import write_report
from edgegt.report.events import MOST_OF_A_KIND, MOST_ROWS, event_rows, marked_steps
from fake_run import EVENTS, fake_run, record_heat

SECTIONS = ("<h2>Heat and power</h2>", "<h2>Heat</h2>", "<h2>Power</h2>", "<h2>What happened</h2>")
MARKS = ("step back or resume", ">pause</span>")


def report_of(folder: Path) -> Any:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)


def page_of(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def charts_of(page: str) -> dict[str, ElementTree.Element]:
    """The pictures of a page by name."""
    found = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    trees = [ElementTree.fromstring(picture) for picture in found]
    return {str(tree.get("class")).removeprefix("chart "): tree for tree in trees}


def without(folder: Path, *keys: str) -> None:
    """Remove columns of metrics.jsonl."""
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    kept = ({key: value for key, value in line.items() if key not in keys} for line in lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))


def run_with_heat(folder: Path, **settings: Any) -> Path:
    fake_run(folder, layers=1, rounds=1)
    record_heat(folder, **settings)
    return folder


def test_a_run_without_sensors_and_events_shows_nothing_of_them(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", layers=1, rounds=1)
    write_report(folder)
    page, report = page_of(folder), report_of(folder)
    assert not [words for words in (*SECTIONS, *MARKS) if words in page]
    assert report["events"] == []
    assert report["temperature"] == {"max_c": None, "ceiling_c": None, "paused_s": 0}


def test_heat_power_and_events_are_drawn_and_told(tmp_path: Path) -> None:
    folder = run_with_heat(tmp_path / "run")
    write_report(folder)
    page, report = page_of(folder), report_of(folder)
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    hottest = max(line["temperature_c"] for line in found if "temperature_c" in line)
    assert report["temperature"] == {"max_c": hottest, "ceiling_c": 80.0, "paused_s": pytest.approx(43.8)}
    assert report["events"] == EVENTS
    assert [words in page for words in SECTIONS] == [True, False, False, True]
    assert f"At most {hottest:.1f} °C, the ceiling is 80 °C. 44 s of rest for heat." in page
    assert {"temperature", "power", "loss"} <= set(charts_of(page))
    assert "on battery at 18 %: waited for mains" in page and "12 min 03 s" in page
    assert "<b>loss</b>" not in page and "&lt;b&gt;loss" in page
    assert all(words in page for words in MARKS)


@pytest.mark.parametrize(("missing", "section", "chart"), [
    ("power_w", SECTIONS[1], "temperature-wide"), ("temperature_c", SECTIONS[2], "power-wide"),
])  # fmt: skip
def test_one_picture_alone_takes_the_whole_width(missing: str, section: str, chart: str, tmp_path: Path) -> None:
    folder = run_with_heat(tmp_path / "run")
    without(folder, missing)
    write_report(folder)
    page = page_of(folder)
    assert [words for words in SECTIONS if words in page] == [section, SECTIONS[3]]
    assert {"temperature", "power", "temperature-wide", "power-wide"} & set(charts_of(page)) == {chart}


def marks_in(chart: ElementTree.Element, colour: str) -> int:
    """Markers of one colour in a picture."""
    return sum(element.tag == "use" and colour in str(element.get("style")) for element in chart.iter())


def test_pauses_are_marked_in_the_temperature_or_else_in_the_loss(tmp_path: Path) -> None:
    folder = run_with_heat(tmp_path / "run")
    write_report(folder)
    charts = charts_of(page_of(folder))
    assert (marks_in(charts["temperature"], "limit"), marks_in(charts["loss"], "limit")) == (3, 0)
    without(folder, "temperature_c")
    (folder / "profile.json").unlink()
    write_report(folder)
    charts = charts_of(page_of(folder))
    assert marks_in(charts["loss"], "limit") == 3
    assert marks_in(charts["loss"], "ink") == 2 + 2, "a step back, a resume, and the held-out loss twice"


@pytest.mark.parametrize("damage", [
    b"", b"\xff\xfe\x00", b"[1]\n3\nnull\n{", b'{"kind": 3, "text": "x"}\n{"kind": "heat"}',
    b'{"kind": "", "text": "x"}\n{"text": "x"}', "folder", "profile",
])  # fmt: skip
def test_damaged_events_and_profiles_do_not_break_the_report(damage: bytes | str, tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", layers=1, rounds=1, steps=20)
    if damage == "folder":
        (folder / "events.jsonl").mkdir()
    elif damage == "profile":
        (folder / "profile.json").write_text('{"ceiling_c": ')
    elif isinstance(damage, bytes):
        (folder / "events.jsonl").write_bytes(damage)
    write_report(folder)
    assert report_of(folder)["events"] == []
    assert SECTIONS[3] not in page_of(folder)


def test_odd_values_of_events_and_sensors_are_left_out(tmp_path: Path) -> None:
    folder = run_with_heat(tmp_path / "run")
    lines = [
        {"kind": "heat", "text": "two\nlines", "step": None, "paused_s": "long", "at_s": True},
        {"kind": "new kind", "text": "z" * 5000, "step": math.nan, "other": [1]},
    ]
    (folder / "events.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + '\n{"kind": "hea')
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 200, "temperature_c": None, "power_w": "NaN", "throttled": []}) + "\n")
    write_report(folder)
    assert report_of(folder)["events"] == [
        {"kind": "heat", "text": "two lines"}, {"kind": "new kind", "text": "z" * 300},
    ]  # fmt: skip
    assert "two lines" in page_of(folder)


def test_a_single_reading_and_events_before_the_first_step_render(tmp_path: Path) -> None:
    folder = run_with_heat(tmp_path / "run", every=200)
    write_report(folder)
    assert {"temperature", "power"} <= set(charts_of(page_of(folder)))
    (folder / "metrics.jsonl").unlink()
    write_report(folder)
    page = page_of(folder)
    assert [words for words in SECTIONS if words in page] == [SECTIONS[3]]


def event(kind: str, step: int, paused_s: float = 0.0) -> dict[str, Any]:
    return {"kind": kind, "text": f"{kind} at {step}", "step": step, "paused_s": paused_s}


def test_a_kind_that_happened_often_is_one_row_in_its_place() -> None:
    often = [event("heat", step, 2.0) for step in range(10, 10 + MOST_OF_A_KIND + 1)]
    events = [event("resume", 1), *often, event("mains", 11, 90.0), event("rollback", 50)]
    assert event_rows(events) == [
        ("1", "resume at 1", ""), ("10–14", "5 × heat, first: heat at 10", "10 s"),
        ("11", "mains at 11", "1 min 30 s"), ("50", "rollback at 50", ""),
    ]  # fmt: skip
    assert len(event_rows(often[:-1])) == MOST_OF_A_KIND
    many = event_rows([event(f"kind {index}", index) for index in range(MOST_ROWS + 5)])
    assert len(many) == MOST_ROWS + 1
    assert many[-1] == ("", "and 5 more, in events.jsonl", "")


def test_marks_are_of_their_kinds_in_order_and_apart() -> None:
    events = [event("heat", 90), event("heat", 10), event("heat", 10), event("nan", 50), {"kind": "heat", "text": ""}]
    assert marked_steps(events, ("heat",), 100) == [10, 90]
    assert len(marked_steps([event("heat", step) for step in range(100_000)], ("heat",), 100_000)) <= 201
