"""Files become rows, bad ones one clear line, and held-out rows stay apart."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from edgegt.data.formats import FORMATS
from edgegt.data.read import BadRow, Row, parse_columns, read_rows, split_rows
from edgegt.errors import InputError
from edgegt.job import read_corpus
from edgegt.options import RunOptions
from letters import Letters

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
PAIRS = [('say, "hi"', "hi\nthere"), ("Straße", " ⟨ok⟩ "), ("3", "4")]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(path: Path, columns: dict[str, str] | None = None) -> str:
    with pytest.raises(InputError) as caught:
        read_rows(path, columns)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def table(delimiter: str) -> str:
    def quoted(text: str) -> str:
        return '"' + text.replace('"', '""') + '"'

    lines = [("prompt", "completion"), *PAIRS]
    return "\r\n".join(delimiter.join(map(quoted, line)) for line in lines) + "\r\n"


def written(format_name: str) -> str:
    objects = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in PAIRS]
    made = {
        "jsonl": "\n".join(objects) + "\n",
        "json": "[\n" + ",\n".join(objects) + "]",
        "csv": table(","),
        "tsv": table("\t"),
    }
    return made[format_name]


@pytest.mark.parametrize("format_name", [name for name in FORMATS if name != "text"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_every_format_gives_back_what_was_written(tmp_path: Path, format_name: str, encoding: str) -> None:
    source = read_rows(write(tmp_path, f"d.{format_name}", written(format_name).encode(encoding)), None)
    assert [(row.prompt, row.completion) for row in source.rows] == PAIRS
    assert (source.format, source.name, source.dropped) == (format_name, f"d.{format_name}", {})
    first = 2 if format_name in ("csv", "tsv") else 1
    assert [row.number for row in source.rows] == [first, first + 1, first + 2]


def test_text_field_numbers_and_empty_rows(tmp_path: Path) -> None:
    lines = ['{"text": "one", "n": 1}', "", '{"text": 2.5}', '{"text": " "}', '{"text": null}', r'{"text": "\ud800"}']
    source = read_rows(write(tmp_path, "d.jsonl", "\n".join(lines)), None)
    assert source.rows == (Row("", "one", 1), Row("", "2.5", 3))
    assert source.dropped == {"empty text": 2, "half a surrogate pair (broken Unicode)": 1}


def test_lines_of_objects_under_the_name_json_and_separators_inside_strings(tmp_path: Path) -> None:
    content = '{"text": "a\u2028b"}\n{"text": "c"}\n'
    assert [row.completion for row in read_rows(write(tmp_path, "d.json", content), None).rows] == ["a\u2028b", "c"]


@pytest.mark.parametrize("space", ["", "\n "])
def test_a_list_of_objects_under_the_name_jsonl(tmp_path: Path, space: str) -> None:
    content = f'[{space}{{"text": "a"}},{space}{{"text": "b"}}]{space}'
    source = read_rows(write(tmp_path, "d.jsonl", content), None)
    assert [(row.completion, row.number) for row in source.rows] == [("a", 1), ("b", 2)]


def test_nan_is_nothing(tmp_path: Path) -> None:
    """pandas writes it where a cell was empty."""
    source = read_rows(write(tmp_path, "d.jsonl", '{"text": NaN}\n{"text": "a"}'), None)
    assert (source.rows, source.dropped) == ((Row("", "a", 2),), {"empty text": 1})


def test_semicolons_of_spreadsheets_and_tabs(tmp_path: Path) -> None:
    assert read_rows(write(tmp_path, "d.csv", "text;n\na, b;1\n"), None).rows == (Row("", "a, b", 2),)
    assert read_rows(write(tmp_path, "d.csv", "text\tn\na, b;\t1\n"), None).rows == (Row("", "a, b;", 2),)


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ("one\ntwo", [("one\ntwo", 1)]),
        ("\n\none\ntwo\n\n \nthree\n", [("one\ntwo", 3), ("three", 7)]),
        ("a\r\n\r\nb", [("a", 1), ("b", 3)]),
        ("a\n\nb\n<|endoftext|>\n\nc\n<|endoftext|>\n", [("a\n\nb", 1), ("c", 6)]),
    ],
)
def test_plain_text_is_divided(tmp_path: Path, content: str, rows: list[tuple[str, int]]) -> None:
    source = read_rows(write(tmp_path, "d.txt", content), None)
    assert [(row.completion, row.number) for row in source.rows] == rows
    assert all(row.prompt == "" for row in source.rows)


def test_columns_are_mapped() -> None:
    assert parse_columns("prompt=mr, completion=ref") == {"prompt": "mr", "completion": "ref"}
    assert parse_columns("text=user 1 personas") == {"text": "user 1 personas"}


@pytest.mark.parametrize("text", ["", "mr", "prompt=mr", "prompt=a,prompt=b", "prompt=a,completion=", "promt=a,text=b"])
def test_columns_that_are_refused(text: str) -> None:
    with pytest.raises(
        InputError, match="--columns prompt=NAME,completion=NAME, --columns text=NAME or --columns messages=NAME"
    ):
        parse_columns(text)


@pytest.mark.parametrize(
    ("prompt", "completion", "context"),
    [("q", "a", "q\n"), ("q ", "a", "q "), ("q", " a", "q"), ("q\n", "\na", "q\n"), ("", "a", "")],
)
def test_a_newline_only_where_words_would_run_together(prompt: str, completion: str, context: str) -> None:
    assert Row(prompt, completion, 1).context == context


def test_missing_file_and_folder_and_unknown_format(tmp_path: Path) -> None:
    write(tmp_path, "train.jsonl", "")
    assert "did you mean 'train.jsonl'" in refusal(tmp_path / "trian.jsonl")
    assert "does not exist" in refusal(tmp_path / "no" / "such.csv")
    assert "is a folder: give one file, '.jsonl'" in refusal(tmp_path)
    assert "unknown format '.xlsx'" in refusal(write(tmp_path, "d.xlsx", "PK"))


def test_malformed_json_names_row_column_and_excerpt(tmp_path: Path) -> None:
    lines = ['{"text": "fine"}'] * 16 + ['{"text": "oops}'] + ['{"text": "fine"}'] * 3
    message = refusal(write(tmp_path, "d.jsonl", "\n".join(lines)))
    assert "row 17: malformed JSON at column 10" in message
    assert "oops" in message
    message = refusal(write(tmp_path, "d.json", "[\n" + ",\n".join(lines) + "\n]"))
    assert "row 17 (line 18): malformed JSON at column" in message
    assert "row 2 (line 1)" in refusal(write(tmp_path, "e.json", '[{"text": 1} {"text": 2}]'))
    assert "row 2 " in refusal(write(tmp_path, "f.json", '[{"text": 1}, nope]'))
    assert "row 1:" in refusal(write(tmp_path, "g.jsonl", "[" * 100_000))
    assert "row 1:" in refusal(write(tmp_path, "h.jsonl", '{"text": ' + "9" * 5000 + "}"))


@pytest.mark.parametrize(
    ("name", "content", "columns", "said"),
    [
        ("d.jsonl", '{"text": "a"}\n[1]\n', None, "row 2 is [1], not an object"),
        ("d.json", '[{"text": "a"}, "b"]', None, 'row 2 is "b", not an object'),
        ("d.json", '"a"', None, "is not a list of objects"),
        ("d.jsonl", '{"text": ["a"]}', None, "row 1: field 'text' is a list, wanted text or a number"),
        ("d.jsonl", '{"text": "a"}\n{"txt": "a"}', None, "row 2 has no field 'text': it has 'txt'"),
        ("d.csv", "mr,ref\na,b\n", None, "'instruction' and 'output', 'text': it has 'mr', 'ref'"),
        ("d.csv", "mr,ref\na,b\n", {"text": "reff"}, "no column 'reff' (did you mean 'ref'?): it has 'mr', 'ref'"),
        ("d.csv", "text,n\na,1\nb, c,2\n", None, "row 3 has 3 fields, the header has 2"),
        ("d.csv", 'text,n\na,1\n"b,2\n', None, "row 3: unexpected end of data: close every quote"),
        ("d.txt", "a", {"text": "b"}, "leave --columns out"),
        ("d.csv", b"text\ncaf\xe9\n", None, "line 2: byte 8 (0xe9) is not valid UTF-8"),
        ("d.csv", b"\xef\xbb\xbftext\ncaf\xe9\n", None, "line 2: byte 11 (0xe9) is not valid UTF-8"),
        ("d.jsonl", "", None, "no usable row (it is empty)"),
        ("d.json", "[]", None, "no usable row (it is empty)"),
        ("d.csv", "text\n", None, "no usable row (it is empty)"),
        ("d.txt", "\n \n", None, "no usable row (it is empty)"),
        ("d.jsonl", '{"prompt": "a", "completion": ""}', None, "no usable row (1 with empty completion)"),
    ],
)
def test_refusals(tmp_path: Path, name: str, content: str | bytes, columns: dict[str, str] | None, said: str) -> None:
    assert said in refusal(write(tmp_path, name, content), columns)


MIXED = {
    "d.jsonl": (b'{"text": "a"}\n{"text": "b}\n[1]\n{"txt": 1}\n{"text": {}}\n{"text": "\xe9"}\n\n{"text": "z"}\n3\n""',
                ["a", "z"], [(2, "malformed JSON at column 10"), (3, "a list, not an object"), (4, "no field 'text'"),
                (5, "field 'text' is an object"), (6, "bytes that are not UTF-8"), (9, "a number, not an object"),
                (10, "a text, not an object")]),
    "d.json": (b'[3, {"text": "a"}, null, {"text": []}, true]', ["a"],
               [(1, "a number, not an object"), (3, "null, not an object"), (4, "field 'text' is a list"),
                (5, "a truth value, not an object")]),
    "d.csv": (b'n,text\n1,a\n2\n3,"b"b\n4,c,d\n5,"x\n6,y\n7,\xff\n', ["a", "y"],
              [(3, "1 field, the header has 2"), (4, "',' expected after '\"'"), (5, "3 fields, the header has 2"),
               (6, "unexpected end of data"), (8, "bytes that are not UTF-8")]),
    "d.txt": (b"one\n\ntw\xff\n\nthree", ["one", "three"], [(3, "bytes that are not UTF-8")]),
}  # fmt: skip


@pytest.mark.parametrize("name", list(MIXED))
def test_bad_rows_are_left_out_and_listed(name: str, tmp_path: Path) -> None:
    content, kept, bad = MIXED[name]
    path = write(tmp_path, name, content)
    source = read_rows(path, None, skip_bad=True)
    assert [row.completion for row in source.rows] == kept
    assert source.bad == tuple(BadRow(*one) for one in bad)
    assert "--skip-bad-rows" in refusal(path)


def test_reasons_hold_next_to_nothing_of_the_text(tmp_path: Path) -> None:
    secret = "My name is Ada and my number is 555-0199"
    rows = [{"text": "a"}, {secret: secret}, [secret], secret, {"text": [secret]}]
    path = write(tmp_path, "d.jsonl", "\n".join(map(json.dumps, rows)) + f'\n{{"text": "{secret}')
    source = read_rows(path, None, skip_bad=True)
    assert len(source.bad) == 5 and not any(secret[:21] in one.reason for one in source.bad)


def test_a_run_lists_the_bad_rows_of_both_files(tmp_path: Path) -> None:
    good = [json.dumps({"text": f"text {number}"}) for number in range(3)]
    data = write(tmp_path, "rows.jsonl", "\n".join([*good, *["{"] * 1200, '{"text": ""}']))
    held = write(tmp_path, "held.csv", "text,n\na,1\nb\n")
    options = RunOptions(model="m", data=str(data), eval_data=str(held), skip_bad_rows=True)
    corpus = read_corpus(options, Letters())
    shown = ", ".join(f"row {row} (malformed JSON at column 2)" for row in range(4, 9))
    assert corpus.bad_lines() == [
        f"left out 1200 bad rows of rows.jsonl: {shown} and 1195 more",
        "left out 1 bad row of held.csv: row 3 (1 field, the header has 2)",
    ]
    tree = corpus.to_json()
    assert (tree["rows"], tree["kept"], tree["dropped"]) == (1206, 4, {"empty text": 1, "bad row": 1201})
    assert len(tree["bad_rows"]) == 1000
    assert tree["bad_rows"][0] == {"file": "rows.jsonl", "row": 4, "reason": "malformed JSON at column 2"}
    fine = read_corpus(replace(options, data=str(write(tmp_path, "fine.jsonl", "\n".join(good)))), Letters())
    assert [one["file"] for one in fine.to_json()["bad_rows"]] == ["held.csv"]
    with pytest.raises(InputError, match="row 4: malformed JSON"):
        read_corpus(replace(options, skip_bad_rows=False), Letters())


def sides(rows: list[Row], fraction: float = 0.3, seed: int = 1) -> tuple[set[str], set[str]]:
    train, held_out = split_rows(rows, fraction, seed)
    assert sorted([*train, *held_out], key=lambda row: row.number) == rows
    return {row.prompt or row.completion for row in train}, {row.prompt or row.completion for row in held_out}


def test_split_keeps_equal_prompts_together_and_moves_nobody() -> None:
    rows = [Row(f"Ask  {n % 100}" if n % 2 else f"ask {n % 100}", f"c{n}", n) for n in range(400)]
    train, held_out = sides(rows)
    assert not {" ".join(key.lower().split()) for key in train} & {" ".join(key.lower().split()) for key in held_out}
    assert 10 <= len(held_out) <= 55
    more = [*rows, *(Row(f"other {n}", "c", 400 + n) for n in range(100))]
    assert sides(more)[1] & train == set()
    assert held_out <= sides(more)[1]
    assert sides(rows, seed=2)[1] != held_out


def test_split_uses_the_text_where_there_is_no_prompt() -> None:
    train, held_out = sides([Row("", f"text {n % 10}", n) for n in range(40)])
    assert train | held_out == {f"text {n}" for n in range(10)}
    assert not train & held_out


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_split_leaves_a_row_on_each_side(fraction: float) -> None:
    train, held_out = sides([Row("a", "x", 1), Row("b", "y", 2)], fraction)
    assert (len(train), len(held_out)) == (1, 1)


def test_split_refuses() -> None:
    with pytest.raises(
        InputError, match=r"2 row\(s\) with 1 distinct prompt\(s\).*give --eval-data FILE, or more rows"
    ):
        split_rows([Row("die straße", "x", 1), Row(" Die  STRASSE ", "y", 2)], 0.5, 0)
    for fraction in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(InputError, match=r"--eval-fraction .* is not between 0 and 1"):
            split_rows([Row("a", "x", 1), Row("b", "y", 2)], fraction, 0)


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is absent")
@pytest.mark.parametrize(
    ("name", "columns", "rows"),
    [
        ("e2e/devset.csv", "prompt=mr,completion=ref", 4672),
        ("dialogsum/dialogsum.dev.jsonl", "prompt=dialogue,completion=summary", 500),
        ("instructions/instruction-data.json", "prompt=instruction,completion=output", 1100),
        ("persona_chat/Synthetic-Persona-Chat_valid.csv", "text=Best Generated Conversation", 1000),
        ("tinystories/tinystories_sample.txt", None, 5),
    ],
)
def test_real_files(name: str, columns: str | None, rows: int) -> None:
    source = read_rows(SHARED / name, parse_columns(columns) if columns else None)
    assert len(source.rows) + sum(source.dropped.values()) == rows
    train, held_out = split_rows(source.rows, 0.1, 0)
    assert len(train) + len(held_out) == len(source.rows)
    assert 0.05 < len(held_out) / rows < 0.25


def test_reading_needs_no_torch() -> None:
    code = "import sys, edgegt.data as d; d.read_rows, d.tokenize; assert 'torch' not in sys.modules; print(d.collate)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "function collate" in done.stdout
