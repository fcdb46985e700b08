"""Bad input: one line that names file, row or value and a remedy, exit code 2, no traceback, no run folder left."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from edgegt.cli import _parse as parse
from edgegt.cli import _system_problem as told
from edgegt.cli import main
from edgegt.version import __version__
from tiny_models import SHARED

REPOSITORY = Path(__file__).resolve().parents[1]
STORIES = SHARED / "data" / "models" / "stories260K"
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason="no stories260K under shared/data")
ROWS = [{"prompt": f"say {number}", "completion": f" the word {number}"} for number in range(40)]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory and a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGEGT_CACHE", str(tmp_path / "cache"))
    return tmp_path


def refused(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on standard error of a command that must be refused with exit code 2."""
    assert main(list(words)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("edgegt: ") and err.count("\n") == 1
    assert not Path("runs").exists() and not Path("out").exists()
    return err


def run_words(*more: str, data: Path | str = "rows.jsonl", model: Path | str = STORIES) -> list[str]:
    return ["run", "--quiet", "--output", "out", "--threads", "1", "--model", str(model), "--data", str(data), *more]


def write_rows(path: Path = Path("rows.jsonl"), broken_row: int | None = None) -> Path:
    lines = [json.dumps(row) for row in ROWS]
    if broken_row is not None:
        lines[broken_row - 1] = '{"prompt": "say, "completion": "x"}'
    path.write_text("\n".join(lines) + "\n")
    return path


@needs_stories
def test_a_missing_data_file(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(run_words(data="nothing.jsonl"), capsys)
    assert "'nothing.jsonl' does not exist" in line and "--data" in line


@needs_stories
def test_malformed_json_in_row_17(capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(broken_row=17)
    line = refused(run_words(), capsys)
    assert "'rows.jsonl' row 17" in line and "malformed JSON" in line and "correct or delete" in line


@needs_stories
def test_a_csv_without_the_named_column(capsys: pytest.CaptureFixture[str]) -> None:
    Path("rows.csv").write_text("mr,reference\n" + "a,b\n" * 20)
    line = refused(run_words("--columns", "prompt=mr,completion=referense", data="rows.csv"), capsys)
    assert "'rows.csv' has no column 'referense' (did you mean 'reference'?)" in line and "--columns" in line


@needs_stories
@pytest.mark.parametrize("text", ["", "\n\n", '{"prompt": "a", "completion": ""}\n'])
def test_an_empty_data_set(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("rows.jsonl").write_text(text)
    line = refused(run_words(), capsys)
    assert "rows.jsonl" in line and "give a file with text to learn" in line


def test_a_model_folder_without_safetensors(capsys: pytest.CaptureFixture[str]) -> None:
    write_rows()
    Path("model").mkdir()
    Path("model/config.json").write_text('{"model_type": "llama"}')
    line = refused(run_words(model="model"), capsys)
    assert "'model' has no safetensors" in line and "save_pretrained" in line


@needs_stories
def test_a_config_of_an_unknown_architecture(capsys: pytest.CaptureFixture[str]) -> None:
    write_rows()
    Path("model").mkdir()
    Path("model/model.safetensors").write_bytes((STORIES / "model.safetensors").read_bytes())
    Path("model/config.json").write_text('{"model_type": "perceptron", "architectures": ["PerceptronForCausalLM"]}')
    line = refused(run_words(model="model"), capsys)
    assert "config.json" in line and "'PerceptronForCausalLM' is unknown" in line and "give a decoder-only" in line
    assert "PerceptronForCausalLM" in refused(["plan", "--quiet", "--model", "model"], capsys)


def test_a_profile_with_a_wrong_key(capsys: pytest.CaptureFixture[str]) -> None:
    source = REPOSITORY / "profiles" / "jetson-orin-nano-8gb.toml"
    text = source.read_text(encoding="utf-8")
    key = next(line.split("=")[0].strip() for line in text.splitlines() if "=" in line and not line.startswith("#"))
    Path("mine.toml").write_text(text.replace(f"{key} =", f"{key}x =", 1), encoding="utf-8")
    line = refused(["run", "--quiet", "--output", "out", "--device", "./mine.toml"], capsys)
    assert "mine.toml" in line and f"{key}x" in line


def test_an_unknown_device(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(["run", "--quiet", "--output", "out", "--device", "jetson-orin-nono-8gb"], capsys)
    assert "'jetson-orin-nono-8gb' is unknown" in line and "jetson-orin-nano-8gb" in line and "edgegt devices" in line


@pytest.mark.parametrize("rho", ["0", "2", "-1", "nan"])
def test_a_rho_out_of_range(rho: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(["run", "--quiet", "--output", "out", "--rho", rho], capsys)
    assert f"--rho {rho} is out of range" in line and "such as 0.5" in line


def test_a_memory_budget_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(["run", "--quiet", "--output", "out", "--memory", "4 GB of RAM"], capsys)
    assert "--memory '4 GB of RAM' is not a size" in line and "4GiB" in line


@needs_stories
def test_a_budget_that_nothing_fits_in_names_the_smallest_that_would_do(capsys: pytest.CaptureFixture[str]) -> None:
    write_rows()
    line = refused(run_words("--memory", "100MiB"), capsys)
    assert "no weight can be trained within 100.0 MiB" in line and "give --memory" in line
    assert not list(Path("cache").rglob("*.safetensors"))


@needs_stories
def test_an_unreachable_rho_names_the_smallest_that_would_do(capsys: pytest.CaptureFixture[str]) -> None:
    write_rows()
    line = refused(run_words("--rho", "0.1"), capsys)
    assert "rho 0.1 is below the smallest reachable" in line and ("--rho 0." in line or "--steps" in line)


@needs_stories
def test_an_output_folder_in_use_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows()
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("mine")
    line = refused(["used" if word == "out" else word for word in run_words()], capsys)
    assert "--output 'used' exists and is not an empty folder: give a new name" in line
    assert [item.name for item in (tmp_path / "used").iterdir()] == ["file"]


def test_model_and_data_go_together(capsys: pytest.CaptureFixture[str]) -> None:
    write_rows()
    assert "--data without --model" in refused(["run", "--quiet", "--data", "rows.jsonl"], capsys)
    assert "--model without --data" in refused(["run", "--quiet", "--model", "m"], capsys)
    assert "model 'm' is not a directory" in refused(run_words(model="m"), capsys)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["rum"], "unknown command 'rum' (did you mean 'run'?); commands: run, plan, data, devices"),
        (["run", "--memmory", "4GiB"], "unknown option '--memmory' (did you mean '--memory'?)"),
        (["plan", "--batchsize", "4"], "unknown option '--batchsize' (did you mean '--batch-size'?)"),
        (["run", "--steps", "many"], "--steps"),
        (["run", "--steps"], "expected one argument"),
        (
            ["run", "--strategy", "greedy"],
            "'greedy' is not one of greentrainer, greentrainer-dp, last-layers, bias, random, lisa, full",
        ),
        (["devices", "shwo"], "invalid choice: 'shwo'"),
        (["devices", "show"], "needs a name"),
        (["devices", "show", "rtx-3060"], "unknown"),
        (["run", "--config", "none.toml"], "none.toml"),
        (["--foo"], "unknown option '--foo'"),
        (["-x"], "unknown option '-x'"),
        (["--"], "no command is named; commands: run, plan"),
        (["--foo", "cache"], "unknown option '--foo'"),
        (["run", "--mem", "4GiB"], "unknown option '--mem' (did you mean '--memory'?)"),
        (["devices", "--js"], "unknown option '--js'"),
        (["eval", "nothing", "--columns", "text=a"], "go with --data"),
        (["eval", "--model", "m", "--data", "d", "--max-length", "3"], "--max-length 3 is out of range"),
        (["eval"], "name a run folder, or a model"),
        (["eval", "nothing"], "'nothing' is not a finished run folder"),
        (["generate", "only-one"], "name the run folder, and quote the prompt"),
        (["generate", "--onnx", "files", "run", "prompt"], "leave out the run folder, and quote the prompt"),
        (["generate", "nothing", "hello"], "'nothing' is not a finished run folder"),
        (["report", "nothing"], "nothing"),
        (["eval", "--model", "m", "--patch", "p"], "--data"),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_line(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in refused(words, capsys)


def test_an_options_file_with_an_unknown_key(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.toml").write_text("batch_sise = 4\n")
    line = refused(["run", "--config", "run.toml"], capsys)
    assert "run.toml: unknown key 'batch_sise' (did you mean 'batch_size'?)" in line


def test_the_command_itself_exits_with_2_and_prints_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edgegt", "run", "--rho", "2"], capture_output=True, text=True, cwd=tmp_path,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": ""}, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("edgegt: --rho 2 is out of range")


def test_devices_are_listed_and_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices"]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 20
    assert main(["devices", "--json"]) == 0
    assert "jetson-orin-nano-8gb" in json.dumps(json.loads(capsys.readouterr().out))
    assert main(["devices", "show", "jetson-orin-nano-8gb"]) == 0
    assert "NVIDIA Jetson Orin Nano 8GB" in capsys.readouterr().out
    assert main(["devices", "show", "rtx-3060-12gb", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "rtx-3060-12gb"


@pytest.mark.parametrize("words", [["devices"], ["--version"], ["run", "--help"], ["cache"], ["run", "--rho", "2"]])
def test_light_commands_import_no_torch(words: list[str], tmp_path: Path) -> None:
    program = (
        f"import sys; sys.argv = ['edgegt', *{words!r}]\nfrom edgegt.cli import main\n"
        "try: main()\nexcept SystemExit: pass\nassert not {'torch', 'transformers'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", program]
    env = {"PYTHONPATH": str(REPOSITORY), "EDGEGT_CACHE": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr


def test_the_cache_is_listed_and_cleared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache"]) == 0
    assert capsys.readouterr().out == f"nothing is cached in {tmp_path / 'cache'}\n"
    if STORIES.is_dir():
        from tiny_models import load

        load(STORIES, tmp_path / "cache")
        assert main(["cache", "list"]) == 0
        assert capsys.readouterr().out.startswith("stories260K ")
        assert main(["cache", "clear"]) == 0
        assert "freed" in capsys.readouterr().out
        assert not list((tmp_path / "cache").rglob("*.safetensors"))


@needs_stories
def test_plan_prints_json_only_and_says_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--model", str(STORIES / "config.json"), "--device", "jetson-orin-nano-8gb"]
    assert main([*words, "--json"]) == 0
    out, err = capsys.readouterr()
    outlook = json.loads(out)
    assert err == ""
    assert outlook["fits"] is True and outlook["selected"] and "proxy" in outlook["importance"]
    assert outlook["predicted"]["flops_ratio"] <= 0.5
    peak = outlook["predicted"]["peak_bytes"]
    assert peak["low"] < peak["expected"] <= peak["high"]
    assert main([*words, "--memory", "100MiB", "--json"]) == 2
    refusal = json.loads(capsys.readouterr().out)
    assert refusal["fits"] is False and refusal["smallest_bytes"] > 100 * 2**20
    assert main(words) == 0
    assert "fits       yes" in capsys.readouterr().out


def test_the_version_and_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["--version"])
    assert leaving.value.code == 0
    assert capsys.readouterr().out == f"edgegt {__version__}\n"
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    text = capsys.readouterr().out
    for option in ("--output", "--seed", "--lr", "--epochs", "--steps", "--batch-size", "--max-length", "--rho",
                   "--memory", "--strategy", "--round-epochs", "--config"):  # fmt: skip
        assert option in text


class OutOfMemoryError(RuntimeError):
    """Named as torch's, which this test need not import."""


@pytest.mark.parametrize(
    "error",
    [MemoryError(), OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_too_little_memory_is_one_line(error: MemoryError | RuntimeError) -> None:
    assert told(error) == "out of memory: lower --memory or --batch-size"


def test_only_the_machines_errors_become_lines() -> None:
    assert told(RuntimeError("a fault of edgegt")) is None
    assert str(told(OSError(28, "No space left on device", "file"))).startswith("No space left on device (file)")


def test_the_command_is_recorded_as_it_can_be_typed_again() -> None:
    parsed = parse(["run", "--data", "my rows.csv", "--columns", "prompt=a b,completion=c"])
    assert parsed.typed == "edgegt run --data 'my rows.csv' --columns 'prompt=a b,completion=c'"
