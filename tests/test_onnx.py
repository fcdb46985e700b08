"""Exported ONNX files against transformers: logits, greedy tokens, 8-bit arithmetic, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import pad

import runs
from edgegt import cli
from edgegt.decoding import decode
from edgegt.engine import empty_cache
from edgegt.errors import EdgegtError, InputError
from edgegt.export import export_model
from edgegt.home import MODEL as HOME
from edgegt.log import Log
from edgegt.onnx import graph, parity, weights, write
from edgegt.onnx.engine import OnnxEngine
from edgegt.onnx.module import OnnxModule
from edgegt.onnx.runtime import OnnxModel
from edgegt.onnx.write import export_onnx
from edgegt.options import RunOptions
from edgegt.patch import save_patch
from edgegt.pretrained import open_pretrained
from edgegt.sampling import Sampling
from test_export import make_patch, some_names
from tiny_models import EVERY, PAIRS, START, save_model

pytest.importorskip("onnxruntime")
QUIET = Log(quiet=True)
QUICK = ("llama", "gpt2", "t5")
SLOW = tuple(name for name in EVERY if name not in (*QUICK, "mixtral", "qwen2-moe"))
BY_FAMILY = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], tuple[Path, Path]]:
    """The folders of a family's model with a patch: for transformers, and in ONNX."""
    made: dict[Any, Path] = {}

    def export(family: str, bits: int) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(family)
        if family not in made:
            save_model(folder / "base", EVERY[family]())
            patch = make_patch(folder / "base", some_names(folder / "base"))
            made[family] = folder
            export_model(None, str(folder / "base"), str(patch), str(folder / "hf"), log=QUIET)
        home = made[family]
        if (family, bits) not in made:
            given = None, str(home / "base"), str(home / "patch.safetensors"), str(home / f"onnx{bits}")
            made[family, bits] = export_onnx(*given, bits=bits, log=QUIET)
        return home / "hf", made[family, bits]

    return export


def reference(folder: Path, family: str) -> Any:
    """transformers' float model of an exported folder."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    kind = AutoModelForSeq2SeqLM if family in PAIRS else AutoModelForCausalLM
    return kind.from_pretrained(folder, attn_implementation="eager").eval()


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 300, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def relative(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found - right).norm() / right.norm())


@pytest.mark.parametrize("family", BY_FAMILY)
def test_float_files_give_the_logits_and_the_words_of_transformers(
    family: str, exported: Callable[[str, int], tuple[Path, Path]]
) -> None:
    hf, onnx = exported(family, 32)
    model, files = reference(hf, family), OnnxModel(onnx)
    ids = torch.tensor([tokens(12), tokens(12, 1)])
    mask = torch.ones_like(ids)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if family in PAIRS:
        inputs["decoder_input_ids"] = torch.tensor([tokens(9, 2), tokens(9, 3)])
        mask[0, -3:] = 0
    else:
        mask[0, :4] = 0
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    found = OnnxModule(files, model.config)(**inputs).logits
    if family in ("bloom", "falcon-alibi"):
        del inputs["position_ids"]
    with torch.no_grad():
        right = model(**inputs).logits
    there = torch.ones_like(inputs["decoder_input_ids"]) if family in PAIRS else mask
    assert relative(found[there.bool()], right[there.bool()]) < 1e-4

    config, prompt = model.generation_config, tokens(10, 4)
    config.eos_token_id = config.forced_eos_token_id = None
    options: dict[str, Any] = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
    if family in PAIRS:  # `generate` would take as many layers as the encoder has
        options["past_key_values"] = empty_cache(model.config)
    said = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, 10, dtype=torch.int64), **options)
    engine = OnnxEngine(files, (), None, START if family in PAIRS else None, config.forced_bos_token_id)
    made = list(decode(engine, prompt, 64, Sampling()))
    assert made == said[0, 1 if family in PAIRS else 10 :].tolist()


def int8_reference(folder: Path, family: str) -> Any:
    """The float model with its linears and token embedding computed as the 8-bit files say."""
    from edgegt.architecture import is_linear, is_transposed

    model = reference(folder, family)

    def blocks(x: torch.Tensor) -> torch.Tensor:
        width = x.shape[-1]
        x = pad(x, (0, -width % 32)).unflatten(-1, (-1, 32))
        scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
        return ((x / scale).round() * scale).flatten(-2)[..., :width]

    with torch.no_grad():
        lookup = model.get_input_embeddings()
        rounded = {id(lookup.weight): blocks(lookup.weight)}
        for module in model.modules():
            if is_linear(module):
                turn = (lambda w: w.t()) if is_transposed(module) else (lambda w: w)
                value = rounded.setdefault(id(module.weight), turn(blocks(turn(module.weight))))
                module.weight = torch.nn.Parameter(value)
                module.register_forward_pre_hook(lambda _, given: (blocks(given[0]),))
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding) and id(module.weight) in rounded:
                module.weight = torch.nn.Parameter(rounded[id(module.weight)])
    return model


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(one, marks=pytest.mark.slow) for one in ("gpt2", "t5", "opt", "smollm"))]
)
def test_8_bit_files_compute_what_the_same_arithmetic_gives_in_torch(
    family: str, exported: Callable[[str, int], tuple[Path, Path]]
) -> None:
    hf, onnx = exported(family, 8)
    model, plain = int8_reference(hf, family), reference(hf, family)
    ids = torch.tensor([tokens(12)])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family in PAIRS:
        inputs["decoder_input_ids"] = torch.tensor([tokens(9, 2)])
    with torch.no_grad():
        right, exact = model(**inputs).logits, plain(**inputs).logits
    if family not in PAIRS:
        inputs["position_ids"] = torch.arange(12)[None]
    found = OnnxModule(OnnxModel(onnx), model.config)(**inputs).logits
    # A sum in another order can move an activation to the next code now and then, so it is not exact.
    assert relative(found, right) < 0.2 * relative(exact, right)


def test_codes_are_within_half_a_step_of_the_weights_and_pad_with_zero() -> None:
    matrix = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    matrix[2] = 0
    found, scales = weights.codes(matrix)
    assert found.shape == (5, 2, 32) and scales.shape == (5, 2) and found.min() >= 1
    back = ((found.astype(np.float32) - 128) * scales[:, :, None]).reshape(5, 64)
    assert (back[:, 40:] == 0).all() and (back[2] == 0).all()
    assert (np.abs(back[:, :40] - matrix.numpy()) <= np.repeat(scales, 32, 1)[:, :40] / 2 + 1e-7).all()


def test_inputs_and_outputs_are_those_that_runtimes_know(exported: Callable[[str, int], tuple[Path, Path]]) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(exported("llama", 8)[1] / "model.onnx")
    kinds = [f"{layer}.{part}" for layer in range(3) for part in ("key", "value")]
    past = [f"past_key_values.{kind}" for kind in kinds]
    assert [one.name for one in session.get_inputs()] == ["input_ids", "attention_mask", "position_ids", *past]
    assert [one.name for one in session.get_outputs()] == ["logits", *(f"present.{kind}" for kind in kinds)]
    shapes = {one.name: one.shape for one in (*session.get_inputs(), *session.get_outputs())}
    assert shapes["input_ids"] == ["batch_size", "sequence_length"]
    assert shapes[past[0]] == ["batch_size", 2, "past_sequence_length", 16]
    assert shapes["logits"][-1] == 320


def test_files_say_nothing_of_this_machine(exported: Callable[[str, int], tuple[Path, Path]]) -> None:
    data = (exported("llama", 32)[1] / "model.onnx").read_bytes()
    for place in (Path(__file__).parents[1], Path(torch.__file__).parents[1], Path.home()):
        assert str(place).encode() not in data


def test_large_weights_lie_beside_the_graph(
    exported: Callable[[str, int], tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf, onnx = exported("gpt2", 32)
    monkeypatch.setattr(write, "EXTERNAL_BYTES", 1000)
    home = hf.parent
    given = None, str(home / "base"), str(home / "patch.safetensors"), str(tmp_path / "out")
    out = export_onnx(*given, bits=32, log=QUIET)
    assert (out / "model.onnx").stat().st_size < (out / "model.onnx.data").stat().st_size
    ids, mask = np.array([tokens(8)]), np.ones((1, 8), dtype=np.int64)
    both = [
        model.forward(ids, mask, np.arange(8)[None], model.empty(1))[0]
        for model in (OnnxModel(out), OnnxModel(onnx))
    ]  # fmt: skip
    assert (both[0] == both[1]).all()


def test_a_graph_that_computes_something_else_is_not_left_behind(
    exported: Callable[[str, int], tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = exported("gpt2", 32)[0].parent
    right = weights._float

    def swapped(value: Any, name: str, turn: bool = False) -> Any:
        read = right(value, name, turn)
        return (lambda: -read()) if name.endswith("h.1.mlp.c_fc.weight") else read

    monkeypatch.setattr(weights, "_float", swapped)
    given = None, str(home / "base"), str(home / "patch.safetensors"), str(tmp_path / "out")
    with pytest.raises(EdgegtError, match=r"something else than PyTorch \(logits differ .* allowed 0.001"):
        export_onnx(*given, bits=32, log=QUIET)
    assert list(tmp_path.iterdir()) == []


def test_without_memory_for_the_comparison_that_is_said(
    exported: Callable[[str, int], tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    import psutil

    home = exported("gpt2", 32)[0].parent
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=1000))
    given = None, str(home / "base"), str(home / "patch.safetensors"), str(tmp_path / "out")
    out = export_onnx(*given, bits=32)
    said = "not compared with PyTorch: its float32 form takes"
    assert said in capsys.readouterr().err and said in (out / "README.md").read_text()


def test_an_engine_keeps_what_a_prompt_shares_with_the_one_before(
    exported: Callable[[str, int], tuple[Path, Path]],
) -> None:
    files = OnnxModel(exported("llama", 32)[1])
    engine, fresh = (OnnxEngine(files, (2,), 128, None) for _ in range(2))
    first, second = tokens(20), [*tokens(20)[:15], *tokens(6, 1)]
    engine.prefill(first)
    assert relative(engine.prefill(second), fresh.prefill(second)) < 1e-5
    assert engine.reused == 15 and fresh.reused == 0
    assert relative(engine.step(7), fresh.step(7)) < 1e-5


# ---- what is refused


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


def test_what_cannot_be_exported_or_run_is_said_in_one_line(
    exported: Callable[[str, int], tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    home = exported("llama", 32)[0].parent
    words = ["export", "--model", str(home / "base"), "--patch", str(home / "patch.safetensors")]
    to = [*words, "--output", str(tmp_path / "out"), "--to"]
    assert "--dtype goes with --to hf" in refusal([*to, "onnx", "--dtype", "float32"], capsys)
    assert "--bits goes with --to onnx" in refusal([*to, "hf", "--bits", "8"], capsys)
    assert "--bits" in refusal([*to, "onnx", "--bits", "4"], capsys)
    with pytest.raises(InputError, match="--bits 4 is not one of 8, 32"):
        export_onnx(None, str(home / "base"), str(home / "patch.safetensors"), str(tmp_path / "out"), bits=4)
    mixture = tmp_path / "mixture"
    save_model(mixture, EVERY["mixtral"]())
    save_patch(tmp_path / "p", {}, open_pretrained(str(mixture)).fingerprint, "m", "0")
    other = ["export", "--model", str(mixture), "--patch", str(tmp_path / "p"), "--output", str(tmp_path / "out")]
    assert "mixture of experts, which is not exported to ONNX" in refusal([*other, "--to", "onnx"], capsys)
    assert "was trained on another base" in refusal([*other[:4], words[4], *other[5:], "--to", "onnx"], capsys)

    assert "is not there" in refusal(["generate", "--onnx", str(tmp_path / "nothing"), "hello"], capsys)
    assert "leave out --model" in refusal(["generate", "--onnx", str(home), "--model", "x", "hello"], capsys)
    assert "needs --data" in refusal(["eval", "--onnx", str(home)], capsys)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.onnx").write_bytes(b"no graph")
    assert "onnxruntime cannot run" in refusal(["generate", "--onnx", str(tmp_path / "broken"), "hello"], capsys)

    monkeypatch.setattr(write, "find_spec", lambda name: None if name == "onnxscript" else object())
    said = refusal([*to, "onnx"], capsys)
    assert "--to onnx needs onnxscript: pip install edgegt[export]" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", [name for name in EVERY if name not in ("mixtral", "qwen2-moe")])
def test_every_family_is_traced_with_attention_that_is_written_out(family: str, tmp_path: Path) -> None:
    from edgegt.onnx.float_model import float_model
    from edgegt.onnx.forms import forms_of

    save_model(tmp_path, EVERY[family]())
    model = float_model(open_pretrained(str(tmp_path)), None).module
    assert {part.config._attn_implementation for part in model.modules() if hasattr(part, "config")} == {"eager"}
    assert len(forms_of(model)) == 1 + (family in PAIRS)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as Python has it from the start, also where the tests run in the background and a shell ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_an_export_that_the_exporter_would_go_on_with(
    exported: Callable[[str, int], tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    home, before = exported("llama", 32)[0].parent, signal.getsignal(signal.SIGINT)

    def swallowed() -> None:
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
            time.sleep(1)  # the handler runs in here at the latest

    def fails(*_: Any, **__: Any) -> None:
        swallowed()
        raise torch.onnx.errors.OnnxExporterError("every way failed")

    with pytest.raises(KeyboardInterrupt), graph._stopped_by_ctrl_c():
        swallowed()
    monkeypatch.setattr(torch.onnx, "export", fails)
    given = "--model", str(home / "base"), "--patch", str(home / "patch.safetensors")
    assert cli.main(["export", *given, "--to", "onnx", "--output", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "edgegt: stopped"
    assert not list(tmp_path.iterdir()) and signal.getsignal(signal.SIGINT) is before


def test_files_of_another_base_do_not_stand_for_a_run(
    exported: Callable[[str, int], tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, onnx = exported("llama", 32)
    save_model(tmp_path / "other", EVERY["llama"](), seed=1)
    patch = open_pretrained(str(tmp_path / "other"))
    (tmp_path / "run").mkdir()
    for name in ("run", "options"):
        (tmp_path / "run" / f"{name}.json").write_text(json.dumps(dataclasses.asdict(RunOptions())))
    save_patch(tmp_path / "run" / "patch.safetensors", {}, patch.fingerprint, "other", "0")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (onnx / name).write_bytes((HOME / name).read_bytes())
    words = ["eval", str(tmp_path / "run"), "--onnx", str(onnx)]
    assert "are of another base than" in refusal(words, capsys)
    classifies = dataclasses.asdict(RunOptions(task="classification", data="x"))
    (tmp_path / "run" / "options.json").write_text(json.dumps(classifies))
    assert "says the class of a text, and ONNX files write" in refusal(words, capsys)


def test_parity_counts_real_positions_only(exported: Callable[[str, int], tuple[Path, Path]]) -> None:
    from edgegt.onnx.float_model import float_model
    from edgegt.patch import open_patch

    hf, onnx = exported("llama", 32)
    model = float_model(open_pretrained(str(hf.parent / "base")), open_patch(hf.parent / "patch.safetensors"))
    model.load()
    found = parity.compare(onnx, parity.reference(model))
    assert found.error < 1e-5 and found.same == found.positions == 2 * parity.TOKENS - parity.PADDING


# ---- real models


@pytest.mark.skipif(not (runs.STORIES / "golden_greedy.json").is_file(), reason="no stories260K under shared/data")
def test_a_patch_of_no_steps_says_the_published_story(tmp_path: Path) -> None:
    from edgegt.source import load_tokenizer

    base = open_pretrained(str(runs.STORIES))
    save_patch(tmp_path / "p", {}, base.fingerprint, "stories260K", "0")
    out = export_onnx(None, str(runs.STORIES), str(tmp_path / "p"), str(tmp_path / "out"), bits=32, log=QUIET)
    golden = json.loads((runs.STORIES / "golden_greedy.json").read_text())
    tokenizer, prompt = load_tokenizer(out), golden["prompt_ids"]
    engine = OnnxEngine(OnnxModel(out), (tokenizer.eos_token_id,), None, None)
    said = [*prompt, *decode(engine, prompt, golden["max_new_tokens"], Sampling())]
    assert tokenizer.decode(said, skip_special_tokens=True).strip() == golden["text"].strip()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stories260K", "base-7m"])
def test_a_run_keeps_its_loss_in_8_bits_and_answers_from_the_files(name: str, tmp_path: Path) -> None:
    base, cache, run = runs.model_here(name), Path(os.environ["EDGEGT_CACHE"]), tmp_path / "run"
    some = runs.words(run, "--steps", "60", "--eval-rows", "40", model=base)
    files = {bits: tmp_path / f"onnx{bits}" for bits in (8, 32)}
    every = [
        some,
        *(
            ["export", str(run), "--to", "onnx", "--bits", str(bits), "--output", str(path)]
            for bits, path in files.items()
        ),
    ]
    for words in every:
        done = runs.edgegt(words, cache)
        assert done.returncode == 0, done.stderr
    loss = {}
    for bits, path in files.items():
        done = runs.edgegt(["eval", str(run), "--onnx", str(path), "--json"], cache)
        loss[bits] = json.loads(done.stdout)["loss"]
    assert loss[8] == pytest.approx(loss[32], rel=0.005)
    assert loss[32] == pytest.approx(runs.read(run, "eval.json")["after"]["loss"], rel=0.005)
    assert (files[8] / "model.onnx").stat().st_size < 0.36 * (files[32] / "model.onnx").stat().st_size
    said = runs.edgegt(
        ["generate", "--onnx", str(files[8]), "--tokens", "8", "name[Alimentum], area[city centre]"], cache
    )
    assert said.returncode == 0 and said.stdout.strip()
