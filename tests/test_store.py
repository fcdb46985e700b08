"""The base store: int8 on disk at about a byte per parameter, made once per model, and the source it is made from."""

from __future__ import annotations

import json
import resource
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from edgegt import store
from edgegt.cache import cache_dir
from edgegt.errors import InputError
from edgegt.quant import dequantize, quantize_rows
from edgegt.source import Source, fingerprint, load_tokenizer, locate, open_source, read_config
from edgegt.store import Entry, base_store, clear_cache, list_cache
from tiny_models import FAMILIES, SHARED, load, save_model

STORIES = SHARED / "data" / "models" / "stories260K"
BASE_7M = SHARED / "data" / "models" / "base-7m"


def tensor_bytes(folder: Path) -> int:
    """Bytes of the tensors in a folder's safetensors, without the files' headers."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(str(path), framework="pt") as handle:
            total += sum(handle.get_tensor(key).nbytes for key in handle.keys())  # noqa: SIM118
    return total


def parameters(folder: Path) -> int:
    return sum(tensor.numel() for path in folder.glob("*.safetensors") for tensor in load_file(str(path)).values())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", FAMILIES["llama"]())
    return tmp_path / "model"


@pytest.mark.parametrize("path", [STORIES, BASE_7M], ids=["stories260K", "base-7m"])
def test_the_base_of_a_real_model_takes_about_a_byte_per_parameter(path: Path, tmp_path: Path) -> None:
    if not path.is_dir():
        pytest.skip(f"no {path.name} under shared/data")
    model = load(path, tmp_path / "cache")
    assert tensor_bytes(model.store.directory) <= 1.05 * parameters(path)


def test_a_wide_model_stays_within_1_05_bytes_per_parameter(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=500, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    save_model(tmp_path / "model", config)
    model = load(tmp_path / "model", tmp_path / "cache")
    assert tensor_bytes(model.store.directory) <= 1.05 * parameters(tmp_path / "model")


def test_the_store_is_made_once_and_then_reused(folder: Path, tmp_path: Path) -> None:
    first = load(folder, tmp_path / "cache").store
    before = {path: path.stat().st_mtime_ns for path in first.directory.iterdir()}
    again = load(folder, tmp_path / "cache").store
    assert again == first
    assert {path: path.stat().st_mtime_ns for path in again.directory.iterdir()} == before
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_a_store_with_a_file_missing_is_made_again(folder: Path, tmp_path: Path) -> None:
    first = load(folder, tmp_path / "cache").store
    (first.directory / "block-001.safetensors").unlink()
    again = load(folder, tmp_path / "cache").store
    assert (again.directory / "block-001.safetensors").is_file()


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": 1}', '{"format": 1, "files": {}}', '{"format": 1, "files": 3}']
)
def test_a_store_with_a_damaged_manifest_is_made_again(text: str, folder: Path, tmp_path: Path) -> None:
    first = load(folder, tmp_path / "cache").store
    (first.directory / "manifest.json").write_text(text)
    assert list_cache(tmp_path / "cache") == []
    assert load(folder, tmp_path / "cache").store.files == first.files
    assert len(list_cache(tmp_path / "cache")) == 1


@dataclass(frozen=True)
class SlowSource(Source):
    """While its tensors are read, another process puts a store in place."""

    rival: Path
    place: Path

    def row_parts(self, name: str, elements: int) -> Any:
        shutil.copytree(self.rival, self.place, dirs_exist_ok=True)
        return super().row_parts(name, elements)


@pytest.mark.parametrize("complete", [True, False])
def test_two_processes_may_make_the_same_store(complete: bool, folder: Path, tmp_path: Path) -> None:
    rival, source = load(folder, tmp_path / "cache").store, open_source(str(folder))
    if not complete:
        (rival.directory / "manifest.json").unlink()
    place = tmp_path / "other" / "base" / rival.directory.name
    slow = SlowSource(source.directory, source.name, source.files, rival.directory, place)
    name = "model.norm.weight"
    store = base_store(slow, rival.directory.name, [Entry(name, name, 3, False, False)], tmp_path / "other")
    assert (len(store.files) > 1) == complete  # the rival's has every tensor
    assert torch.equal(store.tensor(name), rival.tensor(name))
    assert list(place.parent.iterdir()) == [place]


def test_a_damaged_file_of_a_store_is_named_with_a_remedy(folder: Path, tmp_path: Path) -> None:
    path = load(folder, tmp_path / "cache").store.directory / "block-001.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"block-001\.safetensors' is damaged.*`edgegt cache clear`"):
        load(folder, tmp_path / "cache")


def test_a_full_disk_is_refused_in_one_line_and_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))  # as a full disk, for this process
    try:
        with pytest.raises(InputError, match=r"could not be written.*free space there") as refusal:
            load(folder, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(refusal.value)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_cache_that_cannot_be_written_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "base").write_text("in the way")
    with pytest.raises(InputError, match=r"could not be written.*EDGEGT_CACHE") as refusal:
        load(folder, tmp_path / "cache")
    assert "\n" not in str(refusal.value)


def test_the_store_holds_the_quantised_tensors(folder: Path, tmp_path: Path) -> None:
    store = load(folder, tmp_path / "cache").store
    tensors = load_file(str(folder / "model.safetensors"))
    name = "model.layers.2.mlp.down_proj.weight"
    expected = quantize_rows(tensors[name])
    assert torch.equal(store.tensor(f"{name}.q"), expected.q)
    assert torch.equal(store.tensor(f"{name}.scale"), expected.scale)
    norm = "model.layers.2.input_layernorm.weight"
    assert torch.equal(store.tensor(norm), tensors[norm])
    assert store.files[f"{name}.q"] == "block-002.safetensors"
    assert (dequantize(expected) - tensors[name]).abs().max() < tensors[name].abs().max() / 127


def test_the_fingerprint_changes_with_one_weight_and_with_the_config(folder: Path, tmp_path: Path) -> None:
    memo = tmp_path / "fingerprints.json"
    first = fingerprint(open_source(str(folder)), memo)
    assert fingerprint(open_source(str(folder)), memo) == first
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert fingerprint(open_source(str(copy)), memo) == first
    tensors = load_file(str(copy / "model.safetensors"))
    tensors["model.norm.weight"][3] += 1e-3
    save_file(tensors, str(copy / "model.safetensors"))
    changed = fingerprint(open_source(str(copy)), memo)
    assert changed != first
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert fingerprint(open_source(str(copy)), memo) not in (first, changed)
    assert load(copy, tmp_path / "cache").fingerprint != load(folder, tmp_path / "cache").fingerprint


def test_a_sharded_checkpoint_gives_the_same_base(folder: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "shards", FAMILIES["llama"](), max_shard_size="60KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    whole, shards = load(folder, tmp_path / "cache"), load(tmp_path / "shards", tmp_path / "cache")
    assert whole.fingerprint != shards.fingerprint
    assert whole.store.files == shards.store.files
    for key in whole.store.files:
        assert torch.equal(whole.store.tensor(key), shards.store.tensor(key))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_model(tmp_path / "shards", FAMILIES["llama"](), max_shard_size="60KB")
    lost = sorted((tmp_path / "shards").glob("*.safetensors"))[0]
    lost.unlink()
    with pytest.raises(InputError, match=lost.name):
        open_source(str(tmp_path / "shards"))


def test_a_missing_tensor_is_named_and_nothing_is_stored(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(str(folder / "model.safetensors"))
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, str(folder / "model.safetensors"))
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load(folder, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_a_model_that_is_quantised_already_is_refused(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(str(folder / "model.safetensors"))
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, str(folder / "model.safetensors"))
    with pytest.raises(InputError, match="int8"):
        load(folder, tmp_path / "cache")
    assert not list((tmp_path / "cache" / "base").glob("*"))


def test_a_weight_with_nan_is_refused_by_name_and_leaves_nothing_behind(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(str(folder / "model.safetensors"))
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][2, 3] = float("nan")
    save_file(tensors, str(folder / "model.safetensors"))
    with pytest.raises(InputError, match="NaN") as refusal:
        load(folder, tmp_path / "cache")
    assert name in str(refusal.value)
    assert not list((tmp_path / "cache" / "base").glob("*"))


def test_folders_without_safetensors_are_refused_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="no safetensors: save the model with save_pretrained"):
        open_source(str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match=r"pytorch_model\.bin is a pickle and is not loaded"):
        open_source(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors at all")
    with pytest.raises(InputError, match=r"model\.safetensors: not a readable safetensors file"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"model_type": "nosuch", "architectures": ["NoSuchForCausalLM"]}', "'NoSuchForCausalLM' is unknown"),
        ('{"architectures": ["LlamaForCausalLM"]}', "unknown"),
        ('{"model_type": ', "not valid JSON"),
        ("[1, 2]", "config.json"),
    ],
)
def test_bad_configs_are_refused_in_one_line(text: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError) as refusal:
        read_config(str(tmp_path))
    assert expected in str(refusal.value)
    assert "config.json" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_model_that_is_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a directory"):
        locate(str(tmp_path / "nothing"))
    with pytest.raises(InputError, match=r"no config\.json"):
        read_config(str(tmp_path))


def test_a_folder_without_a_tokenizer_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="no usable tokenizer") as refusal:
        load_tokenizer(folder)
    assert "\n" not in str(refusal.value)


def test_the_cache_lists_what_it_holds_and_clears_it(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert list_cache(cache) == []
    assert clear_cache(cache) == 0
    model = load(folder, cache)
    (listed,) = list_cache(cache)
    assert (listed.model, listed.fingerprint, listed.directory) == ("model", model.fingerprint, model.store.directory)
    assert listed.size_bytes >= tensor_bytes(model.store.directory)
    freed = clear_cache(cache)
    assert freed >= listed.size_bytes
    assert list_cache(cache) == []
    assert not list(cache.rglob("*.safetensors"))


def test_clearing_touches_only_what_edgegt_made(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    made = load(folder, cache).store.directory
    half = made.with_name(f"{'0' * 32}.123.partial")
    half.mkdir()
    (half / "below.safetensors").write_bytes(b"half")
    foreign = [cache / "notes.json", cache / "thesis.txt", cache / "base" / "mine" / "file", cache / "base" / "x.json",
               cache / "base" / f"{'0' * 32}.old" / "file"]  # fmt: skip
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("mine")
    (cache / "base" / ("1" * 32)).symlink_to(tmp_path / "elsewhere")
    (cache / "backend.json").write_text("{}")
    ours = sum(path.stat().st_size for place in (made, half) for path in place.iterdir())
    ours += sum((cache / name).stat().st_size for name in ("backend.json", "fingerprints.json"))
    assert clear_cache(cache) == ours
    assert all(path.read_text() == "mine" for path in (*foreign, tmp_path / "elsewhere" / "file"))
    assert not made.exists() and not half.exists()
    assert {path.name for path in cache.iterdir()} == {"base", "notes.json", "thesis.txt"}
    assert clear_cache(cache) == 0


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGEGT_CACHE", str(tmp_path / "here"))
    assert cache_dir() == tmp_path / "here"
    monkeypatch.delenv("EDGEGT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "edgegt"


def test_a_large_matrix_is_quantised_by_parts_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "model", FAMILIES["gpt2"]())
    source = open_source(str(tmp_path / "model"))
    whole = load(tmp_path / "model", tmp_path / "whole")
    monkeypatch.setattr(store, "PART_ELEMENTS", 1000)
    parts = load(tmp_path / "model", tmp_path / "parts")
    assert len(list(source.row_parts("transformer.wte.weight", 1000))) > 10
    assert whole.linears.keys() == parts.linears.keys()
    for name, linear in whole.linears.items():
        assert torch.equal(linear.weight.q, parts.linears[name].weight.q)
        assert torch.equal(linear.weight.scale, parts.linears[name].weight.scale)
