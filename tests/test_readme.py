"""The README is held true: its file tree, its two commands, its tables, its links; and nothing is left to fill in."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest

from documents import ROOT, blocks, broken_links, edgegt_commands, text_of
from edgegt.cli import _COMMANDS, _parse
from edgegt.options import RunOptions, flag

SOURCES = (".py", ".j2", ".c", ".h", ".cpp")
OTHER_FLAGS = {
    "--config", "--resume", "--explain", "--frontier", "--help", "--model", "--patch", "--extra-index-url",
    "--metrics", "--answers", "--tokens", "--logdir", "--to", "--dtype", "--weights", "--force",
    "--strategies", "--seeds", "--equal", "--rates",
    "--system", "--temperature", "--top-k", "--top-p", "--min-p", "--repetition-penalty", "--seed", "--stop", "--json",
    "--onnx", "--bits",
}  # fmt: skip


def readme() -> str:
    return text_of("README.md")


def section(title: str) -> str:
    return readme().split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def named_files() -> list[str]:
    """The paths of the tree, put together from its indentation."""
    tree = section("What is where").split("```text\n", 1)[1].split("```", 1)[0]
    folders: list[str] = []
    paths = []
    for line in tree.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
        paths.append("".join(folders) if name.endswith("/") else "".join([*folders, name]))
    return paths


def command(name: str) -> str:
    """The sh block below a marker, as .ci/run takes it out."""
    found = blocks("README.md", "sh", f"ci: {name}")
    assert len(found) == 1, f"one block must follow <!-- ci: {name} -->"
    return found[0]


def test_the_tree_names_every_source_file_and_nothing_else() -> None:
    listed = named_files()
    assert len(listed) == len(set(listed))
    there = {
        path.relative_to(ROOT).as_posix()
        for folder in ("edgegt", "tools")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in SOURCES
    }
    assert {name for name in listed if name.startswith(("edgegt/", "tools/")) and not name.endswith("/")} == there
    assert [name for name in listed if not (ROOT / name).exists()] == []


def test_every_line_of_the_tree_says_something() -> None:
    tree = section("What is where").split("```text\n", 1)[1].split("```", 1)[0]
    bare = [line for line in tree.splitlines() if len(line.split()) < 2 and not line.rstrip().endswith("/")]
    assert bare == []


def test_the_two_commands_come_first_and_can_be_taken_out() -> None:
    assert "edgegt run --device jetson" in command("run").splitlines()
    assert "make check test" in command("test").splitlines()
    assert all("-c constraints.txt" in command(name) for name in ("run", "test"))
    assert blocks("README.md", "sh")[:2] == [command("run"), command("test")]


def test_commands_and_options_in_the_readme_exist() -> None:
    assert re.findall(r"^\| `edgegt (\w+)` \|", section("Commands"), re.M) == list(_COMMANDS)
    known = {flag(item.name) for item in fields(RunOptions)} | {"--no-examples", "--no-early-stopping"} | OTHER_FLAGS
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", readme())) <= known


def test_commands_in_the_readme_parse() -> None:
    every = edgegt_commands("README.md")
    assert len(every) > 10
    for words in every:
        _parse(words)


def test_links_lead_somewhere() -> None:
    assert "](docs/" in readme()
    assert broken_links("README.md") == []


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md", "docs/decisions.md", "docs/benchmarks.md"])
def test_nothing_is_left_to_fill_in(name: str) -> None:
    assert re.findall(r"@@\w+@@", text_of(name)) == []
