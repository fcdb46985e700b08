"""A whole run of a small real model: what it leaves, that it keeps to both budgets, and what can be done with it."""

from __future__ import annotations

import json
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

import runs
from edgegt.cli import main
from edgegt.patch import read_patch

pytestmark = pytest.mark.skipif(not runs.HERE, reason="no stories260K or no E2E rows under shared/data")
FILES = {
    "options.json", "profile.json", "costs.json", "run.json", "plan-0.json", "plan-1.json", "metrics.jsonl",
    "eval.json", "patch.safetensors", ".lock", "frontier.json", "report.json", "report.html",
}  # fmt: skip
BUDGET = 2 * 2**30


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.some_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cache: Path, rows: Path) -> Path:
    """The folder of one run of 40 steps in two rounds, in a process of its own."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    more = ["--steps", "40", "--rho", "0.5", "--memory", "2GiB", "--lr", "3e-3", "--quiet"]
    done = runs.edgegt(runs.words(folder, *more, data=rows), cache)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout == f"{folder}\n"
    return folder


def here(words: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The command in this process."""
    for key, value in runs.environment(cache).items():
        monkeypatch.setenv(key, value)
    return main(words)


def test_the_run_folder_holds_the_files_of_the_contract(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == FILES
    assert stat.S_IMODE(finished.stat().st_mode) == 0o700
    assert runs.read(finished, "options.json")["steps"] == 40
    assert runs.read(finished, "run.json")["finished"] is True


def test_report_json_keeps_its_contract(finished: Path) -> None:
    report = runs.read(finished, "report.json")
    assert set(report["budget"]) >= {"rho", "flops", "memory_bytes"}
    assert set(report["predicted"]) >= {"flops_ratio", "peak_bytes", "step_s"}
    assert set(report["measured"]) >= {"flops_ratio", "peak_bytes", "step_s", "tokens_per_s"}
    assert all(report["eval"][when]["loss"] > 0 for when in ("before", "after"))
    assert len(report["rounds"]) == 2
    for index, entry in enumerate(report["rounds"]):
        assert set(entry) >= {"selected", "recompute", "micro_batch"}
        assert entry["selected"] == runs.read(finished, f"plan-{index}.json")["selected"] != []
    assert isinstance(report["fallbacks"], list)
    assert report["version"] and report["device"]["name"] == "jetson-orin-nano-8gb"
    assert report["model"]["name"] == "stories260K"


def test_both_budgets_hold_and_the_flops_are_as_predicted(finished: Path) -> None:
    run = runs.read(finished, "run.json")
    assert run["measured"]["flops_ratio"] <= run["budget"]["rho"] == 0.5
    assert run["measured"]["flops"] <= run["budget"]["flops"]
    assert run["measured"]["peak_bytes"] <= run["budget"]["memory_bytes"] == BUDGET
    assert run["measured"]["flops"] == pytest.approx(run["predicted"]["flops"], rel=0.02)
    # 5 % of the budget is what probing may take, but never fewer than 4 rows a round, which is more in a run this short
    assert 0 < run["measured"]["probe_flops"] < 0.2 * run["budget"]["flops"]


def test_the_steps_are_recorded_and_the_loss_falls(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 41))
    assert sorted({line["round"] for line in lines}) == [0, 1]
    assert lines[-1]["flops"] == runs.read(finished, "run.json")["measured"]["flops"]
    evaluation = runs.read(finished, "eval.json")
    assert evaluation["after"]["loss"] < 0.9 * evaluation["before"]["loss"]
    assert evaluation["before"]["tokens"] == evaluation["after"]["tokens"] > 100
    assert {"prompt", "reference", "before", "after"} == set(evaluation["examples"][0])


def test_the_patch_holds_every_tensor_of_every_round(finished: Path) -> None:
    selected = {name for index in range(2) for name in runs.read(finished, f"plan-{index}.json")["selected"]}
    tensors, about = read_patch(finished / "patch.safetensors")
    assert set(tensors) == selected
    assert about["fingerprint"] == runs.read(finished, "run.json")["model"]["fingerprint"]
    base = load_file(str(runs.STORIES / "model.safetensors"))
    trained = [name for name in tensors if name in base]
    assert trained and all(not tensors[name].equal(base[name]) for name in trained)


def test_eval_repeats_the_runs_own_result(
    finished: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert here(["eval", str(finished), "--json"], cache, monkeypatch) == 0
    out, err = capsys.readouterr()
    again, after = json.loads(out), runs.read(finished, "eval.json")["after"]
    assert err == ""
    assert again["loss"] == pytest.approx(after["loss"], rel=1e-6)
    assert (again["tokens"], again["rows"]) == (after["tokens"], after["rows"])


def test_the_patch_works_on_the_model_alone(
    finished: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = str(runs.some_rows(tmp_path, 8))
    words = ["eval", "--model", str(runs.STORIES), "--data", data, "--columns", "prompt=mr,completion=ref", "--json"]
    losses = []
    for more in ([], ["--patch", str(finished / "patch.safetensors")]):
        assert here([*words, *more], cache, monkeypatch) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[1] < 0.9 * losses[0]


def test_generate_answers(
    finished: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = "name[Alimentum], area[city centre], familyFriendly[no]"
    assert here(["generate", str(finished), prompt, "--tokens", "12"], cache, monkeypatch) == 0
    first = capsys.readouterr().out
    assert first.strip()
    words = ["generate", "--model", str(runs.STORIES), "--tokens", "12", "Once upon a time"]
    assert here(words, cache, monkeypatch) == 0
    assert capsys.readouterr().out.strip()
    assert here([*words, "--patch", str(finished / "patch.safetensors")], cache, monkeypatch) == 0
    assert here(["generate", str(finished), prompt, "--tokens", "0"], cache, monkeypatch) == 2


@pytest.mark.parametrize("strategy", ["last-layers", "random", "full"])
def test_every_strategy_runs_within_its_budgets(
    strategy: str, cache: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    more = ["--steps", "4", "--strategy", strategy, "--quiet", "--memory", "2GiB", "--no-examples"]
    assert here(runs.words(folder, *more, data=rows), cache, monkeypatch) == 0
    run, evaluation = runs.read(folder, "run.json"), runs.read(folder, "eval.json")
    assert run["strategy"] == strategy
    assert evaluation["after"]["loss"] < evaluation["before"]["loss"]
    assert evaluation["examples"] == []
    if strategy == "full":
        assert run["measured"]["flops_ratio"] == pytest.approx(1.0, rel=0.02)
        assert len(runs.read(folder, "plan-0.json")["selected"]) > 40
    else:
        assert run["measured"]["flops_ratio"] <= 0.5
        assert run["measured"]["probe_flops"] == 0
        assert run["measured"]["flops"] == pytest.approx(run["predicted"]["flops"], rel=0.02)


def test_two_runs_with_one_seed_are_the_same_bits(
    cache: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patches = []
    for name, seed in (("one", "3"), ("two", "3"), ("three", "4")):
        more = ["--steps", "12", "--seed", seed, "--quiet", "--memory", "2GiB", "--no-examples"]
        assert here(runs.words(tmp_path / name, *more, data=rows), cache, monkeypatch) == 0
        patches.append(load_file(str(tmp_path / name / "patch.safetensors")))
    one, two, three = patches
    assert one.keys() == two.keys()
    assert all(one[name].equal(two[name]) for name in one)
    assert one.keys() != three.keys() or not all(one[name].equal(three[name]) for name in one)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_stopped_run_keeps_what_was_trained(
    number: signal.Signals, code: int, cache: Path, rows: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "edgegt", *runs.words(folder, "--steps", "3000", "--no-examples", data=rows)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=runs.environment(cache))
    try:
        metrics, end = folder / "metrics.jsonl", time.monotonic() + 120
        while not (metrics.is_file() and metrics.read_text().count("\n") >= 3):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.startswith(f"edgegt: stopped by {number.name} after step ")
    assert last.endswith(f", all of it is saved: `edgegt run --resume {folder}` goes on")
    tensors, _ = read_patch(folder / "patch.safetensors")
    assert set(tensors) == set(runs.read(folder, "plan-0.json")["selected"])
    assert runs.read(folder, "run.json")["finished"] is False
    assert list((folder / "checkpoint").glob("state-*.safetensors"))
