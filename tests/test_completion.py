"""Completion of the command line: bash itself at a terminal, and what the scripts of the other shells name."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from edgegt.cli import _COMMANDS, main
from edgegt.cli.completion import SHELLS
from edgegt.options import STRATEGY_NAMES
from edgegt.profile import profile_names

BASH = shutil.which("bash")
needs_bash = pytest.mark.skipif(BASH is None, reason="no bash here")


@pytest.fixture
def scripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Path]:
    """The script of each shell, in a folder with some files to complete."""
    found = {}
    for shell in SHELLS:
        assert main(["completion", shell]) == 0
        found[shell] = tmp_path / f"edgegt.{shell}"
        found[shell].write_text(capsys.readouterr().out)
    (tmp_path / "rows of mine.csv").write_text("a,b\n")
    (tmp_path / "board.toml").write_text("")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "runs" / "first").mkdir(parents=True)
    return found


def offered(script: Path, line: str) -> list[str]:
    """What bash offers at the end of this line of words."""
    words = line.split(" ")
    program = f'''
source "{script}"
COMP_WORDS=({" ".join(f"'{word}'" for word in words)}) COMP_CWORD={len(words) - 1}
$(complete -p edgegt | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
printf '%s\\n' "${{COMPREPLY[@]}}"'''
    command = [str(BASH), "--norc", "--noprofile", "-c", program]
    done = subprocess.run(command, cwd=script.parent, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split("\n")[:-1]


@needs_bash
def test_bash_offers_commands_options_choices_devices_and_files(scripts: dict[str, Path]) -> None:
    script = scripts["bash"]
    assert offered(script, "edgegt ") == list(_COMMANDS)
    assert offered(script, "edgegt run --check") == ["--checkpoint-every"]
    assert offered(script, "edgegt run --strategy ") == list(STRATEGY_NAMES)
    assert offered(script, "edgegt eval --metrics ") == ["exact_match", "accuracy", "f1", "rouge", "bleu", "perplexity"]
    devices = offered(script, "edgegt plan --device ")
    assert set(devices) == {"auto", "jetson", *profile_names(), "board.toml"} and len(devices) == len(set(devices))
    assert set(offered(script, "edgegt devices show ")) >= set(profile_names())
    assert offered(script, "edgegt run --data no") == ["notes.txt"]
    assert offered(script, "edgegt run --resume runs/") == ["runs/first"] == offered(script, "edgegt eval runs/")
    assert offered(script, "edgegt run --no-ex") == ["--no-examples"]
    assert offered(script, "edgegt cache ") == ["list", "clear"]
    assert offered(script, "edgegt run --tensorboard --ener") == ["--energy"]


@needs_bash
def test_a_tab_in_bash_completes_the_line(scripts: dict[str, Path]) -> None:
    board = max(profile_names(), key=len)
    typed = f"edgegt ru\t--strateg\tlast\t--device {board[:-1]}\t--data ro\t\n"
    screen = at_a_terminal(scripts["bash"], typed)
    assert f"<run><--strategy><last-layers><--device><{board}><--data><rows of mine.csv>" in screen


def at_a_terminal(script: Path, typed: str) -> str:
    """What an interactive bash shows when this is typed, where `edgegt` prints its words."""
    terminal, inside = pty.openpty()
    bash = subprocess.Popen(
        [str(BASH), "--norc", "--noprofile", "-i"], cwd=script.parent, stdin=inside, stdout=inside, stderr=inside,
        env={"PATH": os.environ["PATH"], "TERM": "dumb"}, start_new_session=True,
    )  # fmt: skip
    os.close(inside)
    try:
        begin = f"source {script}; edgegt() {{ printf '<%s>' \"$@\"; echo; }}; echo rea''dy\n"
        os.write(terminal, begin.encode())
        screen = until(terminal, "ready\r\n")
        os.write(terminal, typed.encode())
        return screen + until(terminal, ">\r\n")
    finally:
        bash.kill()
        bash.wait()
        os.close(terminal)


def until(terminal: int, end: str) -> str:
    """What the terminal shows until `end`, or for ten seconds."""
    screen, limit = "", time.monotonic() + 10
    while end not in screen and select.select([terminal], [], [], max(0.0, limit - time.monotonic()))[0]:
        screen += os.read(terminal, 4096).decode(errors="replace")
    return screen


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_gets_commands_choices_and_devices(shell: str, scripts: dict[str, Path]) -> None:
    text = scripts[shell].read_text()
    assert not [name for name in (*_COMMANDS, *STRATEGY_NAMES, *profile_names()) if name not in text]
    assert "checkpoint-every" in text and "_edgegt_device_files" in text
    program = shutil.which(shell)
    if program is not None:
        subprocess.run([program, "-n", str(scripts[shell])], check=True)


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "ksh"]) == 2
    assert "invalid choice: 'ksh'" in capsys.readouterr().err
