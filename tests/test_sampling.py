"""Tokens are drawn as transformers draws them, again with the same seed, and numbers out of range are refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from edgegt.errors import InputError, NotFinite
from edgegt.sampling import Defaults, Sampling, generation_defaults
from edgegt.talk import Wanted

LOGITS = torch.tensor([0.0, 3.0, 2.0, 1.0, -4.0])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"temperature": -0.1}, r"--temperature -0.1 is out of range: give 0 \(the likeliest token\) or a number from"),
        ({"temperature": float("nan")}, "--temperature nan is out of range"),
        ({"temperature": 1e-30}, "--temperature 1e-30 is out of range"),
        ({"top_k": -1}, "--top-k -1 is out of range: give 0"),
        ({"top_p": 0.0}, "--top-p 0.0 is out of range: give a number above 0 and up to 1"),
        ({"top_p": 1.5}, "--top-p 1.5 is out of range"),
        ({"min_p": float("inf")}, "--min-p inf is out of range: give a number from 0 to 1"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty 0.0 is out of range: give a number from 0.1 to 10"),
        ({"seed": -1}, "--seed -1 is out of range: give a whole number from 0"),
        ({"seed": 2**63}, "--seed 9223372036854775808 is out of range"),
        ({"temperature": 0.0, "top_k": 4}, "--top-k draws tokens, and --temperature 0 takes the likeliest"),
        ({"temperature": 0.0, "min_p": 0.1}, "--min-p draws tokens"),
    ],
)
def test_what_is_out_of_range_is_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Wanted(flags=flags)


def test_other_wishes_are_checked_too() -> None:
    with pytest.raises(InputError, match="--tokens 0 is out of range"):
        Wanted(0)
    with pytest.raises(InputError, match="--stop '' would end every answer"):
        Wanted(stops=("x", ""))
    with pytest.raises(InputError, match="--top-k is for answers in words"):
        Wanted(flags={"top_k": 3, "seed": None}).check_unused()
    Wanted(flags={"seed": None}).check_unused()


def test_greedy_unless_a_draw_is_asked_for() -> None:
    assert Sampling().with_flags({"temperature": None, "seed": 4}) == Sampling(seed=4)
    assert Sampling().with_flags({"top_p": 0.5}) == Sampling(temperature=1, top_p=0.5)
    base = Sampling(temperature=0.6, top_k=20, top_p=0.95)
    assert base.with_flags({"top_k": 5}) == Sampling(temperature=0.6, top_k=5, top_p=0.95)
    assert base.with_flags({"temperature": 0.0}) == Sampling()
    assert base.words() == "temperature 0.6, top-k 20, top-p 0.95"
    assert Sampling().words() == "the likeliest token each time"


def test_a_seed_draws_the_same_again() -> None:
    draws = []
    for seed in (3, 3, 4):
        pick = Sampling(temperature=1, seed=seed).picker()
        draws.append([pick([1], LOGITS) for _ in range(30)])
    assert draws[0] == draws[1] != draws[2]
    assert Sampling().picker()([1], LOGITS) == 1


def test_draws_have_the_probabilities_of_transformers() -> None:
    wanted = {
        Sampling(temperature=1): [0.032, 0.638, 0.235, 0.086, 0.001],
        Sampling(temperature=2): [0.108, 0.487, 0.295, 0.179, 0.015],
        Sampling(temperature=1, top_k=2): [0, 0.731, 0.269, 0, 0],
        Sampling(temperature=1, top_p=0.7): [0, 0.731, 0.269, 0, 0],
        Sampling(temperature=1, min_p=0.1): [0, 0.665, 0.245, 0.090, 0],
    }
    for sampling, rough in wanted.items():
        scores = LOGITS / sampling.temperature
        kept = torch.tensor([share > 0 for share in rough])
        exact = scores.masked_fill(~kept, -torch.inf).softmax(-1)
        pick = Sampling(**{**vars(sampling), "seed": 1}).picker()
        counts = Counter(pick([0], LOGITS) for _ in range(3000))
        for token, share in enumerate(exact.tolist()):
            assert counts[token] / 3000 == pytest.approx(share, abs=0.035)
            assert share > 0 or counts[token] == 0


def test_logits_that_are_no_numbers_are_one_clear_error() -> None:
    with pytest.raises(NotFinite, match="logits are not finite"):
        Sampling(temperature=1).picker()([0], LOGITS.log())


def test_what_was_read_is_less_likely_with_a_penalty() -> None:
    pick = Sampling(repetition_penalty=2.0).picker()
    assert pick([0, 4], LOGITS) == 1
    assert pick([1, 4], LOGITS) == 2


def test_defaults_come_from_the_models_own_file(tmp_path: Path) -> None:
    assert generation_defaults(tmp_path) == Defaults()
    config = {"eos_token_id": [5, 6], "forced_bos_token_id": 4, "temperature": -1, "do_sample": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert generation_defaults(tmp_path) == Defaults(None, (5, 6), 4)

    def said(**fields: Any) -> Defaults:
        (tmp_path / "generation_config.json").write_text(json.dumps(fields))
        return generation_defaults(tmp_path)

    assert said(eos_token_id=[7, 9], temperature=0.6) == Defaults(None, (7, 9))
    assert said(eos_token_id=7, do_sample=False, top_k=3) == Defaults(None, (7,))
    drawn = said(do_sample=True, top_k=20, top_p=0.8, repetition_penalty=1.1, eos_token_id=None)
    assert drawn == Defaults(Sampling(temperature=1, top_k=20, top_p=0.8, repetition_penalty=1.1))
    for wrong in ("1.0", -1, True):
        with pytest.raises(InputError, match=r"generation_config.json: temperature .* is out of range"):
            said(do_sample=True, temperature=wrong)
    for text in ("{", "[1]", "\udcff"):
        (tmp_path / "generation_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(InputError, match=r"generation_config.json is no JSON"):
            generation_defaults(tmp_path)
