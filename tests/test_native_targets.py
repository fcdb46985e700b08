"""The kernels built for other instruction sets than this machine's, and for aarch64 where there are tools for it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from edgegt.native import build, compiler_words

HERE = Path(__file__).parent
SOURCES = [Path(build.__file__).with_name(name) for name in ("products.c", "attention.c")]
CROSS, QEMU = "aarch64-linux-gnu-gcc", "qemu-aarch64"
# Name, options, what /proc/cpuinfo must name for it to run here, and whether products are compiled.
X86 = [
    ("plain", (), (), False),
    ("avx2", ("-mavx2", "-mfma"), ("avx2", "fma"), True),
    ("vnni-256", ("-mavx2", "-mfma", "-mavx512vnni", "-mavx512vl", "-mno-avx512bw"), ("avx512_vnni", "avx512vl"), True),
    ("vnni-512", ("-mfma", "-mavx512vnni", "-mavx512vl", "-mavx512bw"), ("avx512_vnni", "avx512bw"), True),
    ("avx-vnni", ("-mavx2", "-mfma", "-mavxvnni"), ("avx_vnni",), True),
]


def built(compiler: list[str], options: tuple[str, ...], program: Path) -> None:
    words = [*compiler, *build.KERNELS, *options, str(HERE / "kernels_check.c"), *map(str, SOURCES), "-o", str(program)]
    words = [word for word in words if word not in ("-shared", "-fvisibility=hidden")]
    done = subprocess.run([*words, "-lm"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def checked(words: list[str], products: bool) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("products compiled" if products else "products none")


@pytest.mark.parametrize(("options", "needed", "products"), [row[1:] for row in X86], ids=[row[0] for row in X86])
def test_kernels_are_right_on_every_x86(
    options: tuple[str, ...], needed: tuple[str, ...], products: bool, tmp_path: Path
) -> None:
    info = Path("/proc/cpuinfo")
    if not compiler_words() or not info.is_file() or "x86" not in build._processor():
        pytest.skip("no C compiler for x86-64 here")
    missing = [name for name in needed if name not in info.read_text(encoding="utf-8").split()]
    if missing:
        pytest.skip(f"this processor has no {missing[0]}")
    built(compiler_words(), options, tmp_path / "check")
    checked([str(tmp_path / "check")], products)


@pytest.mark.parametrize(("options", "products"), [((), False), (("-march=armv8.2-a+dotprod",), True)], ids=str)
def test_kernels_are_right_on_aarch64(options: tuple[str, ...], products: bool, tmp_path: Path) -> None:
    if not shutil.which(CROSS) or not shutil.which(QEMU):
        pytest.skip(f"needs {CROSS} and {QEMU}")
    built([CROSS], (*options, "-static"), tmp_path / "check")
    checked([QEMU, "-cpu", "max", str(tmp_path / "check")], products)
