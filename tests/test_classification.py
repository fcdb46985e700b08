"""--task classification from plan to reload: a rule over words is learned, and what does not fit it is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import runs
from edgegt import disk, home
from edgegt.classifier import as_classifier
from edgegt.cli import main
from edgegt.data import collate, labelled, read_rows
from edgegt.disk import read_lines
from edgegt.errors import InputError
from edgegt.evaluate import macro_f1
from edgegt.log import Log
from edgegt.loss import class_logits
from edgegt.model import load_int8
from edgegt.options import RunOptions
from edgegt.outlook import look_ahead
from edgegt.patch import apply_patch, read_patch
from edgegt.quant import dequantize
from edgegt.run import resume, run
from edgegt.source import load_tokenizer, open_source, read_config
from edgegt.subject import load_subject
from edgegt.survey import survey, survey_text
from edgegt.talk import generate_text
from edgegt.use import evaluate_subject
from test_families import Exact
from tiny_models import CPU

SENSES = {"heat": ("warm", "stove", "hot"), "light": ("lamp", "glow", "bright"), "sound": ("song", "loud", "tune")}
FILLING = ("please", "the", "in", "kitchen", "now", "a", "room", "my", "of", "to", "make")
_SHAPE = {
    "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "initializer_range": 0.1, "max_position_embeddings": 64,
}  # fmt: skip
DIES_AT = 25


def rule(count: int, seed: int) -> list[tuple[str, str]]:
    """Texts of which one word says the class."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        label = draw.choice(sorted(SENSES))
        words = [draw.choice(FILLING) for _ in range(draw.randint(3, 7))]
        words.insert(draw.randrange(len(words) + 1), draw.choice(SENSES[label]))
        made.append((" ".join(words), label))
    return made


def write_rows(path: Path, pairs: list[tuple[str, str]], text: str = "text", label: str = "label") -> Path:
    path.write_text("".join(json.dumps({text: one, label: two}) + "\n" for one, two in pairs), encoding="utf-8")
    return path


def write_model(folder: Path, family: str, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    model = BertModel(BertConfig(**_SHAPE)) if family == "bert" else LlamaForCausalLM(LlamaConfig(**_SHAPE))
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((home.MODEL / name).read_bytes())
    if family == "bert":  # a BERT's tokenizer has no end-of-text token
        about = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        about |= {"eos_token": None, "pad_token": "<pad>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(about), encoding="utf-8")
    return folder


@dataclass(frozen=True)
class Trained:
    """What a run left."""

    family: str
    options: RunOptions
    folder: Path
    cache: Path

    @property
    def where(self) -> str:
        return str(self.options.model)

    def read(self, name: str) -> Any:
        return runs.read(self.folder, name)


@pytest.fixture(scope="module", params=["bert", "llama"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    here = tmp_path_factory.mktemp(request.param)
    model = write_model(here / "model", request.param)
    data, held = write_rows(here / "rows.jsonl", rule(200, 0)), write_rows(here / "held.jsonl", rule(60, 1))
    options = RunOptions(
        device="jetson", task="classification", model=str(model), data=str(data), eval_data=str(held), threads=1,
        output=str(here / "run"), epochs=6, round_epochs=3, rho=0.7, lr=5e-3, memory="2GiB", checkpoint_every="20",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.getbasetemp() / "classification"  # one for both: kernels are compiled once
        for key, value in runs.environment(cache).items():
            patch.setenv(key, value)
        yield Trained(request.param, options, run(options, Log(quiet=True)), cache)


def test_a_rule_is_learned_within_both_budgets(trained: Trained) -> None:
    before, after = trained.read("eval.json")["before"], trained.read("eval.json")["after"]
    assert before["accuracy"] < 0.55 and after["accuracy"] > 0.65 and after["macro_f1"] > 0.6
    assert after["loss"] < before["loss"]
    assert set(after) == {"loss", "accuracy", "macro_f1", "rows"}
    about = trained.read("run.json")
    assert about["finished"] and about["data"]["labels"] == sorted(SENSES)
    assert about["measured"]["flops"] <= about["budget"]["flops"]
    measured, predicted = about["measured"]["flops"], about["predicted"]["flops"]
    if about["early_stopping"]["stopped"]:  # which may hang on a processor's last bits
        assert measured < predicted
    else:
        assert measured == pytest.approx(predicted, rel=1e-3)
    assert any("have no head for these 3 classes" in line for line in about["fallbacks"])
    examples = trained.read("eval.json")["examples"]
    assert examples and all({one["reference"], one["before"], one["after"]} <= set(SENSES) for one in examples)


def test_it_is_planned_as_it_is_run(trained: Trained) -> None:
    planned = look_ahead(trained.options, Log(quiet=True))
    assert planned["fits"] and not planned["head"]
    assert "3 classes" in planned["batch"]
    assert planned["full_flops"] == trained.read("run.json")["full_flops"]


@pytest.mark.parametrize("trained", ["bert"], indirect=True)
def test_the_report_says_accuracy(trained: Trained) -> None:
    page = (trained.folder / "report.html").read_text(encoding="utf-8")
    assert "Accuracy on held-out rows" in page and "Macro-F1" in page
    assert "Loss (nats per row)" in page and "Supervised tokens" not in page and "Perplexity" not in page


@pytest.mark.parametrize("trained", ["bert", pytest.param("llama", marks=pytest.mark.slow)], indirect=True)
def test_a_run_that_died_goes_on_with_the_same_bits(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(BaseException):
        pass

    add = disk.Lines.add

    def until(self: disk.Lines, tree: dict[str, Any]) -> None:
        add(self, tree)
        if tree.get("step") == DIES_AT and "loss" in tree:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(disk.Lines, "add", until)
        with pytest.raises(Stopped):
            run(replace(trained.options, output=str(tmp_path / "run")), Log(quiet=True))
    resume(tmp_path / "run", Log(quiet=True))
    ours, theirs = tmp_path / "run", trained.folder
    assert (ours / "patch.safetensors").read_bytes() == (theirs / "patch.safetensors").read_bytes()
    mine, whole = (
        [(line["step"], line.get("loss"), line.get("held_out_loss")) for line in read_lines(path / "metrics.jsonl")]
        for path in (ours, theirs)
    )
    assert mine == whole and any(held_out is not None for _, _, held_out in whole)
    assert runs.read(ours, "eval.json")["after"] == trained.read("eval.json")["after"]


def test_eval_says_what_the_run_said(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    after = trained.read("eval.json")["after"]
    again = evaluate_subject(str(trained.folder))
    assert again == pytest.approx(after, rel=1e-4)
    assert evaluate_subject(str(trained.folder), data=trained.options.eval_data) == pytest.approx(after, rel=1e-4)
    patched = evaluate_subject(
        None, trained.where, str(trained.folder / "patch.safetensors"), data=str(trained.options.eval_data)
    )
    assert patched == pytest.approx(after, rel=1e-4)
    assert main(["eval", str(trained.folder)]) == 0
    assert f"{after['accuracy']:.4f}" in capsys.readouterr().out


def test_generate_says_the_label(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rule(60, 1)[:10]
    said = [generate_text(str(trained.folder), None, None, text, None) for text, _ in rows[:3]]
    assert set(said) <= set(SENSES)
    shown = {one["prompt"]: one["after"] for one in trained.read("eval.json")["examples"]}
    assert all(shown[text] == label for (text, _), label in zip(rows, said, strict=False) if text in shown)
    assert main(["generate", str(trained.folder), rows[0][0]]) == 0
    assert capsys.readouterr().out.strip() == said[0]
    assert main(["generate", str(trained.folder), rows[0][0], "--tokens", "8"]) == 2
    assert "--tokens is for answers in words" in capsys.readouterr().err
    assert main(["generate", str(trained.folder), " "]) == 2
    assert "the text is empty" in capsys.readouterr().err


def test_the_reloaded_model_computes_what_the_float_model_with_the_same_tensors_does(trained: Trained) -> None:
    tensors, about = read_patch(trained.folder / "patch.safetensors")
    labels = tuple(json.loads(about["labels"]))
    source = open_source(trained.where)
    config = as_classifier(read_config(trained.where), labels, 0, source.files)
    base, patched = (load_int8(config, source, trained.cache, Exact(), CPU) for _ in range(2))
    apply_patch(patched, trained.folder / "patch.safetensors")
    assert set(base.fresh) <= set(tensors)
    subject = load_subject(str(trained.folder), None, None)
    rows = read_rows(Path(str(trained.options.eval_data)), None, layout="classification").rows[:6]
    assert subject.reading is not None
    batch = collate(labelled(rows, load_tokenizer(Path(trained.where), False), 64, labels, subject.reading)[0], 2)
    reference = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            owner = name.rpartition(".")[0]
            if name in tensors:
                parameter.copy_(tensors[name])
            elif name in base.linears:
                parameter.copy_(dequantize(base.linears[name].weight))
            elif name in base.vectors:
                parameter.copy_(base.vectors[name])
            else:
                parameter.copy_(dequantize(base.module.get_submodule(owner).weight)
                                if hasattr(base.module.get_submodule(owner).weight, "q")
                                else base.module.get_parameter(name))  # fmt: skip
        expected, found = class_logits(reference, batch, CPU), class_logits(patched.module, batch, CPU)
    assert float((found - expected).norm() / expected.norm()) < 1e-3


@pytest.mark.parametrize("trained", ["bert"], indirect=True)
def test_the_survey_counts_the_classes(trained: Trained) -> None:
    options = RunOptions(task="classification", model=trained.where, data=trained.options.data)
    tree = survey(options)
    side = tree["files"][0]
    assert side["classes"] == {label: sum(two == label for _, two in rule(200, 0)) for label in sorted(SENSES)}
    text = survey_text(tree, colours=False)
    assert "learned    3 classes" in text and "[light]" in text


@pytest.mark.parametrize("strategy", ["full", "greentrainer-dp", "last-layers", "bias", "random"])
@pytest.mark.slow
def test_other_strategies_run_too(strategy: str, trained: Trained, tmp_path: Path) -> None:
    options = replace(trained.options, strategy=strategy, epochs=None, steps=6, output=str(tmp_path / "run"))
    if strategy == "full":
        options = replace(options, lr=1e-3)
    folder = run(options, Log(quiet=True))
    after = runs.read(folder, "eval.json")["after"]
    assert evaluate_subject(str(folder)) == pytest.approx(after, rel=1e-3, abs=0.02)


@pytest.mark.parametrize("trained", ["bert"], indirect=True)
def test_the_files_own_head_is_a_candidate_and_evaluated_without_a_patch(tmp_path: Path, trained: Trained) -> None:
    torch.manual_seed(0)
    names = dict(enumerate(SENSES))
    config = BertConfig(**_SHAPE, id2label=names, label2id={name: place for place, name in names.items()})
    folder = tmp_path / "model"
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((home.MODEL / name).read_bytes())
    numbers = evaluate_subject(None, str(folder), data=trained.options.eval_data)
    assert numbers["rows"] == 60 and 0 <= numbers["accuracy"] <= 1
    options = replace(trained.options, model=str(folder), epochs=None, steps=4, output=str(tmp_path / "run"))
    left = run(options, Log(quiet=True))
    about = runs.read(left, "run.json")
    assert about["data"]["labels"] == list(SENSES)
    assert not any("have no head" in line for line in about["fallbacks"])
    assert runs.read(left, "eval.json")["before"]["accuracy"] == pytest.approx(numbers["accuracy"], abs=0.05)
    assert "classifier.weight" in {one["name"] for one in runs.read(left, "plan-0.json")["candidates"]}


def test_macro_f1_is_the_mean_over_classes() -> None:
    assert macro_f1([(0, 0), (1, 1)]) == 1.0
    assert macro_f1([(0, 0), (0, 0), (0, 0), (1, 0)]) == pytest.approx((6 / 7 + 0) / 2)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"format": "text"}, "--format text goes with --task generation"),
        ({"task": "classify"}, "--task 'classify' is not one of generation, classification"),
    ],
)
def test_options_that_do_not_fit_are_refused(changed: dict[str, str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        RunOptions(**{"task": "classification", "model": "m", "data": "d", **changed})


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line with which the command line refuses these words."""
    assert main([*words]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("edgegt: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("trained", ["bert"], indirect=True)
def test_what_does_not_fit_is_refused_in_one_line(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data, out = trained.where, str(trained.options.data), str(tmp_path / "out")
    words = ("run", "--model", model, "--output", out, "--task", "classification", "--device", "jetson")
    plain = str(write_rows(tmp_path / "plain.jsonl", rule(20, 0), "text", "kind"))
    assert "has none of 'text' and 'label'" in refused(capsys, *words, "--data", plain)
    assert "names only 'text'" in refused(capsys, *words, "--data", plain, "--columns", "text=text")
    language = ("run", "--model", model, "--output", out, "--data", plain, "--columns", "text=text,label=kind")
    assert "--task classification" in refused(capsys, *language)
    assert "needs --model and --data" in refused(capsys, "run", "--task", "classification", "--output", out)
    assert "needs --model and --data" in refused(capsys, "plan", "--task", "classification")
    one = str(write_rows(tmp_path / "one.jsonl", [(text, "same") for text, _ in rule(20, 0)]))
    assert "rows have the label 'same'" in refused(capsys, *words, "--data", one)
    run_folder, patch = str(trained.folder), str(trained.folder / "patch.safetensors")
    assert "--metrics is for answers in words" in refused(capsys, "eval", run_folder, "--metrics", "f1")
    wrong = ("eval", run_folder, "--data", data, "--format", "text")
    assert "--format is for answers in words" in refused(capsys, *wrong)
    t5 = tmp_path / "t5"
    t5.mkdir()
    (t5 / "config.json").write_text('{"model_type": "t5", "decoder_start_token_id": 0}', encoding="utf-8")
    said = refused(capsys, "plan", "--model", str(t5), "--task", "classification")
    assert "'t5' is an encoder-decoder" in said and "answer with the label's word" in said
    said = "'bert' is an encoder, which writes no text: train it with --task classification"
    for command in ("run", "plan", "data"):
        more = {"run": ("--data", data, "--output", out), "plan": ("--data", data), "data": (data,)}[command]
        assert said in refused(capsys, command, "--model", model, *more)
    assert said in refused(capsys, "generate", "--model", model, "what is it")
    other = write_model(tmp_path / "other", trained.family, seed=1)
    assert "was trained on another base" in refused(
        capsys, "eval", "--model", str(other), "--patch", patch, "--data", data
    )
