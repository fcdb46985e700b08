"""The report reads any run folder, whole or not, and writes the contract and one page that fetches nothing."""

from __future__ import annotations

import html
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from edgegt.cost import BatchShape
from edgegt.errors import EdgegtError, InputError
from edgegt.memory import Setting, Surroundings, peak_terms
from edgegt.report import write_report
from edgegt.report.charts import TERM_COLOURS
from edgegt.report.words import TERM_MEANINGS
from edgegt.trace import trace
from edgegt.units import MIB, format_bytes
from fake_run import EXAMPLES, fake_run, record_problem
from tiny_models import FAMILIES

CONTRACT = {
    "device", "model", "budget", "predicted", "measured", "eval", "rounds", "fallbacks", "version",
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run folder with its report written."""
    folder = fake_run(tmp_path_factory.mktemp("report") / "run")
    assert write_report(folder) == folder / "report.html"
    return folder


def report_of(folder: Path) -> Any:
    """report.json, refusing the NaN and Infinity that JSON does not have."""
    return json.loads((folder / "report.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)


def page_of(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def text_of(page: str) -> str:
    """What a reader sees of the page outside its pictures: no style, no tags, entities resolved."""
    bare = re.sub(r"<(style|svg).*?</\1>", " ", page, flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]+>", " ", bare))


def change(folder: Path, name: str, **values: Any) -> None:
    """Replace top-level keys of a JSON file of the run folder."""
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def pictures(page: str) -> list[str]:
    return re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)


class Reader(HTMLParser):
    """Tags and attributes of the page, and whether every element is closed in order."""

    VOID = ("meta", "br", "link", "img", "input", "hr")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_report_json_has_the_keys_and_types_of_the_contract(whole: Path) -> None:
    report = report_of(whole)
    numbers = {
        "budget": {"rho": float, "flops": int, "memory_bytes": int},
        "predicted": {"flops_ratio": float, "peak_bytes": int, "step_s": float},
        "measured": {"flops_ratio": float, "peak_bytes": int, "step_s": float, "tokens_per_s": float},
    }
    for section, keys in numbers.items():
        for key, kind in keys.items():
            assert type(report[section][key]) is kind, (section, key)
    for moment in ("before", "after"):
        assert type(report["eval"][moment]["loss"]) is float
        assert type(report["eval"][moment]["tokens"]) is int
    assert len(report["rounds"]) == 3
    for found in report["rounds"]:
        assert found["selected"] and all(type(name) is str for name in found["selected"])
        assert found["recompute"] == []
        assert type(found["micro_batch"]) is int
    assert all(type(line) is str for line in report["fallbacks"])
    assert type(report["version"]) is str


def test_report_json_says_what_the_run_folder_says(whole: Path) -> None:
    report, run = report_of(whole), json.loads((whole / "run.json").read_text())
    for key in ("device", "model", "fallbacks", "version", "budget", "measured", "predicted", "full_flops"):
        assert report[key] == run[key], key
    evaluation = json.loads((whole / "eval.json").read_text())
    assert report["eval"] == {moment: evaluation[moment] for moment in ("before", "after")}
    plans = [json.loads((whole / f"plan-{index}.json").read_text()) for index in range(3)]
    assert [found["selected"] for found in report["rounds"]] == [plan["selected"] for plan in plans]
    assert (report["finished"], report["steps"]) == (True, 200)


def change_device(folder: Path, on_board: bool) -> None:
    change(folder, "run.json", device={"name": "jetson-orin-nano-8gb", "on_board": on_board})


@pytest.mark.parametrize(("on_board", "seconds"), [(True, 66.4), (False, 200 * 0.082)])
def test_energy_is_the_devices_power_times_the_devices_time(on_board: bool, seconds: float, tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", layers=1, rounds=1)
    change_device(folder, on_board)
    write_report(folder)
    report, text, wh = report_of(folder), text_of(page_of(folder)), 15.0 * seconds / 3600
    assert report["energy"]["seconds"] == pytest.approx(seconds)
    assert report["energy"]["wh"] == pytest.approx(wh)
    assert report["energy"]["full_wh"] == pytest.approx(wh / 0.481)
    assert report["co2"]["g"] == pytest.approx(wh * report["co2"]["kg_per_kwh"])
    assert report["co2"]["full_g"] == pytest.approx(wh / 0.481 * report["co2"]["kg_per_kwh"])
    predicted = "predicted for the device: the profile's power mode 15W and its predicted step time"
    basis = "the profile's power mode 15W × measured time" if on_board else predicted
    assert report["energy"]["basis"] == basis
    assert f"Energy (15 W): {basis}." in text
    assert ("Energy, predicted" in text) == ("Time on the device, predicted" in text) == (not on_board)


def test_energy_off_the_board_is_not_known_without_a_step_time_of_the_device(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", layers=1, rounds=1, steps=4)
    change(folder, "run.json", predicted={"device_step_s": 0.0})
    write_report(folder)
    assert report_of(folder)["energy"]["wh"] is report_of(folder)["energy"]["basis"] is None
    assert "Energy (" not in text_of(page_of(folder))


def test_rounds_are_in_their_order_beyond_nine(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", layers=2, rounds=12, steps=24)
    write_report(folder)
    assert [found["round"] for found in report_of(folder)["rounds"]] == list(range(12))


def test_the_page_fetches_nothing(whole: Path) -> None:
    page = page_of(whole)
    assert "://" not in page
    reader = Reader(page)
    assert reader.open == []
    tags = {tag for tag, _ in reader.seen}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "audio", "video", "source"}
    fetching = {"src", "srcset", "action", "data", "poster", "background", "formaction"}
    for tag, attributes in reader.seen:
        assert not fetching & set(attributes), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
        assert all((attributes.get(name) or "#").startswith("#") for name in ("href", "xlink:href")), attributes
    assert "@import" not in page
    assert all(target.startswith("#") for target in re.findall(r"url\(['\"]?([^)]*)", page))
    policy = [attributes for tag, attributes in reader.seen if attributes.get("http-equiv")]
    assert [found["http-equiv"] for found in policy] == ["Content-Security-Policy"]
    assert "default-src 'none'" in str(policy[0]["content"])
    assert page.startswith("<!doctype html>")


def test_the_page_shows_the_numbers_of_report_json(whole: Path) -> None:
    text = " ".join(text_of(page_of(whole)).split())
    assert "base-7m on Jetson Orin Nano 8GB" in text
    assert "Held-out loss 5.70 → 1.18 with 48.1 % of the FLOPs of full fine-tuning" in text
    assert "Exact match on held-out rows 3.4 % → 91.4 %, general commands 98.5 % → 97.5 %." in text
    assert "This machine is not a Jetson" in text
    assert "bitsandbytes' kernels do not run here: the torch backend is used" in text
    assert "edgegt run --device jetson --epochs 2 --rho 0.5" in text
    assert "not finished" not in text
    assert "None" not in text.replace("None .", "")
    assert "nan" not in text


def test_every_picture_is_xml_with_ids_of_its_own_and_colours_of_the_page(whole: Path) -> None:
    page = page_of(whole)
    drawn = pictures(page)
    assert len(drawn) == page.count("<svg") == 6
    ids: list[str] = []
    for picture in drawn:
        root = ElementTree.fromstring(picture)
        assert root.tag == "svg"
        assert root.attrib["aria-label"] and root.attrib["role"] == "img"
        own = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
        ids += own
        for element in root.iter():
            for key, value in element.attrib.items():
                if key == "href":
                    assert value.removeprefix("#") in own
                for target in re.findall(r"url\(#([^)]*)\)", value):
                    assert target in own
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"var\(--([\w-]+)\)", " ".join(drawn)))
    style = page[: page.index("</style>")]
    assert {"ink", "accent", "limit", "guess", "term-0"} <= used
    assert all(f"--{name}:" in style for name in used)
    assert not re.search(r"#0[0-9a-f]0[0-9a-f]01|#07[0-9a-f]{2}02", page)


def test_pictures_write_in_the_font_of_the_page(whole: Path) -> None:
    for picture in pictures(page_of(whole)):
        assert "<text" in picture
        assert "DejaVu" not in picture and "font-family" not in picture


def test_a_users_text_is_escaped(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", layers=2, steps=20)
    evil = '"><img src=x onerror=alert(2)>{{ 7 * 191 }}</td><script>alert(3)</script>'
    example = {"prompt": evil, "reference": evil, "before": evil, "after": evil}
    change(folder, "eval.json", examples=[*EXAMPLES, example])
    run = json.loads((folder / "run.json").read_text())
    change(folder, "run.json", command=f"edgegt run --data {evil}", fallbacks=[evil])
    change(folder, "run.json", model={**run["model"], "name": evil}, data={**run["data"], "name": evil})
    change(folder, "run.json", device={**run["device"], "title": evil, "notice": evil})
    change(folder, "options.json", data=evil)
    write_report(folder)
    page = page_of(folder)
    reader = Reader(page)
    assert not {"script", "img"} & {tag for tag, _ in reader.seen}
    assert not [attributes for _, attributes in reader.seen if any(name.startswith("on") for name in attributes)]
    assert reader.open == []
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; turn off the fountain" in page
    assert "{{ 7 * 191 }}" in page and "1337" not in page
    assert text_of(page).count(evil) >= 4 + 6
    for picture in pictures(page):
        ElementTree.fromstring(picture)


def test_names_of_tensors_are_escaped_in_pictures_too(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", layers=2, rounds=1, steps=20)
    plan = json.loads((folder / "plan-0.json").read_text())
    plan["candidates"][0]["name"] = "model.layers.0.<b>&$x$.weight"
    plan["selected"] = ["model.layers.0.<b>&$x$.weight"]
    (folder / "plan-0.json").write_text(json.dumps(plan))
    write_report(folder)
    page = page_of(folder)
    assert "<b>" not in page
    assert "&lt;b&gt;&amp;$x$" in page
    (tensors,) = (picture for picture in pictures(page) if 'class="chart tensors"' in picture)
    assert "<b>&$x$" in [element.text for element in ElementTree.fromstring(tensors).iter()]


def test_examples_are_shown_with_exact_answers_marked(whole: Path) -> None:
    page = page_of(whole)
    assert "<h2>Examples</h2>" in page
    assert page.count('<span class="exact">') == 4
    assert "unbolt the windows in the bridge" in text_of(page)


def test_without_examples_the_users_text_is_nowhere(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", layers=2, steps=20)
    secret = {key: f"private words {key}" for key in ("prompt", "reference", "before", "after")}
    change(folder, "eval.json", examples=[secret])
    write_report(folder)
    assert "private words prompt" in page_of(folder)
    assert "private words" not in (folder / "report.json").read_text()
    change(folder, "options.json", examples=False)
    run = json.loads((folder / "run.json").read_text())
    change(folder, "run.json", data={**run["data"], "examples": ["private words row"]})
    write_report(folder)
    for name in ("report.html", "report.json"):
        assert "private words" not in (folder / name).read_text(encoding="utf-8"), name
    assert "<h2>Examples</h2>" not in page_of(folder)
    assert "Held-out loss" in page_of(folder)


def interrupted(folder: Path) -> Path:
    """As a run that was stopped in its second round leaves its folder: no sum of its use, a line half written."""
    fake_run(folder, layers=2, rounds=2, steps=40)
    change(folder, "run.json", measured={}, finished=False)
    evaluation = json.loads((folder / "eval.json").read_text())
    (folder / "eval.json").write_text(json.dumps({"before": evaluation["before"], "examples": []}))
    lines = (folder / "metrics.jsonl").read_text().splitlines()[:31]
    (folder / "metrics.jsonl").write_text("\n".join(lines)[:-20])
    return folder


def test_an_interrupted_run_shows_what_it_used_so_far(tmp_path: Path) -> None:
    folder = interrupted(tmp_path / "run")
    write_report(folder)
    report, text = report_of(folder), text_of(page_of(folder))
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[29])
    assert (report["finished"], report["steps"]) == (False, 30)
    assert report["measured"]["flops"] == last["flops"]
    assert report["measured"]["flops_ratio"] == pytest.approx(last["flops"] / report["full_flops"])
    assert report["measured"]["peak_bytes"] == last["peak_bytes"]
    assert report["measured"]["step_s"] == pytest.approx(0.33)
    assert report["eval"]["after"] is None
    assert report["eval"]["before"]["loss"] == 5.7021
    assert report["energy"]["wh"] == pytest.approx(15 * 30 * 0.082 / 3600)
    assert report["energy"]["full_wh"] is None
    assert "This run is not finished. It was stopped after step 30" in text
    assert "no evaluation after" in text
    assert "Held-out loss 5.70 before training with 36.1 % of the FLOPs of full fine-tuning so far" in text
    assert len(pictures(page_of(folder))) == 6
    assert Reader(page_of(folder)).open == []


@pytest.mark.parametrize("kept", [(), ("options",), ("options", "plan-0"), ("options", "plan-0", "metrics")])
def test_a_run_stopped_anywhere_renders(kept: tuple[str, ...], tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", layers=2, rounds=1, steps=20)
    change(folder, "run.json", measured={}, finished=False)
    for path in folder.iterdir():
        if path.stem not in ("run", *kept):
            path.unlink()
    write_report(folder)
    report, page = report_of(folder), page_of(folder)
    assert set(report) >= CONTRACT
    assert report["eval"] == {"before": None, "after": None}
    assert len(report["rounds"]) == ("plan-0" in kept)
    assert (report["measured"]["flops"] is None) == ("metrics" not in kept)
    assert "This run is not finished." in text_of(page)
    assert Reader(page).open == []
    for picture in pictures(page):
        ElementTree.fromstring(picture)


def test_a_run_folder_with_hardly_anything_in_it_renders(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    write_report(tmp_path)
    assert set(report_of(tmp_path)) >= CONTRACT
    assert "not known" in page_of(tmp_path)


def test_numbers_that_json_cannot_hold_become_null(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", layers=2, steps=20)
    evaluation = json.loads((folder / "eval.json").read_text())
    change(folder, "eval.json", after={**evaluation["after"], "loss": math.nan, "perplexity": math.inf})
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 21, "loss": math.nan, "bytes": 1}) + "\n")
    write_report(folder)
    assert report_of(folder)["eval"]["after"]["loss"] is None
    assert len(pictures(page_of(folder))) == 6


def test_what_is_no_run_folder_is_refused_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("{}")
    fake_run(tmp_path / "damaged", layers=1, rounds=1, steps=4)
    (tmp_path / "damaged" / "plan-0.json").write_text('{"round": ')
    fake_run(tmp_path / "list", layers=1, rounds=1, steps=4)
    (tmp_path / "list" / "run.json").write_text("[]")
    cases = {
        "nowhere": r"does not exist: give the folder that", "empty": "is not a run folder, it has no run.json: give",
        "file": "does not exist: give", "damaged": r"plan-0.json' is not JSON \(.*\): restore it",
        "list": "run.json' holds a list, not an object: restore it",
    }  # fmt: skip
    for name, expected in cases.items():
        with pytest.raises(InputError, match=expected) as refusal:
            write_report(tmp_path / name)
        assert "\n" not in str(refusal.value)
        assert name in str(refusal.value)
        assert not (tmp_path / name / "report.html").exists()


def test_a_report_is_written_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", layers=2, rounds=1, steps=20)
    before = {path.name for path in folder.iterdir()}
    write_report(folder)
    first = page_of(folder), (folder / "report.json").read_text()
    write_report(folder)
    assert (page_of(folder), (folder / "report.json").read_text()) == first
    assert {path.name for path in folder.iterdir()} - before == {"report.json", "report.html"}


def test_a_page_that_cannot_be_written_is_said_and_leaves_nothing_half_done(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", layers=1, rounds=1, steps=4)
    (folder / "report.html").mkdir()
    with pytest.raises(
        EdgegtError, match=r"report\.html' could not be written \(Is a directory\): check the disk"
    ) as refusal:
        write_report(folder)
    assert "\n" not in str(refusal.value)
    assert not list(folder.glob(".*"))


def test_every_term_of_the_memory_model_has_a_meaning_and_a_colour(tmp_path: Path) -> None:
    table, setting = trace(FAMILIES["llama"]()), Setting(BatchShape(1, 8, 4), 320, accumulate=False)
    terms = peak_terms(table, [table.weights[0].name], (), Surroundings(10**6), setting)
    folder = fake_run(tmp_path / "run", layers=1, rounds=1, steps=4)
    change(folder, "run.json", memory_terms=terms)
    write_report(folder)
    assert set(terms) <= set(TERM_MEANINGS)
    assert len(terms) <= len(TERM_COLOURS)


def test_a_predicted_peak_that_is_not_of_training_stands_apart_from_the_sum_of_its_terms(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", layers=1, rounds=1, steps=4)
    write_report(folder)
    total = sum(report_of(folder)["memory_terms"].values())
    assert "the terms of training: the predicted peak" in text_of(page_of(folder))
    change(folder, "run.json", predicted={"peak_bytes": total + 100 * MIB}, memory_terms={})
    write_report(folder)
    text = " ".join(text_of(page_of(folder)).split())
    assert sum(report_of(folder)["memory_terms"].values()) == total, "taken from the plan"
    assert f"sum the terms of training {format_bytes(total)} 100 %" in text
    assert f"the largest of training, evaluation and importance {format_bytes(total + 100 * MIB)}" in text


def test_an_eighty_layer_run_of_many_steps_is_a_page_of_moderate_size(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", layers=80, rounds=4, steps=5000)
    write_report(folder)
    assert (folder / "report.html").stat().st_size < 2 * MIB


def test_terms_stand_beside_what_was_measured_of_them(whole: Path) -> None:
    report, text = report_of(whole), " ".join(text_of(page_of(whole)).split())
    assert report["measured_terms"] == json.loads((whole / "run.json").read_text())["measured_terms"]
    assert "Training at its largest, which is in the backward of a recomputed layer, term by term" in text
    assert "8.48 % 88.0 MiB" in text and "20 % 197.0 MiB" in text
    for name in set(report["memory_terms"]) - set(report["measured_terms"]):
        assert (f"{TERM_MEANINGS[name]} " in text) == bool(report["memory_terms"][name])
    assert text.count("not separable") == sum(
        bool(size) for name, size in report["memory_terms"].items() if name not in report["measured_terms"]
    )


def test_without_measured_terms_there_is_no_column_for_them(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", layers=1, rounds=1, steps=4)
    change(folder, "run.json", measured_terms={})
    write_report(folder)
    assert "not separable" not in page_of(folder)


def test_formats_and_recomputed_layers_of_a_round_are_said(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", layers=2, rounds=2, steps=20)
    change(folder, "plan-1.json", recompute=[0, 1], formats={"master": "bfloat16", "states": "8-bit"})
    write_report(folder)
    text = text_of(page_of(folder))
    assert "float32, 8-bit" in text and "bfloat16, 8-bit; 700 rows of the head" in text
    assert "2 layers recomputed" in text
    rounds = report_of(folder)["rounds"]
    assert rounds[1]["recompute"] == [0, 1] and rounds[1]["formats"]["master"] == "bfloat16"
    assert [found["head_rows"] for found in rounds] == [None, 700]


def test_the_frontier_of_a_run_is_drawn_and_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fake_run(tmp_path / "run", layers=3, rounds=1, steps=20)
    record_problem(folder, 3)
    write_report(folder)
    page = page_of(folder)
    assert "What other budgets could reach" in page and len(pictures(page)) == 7
    assert "130.0 MiB (budget)" in page and "this plan: " in page
    for picture in pictures(page):
        ElementTree.fromstring(picture)
    stored = json.loads((folder / "frontier.json").read_text())
    assert stored["rho"] == pytest.approx(0.5, abs=1e-6) and len(stored["points"]) == 5
    monkeypatch.setattr("edgegt.report.reach.frontier_of", pytest.fail)
    write_report(folder)
    assert page_of(folder) == page


@pytest.mark.parametrize("damage", ["no problem", "no costs", "costs", "shapes", "names", "strategy", "frontier.json"])
def test_a_frontier_that_cannot_be_known_is_left_out(damage: str, tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", layers=2, rounds=1, steps=20)
    record_problem(folder, 2)
    plan = json.loads((folder / "plan-0.json").read_text())
    if damage == "no costs":
        (folder / "costs.json").unlink()
    elif damage == "costs":
        (folder / "costs.json").write_text('{"blocks": ')
    elif damage == "no problem":
        change(folder, "plan-0.json", problem=None)
    elif damage == "shapes":
        change(folder, "plan-0.json", problem={**plan["problem"], "shapes": [["many", 1]]})
    elif damage == "names":
        change(folder, "plan-0.json", selected=["nobody.weight"])
    elif damage == "strategy":
        change(folder, "plan-0.json", strategy="last-layers")
    else:
        (folder / "frontier.json").write_text('{"rhos": [0.5], "points": 3}')
    write_report(folder)
    page = page_of(folder)
    assert ("What other budgets could reach" in page) == (damage == "frontier.json"), "a damaged one is made again"
    assert len(pictures(page)) == (7 if damage == "frontier.json" else 6)


@pytest.mark.parametrize("bad", [None, 3, "text", [1, 2], {"base": "large", "slack": None, "masters": math.nan}])
def test_fields_of_another_kind_do_not_break_the_report(bad: Any, tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", layers=1, rounds=1, steps=4)
    change(folder, "run.json", memory_terms=bad, measured_terms=bad)
    change(folder, "plan-0.json", formats=bad, head_rows=bad, problem=bad)
    write_report(folder)
    assert set(report_of(folder)) >= CONTRACT


def test_a_budget_that_was_lowered_is_told_beside_the_first_one(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", layers=1, rounds=1, steps=4)
    run = json.loads((folder / "run.json").read_text())
    write_report(folder)
    assert "last step back" not in page_of(folder)
    run["budget"]["lowered_to_bytes"], run["measured"]["peak_since_bytes"] = 512 * 2**20, 500 * 2**20
    (folder / "run.json").write_text(json.dumps(run))
    write_report(folder)
    assert "Budget from the last step back on" in page_of(folder) and "500.0 MiB used since" in page_of(folder)
