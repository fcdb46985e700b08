"""Peak memory of real runs, each in a process of its own: under the budget and as predicted, near the smallest too."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import runs
from tiny_models import SHARED

pytestmark = pytest.mark.skipif(not runs.HERE, reason="no stories260K or no E2E rows under shared/data")
MIB = 2**20
ALLOWED_SHARE, ALLOWED_BYTES = 0.15, 16 * MIB
MODELS = {"stories260K": runs.STORIES, "base-7m": SHARED / "data" / "models" / "base-7m"}
LIGHT = ["--steps", "16", "--batch-size", "8", "--eval-rows", "16", "--rho", "0.6", "--quiet", "--no-examples"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module", params=MODELS)
def smallest(request: pytest.FixtureRequest, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, int]:
    """A model's name and the smallest feasible budget that the refusal of 100 MiB names, in MiB."""
    folder = tmp_path_factory.mktemp("refused") / "run"
    words = runs.words(folder, *LIGHT, "--memory", "100MiB", model=MODELS[request.param])
    done = runs.edgegt(words, cache)
    assert done.returncode == 2, done.stderr
    assert not folder.exists()
    named = re.search(r"smallest budget that would do is (\d+) MiB", done.stderr)
    assert named is not None, done.stderr
    return request.param, int(named[1])


@pytest.mark.slow
@pytest.mark.parametrize("factor", [1.05, 1.3, 2.0])
def test_the_peak_is_under_the_budget_and_as_predicted(
    factor: float, smallest: tuple[str, int], cache: Path, tmp_path: Path
) -> None:
    name, least = smallest
    budget = int(least * factor)
    words = runs.words(tmp_path / "run", *LIGHT, "--memory", f"{budget}MiB", model=MODELS[name])
    done = runs.edgegt(words, cache)
    assert done.returncode == 0, done.stderr
    run = runs.read(tmp_path / "run", "run.json")
    floor = run["measured"]["floor_bytes"]
    predicted, measured = run["predicted"]["peak_bytes"] - floor, run["measured"]["peak_bytes"] - floor
    print(f"{name} x{factor}: budget {budget} MiB, floor {floor / MIB:.1f}, above it predicted {predicted / MIB:.1f}, "
          f"measured {measured / MIB:.1f} MiB")  # fmt: skip
    assert run["measured"]["peak_bytes"] <= run["budget"]["memory_bytes"] == budget * MIB
    assert run["predicted"]["peak_bytes"] <= run["budget"]["memory_bytes"]
    assert abs(measured - predicted) <= max(ALLOWED_SHARE * predicted, ALLOWED_BYTES)


def test_the_smallest_budget_that_a_refusal_names_is_feasible(
    smallest: tuple[str, int], cache: Path, tmp_path: Path
) -> None:
    name, least = smallest
    # the floor differs by a few MiB from process to process
    words = runs.words(tmp_path / "run", *LIGHT, "--memory", f"{least + 8}MiB", model=MODELS[name])
    done = runs.edgegt(words, cache)
    assert done.returncode == 0, done.stderr
    assert runs.read(tmp_path / "run", "run.json")["measured"]["peak_bytes"] <= (least + 8) * MIB
