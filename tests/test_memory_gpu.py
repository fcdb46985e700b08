"""Device memory of a real run on CUDA against its prediction and its budget; skipped, visibly, without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

import runs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not runs.HERE, reason="no stories260K or no E2E rows under shared/data"),
]
MIB = 2**20


@pytest.mark.parametrize("budget", ["1GiB", "2GiB"])
def test_device_memory_stays_within_the_budget_and_near_the_prediction(budget: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = runs.words(folder, "--memory", budget, "--rho", "0.6", "--steps", "16", "--quiet", "--no-examples")
    words[words.index("--device") + 1] = "rtx-4090-24gb"
    done = runs.edgegt(words, tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    run = runs.read(folder, "run.json")
    predicted, measured = run["predicted"]["peak_bytes"], run["measured"]["peak_bytes"]
    print(f"budget {budget}, predicted {predicted / MIB:.1f} MiB, measured {measured / MIB:.1f} MiB")
    assert measured <= run["budget"]["memory_bytes"]
    assert abs(predicted - measured) <= max(0.05 * measured, 16 * MIB)
    assert predicted >= 0.97 * measured
