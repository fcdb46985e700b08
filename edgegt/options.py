"""Every option of a run, declared once: name, type, default, help. The command line, the TOML reader and the record
in the run folder all come from this table. The command line wins over the file; an unknown key is an error.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgegt.errors import InputError, nearest
from edgegt.profile import Profile
from edgegt.rates import seconds_for_energy
from edgegt.units import parse_bytes, parse_duration, parse_energy

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

STRATEGY_NAMES = ("greentrainer", "greentrainer-dp", "last-layers", "bias", "random", "full")
SCHEDULES = ("linear", "cosine", "constant")


def _option(default: Any, help_text: str, **extra: Any) -> Any:
    return field(default=default, metadata={"help": help_text, **extra})


@dataclass(frozen=True)
class RunOptions:
    """The options of `edgegt run` and `edgegt plan`, validated. None means: from the profile, the model or the data."""

    device: str = _option("auto", "device profile: a name, 'jetson', 'auto' or a path to a .toml file")
    model: str | None = _option(None, "model directory with safetensors, or a hub id (default: the home assistant)")
    data: str | None = _option(None, "JSONL, JSON, CSV, TSV or text file (default: one household's utterances)")
    columns: str | None = _option(None, "which fields to read, such as prompt=mr,completion=ref or text=body")
    output: str | None = _option(None, "run folder to write (default: runs/<model>-<device>-<number>)")
    rho: float | None = _option(None, "FLOPs of the run as a fraction of full fine-tuning (default: the profile's)")
    memory: str | None = _option(None, "peak memory of the process, such as 4GiB (default: the profile's)")
    time: str | None = _option(
        None, "time of the whole run, such as 20m; what is trained is chosen to fit (default: any)"
    )
    energy: str | None = _option(
        None, "energy of the whole run, such as 15Wh, at the watts of the profile (default: any)"
    )
    strategy: str = _option("greentrainer", "how tensors are chosen", choices=STRATEGY_NAMES)
    epochs: float | None = _option(None, "passes over the data (default: 2; the household: 6)")
    steps: int | None = _option(None, "optimizer steps instead of epochs")
    round_epochs: float | None = _option(
        None, "epochs between two selections (default: half of the run, all of it below 40 steps)"
    )
    batch_size: int = _option(8, "rows of an optimizer step")
    max_length: int = _option(512, "tokens of a row at most; longer rows are cut")
    lr: float | None = _option(None, "peak learning rate (default: 0.4 / hidden size)")
    schedule: str = _option("linear", "learning rate over the run", choices=SCHEDULES)
    warmup: float = _option(0.03, "share of the steps in which the learning rate rises")
    weight_decay: float = _option(0.0, "decoupled weight decay of AdamW")
    max_grad_norm: float = _option(10.0, "gradients are clipped to this norm, per tensor when applied within backward")
    eval_fraction: float = _option(0.1, "share of the rows held out for evaluation")
    eval_data: str | None = _option(None, "file with the held-out rows instead")
    eval_rows: int = _option(512, "held-out rows evaluated at most, the same before and after")
    seed: int = _option(0, "seed of shuffling, splits and random choices")
    threads: int | None = _option(None, "CPU threads (default: physical cores)")
    examples: bool = _option(True, "keep examples of the user's text in the run folder")

    def __post_init__(self) -> None:
        problems = [*_number_problems(self), *_choice_problems(self)]
        if problems:
            raise InputError("; ".join(problems))

    @property
    def memory_bytes(self) -> int | None:
        """The memory budget in bytes, or None for the profile's."""
        return None if self.memory is None else parse_bytes(self.memory, "--memory")

    @property
    def measures_importance(self) -> bool:
        """Whether the strategy chooses by importance, which must be measured."""
        return self.strategy.startswith("greentrainer")

    def seconds_of(self, profile: Profile) -> float | None:
        """The time budget in seconds: --time, or what --energy allows at the profile's watts; the smaller of both."""
        given = [] if self.time is None else [parse_duration(self.time, "--time")]
        if self.energy is not None:
            given.append(seconds_for_energy(profile, parse_energy(self.energy, "--energy")))
        return min(given, default=None)


_RANGES: dict[str, tuple[float, float, str]] = {
    "rho": (0.0, 1.0, "a number greater than 0 and at most 1, such as 0.5"),
    "epochs": (0.0, 1e6, "a number greater than 0"),
    "steps": (0.0, 1e9, "a positive whole number"),
    "round_epochs": (0.0, 1e6, "a number greater than 0"),
    "batch_size": (0.0, 65536, "a positive whole number"),
    "max_length": (7, 1e7, "a number of at least 8"),
    "lr": (0.0, 10.0, "a number greater than 0, such as 5e-4"),
    "warmup": (-1e-9, 0.9, "a number from 0 to 0.9"),
    "weight_decay": (-1e-9, 1.0, "a number from 0 to 1"),
    "max_grad_norm": (0.0, 1e9, "a number greater than 0"),
    "eval_rows": (0.0, 1e9, "a positive whole number"),
    "threads": (0.0, 4096, "a positive whole number"),
}


def flag(name: str) -> str:
    """The command-line spelling of an option: batch_size -> --batch-size."""
    return "--" + name.replace("_", "-")


def _number_problems(options: RunOptions) -> list[str]:
    problems = []
    for name, (above, most, allowed) in _RANGES.items():
        value = getattr(options, name)
        if value is not None and not above < value <= most:
            problems.append(f"{flag(name)} {value:g} is out of range: give {allowed}")
    if not 0 < options.eval_fraction < 1:
        problems.append(f"--eval-fraction {options.eval_fraction:g} is out of range: give a number between 0 and 1")
    quantities = {"memory": parse_bytes, "time": parse_duration, "energy": parse_energy}
    for name, parse in quantities.items():
        try:
            if getattr(options, name) is not None:
                parse(getattr(options, name), flag(name))
        except InputError as error:
            problems.append(str(error))
    return problems


def _choice_problems(options: RunOptions) -> list[str]:
    problems = []
    for item in dataclasses.fields(options):
        choices = item.metadata.get("choices")
        value = getattr(options, item.name)
        if choices and value not in choices:
            known = ", ".join(choices)
            problems.append(f"{flag(item.name)} '{value}' is not one of {known}{nearest(str(value), choices)}")
    return problems


def option_type(item: dataclasses.Field[Any]) -> type:
    """The plain type of an option's value: str, int, float or bool."""
    text = str(item.type).replace(" | None", "")
    return {"str": str, "int": int, "float": float, "bool": bool}[text]


def read_options(path: Path) -> dict[str, Any]:
    """Options from a TOML file, as the keyword arguments of RunOptions.

    Raises: InputError for a missing file, malformed TOML, an unknown key (names the nearest) or a wrong type.
    """
    if not path.is_file():
        raise InputError(f"options file '{path}' does not exist: give the path of a .toml file after --config")
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid TOML ({error}): write lines such as rho = 0.5") from error
    known = {item.name: item for item in dataclasses.fields(RunOptions)}
    values: dict[str, Any] = {}
    for key, value in tree.items():
        name = key.replace("-", "_")
        if name not in known:
            near = nearest(name, known)
            raise InputError(f"{path}: unknown key '{key}'{near}: `edgegt run --help` lists the options")
        values[name] = _checked(path, key, value, option_type(known[name]))
    return values


def _checked(path: Path, key: str, value: Any, wanted: type) -> Any:
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise InputError(f"{path}: {key} = {value!r} should be of type {wanted.__name__}: change the value")
    return value


def merge_options(file: Mapping[str, Any], command_line: Mapping[str, Any]) -> RunOptions:
    """Options of the file, overridden by those given on the command line."""
    return RunOptions(**{**file, **command_line})
