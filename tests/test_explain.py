"""What a plan is explained by: parts that add up, budgets that are worth something, and the command's flags."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaConfig

from edgegt.cli import main
from edgegt.cost import BatchShape
from edgegt.explain import (
    BAR_WIDTH,
    PROBES,
    TERM_MEANINGS,
    bar,
    explain,
    explained_text,
    flops_parts,
    phase_of,
    seconds_parts,
)
from edgegt.memory import Surroundings
from edgegt.planner import Plan, Problem, plan
from edgegt.profile import load_profile, profiles_dir
from edgegt.rates import of_profile
from edgegt.units import MIB
from fake_run import fake_importance, fake_table

SHAPES = (BatchShape(8, 96, 24), BatchShape(8, 64, 16))
PROFILE = load_profile(profiles_dir() / "jetson-orin-nano-8gb.toml")


def problem_of(memory_mib: int, rho: float, seconds: float | None = None) -> Problem:
    table = fake_table(3)
    full = table.full_work().total(SHAPES)
    return Problem(
        table, fake_importance(table), SHAPES, int(rho * full), memory_mib * MIB, Surroundings(60 * MIB), 4096, 8,
        head_rows=(None, 700), seconds=seconds, rates=of_profile(PROFILE),
    )  # fmt: skip


TIGHT = problem_of(112, 0.45)
CASES = {"tight": TIGHT, "roomy": problem_of(4000, 1.0), "many FLOPs, little memory": problem_of(104, 0.9)}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[Problem, Plan]:
    return CASES[request.param], plan(CASES[request.param])


def test_the_parts_add_up_to_what_the_plan_predicts(case: tuple[Problem, Plan]) -> None:
    problem, found = case
    explained = explain(problem, found, 10**9, 0.5)
    assert sum(explained["memory"]["terms"].values()) == explained["memory"]["peak_bytes"] == found.peak_bytes
    assert set(explained["memory"]["terms"]) <= set(TERM_MEANINGS)
    assert sum(flops_parts(problem, found).values()) == found.flops
    assert sum(explained["flops"].values()) == found.flops + 10**9 and explained["flops"][PROBES] == 10**9
    assert sum(seconds_parts(problem, found).values()) == pytest.approx(found.seconds)
    assert all(value >= -1e-12 for value in explained["seconds"].values())
    assert bool(explained["flops"]["recomputation"]) == bool(found.recompute)


def test_lifting_a_budget_never_lowers_the_value_and_only_a_binding_one_raises_it() -> None:
    for name, problem in CASES.items():
        gains = {found["name"]: found["gain"] for found in explain(problem, plan(problem), 0, 0.0)["budgets"]}
        assert set(gains) == {"flops", "memory"}, "a time budget is not explained where there is none"
        assert all(gain >= 0 for gain in gains.values())
        assert (max(gains.values()) > 0.01) == (name != "roomy"), gains


def test_a_time_budget_that_binds_is_explained() -> None:
    slow = plan(problem_of(4000, 1.0)).seconds
    assert slow is not None
    problem = replace(CASES["roomy"], seconds=0.8 * slow)
    budgets = {found["name"]: found for found in explain(problem, plan(problem), 0, 0.0)["budgets"]}
    assert budgets["time"]["gain"] > 0 and budgets["flops"]["gain"] == pytest.approx(0, abs=3e-3)
    assert budgets["time"]["used"] <= budgets["time"]["limit"]


def test_decisions_say_what_the_same_tensors_would_cost_otherwise() -> None:
    found = plan(TIGHT)
    explained = explain(TIGHT, found, 7, 0.5)
    assert {decision["name"] for decision in explained["decisions"]} >= {"micro-batch", "recomputed", "formats"}
    for decision in explained["decisions"]:
        choices = [other["choice"] for other in decision["alternatives"]]
        assert len(choices) == len(set(choices))
        for other in decision["alternatives"]:
            assert ("memory" in other["exceeded"]) == (other["peak_bytes"] > TIGHT.memory_bytes)
            assert ("flops" in other["exceeded"]) == (other["flops"] - 7 > TIGHT.flops)
    formats = next(decision for decision in explained["decisions"] if decision["name"] == "formats")
    assert formats["chosen"].startswith(found.formats.master) and len(formats["alternatives"]) == 2


def test_the_phase_is_read_from_the_terms() -> None:
    assert phase_of({"logits": 5, "transient": 0, "recomputed": 0}) == "at the loss"
    assert phase_of({"logits": 0, "transient": 5, "recomputed": 0}) == "when backward begins"
    assert phase_of({"logits": 0, "transient": 5, "recomputed": 9}) == "in the backward of a recomputed layer"


def test_the_text_has_a_line_for_everything_and_survives_json(case: tuple[Problem, Plan]) -> None:
    problem, found = case
    said: list[str] = []
    explained = explain(problem, found, 10**9, 0.5, said.append)
    assert said == ["explain: planning without the FLOPs budget", "explain: planning without the memory budget"]
    assert json.loads(json.dumps(explained)) == explained
    text = explained_text(explained)
    for name, size in explained["memory"]["terms"].items():
        assert name in text and (TERM_MEANINGS[name] in text) == bool(size)
    for name in (*explained["flops"], *explained["seconds"]):
        assert f"  {name} " in text
    assert all(len(line) <= 130 for line in text.splitlines())
    without = explained_text(explain(replace(problem, rates=None), found, 0, 0.0))
    assert "time       " not in without


def test_a_bar_is_as_long_as_its_share() -> None:
    assert bar(0) == " " * BAR_WIDTH and bar(1) == bar(1.7) == "█" * BAR_WIDTH
    assert bar(1e-9).strip() == "▏"
    assert {len(bar(share / 97)) for share in range(98)} == {BAR_WIDTH}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = LlamaConfig(
        hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4, vocab_size=4096
    )
    folder = tmp_path_factory.mktemp("model")
    config.save_pretrained(folder)
    return str(folder)


def test_the_flags_of_plan(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["plan", "--model", model, "--device", "jetson-orin-nano-8gb", "--memory", "700MiB", "--steps", "10"]
    assert main([*words, "--explain", "--frontier"]) == 0
    out, err = capsys.readouterr()
    assert out.index("fits       yes") < out.index("peak       ") < out.index("decisions  ")
    assert "frontier: 40 of 40 points" in err and (tmp_path / "frontier.png").stat().st_size > 10_000
    assert main([*words, "--explain", "--frontier", "other.png", "--json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    tree = json.loads(out)
    assert err == "" and (tmp_path / "other.png").is_file()
    assert sum(tree["explained"]["memory"]["terms"].values()) == tree["explained"]["memory"]["peak_bytes"]
    assert sum(tree["explained"]["flops"].values()) == tree["predicted"]["flops"]["expected"]
    assert len(tree["frontier"]["points"]) == 5 and tree["frontier"]["memory_bytes"] == 700 * MIB
    assert main([*words, "--frontier", "picture.jpg"]) == 2
    assert "'picture.jpg' is no PNG file" in capsys.readouterr().err


def test_what_does_not_fit_has_a_frontier_and_nothing_to_explain(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "frontier.png"
    words = ["plan", "--model", model, "--device", "jetson-orin-nano-8gb", "--memory", "100MiB", "--quiet", "--json"]
    assert main([*words, "--explain", "--frontier", str(path)]) == 2
    tree = json.loads(capsys.readouterr().out)
    assert tree["fits"] is False and "explained" not in tree
    assert tree["frontier"]["chosen"] is None and path.is_file()
