"""Scores against values worked out by hand, several references, no answer, other scripts; and `eval --metrics`."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.tokenizers import DefaultTokenizer

from edgegt.cli import main
from edgegt.data import Example, Row
from edgegt.errors import InputError
from edgegt.metrics import METRICS, _RougeWords, asks, normalised, parse_metrics, score, token_f1
from edgegt.talk import generate_text
from edgegt.use import questions
from runs import STORIES

ALL = tuple(METRICS)


def one(name: str, answer: str, *right: str) -> float:
    return float(score([name], [answer], [right])[name])


def test_exact_match_sees_everything_but_surrounding_space() -> None:
    answers, right = [" yes\n", "Yes", "no.", "maybe"], [["yes"], ["yes"], ["no"], ["perhaps", "maybe"]]
    assert score(["exact_match"], answers, right) == {"exact_match": 50.0}
    assert score(["accuracy"], answers, right) == {"accuracy": 100.0}


def test_accuracy_is_squads_normalisation() -> None:
    assert normalised("  The Beatles,  a Band!") == "beatles band"
    assert one("accuracy", "Eiffel Tower", "the Eiffel-Tower") == 0.0  # the hyphen goes, and joins
    assert one("accuracy", "an apple.", "Apple") == 100.0


def test_what_normalises_to_nothing_is_not_right_by_saying_nothing() -> None:
    assert one("accuracy", "", "The") == 0.0 and one("f1", "", "?!") == 0.0
    assert one("accuracy", "the", "The") == 100.0 and one("f1", " ?! ", "?!") == 100.0


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ("the cat sat", "a cat sat down", 0.8),  # cat, sat of 2 and of 3: precision 1, recall 2/3
        ("cat cat cat", "cat dog", 2 / 5),  # a word counts as often as both have it
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("Straße 5", "straße 5!", 1.0),
        ("我喜欢猫", "我喜欢狗", 3 / 4),
        ("кот сидит", "Кот спит", 1 / 2),
    ],
)
def test_f1_of_words(answer: str, reference: str, f1: float) -> None:
    assert token_f1(answer, reference) == pytest.approx(f1)


def test_f1_takes_the_best_reference_and_the_mean_over_rows() -> None:
    assert score(["f1"], ["red car", "x"], [["blue", "red", "red car wash"], ["y"]])["f1"] == pytest.approx(40.0)


def test_rouge_by_hand() -> None:
    found = score(["rouge"], ["The cat was found under the bed."], [["the cat was under the bed"]])
    # 6 of 7 words and 6 of 6; 4 of 6 pairs and 4 of 5; longest common subsequence 6
    expected = {"rouge1": 100 * 12 / 13, "rouge2": 100 * 8 / 11, "rougeL": 100 * 12 / 13}
    assert found == pytest.approx(expected)


def test_rouge_takes_the_best_reference_for_each_kind() -> None:
    # Against "c b a": all words, no pair, a subsequence of 1. Against "a b x y": 2 of 3 and of 4, 1 pair of 2 and of 3.
    found = score(["rouge"], ["a b c"], [["c b a", "a b x y"]])
    assert found == pytest.approx({"rouge1": 100.0, "rouge2": 40.0, "rougeL": 100 * 4 / 7})


@given(st.text(st.characters(max_codepoint=127), max_size=40))
def test_rouge_cuts_ascii_as_rouge_score_does(text: str) -> None:
    assert _RougeWords().tokenize(text) == DefaultTokenizer().tokenize(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Fährt nach Köln!", ["fährt", "nach", "köln"]),
        ("Кот спит.", ["кот", "спит"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("猫がいる 2匹", ["猫", "が", "い", "る", "2", "匹"]),
    ],
)
def test_rouge_reads_other_scripts(text: str, words: list[str]) -> None:
    assert _RougeWords().tokenize(text) == words
    assert score(["rouge"], [text], [[text]])["rouge1"] == 100.0


@pytest.mark.parametrize(
    ("answer", "right", "bleu"),
    [
        # 5 of 6 words, 3 of 5 pairs, 2 of 4 and 1 of 3
        ("the cat sat on the mat", ["the cat sat on a mat"], (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25),
        # a second reference adds "on the", "the mat" and "on the mat"; the closest length stays 6
        ("the cat sat on the mat", ["the cat sat on a mat", "on the mat"], (5 / 6 * 5 / 5 * 3 / 4 * 1 / 3) ** 0.25),
        ("the cat sat on", ["the cat sat on a mat"], math.exp(1 - 6 / 4)),
        ("", ["the cat sat on a mat"], 0.0),
    ],
)
def test_bleu_by_hand(answer: str, right: list[str], bleu: float) -> None:
    assert one("bleu", answer, *right) == pytest.approx(100 * bleu)


def test_bleu_is_of_the_corpus_with_references_of_different_number() -> None:
    found = score(["bleu"], ["a b c d e", "v w x y"], [["a b c d e"], ["v w x z", "v w x y"]])
    assert found["bleu"] == pytest.approx(100.0)
    assert found["bleu_signature"].startswith("nrefs:var|case:mixed|eff:no|tok:13a|smooth:exp|version:")


@pytest.mark.parametrize(
    ("text", "words"), [("我喜欢小猫", "zh"), ("猫がいるよ", "char"), ("Кот спит тут ночью", "13a")]
)
def test_bleu_divides_what_is_written_without_spaces(text: str, words: str) -> None:
    found = score(["bleu"], [text], [[text]])
    assert found["bleu"] == pytest.approx(100.0) and f"tok:{words}|" in found["bleu_signature"]


def test_nothing_answered_scores_nothing() -> None:
    found = score(ALL, ["", ""], [["a b"], ["c", "d"]])
    assert {name: value for name, value in found.items() if name != "bleu_signature"} == dict.fromkeys(
        ("exact_match", "accuracy", "f1", "rouge1", "rouge2", "rougeL", "bleu"), 0.0
    )


def test_metrics_are_read_once_each() -> None:
    assert parse_metrics(" ROUGE, exact-match,rouge,") == ("rouge", "exact_match")
    assert not asks(("perplexity",)) and asks(("perplexity", "f1"))
    known = "give some of exact_match, accuracy, f1, rouge, bleu, perplexity"
    with pytest.raises(InputError, match=rf"metric 'blue' is unknown \(did you mean 'bleu'\?\): {known}"):
        parse_metrics("blue")
    with pytest.raises(InputError, match=rf"--metrics names none: {known}"):
        parse_metrics(" , ")


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [("rouge", "rouge_score.rouge_scorer", "rouge-score"), ("bleu", "sacrebleu.metrics.bleu", "sacrebleu")],
)
def test_a_missing_package_is_named(name: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"metric '{name}' needs {package}: pip install edgegt\[metrics\]"):
        parse_metrics(f"f1,{name}")


def test_rows_to_answer_are_spread_evenly_and_each_counts_once() -> None:
    rows = [Row(f"ask {number}", "x", number) for number in range(10)]
    examples = [Example((1, number), (5,), row) for row in rows for number in (1, 2)]
    asked = questions(examples, 4, ("f1",))
    assert [one.row.number for one in asked] == [0, 2, 5, 7] and {one.prompt for one in asked} == {(1, 1)}
    assert len(questions(examples, 10, ("f1",))) == 10 and questions(examples, 10, ("perplexity",)) == []
    with pytest.raises(InputError, match="the rows are plain text and ask nothing"):
        questions([Example((1,), (5,), Row("", "a text", 1))], 4, ("f1",))


@pytest.mark.skipif(not STORIES.is_dir(), reason="no stories260K under shared/data")
def test_eval_answers_and_scores_held_out_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = [generate_text(None, str(STORIES), None, prompt, 6) for prompt in ("Once upon ", "The dog ")]
    rows = [
        {"prompt": "Once upon ", "completion": said[0]},
        {"prompt": "The dog ", "completion": ["something else", said[1].upper()]},
        {"prompt": "Lily ", "completion": "0"},
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["eval", "--model", str(STORIES), "--data", str(data)]
    assert main([*words, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert "scores" not in plain and "answers" not in plain
    assert main([*words, "--metrics", ",".join(ALL), "--tokens", "6", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert "answering 3 rows with at most 6 new tokens each" in err
    assert {name: found[name] for name in plain} == plain and (found["answers"], found["answer_tokens"]) == (3, 6)
    scores = found["scores"]
    assert scores["exact_match"] == pytest.approx(100 / 3) and scores["accuracy"] == pytest.approx(200 / 3)
    assert scores["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert scores["f1"] == pytest.approx(200 / 3) and scores["rouge1"] == pytest.approx(200 / 3)
    assert main([*words, "--metrics", "perplexity,f1", "--answers", "1", "--tokens", "6"]) == 0
    out = capsys.readouterr().out
    assert "answers              1\n" in out and "f1                   100.00\n" in out
    assert main([*words, "--answers", "0", "--metrics", "f1"]) == 2 and main([*words, "--tokens", "4"]) == 2
    err = capsys.readouterr().err
    assert "--answers 0 is out of range" in err and "--tokens goes with --metrics" in err
