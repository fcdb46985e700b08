"""The guides are held true: their commands parse, their links lead somewhere, and what they mark as such runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from documents import ROOT, blocks, broken_links, commands, edgegt_commands, text_of
from edgegt import cli, profile
from edgegt.errors import InputError
from edgegt.profile import load_profile, read_toml

INDEX = "docs/guides/README.md"
GUIDES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs/guides").glob("*.md"))
EXAMPLES = ROOT / "docs/examples"
RUN = "guide: run"


def parses(words: list[str]) -> bool:
    try:
        cli._parse(words)
    except InputError:
        return False
    return True


def test_the_readme_links_the_index_and_the_index_every_guide() -> None:
    assert f"]({INDEX})" in text_of("README.md")
    linked = re.findall(r"\]\(([\w-]+\.md)\)", text_of(INDEX))
    assert sorted([*linked, "README.md"]) == [Path(guide).name for guide in GUIDES]


def test_every_command_parses() -> None:
    every = [words for guide in GUIDES for words in edgegt_commands(guide)]
    assert len(every) > 20
    assert [" ".join(words) for words in every if not parses(words)] == []


@pytest.mark.parametrize("guide", GUIDES)
def test_links_and_named_files_are_there(guide: str) -> None:
    assert broken_links(guide) == []
    words = [word for block in blocks(guide, "sh") for words in commands(block) for word in words]
    files = [word for word in words if re.match(r"(docs|tests|profiles|tools|edgegt)/", word)]
    assert [name for name in files if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("guide", GUIDES)
def test_nothing_is_left_to_fill_in(guide: str) -> None:
    assert re.findall(r"@@\w*@@|TODO|FIXME", text_of(guide)) == []


@pytest.mark.parametrize("guide", GUIDES)
def test_a_formula_within_a_line_ends_in_it(guide: str) -> None:
    text = re.sub(r"^```.*?^```$", "", text_of(guide), flags=re.M | re.S)
    assert [line for line in text.splitlines() if line.count("$`") != line.count("`$")] == []
    assert "$" not in re.sub(r"\$`[^`]+`\$", "", text)


def test_extras_exist_or_wait() -> None:
    project = read_toml(ROOT / "pyproject.toml", "", "project")["project"]
    named = {name for guide in GUIDES for name in re.findall(r"edgegt\[(\w+)\]", text_of(guide))}
    assert named - set(project["optional-dependencies"]) == set()


def test_the_profile_written_from_scratch_is_read_and_every_field_is_explained(tmp_path: Path) -> None:
    (text,) = blocks("docs/guides/profiles.md", "toml")
    (tmp_path / "mine.toml").write_text(text, encoding="utf-8")
    mine = load_profile(tmp_path / "mine.toml")
    assert (mine.name, mine.power.name, mine.kind) == ("mine", "normal", "laptop")
    lines = re.findall(r"^\|(.+?)\|", text_of("docs/guides/profiles.md"), re.M)
    explained = {name for line in lines for name in re.findall(r"`(\w+\.\w+)`", line)}
    assert explained == {f"{table}.{key}" for table, keys in profile._TABLES.items() for key in keys}


def test_conversations_and_dialogues_of_the_examples_are_read() -> None:
    chats = [json.loads(line) for line in (EXAMPLES / "workshop.jsonl").read_text(encoding="utf-8").splitlines()]
    pairs = [json.loads(line) for line in (EXAMPLES / "dialogues.jsonl").read_text(encoding="utf-8").splitlines()]
    assert (len(chats), len(pairs)) == (24, 20)
    assert all(chat["messages"][-1]["role"] == "assistant" for chat in chats)
    assert all(set(pair) == {"dialogue", "summary"} for pair in pairs)
    shown = [json.loads(block) for name in ("jetson-chat", "laptop-summaries")
             for block in blocks(f"docs/guides/{name}.md", "json")]  # fmt: skip
    assert len(shown) == 2
    assert all(row in chats or row in pairs for row in shown)


@pytest.mark.parametrize("guide", [guide for guide in GUIDES if blocks(guide, "python", RUN)])
def test_marked_python_runs_and_says_what_the_guide_says(guide: str, tmp_path: Path) -> None:
    code = "\n".join(blocks(guide, "python", RUN))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    printed = done.stdout
    assert printed.splitlines()[0] in text_of(guide)
    assert (tmp_path / printed.splitlines()[-1] / "patch.safetensors").exists()


def test_python_that_is_not_run_is_python() -> None:
    for guide in GUIDES:
        for code in blocks(guide, "python"):
            compile(code, guide, "exec")


def counting_model(path: Path) -> None:
    """A graph with the inputs of an exported model, whose next token is 10 and the position of the last one.

    The past is a key of one number per position, and must be as long as the mask.
    """
    import numpy as np
    from onnx import TensorProto, checker, helper, numpy_helper, save

    node, info = helper.make_node, helper.make_tensor_value_info
    scores = np.zeros((8, 20), dtype=np.float32)
    scores[np.arange(8), 10 + np.arange(8)] = 1
    constants = {"scores": scores, "one": np.array([1, 1, -1, 1]), "flat": np.array([1, 1, -1, 1])}
    nodes = [
        node("Gather", ["scores", "position_ids"], ["logits"]),
        node("Cast", ["input_ids"], ["new"], to=TensorProto.FLOAT),
        node("Reshape", ["new", "one"], ["key"]),
        node("Concat", ["past_key_values.0.key", "key"], ["long"], axis=2),
        node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        node("Reshape", ["mask", "flat"], ["seen"]),
        node("Mul", ["long", "seen"], ["present.0.key"]),
    ]
    inputs = [info(name, TensorProto.INT64, [1, None]) for name in ("input_ids", "attention_mask", "position_ids")]
    inputs.append(info("past_key_values.0.key", TensorProto.FLOAT, [1, 1, None, 1]))
    outputs = [
        info("logits", TensorProto.FLOAT, [1, None, 20]),
        info("present.0.key", TensorProto.FLOAT, [1, 1, None, 1]),
    ]
    held = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "counting", inputs, outputs, held), opset_imports=[helper.make_opsetid("", 17)]
    )
    model.ir_version = 9
    checker.check_model(model)
    save(model, path)


def test_the_loop_for_onnx_runtime_passes_the_past_on_and_stops(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"t{number}": number for number in range(20)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [16, 3]}', encoding="utf-8")
    counting_model(tmp_path / "model.onnx")

    def said(*most: str) -> str:
        script = [sys.executable, str(EXAMPLES / "onnx_generate.py"), str(tmp_path), "t1 t2 t3", *most]
        done = subprocess.run(script, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert said() == "t12 t13 t14 t15"
    assert said("2") == "t12 t13"
