"""edgegt.Trainer: rows from memory through the same readers, runs and uses as files have, and what stays of them."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest

from edgegt import EdgegtError, InputError, Trained, Trainer, home
from edgegt.folder import RunFolder
from edgegt.log import Log

ROWS = [json.loads(line) for line in home.TRAIN.read_text(encoding="utf-8").splitlines()[:60]]
SMALL: dict[str, Any] = {
    "device": "laptop-x86-16gb", "memory": "2GiB", "steps": 2, "batch_size": 4, "threads": 1,
    "strategy": "last-layers",  # nothing to measure in so short a run
}  # fmt: skip


class Dataset:
    """As a datasets.Dataset: it goes through its rows, and gives them as a list."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def to_list(self) -> list[Any]:
        return list(self.rows)


def trainer(rows: Any, held_out: Any = None, **options: Any) -> Trainer:
    return Trainer(home.MODEL, rows, held_out, log=Log(quiet=True), **SMALL, **options)


def kept_rows() -> list[Path]:
    return sorted(Path(os.environ["EDGEGT_CACHE"]).glob("rows/*"))


def test_trains_evaluates_answers_and_leaves_no_text(tmp_path: Path) -> None:
    ours = trainer(Dataset(ROWS[:40]), ROWS[40:], output=str(tmp_path / "run"), examples=False)
    trained = ours.train()
    assert isinstance(trained, Trained) and trained.folder == ours.folder == tmp_path / "run"
    run = RunFolder(trained.folder)
    assert trained.flops == run.read("run.json")["measured"]["flops"] and 0.3 < trained.flops_share <= 0.5
    held_out = ours.evaluate()
    assert held_out["rows"] == 20 and held_out["loss"] == pytest.approx(trained.loss_after, rel=1e-4)
    assert ours.evaluate(ROWS[:3])["rows"] == 3
    assert ours.evaluate(ROWS[:5])["rows"] == 5
    assert isinstance(ours.generate(ROWS[0]["prompt"], tokens=4), str)
    assert (ours.export(tmp_path / "model") / "model.safetensors").is_file()
    with pytest.raises(InputError, match="cannot export to 'gguf'"):
        ours.export(tmp_path / "other", to="gguf")
    files = kept_rows()
    assert len(files) == 2 and all(path.stat().st_mode & 0o77 == 0 for path in files)
    del ours
    gc.collect()
    assert kept_rows() == []
    text = b"".join(path.read_bytes() for path in trained.folder.rglob("*") if path.is_file())
    assert not [row["prompt"] for row in ROWS if row["prompt"].encode() in text]


def test_rows_as_a_file_has_them(tmp_path: Path) -> None:
    """The same plan from rows in memory and from the file that they stand in."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    first, second = (trainer(rows).plan() for rows in (ROWS, file))
    assert first["fits"] and first["selected"] == second["selected"] != []
    texts = trainer(["one text " * 3, "another one " * 3, "and a third " * 3])
    assert json.loads(Path(str(texts.options.data)).read_text().splitlines()[0]) == {"text": "one text " * 3}


def test_a_run_that_was_broken_off_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows stay while they are needed, and the same rows find the run again."""
    monkeypatch.chdir(tmp_path)

    class Broken(Log):
        def step(self, entry: dict[str, Any]) -> None:
            raise EdgegtError("the power is gone")

    first = Trainer(home.MODEL, ROWS, log=Broken(), **{**SMALL, "steps": 6})
    with pytest.raises(EdgegtError, match="the power is gone"):
        first.train()
    del first
    gc.collect()
    (path,) = kept_rows()
    assert f"stay in {path}" in capsys.readouterr().err
    again = Trainer(home.MODEL, Dataset(ROWS), log=Log(quiet=True), **{**SMALL, "steps": 6})
    trained = again.train(resume=True)
    assert len(RunFolder(trained.folder).read("run.json")["sessions"]) == 2
    assert len(list((tmp_path / "runs").iterdir())) == 1
    del again
    gc.collect()
    assert kept_rows() == []


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        ((home.MODEL, ROWS), {"memry": "1GiB"}, "unknown option 'memry'.*memory"),
        ((home.MODEL, ROWS), {"rho": 2.0}, "--rho 2 is out of range"),
        ((home.MODEL, ROWS), {"rho": "half"}, "--rho 'half' is no number"),
        ((object(), ROWS), {}, "the model is a object: give the folder"),
        ((home.MODEL, 7), {}, "train_dataset is a int: give a path, or a list of rows"),
        ((home.MODEL, []), {}, "train_dataset has no rows"),
        ((home.MODEL, ROWS, [3]), {}, "eval_dataset, row 1 is a int: give mappings"),
        ((home.MODEL, [{"text": {1, 2}}]), {}, "train_dataset, row 1 cannot be written as JSON"),
        ((None, ROWS), {}, "--data without --model"),
    ],
    ids=["option", "value", "type", "model", "dataset", "empty", "row", "json", "no model"],
)
def test_what_cannot_be_is_said(arguments: tuple[Any, ...], options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Trainer(*arguments, log=Log(quiet=True), **options).plan()


def test_nothing_is_used_before_it_is_trained() -> None:
    with pytest.raises(InputError, match="nothing was trained yet"):
        trainer(ROWS).generate("lights on")
