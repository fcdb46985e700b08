"""Conversations: what is remembered, asked and saved; and both commands as they are typed and piped."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import runs
from edgegt import home
from edgegt.cli import main
from edgegt.conversation import Conversation
from edgegt.data import asked
from edgegt.data.rows import Turn
from edgegt.errors import InputError
from edgegt.options import RunOptions
from edgegt.subject import Subject, load_subject
from edgegt.talk import INTERRUPTED, Wanted, generate, generate_text, nowhere
from test_data_chat import CHATML, GEMMA, MISTRAL, tokenizer_of
from tiny_models import EVERY, save_model

POSITIONS = 400
PRINTABLE = 94  # ids of "!" to "~"
SHORT = Wanted(tokens=12)


class Heard:
    """A log that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    fallback = say


def save_chatty(folder: Path, template: str | None = CHATML, family: str = "llama-untied", **more: Any) -> Path:
    """A random model with a byte-level tokenizer and this chat template. It writes printable letters."""
    config = EVERY[family]()
    config.max_position_embeddings = POSITIONS
    tokenizer = tokenizer_of(template, eos="<|im_end|>", bos=None if template == CHATML else "<s>")
    config.eos_token_id, config.bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id
    module = save_model(folder, config)
    if family == "llama-untied":
        module.lm_head.weight.data[PRINTABLE:] = 0  # the likeliest is above
        module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if more:
        (folder / "generation_config.json").write_text(json.dumps(more))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chatty(tmp_path_factory.mktemp("chatty") / "model")


@pytest.fixture(scope="module")
def subject(folder: Path) -> Subject:
    return load_subject(None, str(folder), None)


@pytest.fixture(scope="module")
def assistant() -> Subject:
    return load_subject(None, str(home.MODEL), None)


def conversation_of(subject: Subject, wanted: Wanted = SHORT, system: str = "") -> tuple[Conversation, Heard]:
    log: Any = Heard()
    return Conversation(subject, wanted, system, log), log


def test_history_is_read_and_its_beginning_not_again(subject: Subject) -> None:
    talk, log = conversation_of(subject, system="Be brief.")
    parts: list[str] = []
    first = talk.ask("hello", parts.append)
    assert "".join(parts) == first.text and first.stopped == "length" and first.tokens == 12
    assert talk.engine.reused == 0 and not log.lines
    second = talk.ask("and now", nowhere)
    told = (Turn("system", "Be brief."), Turn("user", "hello"), Turn("assistant", first.text), Turn("user", "and now"))
    assert second.prompt_tokens == len(asked(told, subject.tokenizer)[0])
    assert talk.engine.reused >= first.prompt_tokens
    fresh, _ = conversation_of(subject, system="Be brief.")
    fresh.turns = talk.turns[:2]
    assert fresh.ask("and now", nowhere).text == second.text
    talk.reset()
    assert talk.turns == [] and talk.system == "Be brief."
    assert talk.ask("hello", nowhere).text == first.text


def test_what_is_asked_first_is_what_generate_asks_of_a_run_on_conversations(subject: Subject) -> None:
    trained = dataclasses.replace(subject, separator="chat template", trained=True)
    talk, _ = conversation_of(subject)
    assert talk.ask("hello you", nowhere).text == generate(trained, "hello you", SHORT, nowhere).text


@pytest.mark.parametrize("template", [CHATML, MISTRAL, GEMMA, None], ids=["chatml", "mistral", "gemma", "none"])
def test_the_oldest_turns_go_when_positions_are_used_up(tmp_path: Path, template: str | None) -> None:
    talk, log = conversation_of(load_subject(None, str(save_chatty(tmp_path / "m", template)), None), system="Be kind.")
    forgot = []
    for number in range(16):
        answer = talk.ask(f"question {number} with some words", nowhere)
        assert answer.prompt_tokens + answer.tokens <= POSITIONS
        forgot = [line for line in log.lines if "no longer read" in line]
    assert len(forgot) >= 2 and f"the model knows {POSITIONS} tokens: the first" in forgot[0]
    assert len(talk.turns) == 32
    kept = talk.turns[talk._forgotten :]
    assert 2 <= len(kept) < 32 and kept[0].role == "user"
    with pytest.raises(InputError, match=f"tokens, and the model knows {POSITIONS}: say it more shortly"):
        talk.ask("x" * 500, nowhere)
    assert len(talk.turns) == 32
    if template is None:
        assert "no chat template: a plain one is used" in log.lines[0]
        assert "\nUser:" in talk.wanted.stops


def test_the_mark_behind_an_answer_ends_it_though_it_is_not_end_of_text(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(CHATML, eos="<|endoftext|>", bos=None)
    save_chatty(tmp_path / "m", eos_token_id=[261, 270])
    tokenizer.save_pretrained(tmp_path / "m")
    talk, _ = conversation_of(load_subject(None, str(tmp_path / "m"), None))
    mark = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert set(talk.engine.eos) == {tokenizer.eos_token_id, mark, 261, 270}


def test_a_model_of_prompts_is_asked_line_by_line(assistant: Subject, tmp_path: Path) -> None:
    trained = dataclasses.replace(assistant, options=RunOptions(), trained=True)
    for subject in (assistant, trained):
        talk, log = conversation_of(subject, Wanted())
        assert log.lines == ["each line is asked by itself, without what was said before: so the model was trained"]
        first = talk.ask("turn off the light in the kitchen", nowhere)
        assert json.loads(first.text) == {"do": "off", "what": "light", "where": "kitchen"} and first.stopped == "end"
        talk.ask("play jazz", nowhere)
        assert talk.ask("turn off the light in the kitchen", nowhere).text == first.text
        with pytest.raises(InputError, match="a system text would not be read"):
            talk.set_system("Be brief.")
        assert talk.save(tmp_path / "said.jsonl") == 3
    rows = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert rows[0] == {"prompt": "turn off the light in the kitchen =>", "completion": f" {first.text}"}


def test_an_encoder_decoder_is_asked_line_by_line(tmp_path: Path) -> None:
    folder = save_chatty(tmp_path / "m", None, "t5")
    talk, log = conversation_of(load_subject(None, str(folder), None))
    assert log.lines[0].endswith("the model is an encoder-decoder")
    answer = talk.ask("one line", nowhere)
    assert talk.ask("another line", nowhere).prompt_tokens > answer.prompt_tokens
    again = talk.ask("one line", nowhere)
    assert (again.text, again.prompt_tokens) == (answer.text, answer.prompt_tokens)


def test_answers_are_drawn_as_the_model_says_unless_told(tmp_path: Path) -> None:
    folder = save_chatty(tmp_path / "m", do_sample=True, temperature=0.7, top_k=40)
    loaded = load_subject(None, str(folder), None)
    talk, log = conversation_of(loaded, Wanted(12, {"seed": 5}))
    assert log.lines == ["answers: temperature 0.7, top-k 40, with what generation_config.json of the model says"]
    first, other = talk.ask("hello", nowhere).text, conversation_of(loaded, Wanted(12, {"seed": 6}))[0]
    assert conversation_of(loaded, Wanted(12, {"seed": 5}))[0].ask("hello", nowhere).text == first
    assert other.ask("hello", nowhere).text != first
    talk.reset()
    assert talk.ask("hello", nowhere).text != first  # the next draw
    greedy, log = conversation_of(loaded, Wanted(12, {"temperature": 0.0}))
    assert (
        greedy.ask("hello", nowhere).text
        == generate(dataclasses.replace(loaded, separator="chat template"), "hello", SHORT, nowhere).text
    )


def test_an_answer_that_is_broken_off_is_kept_as_far_as_it_came(subject: Subject) -> None:
    talk, _ = conversation_of(subject, Wanted(tokens=60))
    whole = talk.ask("hello", nowhere).text
    talk.reset()
    assert stopped_after(talk, 3) == INTERRUPTED
    assert 0 < len(talk.turns[1].text) < len(whole) and whole.startswith(talk.turns[1].text)
    talk.reset()
    assert talk.ask("hello", nowhere).text == whole


def stopped_after(talk: Conversation, parts: int) -> str:
    """Ask, and press Ctrl-C at the third part."""
    seen: list[str] = []

    def say(text: str) -> None:
        seen.append(text)
        if len(seen) == parts:
            raise KeyboardInterrupt

    return talk.ask("hello", say).stopped


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`edgegt chat ...` in this process with these lines on standard input: exit code, output, errors."""

    def chat(lines: str, *words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        code = main(["chat", *words])
        return code, *capsys.readouterr()

    return chat


def test_commands(piped: Callable[..., tuple[int, str, str]], folder: Path, tmp_path: Path) -> None:
    saved = tmp_path / "said.jsonl"
    words = ("--model", str(folder), "--tokens", "8")
    code, out, err = piped(
        f"/help\n\nhello\n/system Be brief.\n/save {saved}\n/etc/hosts is what\n/reset\nhello\n/quit\nmore\n", *words
    )
    assert code == 0
    answers = [part for part in (out, err) if part]
    assert len(answers) == 2 and "/save FILE" in err and "the system text is set" in err and "1 row added" in err
    messages = json.loads(saved.read_text())["messages"]
    assert [turn["role"] for turn in messages] == ["system", "user", "assistant"]
    assert messages[0]["content"] == "Be brief." and messages[1]["content"] == "hello"
    assert out.startswith(messages[2]["content"] + "\n") and ">>>" not in out
    code, out, err = piped("/sav x\n/save\n/save a\nhello\n", *words)
    assert code == 2 and out.count("\n") >= 1
    assert "unknown command '/sav' (did you mean '/save'?)" in err
    assert "/save needs a file" in err and "nothing was said yet" in err


def test_what_was_saved_is_data(
    piped: Callable[..., tuple[int, str, str]], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "said.jsonl"
    code, *_ = piped(f"what is it\nand é 猫\n/save {saved}\n/reset\nonce more\n/save {saved}\n", "--model", str(folder),
                     "--tokens", "6")  # fmt: skip
    assert code == 0 and len(saved.read_text().splitlines()) == 2
    assert main(["data", str(saved), "--model", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "jsonl, messages" in said and "2: 2 kept" in said


def test_refused_lines_are_empty_answers(piped: Callable[..., tuple[int, str, str]], folder: Path) -> None:
    code, out, err = piped(f"{'x' * 600}\n", "--model", str(folder), "--tokens", "4")
    assert code == 2 and out == "\n" and "say it more shortly" in err


def test_bytes_that_are_no_text_are_refused(
    piped: Callable[..., tuple[int, str, str]], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = piped("a \udcff\n/system \udcff\n", "--model", str(folder))
    assert code == 2 and out == "\n"
    assert "the line is no text in UTF-8 (from character 3 on)" in err and "the system text is no text" in err
    assert main(["generate", "--model", str(folder), "\udcff"]) == 2
    assert "the prompt is no text in UTF-8" in capsys.readouterr().err


def test_ctrl_c_ends_what_nobody_types_into(
    piped: Callable[..., tuple[int, str, str]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("edgegt.cli.talking._show", interrupt)
    assert piped("hello\nmore\n", "--model", str(folder))[0] == 130
    assert main(["generate", "--model", str(folder), "hello"]) == 130


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--top-p", "2"], "--top-p 2.0 is out of range"),
        (["--tokens", "0"], "--tokens 0 is out of range"),
        (["--temperature", "warm"], "invalid float value: 'warm'"),
        (["--stop", ""], "--stop '' would end every answer"),
    ],
)
def test_wishes_out_of_range_are_refused_before_anything_is_loaded(
    more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["chat", "--model", "nothing"], ["generate", "--model", "nothing", "hello"]):
        assert main([*words, *more]) == 2
        assert message in capsys.readouterr().err


def test_generate_streams_what_it_returns(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = generate_text(None, str(folder), None, "hello", 12)
    assert main(["generate", "--model", str(folder), "hello", "--tokens", "12"]) == 0
    assert capsys.readouterr().out == expected + "\n"
    assert main(["generate", "--model", str(folder), "hello", "--tokens", "12", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told) == {"text", "tokens", "prompt_tokens", "stopped", "seconds", "tokens_per_s"}
    assert (told["text"], told["tokens"], told["prompt_tokens"], told["stopped"]) == (expected, 12, 5, "length")
    assert told["seconds"] > 0 and told["tokens_per_s"] > 0
    stop = expected[3:5]
    assert main(["generate", "--model", str(folder), "hello", "--tokens", "12", "--stop", stop, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["stopped"] == "end" and told["text"] == expected[: expected.index(stop)].strip()


def test_a_prompt_that_does_not_fit_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", str(folder), "x" * 600, "--tokens", "4"]) == 0
    assert "note: the prompt has 600 tokens, and the last 396 are read" in capsys.readouterr().err
    assert main(["generate", "--model", str(folder), ""]) == 2
    assert "the prompt is empty" in capsys.readouterr().err


def test_the_home_assistant_answers_what_is_piped_in() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edgegt", "chat", "--model", str(home.MODEL)], text=True, capture_output=True,
        input="turn off the light in the kitchen\nplay jazz\n", env=runs.environment(Path(os.environ["EDGEGT_CACHE"])),
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["do"] for line in done.stdout.splitlines()] == ["off", "play"]
