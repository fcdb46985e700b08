"""Every family from plan to reload: a run, the same run broken off and resumed, and the patched model in float.

The models are random and tiny; their words are those of the household, whose tokenizer ships with the package.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import runs
from edgegt import disk, home
from edgegt.architecture import is_int8, is_transposed
from edgegt.data import Batch, collate, read_rows, tokenize
from edgegt.disk import read_lines
from edgegt.log import Log
from edgegt.model import Int8Model, load_int8
from edgegt.options import RunOptions
from edgegt.outlook import look_ahead
from edgegt.patch import apply_patch, read_patch
from edgegt.quant import ReferenceBackend, dequantize
from edgegt.run import resume, run
from edgegt.source import load_tokenizer, open_source, read_config
from tiny_models import CPU, EVERY, MIXTURES, float_model, logits_of, save_model, start_of

STEPS, DIES_AT = 8, 5
ALL = EVERY | MIXTURES
QUICK = ("llama", "flan-t5", "qwen2-moe")
QUIET = Log(quiet=True)
CLOSE, CLOSE_TO_MASTERS = 1e-5, 1e-4


class Exact(ReferenceBackend):
    """Inputs of products as they are: what is left of int8 are the weights."""

    name = "exact"

    def quantize_tokens(self, x: Tensor, columns: Tensor | None = None, evenly: bool = False) -> tuple[Tensor, Tensor]:
        x = x.to(torch.float32, copy=True) if columns is None else x * columns
        return x, torch.ones(x.shape[0])


@dataclass(frozen=True)
class Trained:
    """What a run of a family left."""

    family: str
    model: Path
    options: RunOptions
    folder: Path
    cache: Path

    def load(self) -> Int8Model:
        """The base in int8 with exact products."""
        where = str(self.model)
        return load_int8(read_config(where), open_source(where), self.cache, Exact(), CPU)

    def batch(self) -> Batch:
        """Some rows of the household."""
        rows = read_rows(home.HELD_OUT, None).rows[:6]
        examples, _ = tokenize(rows, load_tokenizer(self.model), 64, start=start_of(self.family))
        return collate(examples, 2)


def config_of(family: str) -> Any:
    """The family's tiny config with the household's vocabulary."""
    config = ALL[family]()
    config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id = 1024, 0, 1, 2
    return config


@pytest.fixture(scope="module", params=[p if p in QUICK else pytest.param(p, marks=pytest.mark.slow) for p in ALL])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    """A run of eight steps in two rounds."""
    family, here = request.param, tmp_path_factory.mktemp(request.param)
    save_model(here / "model", config_of(family))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (here / "model" / name).write_bytes((home.MODEL / name).read_bytes())
    lines = home.TRAIN.read_text(encoding="utf-8").splitlines(keepends=True)[:80]
    (here / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    options = RunOptions(
        device="jetson", model=str(here / "model"), data=str(here / "rows.jsonl"), output=str(here / "run"), threads=1,
        batch_size=4, max_length=64, steps=STEPS, round_epochs=STEPS * 4 / 2 / 72, eval_rows=6, rho=1.0, lr=1e-3,
        memory="2GiB", checkpoint_every="2",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for key, value in runs.environment(here / "cache").items():
            patch.setenv(key, value)
        yield Trained(family, here / "model", options, run(options, QUIET), here / "cache")


class Stopped(BaseException):
    """Stands for a process that dies."""


def essence(folder: Path) -> tuple[bytes, list[tuple[int, float, float]], float]:
    """The patch, step, loss and rate of every step, and the loss after."""
    steps = [(line["step"], line["loss"], line["lr"]) for line in read_lines(folder / "metrics.jsonl")]
    return (folder / "patch.safetensors").read_bytes(), steps, runs.read(folder, "eval.json")["after"]["loss"]


def test_it_is_planned_as_it_is_run(trained: Trained) -> None:
    planned = look_ahead(trained.options, QUIET)
    assert planned["fits"]
    measured = runs.read(trained.folder, "run.json")
    assert measured["measured"]["steps"] == STEPS
    assert measured["measured"]["flops"] <= measured["budget"]["flops"]
    # The second round's importance pass computes the trained rows of the head once more, which is not predicted.
    assert measured["measured"]["flops"] == pytest.approx(measured["predicted"]["flops"], rel=3e-3)


def test_a_run_that_died_goes_on_with_the_same_bits(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = disk.Lines.add

    def until(self: disk.Lines, tree: dict[str, Any]) -> None:
        add(self, tree)
        if tree.get("step") == DIES_AT and "loss" in tree:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(disk.Lines, "add", until)
        with pytest.raises(Stopped):
            run(replace(trained.options, output=str(tmp_path / "run")), QUIET)
    resume(tmp_path / "run", QUIET)
    assert essence(tmp_path / "run") == essence(trained.folder)


def test_frozen_weights_stay_int8_and_every_selected_weight_changes(trained: Trained) -> None:
    base, patched = trained.load(), trained.load()
    apply_patch(patched, trained.folder / "patch.safetensors")
    plans = [runs.read(trained.folder, f"plan-{index}.json") for index in range(2)]
    selected = {name for plan in plans for name in plan["selected"]}
    tensors, _ = read_patch(trained.folder / "patch.safetensors")
    assert selected == {name for name in tensors if "|" not in name}
    for name, linear in patched.linears.items():
        before = base.linears[name].weight
        if name not in selected:
            assert linear.weight.low is None and linear.rows is None
            assert torch.equal(linear.weight.q, before.q) and torch.equal(linear.weight.scale, before.scale)
    for name in selected:
        rows = tensors.get(f"{name}|rows")
        start = base.original(name, rows) if name in base.linears else base.vectors[name].detach()
        assert tensors[name].shape == start.shape
        assert not torch.equal(tensors[name], start), f"{name} was trained and is what it was"


def test_the_reloaded_model_computes_what_the_float_model_with_the_same_tensors_does(trained: Trained) -> None:
    """Trained tensors are held in two planes: as these stand for them, and as the patch has them."""
    patched, base, batch = trained.load(), trained.load(), trained.batch()
    apply_patch(patched, trained.folder / "patch.safetensors")
    tensors, _ = read_patch(trained.folder / "patch.safetensors")
    as_held = {name: held(patched, name) if name in patched.linears else value for name, value in tensors.items()}
    found, seen = logits_of(patched.module, batch), batch.labels >= 0
    for values, close in ((as_held, CLOSE), (tensors, CLOSE_TO_MASTERS)):
        reference = float_model(config_of(trained.family), untied=True)
        put(reference, base, values)
        expected = logits_of(reference, batch)
        assert float((found[seen] - expected[seen]).norm() / expected[seen].norm()) < close


def held(model: Int8Model, name: str) -> Tensor:
    """The trained numbers of a linear, all of them or of its trained rows, as the model computes with them."""
    linear = model.linears[name]
    return dequantize(linear.weight if linear.rows is None else linear.rows.weight)


@torch.no_grad()
def put(reference: Any, base: Int8Model, tensors: dict[str, Tensor]) -> None:
    """Give a float model the base's tensors as numbers, and over these the trained ones."""
    owners = {f"{path}.{short}": module for path, module in reference.named_modules()
              for short, _ in module.named_parameters(recurse=False)}  # fmt: skip
    table = base.module.get_input_embeddings().weight
    for name, parameter in reference.named_parameters(remove_duplicate=False):
        if name in base.linears:
            value = dequantize(base.linears[name].weight)
        elif name in base.vectors:
            value = base.vectors[name].detach()
        elif is_int8(owners[name], parameter):
            held = base.module.get_submodule(name.rpartition(".")[0]).weight
            value = dequantize(held if held.shape == parameter.shape else table)
        else:
            value = base.module.get_parameter(name).detach()
        trained, rows = tensors.get(name), tensors.get(f"{name}|rows")
        if trained is not None and rows is not None:
            value = value.index_copy(0, rows, trained)
        elif trained is not None:
            value = trained
        value = value.t() if is_transposed(owners[name]) and value.ndim == 2 else value
        parameter.copy_(value.reshape(parameter.shape))  # experts are stacked, in int8 one below the other
