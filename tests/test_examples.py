"""The examples run as they stand, with what the package ships and without a network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from edgegt import evaluate_subject, home
from edgegt.folder import RunFolder

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "docs" / "examples"


def printed(name: str, folder: Path) -> str:
    """What an example printed, run in an empty folder."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, EXAMPLES / name], cwd=folder, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": paths}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run_here_and_named_in_the_readme() -> None:
    there = {path.name for path in EXAMPLES.glob("*.py")} - {"onnx_generate.py"}  # of a guide: test_guides
    assert there == {"hf_callback.py", "plain_loop.py", "trainer.py"}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert there == set(re.findall(r"\(docs/examples/(\w+\.py)\)", readme))


def test_trainer(tmp_path: Path) -> None:
    said = printed("trainer.py", tmp_path)
    before, after, share = re.findall(r"[\d.]+", said.splitlines()[0])[:3]
    assert float(after) < 0.5 * float(before) and 30 < float(share) <= 50
    (run,) = (tmp_path / "runs").iterdir()
    assert RunFolder(run).finished
    assert not list(Path(os.environ["EDGEGT_CACHE"]).glob("rows/*"))  # the user's text went with the Trainer
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "my-assistant", dtype=torch.float32)
    assert exported.get_output_embeddings().weight is not exported.get_input_embeddings().weight


def test_hf_callback(tmp_path: Path) -> None:
    said = printed("hf_callback.py", tmp_path)
    found = re.search(
        r"^([\d.]+)% of the FLOPs of full training, (\d+) tensors, the last round:\n(.*)", said, re.M | re.S
    )
    assert found is not None
    assert 40 < float(found[1]) <= 50
    names = found[3].split()
    assert len(names) == int(found[2]) and "lm_head.weight" in names


def test_plain_loop(tmp_path: Path) -> None:
    said = printed("plain_loop.py", tmp_path)
    first, last = (float(number) for number in re.findall(r"\d+\.\d+", said))
    assert last < 0.7 * first
    patch, data = tmp_path / "plain.safetensors", str(home.HELD_OUT)
    trained = evaluate_subject(None, str(home.MODEL), str(patch), data)["loss"]
    assert trained < 0.9 * evaluate_subject(None, str(home.MODEL), None, data)["loss"]
    assert evaluate_subject(None, str(home.MODEL), str(patch), data, metrics="exact_match", answers=4)["answers"] == 4


@pytest.mark.parametrize("name", ["hf_callback.py", "plain_loop.py", "trainer.py"])
def test_short(name: str) -> None:
    """An example is read before it is run."""
    assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) <= 60
