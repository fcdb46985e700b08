"""`edgegt data` says what would be trained, and why not; what it says of real data is in test_data_folders."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgegt import home
from edgegt.cli import main
from edgegt.data.layouts import LAYOUTS
from edgegt.data.rows import Row, Turn
from edgegt.data.tokens import tokenize
from edgegt.errors import InputError
from edgegt.options import DATA_FORMATS, RunOptions
from edgegt.survey import GREEN, _pieces, survey, survey_text

HOME = home.MODEL


def write(folder: Path, name: str, rows: list[Any]) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


PAIR = {"prompt": "turn it on", "completion": "done"}
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"},
                     {"role": "user", "content": "bye"}, {"role": "assistant", "content": "so long"}]}  # fmt: skip


def test_the_page_of_a_small_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "d.jsonl", [CHAT, {"messages": CHAT["messages"][:1]}, {"messages": 3}])
    assert main(["data", str(path), "--model", str(HOME)]) == 2
    assert "row 3: field 'messages' is no list of turns" in capsys.readouterr().err
    assert main(["data", str(path), "--model", str(HOME), "--skip-bad-rows"]) == 0
    shown = capsys.readouterr().out
    assert "data       d.jsonl: jsonl, messages\n" in shown
    assert "rows       3: 1 kept, 0 of them cut to" in shown
    assert "2 dropped (no assistant turn 1, bad row 1)" in shown
    assert "note       the model has no chat template: a plain one is used" in shown
    assert "left out 1 bad row of d.jsonl: row 3 (field 'messages' is no list of turns)" in shown
    assert shown.count("[") == shown.count("]") == 2 and "\x1b" not in shown
    assert main(["data", str(path), "--model", str(HOME), "--skip-bad-rows", "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert [piece["learned"] for piece in tree["files"][0]["shown"][0]["pieces"]] == [False, True, False, True]
    assert survey_text(tree, True).count(GREEN[0]) == 2


def test_control_characters_of_the_data_do_not_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, "d.jsonl", [{"prompt": "a\x1b[2J", "completion": "b\x07" * 900}])
    assert main(["data", str(path), "--model", str(HOME), "--max-length", "2000"]) == 0
    shown = capsys.readouterr().out
    assert all(line.isprintable() for line in shown.splitlines())
    assert max(map(len, shown.splitlines())) < 4000


def test_a_text_without_a_prompt_shows_that_its_first_token_is_not_learned() -> None:
    class Letters:
        bos_token_id, eos_token_id = None, 0

        def __call__(self, text: list[str], **_: object) -> dict[str, list[list[int]]]:
            return {"input_ids": [[ord(one) for one in words] for words in text]}

        def decode(self, token_ids: list[int]) -> str:
            return "".join(map(chr, token_ids))

    (example,), _ = tokenize([Row("", "abc", 1)], Letters(), 64)
    assert _pieces(example, Letters()) == [{"text": "a", "learned": False}, {"text": "bc\0", "learned": True}]


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "d.jsonl", [PAIR])
    assert main(["data", str(path)]) == 2
    assert "`edgegt data` needs --model" in capsys.readouterr().err
    assert main(["data", str(path), "--model", str(HOME), "--format", "mesages"]) == 2
    assert "is not one of messages, conversations" in (said := capsys.readouterr().err)
    assert "did you mean 'messages'?" in said
    words = ["data", str(path), "--model", str(HOME), "--format", "text", "--columns", "text=prompt"]
    assert main(words) == 2
    assert "--columns and --format text both say which fields to read" in capsys.readouterr().err


def test_every_format_of_the_option_is_there() -> None:
    assert set(DATA_FORMATS) == {*LAYOUTS, "piqa"}


def test_generate_asks_a_chat_run_through_its_template() -> None:
    """The ids that training saw before the first answer are those of a question asked later."""
    from edgegt.source import load_tokenizer

    tokenizer = load_tokenizer(HOME)
    trained = tokenize([Row.of_turns((Turn("user", "hi"), Turn("assistant", "hello there")), 1)], tokenizer, 64)[0][0]
    asked = tokenize([Row.of_turns((Turn("user", "hi"), Turn("assistant", "x")), 1)], tokenizer, 64)[0][0]
    assert trained.prompt == asked.prompt and trained.row.separator == asked.row.separator


def test_a_survey_loads_no_kernels(tmp_path: Path) -> None:
    path = write(tmp_path, "d.jsonl", [PAIR])
    code = (
        "import sys; from edgegt.cli import main; "
        f"assert main(['data', {str(path)!r}, '--model', {str(HOME)!r}]) == 0; "
        "print('bitsandbytes' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")


def test_a_folder_that_says_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no one training file, it has no data file"):
        survey(RunOptions(data=str(tmp_path), model=str(HOME)))
