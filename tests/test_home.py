"""The shipped home assistant must be what its generator makes and must keep held-out wordings out of training."""

from __future__ import annotations

import importlib
import itertools
import json
import struct
import sys
from collections import Counter
from functools import cache
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / "edgegt" / "home"
DATA = ("household.train", "household.heldout", "general.heldout")
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


@cache
def grammar() -> ModuleType:
    sys.path.append(str(ROOT / "tools"))
    return importlib.import_module("home_grammar")


@cache
def rows(name: str) -> tuple[dict[str, str], ...]:
    lines = (HOME / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(json.loads(line) for line in lines)


def keys(name: str) -> set[str]:
    return {" ".join(row["prompt"].lower().split()) for row in rows(name)}


def tensor_shapes() -> dict[str, list[int]]:
    """Read from the safetensors header, so that the test needs no tensor library."""
    with (HOME / "model.safetensors").open("rb") as handle:
        (size,) = struct.unpack("<Q", handle.read(8))
        header: dict[str, Any] = json.loads(handle.read(size))
    assert all(entry["dtype"] == "F32" for name, entry in header.items() if name != "__metadata__")
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}


@pytest.mark.parametrize("name", MODEL_FILES + tuple(f"{name}.jsonl" for name in DATA))
def test_file_is_shipped(name: str) -> None:
    assert (HOME / name).stat().st_size > 0


def test_base_is_small() -> None:
    assert (HOME / "model.safetensors").stat().st_size <= 8_000_000
    assert sum(prod(shape) for shape in tensor_shapes().values()) <= 1_500_000


def test_head_is_tied_and_vocabulary_fits() -> None:
    config = json.loads((HOME / "config.json").read_text(encoding="utf-8"))
    shapes = tensor_shapes()
    assert config["tie_word_embeddings"] is True and "lm_head.weight" not in shapes
    vocabulary = json.loads((HOME / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    assert shapes["model.embed_tokens.weight"][0] == config["vocab_size"] == len(vocabulary)
    assert [vocabulary[token] for token in ("<s>", "</s>", "<pad>")] == [
        config["bos_token_id"],
        config["eos_token_id"],
        config["pad_token_id"],
    ]


def test_generator_reproduces_the_shipped_files() -> None:
    made = grammar().files()
    assert made == grammar().files()
    for name, text in made.items():
        assert (HOME / name).read_bytes() == text.encode(), name


def test_row_counts() -> None:
    assert 700 <= len(rows("household.train")) <= 1000
    assert len(rows("household.heldout")) == len(rows("general.heldout")) == 240


@pytest.mark.parametrize("name", DATA)
def test_rows_are_well_formed(name: str) -> None:
    for row in rows(name):
        assert set(row) == {"prompt", "completion"}
        assert row["prompt"].endswith(grammar().SEP) and grammar().SEP not in row["prompt"][: -len(grammar().SEP)]
        action = json.loads(row["completion"])
        assert " " + json.dumps(action, separators=(",", ":")) == row["completion"]
        assert next(iter(action)) == "do"


@pytest.mark.parametrize("name", DATA)
def test_no_utterance_twice(name: str) -> None:
    assert len(keys(name)) == len(rows(name))


@pytest.mark.parametrize("name", ["household.heldout", "general.heldout"])
def test_heldout_is_not_in_training(name: str) -> None:
    assert not keys(name) & keys("household.train")


def test_heldout_wording_is_new_even_without_politeness() -> None:
    train, heldout = grammar().household()
    trained = {grammar().key(row.core) for row in train}
    assert not trained & {grammar().key(row.core) for row in heldout + grammar().general_heldout()}


def test_every_household_heldout_row_uses_own_words() -> None:
    train, heldout = grammar().household()
    assert all(row.own for row in heldout)
    ordinary = sum(not row.own for row in train)
    assert 0.2 <= ordinary / len(train) <= 0.34


def test_every_own_term_is_trained_often() -> None:
    train, heldout = grammar().household()
    trained = Counter(term for row in train for term in row.own)
    assert all(trained[term] >= 6 for row in heldout for term in row.own)


def test_general_language_has_no_own_words() -> None:
    for row in rows("general.heldout"):
        assert not grammar().words_of(row["prompt"]) & grammar().OWN_WORDS, row


def test_pretraining_leaves_out_heldout_and_own_words() -> None:
    barred = keys("general.heldout") | keys("household.heldout")
    for row in itertools.islice(grammar().pretraining_stream(seed=2), 15000):
        assert grammar().key(row.text + grammar().SEP) not in barred
        assert not grammar().words_of(row.text) & grammar().OWN_WORDS


def test_tokenizer_loads_offline_and_round_trips() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(HOME, local_files_only=True)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")
    for row in rows("household.heldout")[:50]:
        prompt, answer = row["prompt"], row["completion"]
        split = tokenizer(prompt).input_ids + tokenizer(answer, add_special_tokens=False).input_ids
        assert split == tokenizer(prompt + answer).input_ids
        assert tokenizer.decode(split[1:]) == prompt + answer
