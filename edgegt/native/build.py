"""Compiling `kernels.c` for this processor, once, into the user's cache.

The library's name has a digest of the source, the compiler's version, its options and the processor in it, so that a
cache shared by several machines, or one left by an older version, never hands out a wrong one.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from edgegt.errors import EdgegtError

SOURCE = Path(__file__).with_name("kernels.c")
FOLDER = "native"
COMPILERS = ("cc", "gcc", "clang")
# Without errno and traps, so that rounding and comparisons become vector instructions; nothing that changes a result.
OPTIONS = ("-O3", "-std=c11", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fPIC", "-shared",
           "-fvisibility=hidden")  # fmt: skip
# Clang on macOS has no OpenMP of its own, and some compilers no name for the processor: less is tried in this order.
FOR_THIS_PROCESSOR = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-fopenmp",), ())
TIMEOUT_S = 60


@cache
def library(folder: Path) -> Any:
    """The compiled kernels, from the folder 'native' of this cache if they are there.

    Raises: EdgegtError when there is no compiler or it fails, with what it said.
    """
    compiler = compiler_words()
    if not compiler:
        raise EdgegtError(f"no C compiler was found ({', '.join(COMPILERS)}, or $CC)")
    version = _run([*compiler, "--version"]).partition("\n")[0]
    said = ""
    for options in FOR_THIS_PROCESSOR:
        words = [*compiler, *OPTIONS, *options]
        key = hashlib.sha256("\n".join((SOURCE.read_text(encoding="utf-8"), version, *words, _processor())).encode())
        path = folder / FOLDER / f"kernels-{key.hexdigest()[:20]}.so"
        try:
            if not path.is_file():
                _compile(words, path)
            return ctypes.CDLL(str(path))
        except (EdgegtError, OSError) as error:
            said = said or str(error)
    raise EdgegtError(said)


def compiler_words() -> list[str]:
    """The command of the compiler, with its options in $CC if it is named there; empty when there is none."""
    given = shlex.split(os.environ.get("CC", ""))
    return next((words for words in (given, *([name] for name in COMPILERS)) if words and shutil.which(words[0])), [])


def _compile(words: list[str], path: Path) -> None:
    """Compile next to `path` and move it there at once, so that two processes do not see half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as work:
        made = Path(work) / path.name
        _run([*words, str(SOURCE), "-o", str(made), "-lm"])
        made.replace(path)


def _run(words: list[str]) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise EdgegtError(f"'{words[0]}' could not be run ({type(error).__name__})") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
        raise EdgegtError(f"'{words[0]}' could not compile the kernels: {lines[0].strip()[:200]}")
    return done.stdout


def _processor() -> str:
    """What -march=native depends on: the architecture and, where the kernel tells it, the instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return f"{platform.system()} {platform.machine()} {flags}"
