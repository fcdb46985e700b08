"""The run folder: conflicts are found before any work, and two runs at once never share one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgegt.errors import InputError
from edgegt.folder import RunFolder, check_output, choose_folder, make_folder, new_folder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_runs_are_numbered() -> None:
    assert [str(new_folder(None, "m", "d").path) for _ in range(3)] == ["runs/m-d-1", "runs/m-d-2", "runs/m-d-3"]


def test_a_name_that_another_run_takes_in_between_is_not_shared() -> None:
    chosen = choose_folder(None, "m", "d")
    make_folder(chosen, given=False)
    with pytest.raises(FileExistsError):
        make_folder(chosen, given=False)
    assert new_folder(None, "m", "d").path != chosen


def test_a_dangling_link_is_not_a_free_name() -> None:
    Path("runs").mkdir()
    Path("runs/m-d-1").symlink_to("nowhere")
    assert new_folder(None, "m", "d").path == Path("runs/m-d-2")


def test_an_empty_or_new_output_is_used_and_a_used_one_refused() -> None:
    Path("empty").mkdir()
    for name in ("empty", "new/deep"):
        check_output(name)
        assert new_folder(name, "m", "d").path == Path(name)
    check_output(None)
    Path("empty/file").write_text("mine")
    for name in ("empty", "empty/file"):
        with pytest.raises(InputError, match="exists and is not an empty folder"):
            check_output(name)
    with pytest.raises(InputError, match=r"cannot be made in '.*empty/file'"):
        check_output("empty/file/run")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_an_output_that_cannot_be_written_is_refused() -> None:
    Path("closed").mkdir(mode=0o500)
    with pytest.raises(InputError, match="give a writable place"):
        check_output("closed/run")


@pytest.mark.parametrize("text", ["[1]", '{"a": ', "3"])
def test_a_damaged_file_of_a_run_is_refused_in_one_line(text: str) -> None:
    Path("run.json").write_text(text)
    with pytest.raises(InputError, match=r"run\.json is damaged") as refusal:
        RunFolder(Path()).read("run.json")
    assert "\n" not in str(refusal.value)
    with pytest.raises(InputError, match="not a finished run folder"):
        RunFolder(Path("run.json")).read("run.json")
