"""Layouts, dotted paths, lists, Parquet, Hugging Face datasets on disk and folders: rows without a conversion."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgegt.data.fields import ABSENT, lookup
from edgegt.data.folder import DataFiles, data_files
from edgegt.data.read import parse_columns, read_parts, read_rows
from edgegt.data.rows import Row, Turn
from edgegt.errors import InputError
from edgegt.evaluate import exact_match
from edgegt.job import data_digests, read_corpus, read_sources
from edgegt.options import RunOptions
from letters import Letters


def lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


PAIRS = [{"prompt": f"p{n}", "completion": f"c{n}"} for n in range(5)]
READ = [(f"p{n}", f"c{n}", n + 1) for n in range(5)]


def triples(rows: tuple[Row, ...]) -> list[tuple[str, str, int]]:
    return [(row.prompt, row.completion, row.number) for row in rows]


# ---- fields


RECORD: dict[str, Any] = {
    "a": {"b": "x", "c.d": "y"}, "a.b": "first", "l": [{"t": 1}, {"t": 2}, 3], "e": [], "n": {"l": ["p", "q"]},
}  # fmt: skip


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("a.b", "first"), ("l.t", [1, 2]), ("l.1.t", 2), ("l.2", 3), ("n.l.1", "q"), ("n.l", ["p", "q"]), ("e.t", []),
        ("l.9", ABSENT), ("l.x", ABSENT), ("a.z", ABSENT), ("a.b.c", ABSENT), (".", ABSENT), ("a.", ABSENT),
        ("n.l.x", ABSENT), ("zz", ABSENT),
    ],
)  # fmt: skip
def test_dotted_paths(path: str, value: object) -> None:
    found = lookup(RECORD, path)
    assert found is value if value is ABSENT else found == value


def test_nested_fields_and_lists(tmp_path: Path) -> None:
    rows = [
        {"q": {"text": ["One.", "Two.", None]}, "answers": ["", "yes", "sure"]},
        {"q": {"text": 3}, "answers": ["no"]},
        {"q": {"text": "x"}, "answers": []},
    ]
    columns = parse_columns("prompt=q.text,completion=answers")
    source = read_rows(lines(tmp_path / "d.jsonl", rows), columns)
    assert source.rows == (Row("One. Two. ", "yes", 1, references=("yes", "sure")), Row("3", "no", 2))
    assert source.dropped == {"empty completion": 1}
    assert exact_match([" sure\n", "yes"], source.rows) == 0.5


def test_fields_that_are_refused(tmp_path: Path) -> None:
    path = lines(tmp_path / "d.jsonl", [{"q": {"text": "x", "id": 1}, "a": [{"text": "y"}]}])
    found = refusal(lambda: read_rows(path, {"prompt": "q.txt", "completion": "a"}))
    assert "has no column 'q.txt' (did you mean 'q.text'?): it has 'q', 'a'; correct --columns" in found
    found = refusal(lambda: read_rows(path, {"prompt": "q.text", "completion": "a"}))
    assert "row 1: field 'a' has an object in its list, wanted texts: name one of its fields, such as a.text" in found
    assert read_rows(path, {"prompt": "q.text", "completion": "a.text"}).rows[0].completion == "y"
    found = refusal(lambda: read_rows(path, {"prompt": "q", "completion": "a.text"}))
    assert "row 1: field 'q' is an object, wanted text or a number" in found


# ---- layouts


def test_instructions_with_and_without_input(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Sing.", "input": "", "output": "La"},
        {"instruction": "Go.", "output": ["Left", "Right"]},
    ]
    source = read_rows(lines(tmp_path / "d.jsonl", rows), None)
    assert source.layout == "instruction"
    assert triples(source.rows) == [("Add.\n\n1 2", "3", 1), ("Sing.", "La", 2), ("Go.", "Left", 3)]


def test_the_format_is_detected_in_this_order_and_can_be_forced(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    every: dict[str, Any] = {
        "text": "t", "instruction": "i", "output": "o", "prompt": "p", "completion": "c",
        "conversations": turns, "messages": turns,
    }  # fmt: skip
    order = ["messages", "conversations", "prompt-completion", "instruction", "text"]
    path = lines(tmp_path / "d.jsonl", [every])
    for name in order:
        assert read_rows(path, None, layout=name).layout == name
    for name, gone in zip(order, [["messages"], ["conversations"], ["prompt"], ["output"], ["text"]], strict=True):
        assert read_rows(lines(path, [every]), None).layout == name
        for key in gone:
            del every[key]
    found = refusal(lambda: read_rows(lines(path, PAIRS), None, layout="messages"))
    assert found.endswith("has no column 'messages': it has 'prompt', 'completion'; leave --format messages out or use "
                          "--columns")  # fmt: skip
    (tmp_path / "d.txt").write_text("a")
    assert "leave --format messages out" in refusal(lambda: read_rows(tmp_path / "d.txt", None, layout="messages"))
    assert read_rows(tmp_path / "d.txt", None, layout="text").rows[0].completion == "a"


GOALS = [{"goal": "g", "sol1": "a", "sol2": "b"}, {"goal": "h", "sol1": "c", "sol2": "d"}]


def test_piqa_and_its_label_file(tmp_path: Path) -> None:
    path, labels = lines(tmp_path / "d.jsonl", GOALS), tmp_path / "d-labels.lst"
    assert "d-labels.lst' cannot be read: PIQA has NAME.jsonl" in refusal(lambda: read_rows(path, None, layout="piqa"))
    labels.write_text("1\n0\n")
    assert triples(read_rows(path, None, layout="piqa").rows) == [("g", "b", 1), ("h", "c", 2)]
    for content, said in {"1\n": "has no label for row 2", "1\n2\n": "has the label '2' for row 2",
                          "1\n0\n1\n": "has 3 labels for 2 rows"}.items():  # fmt: skip
        labels.write_text(content)
        assert said in refusal(lambda: read_rows(path, None, layout="piqa"))
    labels.write_text("1\n0\n")
    lines(path, [GOALS[0], {"goal": "h"}])
    assert "row 2 has no field 'sol1'" in refusal(lambda: read_rows(path, None, layout="piqa"))


# ---- Parquet and Arrow


@pytest.fixture
def arrow() -> Any:
    return pytest.importorskip("pyarrow")


def save_to_disk(pyarrow: Any, folder: Path, parts: list[list[Any]]) -> None:
    """A folder as `datasets` writes it: streams, and a state that lists them."""
    folder.mkdir(parents=True)
    names = [f"data-{place:05}-of-{len(parts):05}.arrow" for place in range(len(parts))]
    for name, rows in zip(names, parts, strict=True):
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.OSFile(str(folder / name), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))


def test_parquet(arrow: Any, tmp_path: Path) -> None:
    import pyarrow.parquet

    pyarrow.parquet.write_table(arrow.Table.from_pylist(PAIRS), tmp_path / "d.parquet", row_group_size=2)
    source = read_rows(tmp_path / "d.parquet", None)
    assert (triples(source.rows), source.format, source.layout) == (READ, "parquet", "prompt-completion")
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    pyarrow.parquet.write_table(arrow.Table.from_pylist([{"messages": turns}]), tmp_path / "d.parquet")
    assert read_rows(tmp_path / "d.parquet", None).rows[0].turns == (Turn("user", "hi"), Turn("assistant", "yo"))
    for content in (b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1"):
        (tmp_path / "d.parquet").write_bytes(content)
        assert "cannot be read as parquet" in refusal(lambda: read_rows(tmp_path / "d.parquet", None))
    for content in (b"", b"ARROW1", bytes(40)):
        (tmp_path / "d.arrow").write_bytes(content)
        assert "d.arrow" in refusal(lambda: read_rows(tmp_path / "d.arrow", None))


def test_without_pyarrow_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def absent(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] == "pyarrow":
            raise ImportError(name)
        return real(name, *rest, **more)

    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr(builtins, "__import__", absent)
    found = refusal(lambda: read_rows(tmp_path / "d.parquet", None))
    assert found == f"'{tmp_path / 'd.parquet'}' needs pyarrow to be read: pip install edgegt[data]"


def test_a_hugging_face_dataset_on_disk(arrow: Any, tmp_path: Path) -> None:
    save_to_disk(arrow, tmp_path / "one", [PAIRS[:2], PAIRS[2:]])
    files = data_files(tmp_path / "one")
    assert [file.name for file in files.train] == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    source = read_parts(files.train, None)
    assert [row.prompt for row in source.rows] == [pair["prompt"] for pair in PAIRS]
    assert source.name == "data-00000-of-00002.arrow and 1 more"
    save_to_disk(arrow, tmp_path / "two" / "train", [PAIRS])
    save_to_disk(arrow, tmp_path / "two" / "validation", [PAIRS[:1]])
    (tmp_path / "two" / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    sources = read_sources(RunOptions(data=str(tmp_path / "two")))
    assert [len(one.rows) for one in sources] == [5, 1]
    (tmp_path / "one" / "state.json").write_text("{")
    assert "state.json' is damaged: save the dataset again" in refusal(lambda: data_files(tmp_path / "one"))
    (tmp_path / "two" / "train" / "state.json").unlink()
    assert "has no split 'train', it has 'validation'" in refusal(lambda: data_files(tmp_path / "two"))


# ---- folders


@pytest.mark.parametrize(
    ("names", "train", "held_out"),
    [
        (["train.jsonl", "valid.jsonl", "test.jsonl"], ["train.jsonl"], ["valid.jsonl"]),
        (["train.json", "test.json"], ["train.json"], ["test.json"]),
        (["training.csv", "dev.csv", "notes.md"], ["training.csv"], ["dev.csv"]),
        (["Train.csv", "Test.csv"], ["Train.csv"], ["Test.csv"]),
        (["trainmodel.json", "val.json", "devtest.json"], ["trainmodel.json"], ["val.json"]),
        (["only.tsv", "README"], ["only.tsv"], []),
        (["train-00001-of-00002.parquet", "train-00000-of-00002.parquet", "test-00000-of-00001.parquet"],
         ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"], ["test-00000-of-00001.parquet"]),
    ],
)  # fmt: skip
def test_folders(names: list[str], train: list[str], held_out: list[str], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_text("")
    wanted = DataFiles(tuple(tmp_path / name for name in train), tuple(tmp_path / name for name in held_out))
    assert data_files(tmp_path) == wanted


@pytest.mark.parametrize("names", [[], ["a.csv", "b.csv"], ["train1.csv", "train2.csv"], ["train.csv", "train.jsonl"]])
def test_folders_in_which_nothing_is_the_training_file(names: list[str], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_text("")
    assert "has no one training file, it has" in refusal(lambda: data_files(tmp_path))
    for name in ("train.tsv", "dev.tsv", "dev.csv"):
        (tmp_path / "other" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "other" / name).write_text("")
    assert "has no one held-out file, it has" in refusal(lambda: data_files(tmp_path / "other"))


def test_a_run_holds_out_the_folder_s_own_rows_and_knows_when_they_change(tmp_path: Path) -> None:
    lines(tmp_path / "d" / "train.jsonl", PAIRS)
    held = lines(tmp_path / "d" / "valid.jsonl", PAIRS[:2])
    options = RunOptions(model="m", data=str(tmp_path / "d"))
    corpus = read_corpus(options, Letters())
    assert (len(corpus.train), len(corpus.held_out), corpus.layout) == (5, 2, "prompt-completion")
    before = data_digests(options)
    lines(held, PAIRS[:3])
    assert set(before) == {"data"} and data_digests(options) != before
    other = lines(tmp_path / "other.jsonl", PAIRS[:1])
    assert len(read_corpus(RunOptions(model="m", data=options.data, eval_data=str(other)), Letters()).held_out) == 1
