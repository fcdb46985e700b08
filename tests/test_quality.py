"""What training reaches on real text: selection under half of the FLOPs against full fine-tuning (minutes each).

Both learning rates come from a small grid (docs/benchmarks.md). At equal FLOPs, full fine-tuning gets half the steps.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import runs
from edgegt import RunOptions, run
from edgegt.log import Log
from tiny_models import SHARED

pytestmark = pytest.mark.skipif(not runs.HERE, reason="no stories260K or no E2E rows under shared/data")
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
DEVICES = [
    pytest.param("jetson-orin-nano-8gb", id="cpu", marks=pytest.mark.slow),
    pytest.param("jetson-agx-orin-64gb", id="cuda", marks=[pytest.mark.gpu, CUDA]),
]
# model: (learning rate of selection, of full fine-tuning), each the best of its grid
TUNED = {"stories260K": (1.2e-2, 5e-3), "base-7m": (3.2e-3, 1e-3)}


def _loss(folder: Path, device: str, model: str, strategy: str, epochs: float) -> tuple[float, float]:
    """Held-out loss after training, and the FLOPs as a share of full fine-tuning on the same batches."""
    lr = TUNED[model][strategy == "full"]
    path = run(
        RunOptions(
            device=device, model=str(SHARED / "data" / "models" / model),
            data=str(SHARED / "data" / "e2e" / "devset.csv"), columns="prompt=mr,completion=ref", rho=0.5,
            strategy=strategy, epochs=epochs, lr=lr, output=str(folder / f"{strategy}-{epochs}"), examples=False,
            early_stopping=False,
        ),
        Log(quiet=True),
    )  # fmt: skip
    measured = runs.read(path, "run.json")["measured"]["flops_ratio"]
    return runs.read(path, "eval.json")["after"]["loss"], measured


@pytest.mark.parametrize("model", TUNED)
@pytest.mark.parametrize("device", DEVICES)
def test_selection_holds_against_full_fine_tuning(device: str, model: str, tmp_path: Path) -> None:
    ours, share = _loss(tmp_path, device, model, "greentrainer", 2)
    equal_flops, _ = _loss(tmp_path, device, model, "full", 1)
    equal_steps, _ = _loss(tmp_path, device, model, "full", 2)
    full = f"full {equal_flops:.3f} at equal FLOPs, {equal_steps:.3f} at equal steps"
    print(f"{model}: {ours:.3f} at {share:.3f} of full; {full}")
    assert share <= 0.5
    assert ours <= equal_flops
    assert ours <= 1.10 * equal_steps
