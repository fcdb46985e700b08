"""`edgegt compare`: equal budgets, rates from rows that are not held out, peers, and going on after an interruption."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from edgegt.cli import main
from edgegt.comparison import session
from edgegt.comparison.adapters import PEERS, VIRTUAL_TOKENS
from edgegt.comparison.contenders import CONTENDERS, parse_contenders
from edgegt.comparison.jobs import MEASURE, TRAIN, TUNE, Full, Job, Pace, cumulated, steps_of
from edgegt.comparison.peers import PeerTrainee, trainee_of_peer
from edgegt.comparison.rates import MOST_GROWTH, STORED, best_factor, read_rates, write_rates
from edgegt.comparison.request import Request, request_of
from edgegt.comparison.table import mean_and_spread, table_of
from edgegt.comparison.work import Steps, Unsaved, _timed, divided, work
from edgegt.data import Example, Row, TokenReport
from edgegt.disk import write_json
from edgegt.errors import EdgegtError, InputError, Interrupted
from edgegt.evaluate import answer, held_out_loss
from edgegt.flops import FlopMeter, attach
from edgegt.folder import make_folder
from edgegt.full import everywhere
from edgegt.job import Corpus
from edgegt.log import Log
from edgegt.loss import supervised_loss
from edgegt.options import RunOptions
from edgegt.prepare import prepare
from edgegt.run import keeper_of
from runs import E2E, HERE, STORIES, environment, some_rows
from tiny_models import CPU, FAMILIES, batch_of, examples, float_model

FIELDS = {"strategy", "rho", "seed", "flops", "seconds", "peak_bytes", "loss", "metrics"}
needs_stories = pytest.mark.skipif(not HERE, reason="no stories260K or no E2E rows under shared/data")


def apart_here(job: Job, place: Path) -> tuple[int, str]:
    """A job in this process: what a process of its own does, without its start."""
    try:
        found = work(job, place / job.name)
    except EdgegtError as error:
        return error.exit_code, str(error)
    write_json(place / f"{job.name}.json", {"job": job.to_json(), "result": json.loads(json.dumps(found))})
    return 0, ""


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_run_apart", apart_here)


def words(folder: Path, *more: str) -> list[str]:
    """A comparison of a few steps on some rows of E2E; options given last win."""
    return [
        "compare", "--model", str(STORIES), "--data", str(some_rows(folder, 120)), "--columns",
        "prompt=mr,completion=ref", "--device", "jetson", "--threads", "1", "--batch-size", "4", "--max-length", "96",
        "--steps", "6", "--eval-rows", "12", "--seeds", "1", "--rates", str(rates_file(folder)),
        "--output", str(folder / "out"), *more,
    ]  # fmt: skip


def rates_file(folder: Path) -> Path:
    path = folder / "rates.toml"
    write_rates(path, dict.fromkeys(CONTENDERS, 2.0), "Of a test.")
    return path


def setup_of(folder: Path, strategy: str = "full", **more: Any) -> Any:
    options: dict[str, Any] = {
        "model": str(STORIES), "data": str(some_rows(folder, 120)), "columns": "prompt=mr,completion=ref",
        "device": "jetson", "threads": 1, "batch_size": 4, "max_length": 96, "steps": 6, "strategy": strategy, **more,
    }  # fmt: skip
    return prepare(RunOptions(**options), Log(quiet=True))


@needs_stories
def test_a_comparison_spends_equal_flops_and_goes_on_where_it_was(
    tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names: list[str] = []

    def broken_off(job: Job, place: Path) -> tuple[int, str]:
        names.append(job.name)
        return (143, "stopped") if job.name == "train-lora-seed0" else apart_here(job, place)

    monkeypatch.setattr(session, "_run_apart", broken_off)
    asked = words(tmp_path, "--strategies", "full,lora,edgegt", "--rho", "0.7", "--steps", "24", "--quiet")
    assert main(asked) == 143
    assert f"`edgegt compare --resume {tmp_path / 'out'}` goes on" in capsys.readouterr().err
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "jobs").glob("*.json")}
    assert "train-full-seed0.json" in before and "train-lora-seed0.json" not in before

    monkeypatch.setattr(session, "_run_apart", apart_here)
    assert main(["compare", "--resume", str(tmp_path / "out"), "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "jobs").glob("*.json")}
    assert before.items() <= after.items()  # none was made twice
    assert [one["strategy"] for one in found] == ["full", "lora", "edgegt"]
    assert all(set(one) >= FIELDS for one in found)
    assert [one["rho"] for one in found] == [None, None, 0.7]
    spent = [one["flops"] / found[0]["budget_flops"] for one in found]
    assert spent == pytest.approx([1.0] * 3, abs=0.02)
    assert found[2]["steps"] > found[1]["steps"] > found[0]["steps"] == 24
    assert len({one["held_out_rows"] for one in found}) == 1
    assert found[0]["train_rows"] == 120 - found[0]["held_out_rows"]
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found
    assert (tmp_path / "out" / "compare.png").read_bytes()[:4] == b"\x89PNG"
    assert table_of(found) + "\n" == (tmp_path / "out" / "table.md").read_text()
    assert not list((tmp_path / "out" / "jobs").rglob("*.safetensors"))


@needs_stories
def test_rates_are_found_on_rows_that_are_neither_trained_on_nor_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgegt.job import read_corpus
    from edgegt.source import load_tokenizer

    options = RunOptions(
        model=str(STORIES), data=str(some_rows(tmp_path, 120)), columns="prompt=mr,completion=ref", seed=5
    )
    tokenizer = load_tokenizer(STORIES)
    tuned = divided(True, 50, options, tokenizer)
    trained = divided(False, 50, options, tokenizer)
    text = [{(one.prompt, one.completion) for one in side} for side in (tuned.train, tuned.held_out, trained.held_out)]
    assert all(not one & other for one, other in zip(text, [*text[1:], text[0]], strict=True))
    assert len(tuned.train) == 45 and len(tuned.held_out) == 5
    assert {*tuned.train, *tuned.held_out} == {*trained.train}
    assert trained.held_out == divided(False, None, replace(options, seed=6), tokenizer).held_out
    assert trained.held_out == read_corpus(replace(options, seed=0), tokenizer).held_out


def test_examples_of_one_row_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Row("p", "c", number) for number in range(40)]
    made = tuple(Example((1, number), (5, 2), row) for row in rows for number in range(3))
    report = TokenReport(120, 120, 0, {}, 120, 2, 2.0, 120)
    corpus = Corpus("rows", "jsonl", made, made[:3], (), (report, report), {}, "", "text")
    monkeypatch.setattr("edgegt.comparison.work.read_corpus", lambda *_: corpus)
    found = divided(True, 30, RunOptions(), None)
    sides = [{one.row.number for one in side} for side in (found.train, found.held_out)]
    assert not sides[0] & sides[1] and [len(side) for side in sides] == [27, 3]
    assert len(found.train) == 81


def full_of(steps: int = 10, flops: int = 100, seconds_per_flop: float | None = 0.01) -> Full:
    return Full(steps, 5, cumulated([flops] * 4 * steps), 1e-3, seconds_per_flop)


def test_steps_follow_from_what_is_equal() -> None:
    full = full_of()
    pace = Pace(0.5, once=100.0, seconds_per_flop=0.002, once_s=2.0)
    assert steps_of("steps", 10, full, pace) == 10
    assert steps_of("flops", 10, full, pace) == (1000 - 100) / 0.5 / 100
    assert steps_of("seconds", 10, full, pace) == (0.01 * 1000 - 2) / 0.002 / 100
    assert steps_of("flops", 10, full, Pace(0.1)) == 100  # beyond what is listed
    assert steps_of("flops", 10, full, Pace(100.0)) == 1
    assert full.steps_within(149) == 1 and full.steps_within(151) == 2


def test_filling_is_timed_once_and_the_rest_beside_the_steps_for_every_round() -> None:
    step = SimpleNamespace(total=lambda shapes: 100 * len(shapes))
    schedule = SimpleNamespace(shapes=[None] * 20, rounds=(10, 10))
    setup: Any = SimpleNamespace(schedule=schedule, need=SimpleNamespace(table=SimpleNamespace(full_work=lambda: step)))
    log = Steps(None)
    log.entries = [{"step_s": seconds} for seconds in (4.0, 2.0, 1.0, 1.0)]  # the first two warm up
    found = _timed(setup, log, seconds=13.0, filling=3.0)
    assert found == {"seconds_per_flop": 0.01, "once_s": 3.0 + 2 * 2.0}


@needs_stories
def test_seconds_of_every_seed_are_those_that_the_first_was_timed_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: dict[str, int] = {}

    def made(job: Job, place: Path) -> tuple[int, str]:
        slow = 1.0 + job.seed  # the machine is busier later
        found: dict[str, Any] = {"notes": [], "data": {}}
        if job.kind == MEASURE:
            seconds = slow * (0.01 if job.contender == "full" else 0.004)
            found |= {"steps": 100, "flops": cumulated([100] * 300), "per_epoch": 50, "default_lr": 1e-3, "ratio": 0.5}
            found |= {"once": 0.0, "once_s": 0.0, "seconds_per_flop": seconds}
        else:
            steps[job.name] = job.options["steps"]
            found |= {"strategy": job.contender, "rho": job.rho, "seed": job.seed, "metrics": {}}
            found |= dict.fromkeys(("loss", "lr", "flops", "seconds", "peak_bytes", "steps", "flops_of_full"), 1)
        write_json(place / f"{job.name}.json", {"job": job.to_json(), "result": found})
        return 0, ""

    monkeypatch.setattr(session, "_run_apart", made)
    assert main(words(tmp_path, "--strategies", "full,edgegt", "--seeds", "2", "--equal", "seconds", "--quiet")) == 0
    assert steps == {
        "train-full-seed0": 100, "train-full-seed1": 100, "train-edgegt-0.5-seed0": 250, "train-edgegt-0.5-seed1": 250,
    }  # fmt: skip


def test_the_grid_grows_where_the_best_is_its_end_and_stops() -> None:
    asked: list[float] = []

    def loss_of(factor: float, best: float) -> float:
        asked.append(factor)
        return abs(factor - best)

    assert best_factor(partial(loss_of, best=1.0), (0.5, 1.0, 2.0)) == 1.0 and asked == [0.5, 1.0, 2.0]
    asked.clear()
    assert best_factor(partial(loss_of, best=100.0), (1.0, 2.0)) == 2.0 * 2**MOST_GROWTH
    assert asked == [2.0**power for power in range(2 + MOST_GROWTH)]
    with pytest.raises(InputError, match="no learning rate of the grid"):
        best_factor(lambda factor: float("inf"), (1.0,))


@pytest.mark.parametrize("name", PEERS)
def test_flops_of_a_peer_are_those_that_torch_counts(name: str) -> None:
    pytest.importorskip("peft")
    model = PEERS[name](float_model(FAMILIES["llama-untied"]())).eval()
    meter = FlopMeter()
    attach(model, meter)
    batch = everywhere(batch_of(3))
    with FlopCounterMode(display=False) as counter:
        supervised_loss(model, batch, CPU).backward()
    # Eager attention has products that the meter knows of the registered kernel only: they are added by hand.
    config = model.config
    keys = batch.shape.tokens + (VIRTUAL_TOKENS if name == "prefix" else 0)
    product = 2 * batch.shape.rows * batch.shape.tokens * keys * config.hidden_size
    attention = config.num_hidden_layers * 6 * product - (product if name == "prefix" else 0)  # the lowest queries' own
    assert meter.total + attention == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_a_prefix_is_read_and_its_answers_are_those_of_its_logits() -> None:
    pytest.importorskip("peft")
    model = PEERS["prefix"](float_model(FAMILIES["llama"]())).eval()
    made = examples(5)
    with torch.no_grad():
        losses = []
        for scale in (1.0, 3.0):
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(scale)
            losses.append(held_out_loss(model, made, 0, 5, CPU)["loss"])
        assert losses[0] != pytest.approx(losses[1], rel=1e-3)
        alone = [held_out_loss(model, [one], 0, 1, CPU) for one in made]
        together = held_out_loss(model, made, 0, 5, CPU)["loss"]
        mean = sum(one["loss"] * one["tokens"] for one in alone) / sum(one["tokens"] for one in alone)
        assert together == pytest.approx(mean, rel=1e-5)  # padding on the left changes nothing
        prompt = torch.tensor([made[0].prompt])
        written = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False,
            pad_token_id=0, eos_token_id=2,
        )  # fmt: skip
        for place in range(prompt.shape[1], written.shape[1]):
            ids = written[:, :place]
            logits = model(
                input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=torch.arange(place)[None],
                use_cache=False,
            ).logits  # fmt: skip
            assert int(logits[0, -1].argmax()) == int(written[0, place])
        assert written.shape[1] > prompt.shape[1]


@needs_stories
@pytest.mark.parametrize("name", PEERS)
def test_a_peer_learns_what_it_should_and_predicts_its_flops(tmp_path: Path, name: str) -> None:
    pytest.importorskip("peft")
    setup, log = setup_of(tmp_path, steps=8, lr=2e-2), Steps(None)
    keeper = keeper_of(setup, make_folder(tmp_path / "run"), log, kind=Unsaved)
    trainee = PeerTrainee(setup, log, keeper, name)
    before = {key: value.detach().clone() for key, value in trainee.module.named_parameters()}
    predicted = sum(trainee.flops_of(setup.schedule.shapes))
    assert trainee.meter.total == 0
    trainee.train()
    changed = {
        key for key, value in trainee.module.named_parameters() if not torch.equal(value, before[key])
    }  # fmt: skip
    heads = {key for key in changed if "lm_head" in key}
    assert changed == set(trainee.parameters)
    assert len(heads) == (name == "lora-head")
    assert all("lora_" in key or "prompt_encoder" in key for key in changed - heads)
    assert trainee.meter.total == pytest.approx(predicted, rel=1e-6)
    assert log.entries[-1]["loss"] < log.entries[0]["loss"]
    assert not (tmp_path / "run" / "checkpoint").exists() or not any((tmp_path / "run" / "checkpoint").iterdir())


@needs_stories
def test_the_published_procedure_keeps_to_rho_and_chooses_in_every_round(tmp_path: Path) -> None:
    setup, log = setup_of(tmp_path, steps=40, lr=5e-3, rho=0.6, round_epochs=0.7), Steps(None)
    keeper = keeper_of(setup, make_folder(tmp_path / "run"), log, kind=Unsaved)
    predicted = trainee_of_peer(setup, log, keeper, "published").cost()
    trainee = trainee_of_peer(setup, log, keeper, "published")
    before = {key: value.detach().clone() for key, value in trainee.module.named_parameters()}
    trainee.train()
    changed = {key for key, value in trainee.module.named_parameters() if not torch.equal(value, before[key])}
    assert len(trainee.rounds) == 2 and set(trainee.parameters) <= changed < set(before)
    assert "model.embed_tokens.weight" not in changed  # the tied head is the embedding, at the bottom
    assert predicted["ratio"] < 0.6 and predicted["once"] > 0
    expected = predicted["ratio"] * setup.full_flops + predicted["once"]
    assert trainee.meter.total == pytest.approx(expected, rel=0.05)  # the second round chooses anew
    assert log.entries[-1]["loss"] < log.entries[0]["loss"] and len(log.entries) == 40


def test_seeds_become_mean_and_spread() -> None:
    one = {
        "strategy": "edgegt", "rho": 0.5, "seed": 0, "flops": 50, "budget_flops": 100, "seconds": 2.0, "steps": 7,
        "peak_bytes": 2**20, "loss": 1.0, "lr": 1e-3, "metrics": {"rougeL": 10.0, "bleu_signature": "x"},
    }  # fmt: skip
    other = {**one, "seed": 1, "loss": 2.0, "metrics": {"rougeL": 12.0}}
    assert mean_and_spread([1.0, 2.0]) == (1.5, pytest.approx(0.7071, abs=1e-4))
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table_of([one, other]).splitlines()]
    assert lines[0][-2:] == ["held-out loss", "rougeL"]
    assert lines[2] == [
        "edgegt", "0.5", "1.00e-03", "7", "0.500 ± 0.000", "2.0 ± 0.0", "1 ± 0", "1.5000 ± 0.7071", "11.00 ± 1.41",
    ]  # fmt: skip


@needs_stories
def test_a_contender_that_cannot_run_is_told_and_the_others_go_on(
    tmp_path: Path, here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = words(tmp_path, "--strategies", "full,bias", "--rho", "0.2", "--equal", "steps", "--steps", "2")
    assert main(asked) == 1
    said = capsys.readouterr()
    assert "train-bias-0.2-seed0: --rho 0.2 is below the smallest reachable" in said.err
    assert "| full" in said.out and "bias" not in said.out
    about = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert list(about["problems"]) == ["train-bias-0.2-seed0"] and about["finished"] is False


@needs_stories
def test_a_comparison_of_other_data_does_not_go_on(tmp_path: Path, here: None) -> None:
    assert main(words(tmp_path, "--strategies", "full", "--equal", "steps", "--steps", "1", "--quiet")) == 0
    path = tmp_path / "out" / "jobs" / "train-full-seed0.json"
    tree = json.loads(path.read_text())
    tree["result"]["data"] = {"data": "0"}
    path.write_text(json.dumps(tree))
    with pytest.raises(InputError, match=r"the data of '.*' changed since it was begun"):
        session.resume(tmp_path / "out", Log(quiet=True))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--strategies", "full,lorra"], "--strategies 'lorra' is unknown (did you mean 'lora'?)"),
        (["--strategies", ","], "--strategies names none"),
        (["--rho", "0.5,2"], "--rho '2' is not allowed: give numbers above 0 and at most 1"),
        (["--seeds", "0"], "--seeds 0 is out of range"),
        (["--equal", "flop"], "--equal 'flop' is not one of flops, seconds, steps (did you mean 'flops'?)"),
        (["--epochs", "1"], "--epochs and --steps both say"),
        (["--grid", "1,2"], "--rates gives the learning rates, --grid and --tune-steps find them"),
        (["--rates", "nowhere.toml"], "--rates 'nowhere.toml' does not exist"),
        (["--rows", "3"], "--rows 3 is out of range"),
        (["--answers", "4"], "--answers goes with --metrics"),
        (["--metrics", "rogue"], "metric 'rogue' is unknown"),
        (["--resume", "x"], "--resume goes on with the options that the comparison has"),
        (["--batch-size", "0"], "--batch-size 0 is out of range"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_is_not_allowed_is_refused_in_one_line(
    tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["compare", "--model", "m", "--data", "d", "--steps", "6", "--rates", STORED]
    assert main([*base, *more]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_input_that_no_run_would_take_leaves_no_folder(
    tmp_path: Path, here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["compare", "--model", str(tmp_path / "none"), "--data", "d.csv", "--steps", "6", "--rates", STORED]
    assert main([*asked, "--output", str(tmp_path / "out"), "--quiet"]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_peers_need_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgegt.comparison.contenders.find_spec", lambda name: None)
    assert parse_contenders("full,edgegt") == ("full", "edgegt")
    with pytest.raises(InputError, match=r"lora, prefix need PEFT: pip install edgegt\[compare\]"):
        parse_contenders("full,lora,prefix")


def test_rates_are_read_as_they_are_written_and_the_package_has_one_for_all(tmp_path: Path) -> None:
    assert set(read_rates(STORED)) == set(CONTENDERS)
    write_rates(tmp_path / "rates.toml", {"full": 0.64, "greentrainer-dp": 2.0}, "Of a test.")
    assert read_rates(str(tmp_path / "rates.toml")) == {"full": 0.64, "greentrainer-dp": 2.0}
    for text, message in (("x = 1", "no table"), ("[factors]\nfull = -1", "number above 0"), ("[", "not valid TOML")):
        (tmp_path / "rates.toml").write_text(text)
        with pytest.raises(InputError, match=message):
            read_rates(str(tmp_path / "rates.toml"))


def test_requests_and_jobs_come_back_from_json(tmp_path: Path) -> None:
    request = request_of(RunOptions(model="m", data="d"), "full,edgegt", "0.36,0.5", metrics="f1")
    assert Request.from_json(json.loads(json.dumps(request.to_json())), tmp_path) == request
    with pytest.raises(InputError, match="damaged or from another version"):
        Request.from_json({"strategies": []}, tmp_path)
    job = Job(TUNE, "edgegt", 1, {"lr": 1e-3}, 0.5, metrics=("f1",))
    assert Job.from_json(json.loads(json.dumps(job.to_json()))) == job
    assert job.name == "tune-edgegt-0.5-lr0.001-seed1"
    assert {Job(kind, "full", 0, {"lr": 1.0}).name.split("-")[0] for kind in (MEASURE, TRAIN)} == {"measure", "train"}
    with pytest.raises(InputError, match="is no comparison"):
        session.resume(tmp_path, Log(quiet=True))


@needs_stories
def test_an_encoder_decoder_has_no_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = setup_of(tmp_path)
    monkeypatch.setattr("edgegt.comparison.peers.is_encoder_decoder", lambda config: True)
    with pytest.raises(InputError, match="lora is compared on decoder-only models"):
        PeerTrainee(setup, Log(quiet=True), None, "lora")


@needs_stories
def test_a_peers_answers_are_text(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from edgegt.source import load_tokenizer

    setup = setup_of(tmp_path)
    keeper = keeper_of(setup, make_folder(tmp_path / "run"), Log(quiet=True), kind=Unsaved)
    prompts = [one.prompt for one in setup.corpus.held_out[:3]]
    for name in ("lora", "prefix"):
        module = PeerTrainee(setup, Log(quiet=True), keeper, name).module
        said = answer(module, load_tokenizer(STORIES), prompts, 5, 2, CPU)
        assert len(said) == 3 and all(isinstance(one, str) for one in said)


@pytest.mark.slow
@needs_stories
def test_a_comparison_that_was_killed_goes_on_in_processes_of_their_own(tmp_path: Path) -> None:
    command = words(tmp_path, "--strategies", "full,lora,edgegt", "--rho", "0.7")
    process = subprocess.Popen(
        [sys.executable, "-m", "edgegt", *command], env=environment(tmp_path / "cache"), stderr=subprocess.PIPE
    )
    first = tmp_path / "out" / "jobs" / "train-full-seed0.json"
    until = time.monotonic() + 240
    while not first.is_file() and time.monotonic() < until and process.poll() is None:
        time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert first.is_file() and not (tmp_path / "out" / "results.json").exists()
    before = first.stat().st_mtime_ns
    time.sleep(15)  # the job that was under way ends by itself
    done = subprocess.run(
        [sys.executable, "-m", "edgegt", "compare", "--resume", str(tmp_path / "out"), "--json"],
        env=environment(tmp_path / "cache"), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [one["strategy"] for one in found] == ["full", "lora", "edgegt"] and first.stat().st_mtime_ns == before
    assert all(100 * 2**20 < one["peak_bytes"] < 2 * 2**30 for one in found)


@pytest.mark.slow
@needs_stories
def test_the_main_claims_hold_in_small(tmp_path: Path) -> None:
    """stories260K on E2E, one seed, at the FLOPs of 100 full steps: the order of the contenders."""
    names = "full,lora,lora-head,prefix,bias,edgegt"
    command = [
        *words(tmp_path, "--data", str(E2E), "--rows", "1000", "--steps", "100", "--batch-size", "8"),
        "--strategies", names, "--eval-rows", "128", "--seeds", "1", "--rates", STORED, "--json",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "edgegt", *command], env=environment(tmp_path / "cache"), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    loss = {one["strategy"]: one["loss"] for one in json.loads(done.stdout)}
    assert all(one["flops"] == pytest.approx(one["budget_flops"], rel=0.02) for one in json.loads(done.stdout))
    assert loss["edgegt"] < loss["full"]
    assert loss["edgegt"] < loss["lora-head"] < loss["lora"] < loss["prefix"]
    assert loss["edgegt"] < loss["bias"]


def test_being_stopped_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(job: Job, place: Path) -> tuple[int, str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "_run_apart", interrupt)
    request = request_of(RunOptions(model="m", data="d", steps=2), "full", rates=STORED)
    with pytest.raises(Interrupted, match="--resume") as stopped:
        session.compare(request, Log(quiet=True), str(tmp_path / "out"))
    assert stopped.value.exit_code == 130
