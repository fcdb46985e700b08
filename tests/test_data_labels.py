"""Labelled rows: found or named, their classes, and what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from edgegt.data import Reading, Row, classes_of, collate, labelled, matched, parse_columns, read_rows
from edgegt.data.labels import counted
from edgegt.errors import InputError
from edgegt.job import read_corpus
from edgegt.options import RunOptions
from letters import Letters


class Framed(Letters):
    """Puts a mark before and after each text, as BERT's tokenizer does."""

    all_special_ids = (500, 501)

    def __call__(self, text: list[str], *, add_special_tokens: bool, verbose: bool) -> dict[str, list[list[int]]]:
        found = super().__call__(text, add_special_tokens=False, verbose=verbose)["input_ids"]
        return {"input_ids": [[500, *ids, 501] if add_special_tokens else ids for ids in found]}


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def rows(*pairs: tuple[str, str]) -> list[Row]:
    return [Row(text, label, number) for number, (text, label) in enumerate(pairs, 1)]


def test_a_text_and_a_label_are_found_by_name(tmp_path: Path) -> None:
    for field in ("text", "sentence"):
        path = write(tmp_path, f"{field}.jsonl", json.dumps({"id": 1, field: "fine film", "label": 1}) + "\n")
        source = read_rows(path, None, layout="classification")
        assert source.layout == "classification"
        assert [(row.prompt, row.completion) for row in source.rows] == [("fine film", "1")]


def test_columns_name_them(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.csv", "review,stars\ngood,5\nbad, 1 \n,2\nnothing,\n")
    columns = parse_columns("text=review,label=stars", labels=True)
    source = read_rows(path, columns, layout="classification")
    assert [(row.prompt, row.completion) for row in source.rows] == [("good", "5"), ("bad", "1")]
    assert source.dropped == {"empty text": 1, "no label": 1}


def test_classes_are_numbers_in_their_order_and_words_in_the_alphabets() -> None:
    assert classes_of(rows(("a", "10"), ("b", "9"), ("c", "10")), Reading()) == ("9", "10")
    assert classes_of(rows(("a", "yes"), ("b", "no"), ("c", "no")), Reading()) == ("no", "yes")


def test_a_models_own_classes_are_kept_where_the_rows_have_no_others() -> None:
    known = Reading(("world", "sports", "business"))
    assert classes_of(rows(("a", "sports"), ("b", "world")), known) == known.known
    assert classes_of(rows(("a", "0"), ("b", "1"), ("c", "2")), known) == known.known
    assert classes_of(rows(("a", "1"), ("b", "2"), ("c", "2")), known) == ("1", "2")
    assert classes_of(rows(("a", "sports"), ("b", "arts"), ("c", "arts")), known) == ("arts", "sports")
    assert classes_of(rows(("a", "arts")), Reading(known.known, fixed=True)) == known.known


def test_numbers_of_a_models_classes_are_taken_as_such_and_said() -> None:
    made, report = labelled(rows(("a", "1"), ("b", "0")), Framed(), 9, ("world", "sports"), Reading())
    assert [example.label for example in made] == [1, 0]
    assert report.notes == ("labels are taken as numbers of the model's classes, world, sports, counted from 0",)


def test_rows_are_cut_on_the_right_and_keep_the_mark_at_their_end() -> None:
    given = rows(("abcdefgh", "x"), ("ab", "y"))
    made, report = labelled(given, Framed(), 6, ("x", "y"), Reading(right=True))
    letters = [ids[1:-1] for ids in Framed()(["abcd", "ab"], add_special_tokens=True, verbose=False)["input_ids"]]
    assert made[0].inputs == (500, *letters[0], 501)
    assert made[1].inputs == (500, *letters[1], 501)
    assert (report.cut, report.counts, report.longest) == (1, (("x", 1), ("y", 1)), 6)
    assert report.line() == "2 rows: 2 kept, 1 of them cut; 2 classes (x 1, y 1); 5 tokens per example, at most 6"
    plain, _ = labelled(given, Letters(), 6, ("x", "y"), Reading())
    assert len(plain[0].inputs) == 6 and plain[0].inputs[-1] != 501


@pytest.mark.parametrize("right", [True, False])
def test_a_batch_has_one_label_per_row_and_its_padding_where_the_model_wants_it(right: bool) -> None:
    made, _ = labelled(rows(("abc", "x"), ("a", "y")), Framed(), 9, ("x", "y"), Reading(right=right))
    batch = collate(made, 0)
    assert batch.labels.tolist() == [[0], [1]]
    assert (batch.shape.rows, batch.shape.tokens, batch.shape.kept, batch.supervised) == (2, 5, 1, 2)
    ends = batch.attention_mask[:, 0 if right else -1]
    assert ends.tolist() == [1, 1] and batch.attention_mask.sum(1).tolist() == [5, 3]
    if not right:
        assert batch.position_ids[1].tolist() == [0, 0, 0, 1, 2]


def test_a_held_out_row_of_a_class_that_training_lacks_is_left_out_and_counted(tmp_path: Path) -> None:
    train = write(tmp_path, "train.jsonl", "".join(f'{{"text": "t{n}", "label": "{n % 2}"}}\n' for n in range(8)))
    held = write(tmp_path, "held.jsonl", '{"text": "a", "label": "1"}\n{"text": "b", "label": "7"}\n')
    options = RunOptions(model="m", task="classification", data=str(train), eval_data=str(held))
    corpus = read_corpus(options, Framed(), None, Reading())
    assert corpus.labels == ("0", "1") and len(corpus.held_out) == 1
    assert corpus.to_json()["dropped"] == {"label that no training row has": 1}
    assert "1 dropped (label that no training row has 1)" in corpus.reports[1].line()
    with pytest.raises(InputError, match=r"none of 1 row\(s\) has a label that is known, such as '7'"):
        labelled(rows(("b", "7")), Framed(), 9, ("0", "1"), Reading())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (rows(("a", "x"), ("b", "x")), "all 2 rows have the label 'x'"),
        (rows(("a", "one"), ("b", "two"), ("c", "three")), "3 rows have 3 different labels, such as 'one'"),
    ],
)
def test_labels_that_are_no_classes_are_refused(given: list[Row], said: str) -> None:
    with pytest.raises(InputError, match=said):
        classes_of(given, Reading())


@pytest.mark.parametrize(
    ("columns", "labels", "said"),
    [
        ("text=a,label=b", False, "names a label: add --task classification"),
        ("prompt=a,completion=b", True, "unknown role 'prompt'; write --columns text=NAME,label=NAME"),
        ("text=a", True, "names only 'text'; write --columns text=NAME,label=NAME"),
    ],
)
def test_columns_of_the_other_task_are_refused(columns: str, labels: bool, said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse_columns(columns, labels)


def test_data_without_labels_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.jsonl", '{"text": "a"}\n')
    with pytest.raises(InputError, match="has none of 'text' and 'label', 'sentence' and 'label'"):
        read_rows(path, None, layout="classification")
    with pytest.raises(InputError, match="is plain text and has no labels"):
        read_rows(write(tmp_path, "rows.txt", "a\n"), None, layout="classification")


def test_many_classes_are_not_all_listed() -> None:
    assert counted([(str(place), 1) for place in range(14)]).endswith("11 1 and 2 more)")


def test_rows_to_measure_importance_on_have_the_same_classes_in_both_halves() -> None:
    made, _ = labelled(rows(*((f"t{n}", str(n % 3)) for n in range(30))), Framed(), 9, ("0", "1", "2"), Reading())
    found = matched(made, range(2, 30), 4, 4, random.Random(0))
    labels = [made[index].label for index in found]
    assert len(found) == 16 and min(found) >= 2
    halves = [labels[start : start + 2] for start in range(0, 16, 2)]
    assert halves[0:4] == [halves[0]] * 4 and halves[4:8] == [halves[4]] * 4
    assert len(set(found)) > 8
