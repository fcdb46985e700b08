"""What is asked of a comparison, validated; it is kept in the folder, so that a broken-off one goes on as it began."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgegt.comparison.contenders import CONTENDERS, EQUAL, PASSED, parse_contenders
from edgegt.comparison.rates import GRID, read_rates
from edgegt.errors import InputError, nearest
from edgegt.folder import lasting
from edgegt.metrics import parse_metrics
from edgegt.options import RunOptions
from edgegt.units import format_text

FEWEST_ROWS = 16


@dataclass(frozen=True)
class Request:
    """A comparison. run: options of a run, of which epochs or steps are those of full fine-tuning.

    equal: what all may spend as much of. rates: factors of 0.4 / hidden size by contender (see `rates`), empty to find
    them on a grid of such factors with tune_steps steps. rows: of training at most. answers: rows answered for metrics.
    """

    run: dict[str, Any]
    strategies: tuple[str, ...]
    rhos: tuple[float, ...] = (0.5,)
    seeds: int = 3
    equal: str = "flops"
    rates: dict[str, float] = field(default_factory=dict)
    grid: tuple[float, ...] = GRID
    tune_steps: int | None = None
    rows: int | None = None
    metrics: tuple[str, ...] = ()
    answers: int | None = None

    def __post_init__(self) -> None:
        if self.equal not in EQUAL:
            near = nearest(self.equal, EQUAL)
            raise InputError(f"--equal '{format_text(self.equal)}' is not one of {', '.join(EQUAL)}{near}")
        for name, value in (("seeds", self.seeds), ("tune-steps", self.tune_steps), ("answers", self.answers)):
            if value is not None and not 0 < value <= 10**6:
                raise InputError(f"--{name} {value} is out of range: give a positive whole number")
        if self.rows is not None and self.rows < FEWEST_ROWS:
            raise InputError(f"--rows {self.rows} is out of range: give {FEWEST_ROWS} or more")
        if self.answers is not None and not self.metrics:
            raise InputError("--answers goes with --metrics: without it nothing is answered")
        missing = [name for name in self.strategies if self.rates and name not in self.rates]
        if missing:
            raise InputError(f"--rates has none for {', '.join(missing)}: leave it out to find them, or add them")

    def to_json(self) -> dict[str, Any]:
        """A plain dict."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, tree: Mapping[str, Any], path: Path) -> Request:
        """The request that `to_json` gave. Raises: InputError for that of another version or a damaged one."""
        lists = ("strategies", "rhos", "grid", "metrics")
        try:
            return cls(**{**tree, **{name: tuple(tree[name]) for name in lists}})
        except (TypeError, KeyError) as error:
            raise InputError(f"'{path}' is damaged or from another version ({error}): compare anew") from error


def request_of(
    options: RunOptions, strategies: str | None = None, rhos: str | None = None, seeds: int = 3, equal: str = "flops",
    rates: str | None = None, grid: str | None = None, tune_steps: int | None = None, rows: int | None = None,
    metrics: str | None = None, answers: int | None = None,
) -> Request:  # fmt: skip
    """A request from what the command line gives. Raises: InputError for values that are not allowed."""
    names = parse_contenders(strategies or ",".join(CONTENDERS))
    given, model = lasting(options), Path(options.model or "home").name
    if options.epochs is not None and options.steps is not None:
        raise InputError("--epochs and --steps both say how long full fine-tuning trains: leave one of them out")
    if rates is not None and (grid is not None or tune_steps is not None):
        raise InputError("--rates gives the learning rates, --grid and --tune-steps find them: leave one of them out")
    return Request(
        {name: getattr(given, name) for name in PASSED}, names,
        numbers(rhos or "0.5", "--rho", 1.0), seeds, equal, read_rates(rates, model) if rates else {},
        tuple(sorted(numbers(grid, "--grid", 1e4))) if grid else GRID, tune_steps, rows,
        parse_metrics(metrics) if metrics else (), answers,
    )  # fmt: skip


def numbers(text: str, option: str, most: float) -> tuple[float, ...]:
    """'0.36,0.5' as numbers above 0 and at most `most`, each once. Raises: InputError."""
    found: list[float] = []
    for one in text.split(","):
        try:
            value = float(one)
        except ValueError:
            value = math.nan
        if not 0 < value <= most:
            raise InputError(
                f"{option} '{format_text(one)}' is not allowed: give numbers above 0 and at most {most:g}, divided by "
                "commas"
            )
        found.append(value)
    return tuple(dict.fromkeys(found))


def middle(values: Sequence[float]) -> float:
    """The middle one of some numbers, the lower of two."""
    return sorted(values)[(len(values) - 1) // 2]
