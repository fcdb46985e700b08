"""Learning rates of a comparison: one per contender, from one grid, on rows that nobody is trained or scored on.

A rate is written as a factor of 0.4 / hidden size, the default of a run, so that it means something on another model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from edgegt.disk import write_text
from edgegt.errors import InputError
from edgegt.profile import read_toml
from edgegt.units import format_text

GRID = (0.5, 1.0, 2.0, 4.0)
STORED = "stored"
STORED_FILE = Path(__file__).with_name("rates.toml")
STEP = 2.0
MOST_GROWTH = 4


def read_rates(name: str, model: str = "") -> dict[str, float]:
    """The factors in a TOML file, or with 'stored' the package's: of this model, else of all. Raises: InputError.

    model: the name of its folder, which the package's file may have a table for.
    """
    path = STORED_FILE if name == STORED else Path(name)
    shown = format_text(path, None)
    if not path.is_file():
        raise InputError(f"--rates '{shown}' does not exist: give a rates.toml of a comparison, or '{STORED}'")
    tree = read_toml(path, "full = 0.64", "learning rates")
    factors = tree.get(model, tree.get("factors"))
    if not isinstance(factors, dict) or not factors:
        raise InputError(f"{shown} has no table [factors]: give a rates.toml of a comparison, or '{STORED}'")
    for key, value in factors.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1e4:
            raise InputError(f"{shown}: the factor of {format_text(key)} should be a number above 0: change it")
    return {key: float(value) for key, value in factors.items()}


def write_rates(path: Path, factors: Mapping[str, float], about: str) -> None:
    """Write factors so that `read_rates` reads them. Raises: DiskError."""
    lines = [f"{name} = {value!r}" for name, value in factors.items()]
    heading = f"# Learning rates as factors of 0.4 / hidden size. {about}"
    write_text(path, "\n".join([heading, "[factors]", *lines, ""]))


def best_factor(loss_of: Callable[[float], float], grid: Sequence[float]) -> float:
    """The factor with the least validation loss; while it is the first or last of the grid, the grid grows there.

    Raises: InputError when no factor trains at all.
    """
    losses = {factor: loss_of(factor) for factor in grid}
    for _ in range(MOST_GROWTH):
        best = min(losses, key=lambda factor: losses[factor])
        if best == max(losses):
            further = best * STEP
        elif best == min(losses):
            further = best / STEP
        else:
            break
        losses[further] = loss_of(further)
    best = min(losses, key=lambda factor: losses[factor])
    if losses[best] == float("inf"):
        raise InputError("no learning rate of the grid trains it: see the lines above, or give another --grid")
    return best
