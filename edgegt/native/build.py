"""Compiling the C and C++ files beside this one for this processor, once, into the user's cache.

A library's name has a digest of the source, the compiler's version, its options and the processor in it, so that a
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
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from edgegt.errors import EdgegtError

FOLDER = "native"
COMPILERS = {"CC": ("cc", "gcc", "clang"), "CXX": ("c++", "g++", "clang++")}
SHARED = ("-fPIC", "-shared", "-fvisibility=hidden")
# Without errno and traps, so that rounding and comparisons become vector instructions; nothing that changes a result.
KERNELS = ("-O3", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", *SHARED)
# Clang on macOS has no OpenMP of its own, and some compilers no name for the processor: less is tried in this order.
FOR_THIS_PROCESSOR = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-fopenmp",), ())
# The standard that torch's headers need has changed between versions.
ALLOCATOR = ("-O2", *SHARED)
STANDARDS = (("-std=c++20",), ("-std=c++17",))
TIMEOUT_S = 60


@cache
def library(folder: Path) -> Any:
    """The compiled C files, as one library, from the folder 'native' of this cache if it is there.

    Raises: EdgegtError when there is no compiler or it fails, with what it said.
    """
    sources = ("kernels.c", "products.c", "attention.c")
    return _built(sources, folder, "CC", KERNELS, FOR_THIS_PROCESSOR, ("-lm",), _processor())


@cache
def allocator(folder: Path) -> Any:
    """The compiled `allocator.cpp` for the torch that is installed, likewise. Raises: as library."""
    import torch

    inside = Path(torch.__file__).parent
    old = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    words = (*ALLOCATOR, old, f"-I{inside / 'include'}")
    libraries = (f"-L{inside / 'lib'}", "-lc10")
    return _built(("allocator.cpp",), folder, "CXX", words, STANDARDS, libraries, torch.__version__)


def compiler_words(variable: str = "CC") -> list[str]:
    """The command of the compiler, with its options in $CC (or $CXX) if it is named there; empty when there is none."""
    try:
        given = shlex.split(os.environ.get(variable, ""))
    except ValueError:  # a quotation that does not end
        given = []
    known = (given, *([name] for name in COMPILERS[variable]))
    return next((words for words in known if words and shutil.which(words[0])), [])


def _built(
    names: Sequence[str], folder: Path, variable: str, options: Sequence[str], variants: Sequence[Sequence[str]],
    libraries: Sequence[str], depends_on: str,
) -> Any:  # fmt: skip
    """The library of these sources, by the first variant of options that compiles and loads."""
    compiler = compiler_words(variable)
    if not compiler:
        language = {"CC": "C", "CXX": "C++"}[variable]
        raise EdgegtError(f"no {language} compiler was found ({', '.join(COMPILERS[variable])}, or ${variable})")
    sources = [Path(__file__).with_name(name) for name in names]
    headers = sorted(Path(__file__).parent.glob("*.h"))
    texts = [source.read_text(encoding="utf-8") for source in (*sources, *headers)]
    version = _run([*compiler, "--version"], names[0]).partition("\n")[0]
    said = ""
    for variant in variants:
        words = [*compiler, *options, *variant, *map(str, sources), *libraries]
        facts = (*texts, version, *compiler, *options, *variant, depends_on)
        key = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:20]
        try:
            return _loaded(words, folder / FOLDER / f"{sources[0].stem}-{key}.so", names[0])
        except (EdgegtError, OSError) as error:
            said = said or str(error)
    raise EdgegtError(said)


def _loaded(words: list[str], path: Path, name: str) -> Any:
    """The library at `path`; one that is not there, or does not load, is compiled."""
    if path.is_file():
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # cut short when the machine lost its power, say
            path.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as work:  # moved there at once: no process sees half of it
        made = Path(work) / path.name
        _run([*words, "-o", str(made)], name)
        made.replace(path)
    return ctypes.CDLL(str(path))


def _run(words: list[str], name: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        raise EdgegtError(f"'{words[0]}' could not be run ({type(error).__name__})") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
        raise EdgegtError(f"'{words[0]}' could not compile {name}: {lines[0].strip()[:200]}")
    return done.stdout


def _processor() -> str:
    """What -march=native depends on: the architecture and, where the kernel tells it, the instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return f"{platform.system()} {platform.machine()} {flags}"
