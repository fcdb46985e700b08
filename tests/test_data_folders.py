"""Every data set under shared/data is surveyed, and trained on for a step, as it is: without a conversion."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

import runs
from data_folders import DATA, FOLDERS, Folder
from edgegt.cli import main
from edgegt.options import RunOptions
from edgegt.survey import survey, survey_text

pytestmark = pytest.mark.skipif(not runs.HERE, reason="no stories260K or no E2E rows under shared/data")
# Those that take longest, or hold what another one holds as well.
LONG = (
    "scitldr", "persona_chat", "tinyshakespeare", "dialogsum/dialogsum.dev.jsonl", "webquestions", "e2e",
    "tinystories/tinystories.txt",
)  # fmt: skip


def cases(slow: tuple[str, ...] = ()) -> list[object]:
    return [
        pytest.param(one, id=one.name, marks=[pytest.mark.slow] if one.name in slow else []) for one in FOLDERS
    ]  # fmt: skip


@pytest.mark.parametrize("folder", cases())
def test_data_says_what_would_be_learned(folder: Folder) -> None:
    options = RunOptions(
        data=str(DATA / folder.name), model=str(DATA / "models" / "base-7m"), max_length=256, **folder.options
    )
    tree = survey(options)
    assert tuple(side["rows"] for side in tree["files"]) == folder.rows
    side = tree["files"][0]
    assert f"{side['format']}, {side['layout']}" == folder.said
    assert side["kept"] + sum(side["dropped"].values()) == side["rows"]
    assert side["least_supervised"] > 0 and side["supervised_tokens"] >= side["examples"]
    assert sum(one["examples"] for one in side["lengths"]) == side["examples"]
    assert len(side["shown"]) == 3 and all(any(p["learned"] for p in one["pieces"]) for one in side["shown"])
    assert f"{side['name']}: {folder.said}" in survey_text(tree, False)


@pytest.mark.parametrize("folder", cases(LONG))
def test_one_step(folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`edgegt data` and then `edgegt run` with the same words: what the one says, the other trains on.

    The last layers, because measuring importance takes more than one step may cost.
    """
    given = [*folder.words, "--model", str(runs.STORIES), "--max-length", "96"]
    assert main(["data", *given, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["files"]
    out, more = tmp_path / "run", ["--steps", "1", "--batch-size", "4", "--eval-rows", "4", "--threads", "1"]
    more += ["--strategy", "last-layers", "--output", str(out), "--quiet", "--no-examples"]
    assert main(["run", "--device", "jetson", "--data", *given, *more]) == 0
    about, (line,) = runs.read(out, "run.json"), (out / "metrics.jsonl").read_text().splitlines()
    assert about["finished"] is True and 0 < json.loads(line)["loss"] < 20
    assert f"{about['data']['format']}, {about['data']['layout']}" == folder.said
    assert about["data"]["rows"] == sum(side["rows"] for side in said) == sum(folder.rows)
    assert about["data"]["kept"] == sum(side["kept"] for side in said)
    assert about["data"]["dropped"] == sum((Counter(side["dropped"]) for side in said), Counter())
    assert (out / "patch.safetensors").is_file()
