"""Ids decode to the text as given, the boundary is exact, and what is cut or dropped is counted."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from edgegt.data.examples import Example
from edgegt.data.read import Row, parse_columns, read_rows
from edgegt.data.tokens import tokenize
from edgegt.errors import InputError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
MODELS = ["base-7m", "stories260K", "babyllama-tok361"]


class Letters:
    """One id per character, from 10 on, and 9 for two newlines; '#' vanishes; `dummy` begins each text with a space."""

    eos_token_id: int | None = 2

    def __init__(self, bos: int | None = 1, dummy: bool = False) -> None:
        self.bos_token_id = bos
        self.dummy = dummy

    def __call__(self, text: list[str], *, add_special_tokens: bool, verbose: bool) -> dict[str, list[list[int]]]:
        assert not add_special_tokens
        assert not verbose
        started = [(" " if self.dummy and t else "") + t.replace("#", "") for t in text]
        merged = [[10 + ord(letter) for letter in t.replace("\n\n", "\0")] for t in started]
        return {"input_ids": [[9 if i == 10 else i for i in text_ids] for text_ids in merged]}

    def decode(self, token_ids: list[int]) -> str:
        return "".join(chr(i - 10) for i in token_ids)


def ids(text: str) -> tuple[int, ...]:
    return tuple(10 + ord(letter) for letter in text)


@pytest.fixture(scope="module", params=MODELS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    if not SHARED.is_dir():
        pytest.skip("../shared/data is absent")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(SHARED / "models" / request.param)


@pytest.mark.parametrize("dummy", [False, True])
@pytest.mark.parametrize("bos", [None, 1])
def test_bos_text_separator_and_eos(bos: int | None, dummy: bool) -> None:
    rows = [Row("q", "a", 1), Row("q ", "b", 2), Row("", "c", 3)]
    examples, report = tokenize(rows, Letters(bos, dummy), 64)
    lead, space = (() if bos is None else (bos,)), " " * dummy
    assert [example.prompt for example in examples] == [lead + ids(f"{space}q\n"), lead + ids(f"{space}q "), lead]
    assert [example.completion for example in examples] == [(*ids("a"), 2), (*ids("b"), 2), (*ids(f"{space}c"), 2)]
    assert [example.row for example in examples] == rows
    assert report.supervised_tokens == sum(len(example.targets) for example in examples)


def test_inputs_and_targets_align_at_the_end() -> None:
    row = Row("p", "c", 1)
    example = Example((1, 5), (6, 7, 2), row)
    assert (example.inputs, example.targets) == ((1, 5, 6, 7), (6, 7, 2))
    first_is_not_learned = Example((), (6, 7, 2), row)
    assert (first_is_not_learned.inputs, first_is_not_learned.targets) == ((6, 7), (7, 2))


@pytest.mark.parametrize("dummy", [False, True])
def test_no_token_spans_prompt_and_completion(dummy: bool) -> None:
    (example,), _ = tokenize([Row("q\n", "\nb", 1)], Letters(dummy=dummy), 64)
    assert example.completion == (*ids("\nb"), 2)


def test_bos_and_eos_that_the_text_spells_out_are_not_doubled() -> None:
    row = Row(chr(40), "a" + chr(41), 1)
    letters = Letters(bos=50)
    letters.eos_token_id = 51
    (example,), _ = tokenize([row], letters, 64)
    assert (example.prompt, example.completion) == ((50, *ids("\n")), (*ids("a"), 51))


def test_the_prompt_is_cut_on_the_left_then_the_completion_on_the_right() -> None:
    prompt, completion = "p" * 40 + "0123456789abcde ", "x" * 10 + "y" * 30
    rows = [Row(prompt, completion[:10], 1), Row(prompt, completion, 2), Row("s ", "t", 3)]
    examples, report = tokenize(rows, Letters(), 40)
    assert examples[0].prompt == (1, *ids(prompt[-29:]))
    assert examples[0].completion == (*ids("x" * 10), 2)
    assert examples[1].prompt == (1, *ids(prompt[-16:]))
    assert examples[1].completion == ids(completion[:24])
    assert [len(example.inputs) for example in examples] == [40, 40, 4]
    assert (report.rows, report.kept, report.cut, report.examples) == (3, 3, 2, 3)


@pytest.mark.parametrize("max_length", [2, 3, 5, 16, 17, 40, 41, 90, 91, 92, 200])
@pytest.mark.parametrize("bos", [None, 1])
def test_any_length_leaves_something_to_learn_within_the_limit(bos: int | None, max_length: int) -> None:
    examples, report = tokenize([Row("p" * 50, "c" * 39, 1), Row("", "t" * 90, 2)], Letters(bos), max_length)
    assert all(len(example.inputs) <= max_length and example.targets for example in examples)
    assert report.longest == max(len(example.inputs) for example in examples)
    whole = 50 + 1 + 39 + (bos is not None)
    assert report.cut == (whole > max_length)


@pytest.mark.parametrize("bos", [None, 1])
@pytest.mark.parametrize("length", range(90, 122))
def test_pieces_of_a_long_text_learn_every_token_once(bos: int | None, length: int) -> None:
    text = "".join(chr(97 + n % 26) for n in range(length))
    examples, report = tokenize([Row("", text, 1)], Letters(bos), 32)
    learned = sum((example.completion for example in examples), ())
    assert learned == (*ids(text), 2)
    assert report.supervised_tokens == length + 1 - (bos is None)
    assert (report.kept, report.cut, report.examples) == (1, 0, len(examples))
    assert max(len(example.inputs) for example in examples) == 32
    for before, after in pairwise(examples):
        assert after.prompt[-1] == before.completion[-1]


def test_rows_without_known_text_are_dropped_and_counted() -> None:
    examples, report = tokenize([Row("a", "##", 1), Row("a", "b", 2)], Letters(), 8)
    assert len(examples) == 1
    assert (report.rows, report.kept, report.dropped) == (2, 1, {"no supervised token": 1})
    expected = "2 rows: 1 kept, 0 of them cut, 1 dropped (no supervised token 1); 2 supervised tokens; "
    assert report.line() == expected + "4 tokens per example, at most 4"


def test_refusals() -> None:
    with pytest.raises(InputError, match=r"no supervised token in 1 row\(s\): give completions"):
        tokenize([Row("a", "##", 1)], Letters(), 8)
    with pytest.raises(InputError, match="--max-length 1 is too short"):
        tokenize([Row("a", "b", 1)], Letters(), 1)
    endless = Letters()
    endless.eos_token_id = None
    with pytest.raises(InputError, match="no end-of-text token: set eos_token"):
        tokenize([Row("a", "b", 1)], endless, 8)


def decoded(tokenizer: Any, example: Example) -> str:
    """The text without BOS and EOS, and without the dummy space that begins a text of sentencepiece."""
    assert example.prompt[0] == tokenizer.bos_token_id
    assert example.completion[-1] == tokenizer.eos_token_id
    return str(tokenizer.decode(list(example.prompt[1:] + example.completion[:-1])))


SEAMS = [
    ("turn it on =>", ' {"do":"on"}'),
    ("a", "b"),
    ("a ", "b"),
    ("a\n", "\nb"),
    ("a\n\n", "  b"),
    ("x=", "=y"),
    ("naïve", "\u2028ümlaut 日本"),
    ("tab\t", "\tend \x01"),
    ("", "a text alone"),
]


def test_prompt_and_completion_decode_to_their_concatenation(tokenizer: Any) -> None:
    rows = [Row(prompt, completion, n) for n, (prompt, completion) in enumerate(SEAMS)]
    examples, _ = tokenize(rows, tokenizer, 256)
    assert [decoded(tokenizer, e) for e in examples] == [row.context + row.completion for row in rows]


def test_e2e_decodes_to_its_text(tokenizer: Any) -> None:
    rows = read_rows(SHARED / "e2e" / "devset.csv", parse_columns("prompt=mr,completion=ref")).rows[::40]
    examples, report = tokenize(rows, tokenizer, 2048)
    assert (report.kept, report.cut, report.dropped) == (len(rows), 0, {})
    assert [decoded(tokenizer, e) for e in examples] == [f"{row.prompt}\n{row.completion}" for row in rows]
    # at inference the prompt is tokenised alone, and gives the very ids that were trained on
    alone = tokenizer(rows[0].context, add_special_tokens=False)["input_ids"]
    assert examples[0].prompt == (tokenizer.bos_token_id, *alone)


def test_long_text_is_divided_without_loss(tokenizer: Any) -> None:
    text = (SHARED / "tinystories" / "tinystories.txt").read_text(encoding="utf-8")[:20_000]
    examples, report = tokenize([Row("", text, 1)], tokenizer, 256)
    learned = sum((example.completion for example in examples), ())
    assert tokenizer.decode(list(learned[:-1])) == text
    assert report.examples == len(examples) > 10
