"""The benchmark of quality: its curve, the float32 twin of a selection, how soon a loss is reached, its verdicts."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from edgegt import RunOptions
from edgegt.folder import make_folder
from edgegt.prepare import prepare
from tiny_models import FAMILIES, save_model

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))

from bench_quality import (
    FULL,
    MORE,
    OURS,
    TWIN,
    Curve,
    Point,
    Result,
    arguments,
    curves,
    line_of,
    reached,
    tasks_of,
    time_shares,
    verdicts,
    work,
    work_apart,
)
from bench_rows import Size, write_rows, write_tokenizer
from float_twin import FloatTwin

VOCABULARY, STEPS = 211, 48
NAMES = (FULL, OURS, TWIN, MORE)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny Llama with a tied head and a tokenizer of its own; rows to train on beside it."""
    config = FAMILIES["llama"]()
    config.vocab_size, config.tie_word_embeddings = VOCABULARY, True
    save_model(tmp_path / "model", config)
    write_tokenizer(tmp_path / "model", VOCABULARY)
    write_rows(tmp_path, VOCABULARY, Size(2, 24, 8), 60)
    return tmp_path / "model"


def words(model: Path, *more: str) -> list[str]:
    return [
        "--model", str(model), "--data", str(model.parent / "rows.jsonl"), "--threads", "1", "--batch-size", "2",
        "--max-length", "48", "--steps", str(STEPS), "--every", "20", "--rows", "8", *more,
    ]  # fmt: skip


def result(name: str, losses: list[float], step_s: float = 1.0) -> Result:
    """A run that was evaluated after every 10 steps, with two seconds before the first one."""
    curve = [Point(10 * index, loss, 2 + 10 * index * step_s, 10 * index * step_s) for index, loss in enumerate(losses)]
    return Result(name, 2.0, 1e-3, losses[-1], 8, 0.5, [3, 4], [8, 8], [], curve, [], [step_s], [])


def results(**losses: list[float]) -> dict[str, Result]:
    given = {FULL: [3.0, 2.0, 1.0], OURS: [3.0, 1.8, 1.1], TWIN: [3.0, 1.7, 1.1], MORE: [3.0, 1.0, 0.9]}
    return {name: result(name, losses.get(name.replace("+", "_"), given[name])) for name in NAMES}


def test_int8_and_its_float32_twin_train_alike_and_leave_a_curve(model: Path) -> None:
    args = arguments(words(model, "--lr", "3e-3"))
    full, ours, twin, more = tasks_of(args, model.parent)
    assert (full.options["strategy"], more.options["steps"]) == ("full", 2 * STEPS)
    found = {FULL: work_apart(full, model.parent), OURS: work(ours), TWIN: work(twin)}
    for name in (FULL, OURS, TWIN):
        run = found[name]
        assert [point.step for point in run.curve] == [0, 20, 40, STEPS]
        assert len(run.losses) == len(run.step_s) == STEPS
        assert run.last.loss < run.curve[0].loss - 0.3, name
        assert 0 < run.last.steps_s <= run.last.seconds
        assert run.last.steps_s == pytest.approx(sum(run.step_s), rel=1e-2)
    assert found[OURS].selected == found[TWIN].selected and len(found[OURS].selected) == 2
    assert found[OURS].flops_ratio <= 0.5 and found[FULL].flops_ratio == pytest.approx(1.0, abs=0.01)
    assert found[OURS].final == pytest.approx(found[TWIN].final, rel=0.01)
    assert found[OURS].losses == pytest.approx(found[TWIN].losses, rel=0.02)
    assert found[OURS].losses != found[TWIN].losses
    assert found[FULL].curve[0].loss == pytest.approx(found[TWIN].curve[0].loss)


def test_the_twin_trains_what_the_plans_say_and_nothing_else(model: Path) -> None:
    options = RunOptions(
        device="jetson", model=str(model), data=str(model.parent / "rows.jsonl"), steps=4, batch_size=2, threads=1,
        strategy="full",
    )  # fmt: skip
    log = Curve(2, 8)
    setup = prepare(options, log)
    rows = len(setup.corpus.used_tokens)
    first, second = "model.layers.2.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"
    plans = make_folder(model.parent / "plans")
    for index, names in enumerate(([first, "lm_head.weight"], [second, "lm_head.weight"])):
        plan = {"first_step": 2 * index, "steps": 2, "selected": names, "micro_batch": 2 - index, "head_rows": rows}
        plans.write(f"plan-{index}.json", plan)
    twin = FloatTwin(setup, log, plans.path, make_folder(model.parent / "out"))
    before = {name: parameter.detach().clone() for name, parameter in twin.parameters.items()}
    assert "lm_head.weight" in before and "model.embed_tokens.weight" in before
    log.begin(setup, twin)
    twin.train()
    changed = {name for name, old in before.items() if not torch.equal(old, twin.parameters[name])}
    assert changed == {first, second, "lm_head.weight"}
    moved = (before["lm_head.weight"] != twin.parameters["lm_head.weight"]).any(1).nonzero().flatten()
    assert set(moved.tolist()) == set(setup.corpus.used_tokens)
    assert 0 < rows < VOCABULARY
    assert {name: state.step for name, state in twin.optimizer.states.items()} == {
        first: 2, second: 2, "lm_head.weight": 4,
    }  # fmt: skip


def test_a_loss_is_reached_at_the_first_evaluation_at_or_below_it() -> None:
    run = result(OURS, [3.0, 1.2, 1.0, 1.1])
    assert reached(run, 1.0) == run.curve[2]
    assert reached(run, 0.9) is None
    assert time_shares(results()) == {MORE: (12 / 22, 10 / 20)}
    assert time_shares(results(edgegt=[3.0, 2.0, 1.0])) == {OURS: (1.0, 1.0), MORE: (12 / 22, 10 / 20)}


@pytest.mark.parametrize(
    ("losses", "holds"),
    [
        ({}, {"int8": True, "time": True}),
        ({"edgegt": [3.0, 1.8, 1.12]}, {"int8": False, "time": True}),
        ({"float32": [3.0, 1.8, 1.12]}, {"int8": False, "time": True}),
        ({"edgegt_": [3.0, 2.0, 1.0]}, {"int8": True, "time": False}),
        ({"edgegt_": [3.0, 2.0, 1.5]}, {"int8": True, "time": False}),
    ],
)
def test_verdicts(losses: Any, holds: dict[str, bool]) -> None:
    found = verdicts(results(**losses))
    assert {name: good for name, (good, _) in found.items()} == holds
    assert ("not reached" in found["time"][1]) == (losses == {"edgegt_": [3.0, 2.0, 1.5]})


def test_a_result_comes_back_from_its_json_and_is_told() -> None:
    found = results()
    trees = json.loads(json.dumps([asdict(run) for run in found.values()]))
    assert [Result.from_json(tree) for tree in trees] == list(found.values())
    assert "3/4" in line_of(found[OURS]) and "1000.0" in line_of(found[OURS])
    assert curves(found).splitlines()[-1].split() == ["100.0%", "1.0000", "1.1000", "1.1000", "0.9000"]
