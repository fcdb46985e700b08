"""What the README and the guides say, taken out of their text: code blocks, commands of edgegt, links."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@cache
def text_of(document: str) -> str:
    """The text of a file of the repository."""
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str, language: str, marker: str | None = None) -> list[str]:
    """Its code blocks in a language; marker: only those below this comment."""
    before = "" if marker is None else rf"<!-- {re.escape(marker)} -->\n"
    return re.findall(rf"^{before}```{language}\n(.*?)^```$", text_of(document), re.M | re.S)


def commands(block: str) -> list[list[str]]:
    """The words of each command of a shell block; a quoted word may go over several lines."""
    found, pending = [], ""
    for line in block.splitlines(keepends=True):
        pending += line
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:  # a quotation that is still open
            continue
        pending = ""
        while "&&" in words:
            at = words.index("&&")
            found.append(words[:at])
            words = words[at + 1 :]
        found.append(words)
    assert not pending, f"this quotation is never closed: {pending!r}"
    return [words for words in found if words]


def edgegt_commands(document: str) -> list[list[str]]:
    """The words after `edgegt` of every such command in its shell blocks."""
    every = [words for block in blocks(document, "sh") for words in commands(block)]
    return [words[1:] for words in every if words[0] == "edgegt"]


def anchors(document: str) -> set[str]:
    """The anchors that GitHub gives its headings."""
    text = re.sub(r"^```.*?^```$", "", text_of(document), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(document: str) -> list[str]:
    """Its links to files or headings of the repository that lead nowhere."""
    broken = []
    for target in re.findall(r"\]\(([^)]+)\)", text_of(document)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / document).parent / name if name else ROOT / document
        there = path.exists() and not (anchor and anchor not in anchors(path.resolve().relative_to(ROOT).as_posix()))
        if not there:
            broken.append(target)
    return broken
