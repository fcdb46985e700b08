"""Exported models: transformers loads them with exactly the trained tensors, and the base's own for the rest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import edgegt.export
import runs
from edgegt.architecture import is_transposed
from edgegt.cli import main
from edgegt.errors import InputError
from edgegt.export import export_model, export_patch
from edgegt.log import Log
from edgegt.model import head_is_apart
from edgegt.options import RunOptions
from edgegt.outlook import look_ahead
from edgegt.patch import apply_patch, open_patch, read_patch, save_patch
from edgegt.pretrained import open_pretrained
from edgegt.source import Source, open_source, read_config
from edgegt.trace import trace
from tiny_models import EVERY, FAMILIES, MIXTURES, batch_of, load, logits_of, save_model, start_of

LISTED = ["llama", "llama-untied", "gpt2", "opt", "qwen2", "gemma2", "bloom", "gpt-neox", "t5", "flan-t5", "bart"]
QUIET = Log(quiet=True)
HEAD = "lm_head.weight"


def loaded(folder: Path, config: Any, **options: Any) -> Any:
    """transformers' own model of this folder, as a program without edgegt loads it."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto = AutoModelForSeq2SeqLM if getattr(config, "is_encoder_decoder", False) else AutoModelForCausalLM
    return auto.from_pretrained(folder, attn_implementation="eager", **options).eval()


def make_patch(folder: Path, names: list[str], rows: torch.Tensor | None = None, path: Path | None = None) -> Path:
    """Random values for these tensors of the model in `folder`; rows: of the head only these."""
    base = open_pretrained(str(folder))
    torch.manual_seed(3)
    tensors = {name: base.value(name).float() + 0.1 * torch.randn(base.shapes[name]) for name in names}
    if rows is not None:
        tensors |= {base.head: tensors[base.head][rows], f"{base.head}|rows": rows}
    path = path or folder.parent / "patch.safetensors"
    save_patch(path, {name: value.contiguous() for name, value in tensors.items()}, base.fingerprint, "model", "0")
    return path


def some_names(folder: Path) -> list[str]:
    """Trained tensors as runs have them: some linears, norms and biases, and the head."""
    base = open_pretrained(str(folder))
    several = [
        name for name in base.shapes if base.aliases[name][0] == name and name not in (base.head, base.embedding)
    ]
    return [*several[::3], base.head]


def put(module: Any, patch: Path) -> Any:
    """The float model with these tensors in place, put there by hand."""
    tensors, _ = read_patch(patch)
    head = module.get_output_embeddings()
    if any(module.get_submodule(name.rpartition(".")[0]) is head for name in tensors if not name.endswith("|rows")):
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    for name, value in tensors.items():
        if name.endswith("|rows"):
            continue
        owner = module.get_submodule(name.rpartition(".")[0])
        held = dict(module.named_parameters(remove_duplicate=False))[name]
        rows, value = tensors.get(f"{name}|rows"), value.t() if is_transposed(owner) else value
        with torch.no_grad():
            held.copy_(value) if rows is None else held.index_copy_(0, rows, value)
    return module


def names_in(folder: Path) -> list[str]:
    return [name for file in sorted(folder.glob("*.safetensors")) for name in safe_open(str(file), "pt").keys()]  # noqa: SIM118


@pytest.mark.parametrize("part_of_head", [False, True], ids=["all", "rows"])
@pytest.mark.parametrize("family", LISTED)
def test_transformers_loads_what_was_trained_and_the_base_for_the_rest(
    family: str, part_of_head: bool, tmp_path: Path
) -> None:
    folder, out, config = tmp_path / "model", tmp_path / "out", EVERY[family]()
    save_model(folder, config)
    rows = torch.arange(5, 300, 7) if part_of_head else None
    patch = make_patch(folder, some_names(folder), rows)
    export_model(None, str(folder), str(patch), str(out), log=QUIET)
    expected, found = put(loaded(folder, config), patch), loaded(out, config)
    wanted, got = expected.state_dict(), found.state_dict()
    assert got.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(got[name], wanted[name])] == []
    batch = batch_of(4, seed=1, start=start_of(family))
    assert torch.equal(logits_of(found, batch), logits_of(expected, batch))
    assert not torch.equal(logits_of(found, batch), logits_of(loaded(folder, config), batch))
    assert set(names_in(folder)) <= set(names_in(out))
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_tied_embedding_that_was_trained_stays_the_head(family: str, tmp_path: Path) -> None:
    folder, out, config = tmp_path / "model", tmp_path / "out", EVERY[family]()
    save_model(folder, config)
    embedding = open_pretrained(str(folder)).embedding
    patch = make_patch(folder, [embedding])
    export_model(None, str(folder), str(patch), str(out), log=QUIET)
    found = loaded(out, config)
    assert found.get_output_embeddings().weight is found.get_input_embeddings().weight
    assert torch.equal(found.get_input_embeddings().weight, read_patch(patch)[0][embedding])
    assert (out / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert names_in(out) == names_in(folder)


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bart"])
def test_an_exported_model_is_a_base_again(family: str, tmp_path: Path) -> None:
    folder, out, config = tmp_path / "model", tmp_path / "out", EVERY[family]()
    save_model(folder, config)
    export_model(None, str(folder), str(make_patch(folder, some_names(folder))), str(out), log=QUIET)
    model, batch = load(out, tmp_path / "cache"), batch_of(3, start=start_of(family))
    expected = logits_of(loaded(out, config), batch)
    assert not model.tied and float((logits_of(model.module, batch) - expected).norm() / expected.norm()) < 0.05


def test_a_new_head_has_the_name_that_files_give_it(tmp_path: Path) -> None:
    folder, out, config = tmp_path / "model", tmp_path / "out", FAMILIES["gpt-neox"]()
    config.tie_word_embeddings = True
    save_model(folder, config)
    base = open_pretrained(str(folder))
    assert base.tied and "embed_out.weight" not in names_in(folder)
    export_model(None, str(folder), str(make_patch(folder, [base.head])), str(out), log=QUIET)
    assert set(names_in(out)) - set(names_in(folder)) == {"embed_out.weight"}
    value = read_patch(tmp_path / "patch.safetensors")[0][base.head]
    assert torch.equal(loaded(out, config).get_output_embeddings().weight, value)


def test_a_config_says_that_the_head_is_apart_where_it_can(tmp_path: Path) -> None:
    said = {}
    for family in ("llama", "gpt2", "opt", "qwen2", "gemma2", "bloom", "t5", "bart"):
        folder, out, config = tmp_path / family, tmp_path / f"{family}-out", EVERY[family]()
        config.tie_word_embeddings = True
        save_model(folder, config)
        export_model(
            None, str(folder), str(make_patch(folder, [open_pretrained(str(folder)).head])), str(out), log=QUIET
        )
        said[family] = json.loads((out / "config.json").read_text())["tie_word_embeddings"]
    assert said.pop("t5") is True and said.pop("bart") is True  # there it would say something else
    assert not any(said.values())


def test_the_files_own_names_are_kept(tmp_path: Path) -> None:
    """The hub's gpt2 has names without their first part, and masks beside the weights."""
    folder, out, config = tmp_path / "model", tmp_path / "out", FAMILIES["gpt2"]()
    save_model(folder, config)
    stored = {
        name.removeprefix("transformer."): value for name, value in load_file(folder / "model.safetensors").items()
    }
    stored |= {"h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool)}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    patch = make_patch(folder, ["transformer.h.1.mlp.c_fc.weight", "transformer.ln_f.weight", HEAD])
    export_model(None, str(folder), str(patch), str(out), log=QUIET)
    found, trained = load_file(out / "model.safetensors"), read_patch(patch)[0]
    assert found.keys() == {*stored, HEAD}
    assert torch.equal(found["h.1.mlp.c_fc.weight"], trained["transformer.h.1.mlp.c_fc.weight"].t())
    assert torch.equal(found["h.0.attn.bias"], stored["h.0.attn.bias"])
    module = loaded(out, config)
    assert torch.equal(module.get_output_embeddings().weight, trained[HEAD])
    assert torch.equal(module.transformer.wte.weight, stored["wte.weight"])


def test_a_head_that_the_files_hold_twice_is_replaced_once_or_twice(tmp_path: Path) -> None:
    folder, config = tmp_path / "model", FAMILIES["llama"]()
    save_model(folder, config)
    stored = load_file(folder / "model.safetensors")
    embedding = "model.embed_tokens.weight"
    save_file(stored | {HEAD: stored[embedding].clone()}, folder / "model.safetensors", {"format": "pt"})
    for name, same in ((HEAD, False), (embedding, True)):
        out = tmp_path / f"out-{same}"
        patch = make_patch(folder, [name])
        export_model(None, str(folder), str(patch), str(out), log=QUIET)
        found, value = load_file(out / "model.safetensors"), read_patch(patch)[0][name]
        assert torch.equal(found[name], value)
        assert torch.equal(found[HEAD], found[embedding]) == same
        assert torch.equal(loaded(out, config).get_output_embeddings().weight, value)


def test_dtypes_follow_the_base_or_the_option_and_the_loss_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, config = tmp_path / "model", FAMILIES["llama"]()
    save_model(folder, config).to(torch.bfloat16).save_pretrained(folder)
    patch = make_patch(folder, some_names(folder))
    trained, stored = read_patch(patch)[0], load_file(folder / "model.safetensors")
    export_model(None, str(folder), str(patch), str(tmp_path / "same"))
    said = capsys.readouterr().err
    assert "trained tensors rounded to bfloat16: 0.1" in said and "of what training changed" in said
    assert "the base's tensors rounded" not in said
    assert said.splitlines()[0] in (tmp_path / "same" / "README.md").read_text().replace("- trained", "trained")
    same = load_file(tmp_path / "same" / "model.safetensors")
    assert all(torch.equal(same[name], trained[name].bfloat16() if name in trained else stored[name]) for name in same)
    for kind in ("float32", "float16"):
        export_model(None, str(folder), str(patch), str(tmp_path / kind), kind)
        found, dtype = load_file(tmp_path / kind / "model.safetensors"), getattr(torch, kind)
        assert all(
            torch.equal(found[name], (trained | stored)[name].to(dtype)) for name in found if name not in trained
        )
        assert all(torch.equal(found[name], trained[name].to(dtype)) for name in trained)
        assert loaded(tmp_path / kind, config).dtype == dtype
    assert "rounded to float32" not in capsys.readouterr().err


def test_what_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_model(folder, FAMILIES["llama"]())
    patch = make_patch(folder, [HEAD])
    fingerprint = open_patch(patch).fingerprint
    save_patch(patch, {HEAD: torch.full((320, 64), 1e6)}, fingerprint, "model", "0")
    with pytest.raises(InputError, match=r"'lm_head.weight' has values up to 1e\+06, which float16 cannot hold: give"):
        export_model(None, str(folder), str(patch), str(tmp_path / "out"), "float16", log=QUIET)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "patch.safetensors"]


def test_large_models_come_in_shards_with_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out, config = tmp_path / "model", tmp_path / "out", FAMILIES["llama"]()
    save_model(folder, config, max_shard_size="60KB")
    monkeypatch.setattr(edgegt.export, "SHARD_BYTES", 150_000)
    patch = make_patch(folder, some_names(folder))
    export_model(None, str(folder), str(patch), str(out), log=QUIET)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(v.nbytes for f in files for v in load_file(out / f).values())
    assert all((out / name).stat().st_size < 160_000 for name in files)
    wanted, got = put(loaded(folder, config), patch).state_dict(), loaded(out, config).state_dict()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_tensors_of_the_base_are_read_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    save_model(folder, FAMILIES["llama"]())
    patch, read = make_patch(folder, [HEAD]), Source.tensor
    seen: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def watched(source: Source, name: str) -> Any:
        alive.append(sum(one() is not None for one in seen))
        found = read(source, name)
        seen.append(weakref.ref(found))
        return found

    monkeypatch.setattr(Source, "tensor", watched)
    for dtype in (None, "bfloat16"):
        export_model(None, str(folder), str(patch), str(tmp_path / f"out-{dtype}"), dtype, log=QUIET)
    assert len(alive) > 50 and max(alive) <= 1


def test_what_stands_beside_the_weights_comes_along_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    save_model(folder, FAMILIES["llama"]())
    beside = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "LICENSE",
              "merges.txt", "vocab.json", "tokenizer.model"]  # fmt: skip
    for name in beside:
        (folder / name).write_text(f"{name} as it is")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("template")
    (folder / "README.md").write_text("the base's card")
    for name in ("my diary.json", "pytorch_model.bin", "rows.jsonl"):
        (folder / name).write_text("private")
    export_model(None, str(folder), str(make_patch(folder, [HEAD])), str(out))
    assert all((out / name).read_text() == f"{name} as it is" for name in beside)
    assert (out / "additional_chat_templates" / "tools.jinja").read_text() == "template"
    assert (out / "BASE_README.md").read_text() == "the base's card"
    there = {path.name for path in out.iterdir()} - {"additional_chat_templates", "BASE_README.md", *beside}
    assert there == {"README.md", "config.json", "model.safetensors"}
    assert "left out, of the base's folder: my diary.json, pytorch_model.bin, rows.jsonl" in capsys.readouterr().err


def test_an_existing_folder_is_refused_and_only_a_models_is_replaced(tmp_path: Path) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    save_model(folder, FAMILIES["llama"]())
    patch = make_patch(folder, [HEAD])

    def export(place: Path, force: bool) -> None:
        export_model(None, str(folder), str(patch), str(place), force=force, log=QUIET)

    export(out, False)
    (out / "stale").write_text("")
    with pytest.raises(InputError, match=r"out' exists: give a new name, or --force"):
        export(out, False)
    assert (out / "stale").exists()
    export(out, True)
    assert not (out / "stale").exists() and (out / "model.safetensors").exists()
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "love").write_text("")
    with pytest.raises(InputError, match="no folder of a model"):
        export(tmp_path / "letters", True)
    with pytest.raises(InputError, match="holds what is exported"):
        export(folder, True)
    with pytest.raises(InputError, match="holds what is exported"):
        export(tmp_path, True)
    (tmp_path / "empty").mkdir()
    export(tmp_path / "empty", True)
    assert (folder / "model.safetensors").exists() and (tmp_path / "letters" / "love").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_a_killed_export_left_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    save_model(folder, FAMILIES["llama"]())
    for name in (".out.77.tmp", ".out.77.old", ".other.77.tmp"):
        (tmp_path / name).mkdir()
    export_model(None, str(folder), str(make_patch(folder, [HEAD])), str(tmp_path / "out"))
    said = capsys.readouterr().err
    assert ".out.77.tmp' is of an export that still runs, or was killed" in said and ".out.77.old'" in said
    assert ".other" not in said and (tmp_path / ".out.77.tmp").is_dir()


def test_a_failing_export_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    save_model(folder, FAMILIES["llama"]())
    patch = make_patch(folder, [HEAD])
    export_model(None, str(folder), str(patch), str(out), log=QUIET)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*given: object) -> list[str]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(edgegt.export, "copy_beside", full)
    assert main(["export", "--to", "hf", "--model", str(folder), "--patch", str(patch), "--output", str(out),
                 "--force"]) == 1  # fmt: skip
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_patch_that_is_not_of_this_base_is_refused(tmp_path: Path) -> None:
    folder, other, out = tmp_path / "model", tmp_path / "other", tmp_path / "out"
    save_model(folder, FAMILIES["llama"]())
    save_model(other, FAMILIES["llama"](), seed=1)
    patch = make_patch(folder, [HEAD])
    with pytest.raises(InputError, match="was trained on another base"):
        export_model(None, str(other), str(patch), str(out), log=QUIET)
    fingerprint, rows = open_patch(patch).fingerprint, torch.tensor([3, 500])
    for tensors, why in (
        ({"../../evil": torch.ones(3)}, "'../../evil', which 'model' does not"),
        ({HEAD: torch.ones(3, 64)}, r"\(3, 64\), 'model' as \(320, 64\)"),
        ({HEAD: torch.ones(2, 64), f"{HEAD}|rows": rows}, "rows of 'lm_head.weight' that 'model' cannot have"),
        ({HEAD: torch.ones(3, 64), f"{HEAD}|rows": rows}, "2 rows, and values"),
        ({f"{HEAD}|rows": rows}, "without the values of these rows"),
        ({HEAD: torch.full((320, 64), torch.nan)}, "not all finite"),
        (
            {"model.norm.weight": torch.ones(2), "model.norm.weight|rows": torch.tensor([1, 2])},
            "only the rows of a linear",
        ),
    ):
        save_patch(patch, tensors, fingerprint, "model", "0")
        with pytest.raises(InputError, match=why):
            export_model(None, str(folder), str(patch), str(out), log=QUIET)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_dir()) == ["model", "other"]


def test_a_tensor_that_the_files_do_not_have_by_that_name_is_refused(tmp_path: Path) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    save_model(folder, FAMILIES["llama"]())
    name, path = "model.layers.0.mlp.up_proj.weight", folder / "model.safetensors"
    stored = load_file(path)
    whole = stored.pop(name)
    save_file(
        stored | {f"{name}.{part}": half.clone() for part, half in enumerate(whole.chunk(2))}, path, {"format": "pt"}
    )
    base = open_pretrained(str(folder))
    save_patch(tmp_path / "p", {name: whole}, base.fingerprint, "model", "0")
    with pytest.raises(InputError, match=f"'{name}' has no tensor of that name in the files of 'model'") as refusal:
        export_model(None, str(folder), str(tmp_path / "p"), str(out), log=QUIET)
    assert "\n" not in str(refusal.value) and not out.exists()


# ---- the patch as a file


def small_patch(path: Path) -> dict[str, torch.Tensor]:
    """Some of what a model of base-7m's shape trains, rows of the head among it."""
    torch.manual_seed(0)
    tensors = {f"model.layers.{layer}.mlp.up_proj.weight": torch.randn(688, 256) for layer in (2, 5, 7)}
    tensors |= {"model.norm.weight": torch.randn(256), HEAD: torch.randn(1000, 256), f"{HEAD}|rows": torch.arange(1000)}
    save_patch(path, tensors, "f" * 64, "model", "0", "\n")
    return tensors


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_a_patch_file_is_hardly_larger_than_its_tensors(dtype: str | None, tmp_path: Path) -> None:
    tensors = small_patch(tmp_path / "p")
    path = export_patch(None, str(tmp_path / "p"), str(tmp_path / "out"), dtype, log=QUIET)
    found, about = read_patch(path)
    kind = getattr(torch, dtype or "float32")
    trained = sum(value.numel() * kind.itemsize for name, value in tensors.items() if not name.endswith("|rows"))
    assert trained < path.stat().st_size < 1.05 * trained
    assert about["fingerprint"] == "f" * 64 and about["separator"] == "\n"
    rows = f"{HEAD}|rows"
    assert torch.equal(found.pop(rows), tensors.pop(rows))
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name].to(kind)) for name in tensors)


def test_a_patch_file_is_not_replaced_unless_told(tmp_path: Path) -> None:
    small_patch(tmp_path / "p")
    (tmp_path / "out").write_text("mine")
    with pytest.raises(InputError, match="exists: give a new name, or --force"):
        export_patch(None, str(tmp_path / "p"), str(tmp_path / "out"), log=QUIET)
    with pytest.raises(InputError, match="exists: give the name of a file"):
        export_patch(None, str(tmp_path / "p"), str(tmp_path), force=True, log=QUIET)
    with pytest.raises(InputError, match="--dtype 'float16' is not one of float32, bfloat16"):
        export_patch(None, str(tmp_path / "p"), str(tmp_path / "new"), "float16", log=QUIET)
    export_patch(None, str(tmp_path / "p"), str(tmp_path / "out"), force=True, log=QUIET)
    assert len(open_patch(tmp_path / "out").names) == 5


@pytest.mark.parametrize("rows", [None, torch.arange(0, 320, 3)], ids=["all", "rows"])
def test_a_patch_in_bfloat16_is_read_like_any_other(rows: torch.Tensor | None, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_model(folder, FAMILIES["llama"]())
    patch = make_patch(folder, some_names(folder), rows)
    small = export_patch(None, str(patch), str(tmp_path / "small"), "bfloat16", log=QUIET)
    exact = {name: v if name.endswith("|rows") else v.float() for name, v in read_patch(small)[0].items()}
    save_patch(tmp_path / "wide", exact, open_patch(patch).fingerprint, "model", "0")
    found = []
    for path in (small, tmp_path / "wide"):
        model = load(folder, tmp_path / "cache")
        apply_patch(model, path)
        out = tmp_path / f"out-{path.name}"
        export_model(None, str(folder), str(path), str(out), log=QUIET)
        found.append((logits_of(model.module, batch_of(3)), load_file(out / "model.safetensors")))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])


# ---- real models


@pytest.mark.skipif(not (runs.STORIES / "golden_greedy.json").is_file(), reason="no stories260K under shared/data")
@pytest.mark.parametrize("names", [[], [HEAD, "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]], ids=len)
def test_a_patch_of_no_steps_says_the_published_story(names: list[str], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = open_pretrained(str(runs.STORIES))
    tensors = {name: base.value(name).clone() for name in names}
    save_patch(tmp_path / "p", tensors, base.fingerprint, "stories260K", "0")
    out = export_model(None, str(runs.STORIES), str(tmp_path / "p"), str(tmp_path / "out"), log=QUIET)
    golden = json.loads((runs.STORIES / "golden_greedy.json").read_text())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    ids = torch.tensor([golden["prompt_ids"]])
    said = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=golden["max_new_tokens"], do_sample=False
    )
    assert tokenizer.decode(said[0], skip_special_tokens=True).strip() == golden["text"].strip()


_LOSS = """
import json, sys
sys.path[:] = [place for place in sys.path if place not in ("", sys.argv[3])]
sys.modules["edgegt"] = None
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model, rows = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval(), json.load(open(sys.argv[2]))
total = tokens = 0
for prompt, completion in rows:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(completion), reduction="sum"))
    tokens += len(completion)
print(json.dumps({"loss": total / tokens, "tokens": tokens}))
"""


def loss_without_edgegt(model: Path, run: Path, place: Path) -> dict[str, float]:
    """Mean loss on the run's held-out rows, in a process that has transformers and not this package."""
    from edgegt.folder import RunFolder
    from edgegt.job import read_corpus
    from edgegt.source import load_tokenizer

    held_out = read_corpus(RunFolder(run).options(), load_tokenizer(model)).held_out
    place.write_text(json.dumps([[list(one.prompt), list(one.completion)] for one in held_out]))
    command = [sys.executable, "-c", _LOSS, str(model), str(place), str(runs.REPOSITORY)]
    done = subprocess.run(command, cwd=place.parent, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def trained_and_exported(tmp_path: Path, *more: str, model: Path = runs.STORIES) -> tuple[Path, Path]:
    """A run on E2E, and its model folder, both by the command line."""
    run, out = tmp_path / "run", tmp_path / "out"
    words = runs.words(run, *more, model=model, data=runs.some_rows(tmp_path))
    for arguments in (words, ["export", str(run), "--to", "hf", "--output", str(out)]):
        done = runs.edgegt(arguments, Path(os.environ["EDGEGT_CACHE"]))
        assert done.returncode == 0, done.stderr
    return run, out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stories260K", "base-7m"])
def test_an_exported_run_has_its_loss_in_another_program(name: str, tmp_path: Path) -> None:
    base = runs.model_here(name)
    run, out = trained_and_exported(tmp_path, "--steps", "60", "--eval-rows", "40", model=base)
    before, after = (runs.read(run, "eval.json")[when] for when in ("before", "after"))
    found = loss_without_edgegt(out, run, tmp_path / "rows.json")
    assert after["loss"] < 0.8 * before["loss"]
    assert found["tokens"] == after["tokens"] and found["loss"] == pytest.approx(after["loss"], rel=0.005)
    card, about = (out / "README.md").read_text(), runs.read(run, "run.json")
    assert name in card and f"{about['data']['train_rows']} rows trained on, {after['rows']} held out" in card
    assert (
        f"{about['measured']['flops_ratio']:.1%} of full fine-tuning" in card and f"{after['loss']:.4f} after" in card
    )
    assert "Alimentum" not in card and str(tmp_path) not in card


def test_a_card_says_what_the_run_says_and_nothing_of_the_text(tmp_path: Path) -> None:
    folder, run = tmp_path / "model", tmp_path / "run"
    save_model(folder, FAMILIES["llama"]())
    run.mkdir()
    make_patch(folder, [HEAD], path=run / "patch.safetensors")
    about = {
        "model": {"directory": str(folder), "name": "model"}, "strategy": "greentrainer", "finished": True,
        "data": {"train_rows": 90, "eval_rows": 10, "name": "my secrets.csv", "separator": "secret"},
        "measured": {"steps": 12, "flops": 4.14e9, "flops_ratio": 0.499}, "command": "edgegt run --data secret",
    }  # fmt: skip
    result = {"before": {"loss": 2.5}, "after": {"loss": 1.25, "rows": 10}, "examples": [{"prompt": "a secret"}]}
    (run / "run.json").write_text(json.dumps(about))
    (run / "eval.json").write_text(json.dumps(result))
    export_model(str(run), None, None, str(tmp_path / "out"), log=QUIET)
    card = (tmp_path / "out" / "README.md").read_text()
    wanted = (
        "base: model, fingerprint", "90 rows trained on, 10 held out", "12 steps, strategy greentrainer",
        "4.14 GFLOP, 49.9% of full fine-tuning", "2.5000 before and 1.2500 after", "- `lm_head.weight`",
    )  # fmt: skip
    assert [said for said in wanted if said not in card] == []
    assert "secret" not in card and str(tmp_path) not in card and "broken off" not in card
    (run / "run.json").write_text(json.dumps({**about, "finished": False}))
    (run / "eval.json").unlink()
    export_model(str(run), None, None, str(tmp_path / "half"), log=QUIET)
    card = (tmp_path / "half" / "README.md").read_text()
    assert "the run was broken off before its end" in card and "held-out loss" not in card


def test_what_cannot_be_exported_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    save_model(folder, FAMILIES["llama"]())
    patch = make_patch(folder, [HEAD])
    run = tmp_path / "run"
    run.mkdir()
    patch.rename(run / "patch.safetensors")
    (run / "run.json").write_text(json.dumps({"model": {"directory": str(tmp_path / "gone")}}))
    tail = ["--to", "hf", "--output", str(tmp_path / "out")]
    for words, why in (
        (["export", str(run), *tail], "gone' any more: give its place with --model"),
        (["export", *tail], "name a run folder, or a patch with --patch: exactly one of the two"),
        (["export", str(run), "--patch", "p", *tail], "exactly one of the two"),
        (["export", "--patch", str(run / "patch.safetensors"), *tail], "--patch needs its base: give it with --model"),
        (["export", str(tmp_path / "nothing"), *tail], "nothing' does not exist"),
        (["export", str(run), "--to", "gguf", "--output", "o"], "invalid choice: 'gguf'"),
        (["export", str(run), "--to", "patch", "--model", "m", "--output", "o"], "--model goes with --to hf"),
        (["export", str(run), "--output", "o"], "--to"),
        (["patch", "apply", str(run / "patch.safetensors"), "--output", "o"], "--model"),
    ):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert why in said and said.count("\n") == 1 and said.startswith("edgegt: ")
    assert main(["export", str(run), "--model", str(folder), *tail, "--quiet"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    words = [
        "patch",
        "apply",
        str(run / "patch.safetensors"),
        "--model",
        str(folder),
        "--output",
        str(tmp_path / "two"),
    ]
    assert main([*words, "--quiet"]) == 0
    assert (tmp_path / "two" / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("stacked", [False, True], ids=["per expert", "stacked"])
def test_a_patch_of_stacked_experts_is_refused_by_name(stacked: bool, tmp_path: Path) -> None:
    """Files may hold them one by one."""
    folder = tmp_path / "model"
    save_model(folder, MIXTURES["qwen2-moe"](), save_original_format=not stacked)
    base = open_pretrained(str(folder))
    name = next(name for name in base.shapes if name.endswith("experts.down_proj"))
    patch = tmp_path / "patch.safetensors"
    save_patch(patch, {name: torch.ones(base.shapes[name])}, base.fingerprint, "model", "0")
    with pytest.raises(InputError, match=rf"'{name}' has no tensor of that name .* cannot be exported yet"):
        export_model(None, str(folder), str(patch), str(tmp_path / "out"), log=QUIET)
    assert not (tmp_path / "out").exists()


def test_the_routers_and_attention_of_a_mixture_are_exported(tmp_path: Path) -> None:
    folder, out, config = tmp_path / "model", tmp_path / "out", MIXTURES["qwen2-moe"]()
    save_model(folder, config)
    names = [name for name in some_names(folder) if "experts." not in name] + ["model.layers.0.mlp.gate.weight"]
    export_model(None, str(folder), str(make_patch(folder, names)), str(out), log=QUIET)
    batch, expected = batch_of(4, seed=1), put(loaded(folder, config), tmp_path / "patch.safetensors")
    assert torch.equal(logits_of(loaded(out, config), batch), logits_of(expected, batch))


def test_a_classifiers_patch_is_refused(tmp_path: Path) -> None:
    folder, patch = tmp_path / "model", tmp_path / "patch.safetensors"
    save_model(folder, FAMILIES["llama"]())
    base = open_pretrained(str(folder))
    tensors = {"model.norm.weight": torch.ones(64)}
    save_patch(patch, tensors, base.fingerprint, "model", "0", labels=("no", "yes"))
    with pytest.raises(InputError, match="is a classifier's"):
        export_model(None, str(folder), str(patch), str(tmp_path / "out"), log=QUIET)


def test_a_classifiers_patch_keeps_its_classes_in_another_dtype(tmp_path: Path) -> None:
    labels = ("no", "yes, very")
    save_patch(tmp_path / "p", {"score.weight": torch.ones(2, 64)}, "f" * 64, "model", "0", labels=labels)
    path = export_patch(None, str(tmp_path / "p"), str(tmp_path / "out"), "bfloat16", log=QUIET)
    assert open_patch(path).labels == labels


def test_a_tied_model_whose_head_was_trained_is_counted_with_it(tmp_path: Path) -> None:
    """T5's config cannot say that the head is apart; a run and a plan with the exported model know it all the same."""
    folder, out = tmp_path / "model", tmp_path / "out"
    save_model(folder, EVERY["t5"]())
    tied, alone = open_pretrained(str(folder)), trace(EVERY["t5"]())
    export_model(None, str(folder), str(make_patch(folder, [tied.head])), str(out), log=QUIET)
    config, source = read_config(str(out)), open_source(str(out))
    assert head_is_apart(config, source) and not head_is_apart(config, open_source(str(folder)))
    table, head = trace(config).with_head_apart(), load(out, tmp_path / "cache").linears[tied.head]
    assert table.base_bytes - alone.base_bytes == head.weight.nbytes
    assert (table.parameters - alone.parameters) * 4 == table.float_bytes - alone.float_bytes == 4 * 320 * 64
    planned = [look_ahead(RunOptions(device="jetson", model=str(place)), QUIET) for place in (folder, out)]
    assert [plan["model"]["parameters"] for plan in planned] == [alone.parameters, table.parameters]
