"""Every option of a run, declared once: name, type, default, help. The command line, the TOML reader and the record
in the run folder all come from this table. The command line wins over the file; an unknown key is an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgegt.errors import InputError, nearest
from edgegt.prefix import MODES
from edgegt.profile import Profile, read_toml
from edgegt.rates import seconds_for_energy
from edgegt.units import format_text, parse_bytes, parse_duration, parse_energy

STRATEGY_NAMES = ("greentrainer", "greentrainer-dp", "last-layers", "bias", "random", "lisa", "full")
SCHEDULES = ("linear", "cosine", "constant")
TASKS = ("generation", "classification")
DATA_FORMATS = ("messages", "conversations", "prompt-completion", "instruction", "text", "piqa")


def _option(default: Any, help_text: str, **extra: Any) -> Any:
    return field(default=default, metadata={"help": help_text, **extra})


@dataclass(frozen=True)
class RunOptions:
    """The options of `edgegt run` and `edgegt plan`, validated. None means: from the profile, the model or the data."""

    device: str = _option("auto", "device profile: a name, 'jetson', 'auto' or a path to a .toml file")
    model: str | None = _option(None, "model directory with safetensors, or a hub id (default: the home assistant)")
    data: str | None = _option(
        None, "JSONL, JSON, CSV, TSV, Parquet, Arrow or text file, or a folder of them (default: one household's)"
    )
    task: str = _option(
        "generation", "what is learned: to write text, or to say the class of a text (encoders too)", choices=TASKS
    )
    columns: str | None = _option(
        None,
        "which fields to read, such as prompt=question.text,completion=answers, text=body, messages=turns, or "
        "text=review,label=stars for classification",
    )
    format: str | None = _option(None, "what the rows hold (default: what their fields say)", choices=DATA_FORMATS)
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
    lr: float | None = _option(None, "peak learning rate (default: 0.4 / hidden size; full: half of it)")
    schedule: str = _option("linear", "learning rate over the run", choices=SCHEDULES)
    warmup: float = _option(0.03, "share of the steps in which the learning rate rises")
    weight_decay: float = _option(0.1, "decoupled weight decay of AdamW")
    max_grad_norm: float = _option(10.0, "gradients are clipped to this norm, per tensor when applied within backward")
    eval_fraction: float = _option(0.1, "share of the rows held out for evaluation")
    eval_data: str | None = _option(None, "file with the held-out rows instead")
    eval_rows: int = _option(512, "held-out rows evaluated at most, the same before and after")
    skip_bad_rows: bool = _option(False, "leave out rows that cannot be read, and list them, instead of refusing")
    seed: int = _option(0, "seed of shuffling, splits and random choices")
    threads: int | None = _option(None, "CPU threads (default: physical cores)")
    checkpoint_every: str = _option("60s", "steps (such as 200) or time (such as 5m) between checkpoints")
    min_battery: float | None = _option(
        None, "percent of the battery below which the run waits for mains, with a checkpoint (default: any)"
    )
    only_on_mains: bool = _option(False, "wait, with a checkpoint, while the machine runs on its battery")
    cache: str = _option(
        "auto",
        "keep on disk, once per row, what the frozen layers below the lowest trained one give: where it saves FLOPs "
        "or memory (auto), always (on), or never (off)",
        choices=MODES,
    )
    tensorboard: bool = _option(False, "write the curves for TensorBoard too, into the run folder's tensorboard/")
    early_stopping: bool = _option(
        True,
        "from two epochs on: measure held-out rows after each, end when it was worse twice in a row, keep the best",
    )
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
    def checkpoint_interval(self) -> tuple[int | None, float | None]:
        """Between two checkpoints: (steps, None) or (None, seconds)."""
        text = self.checkpoint_every.strip()
        try:
            if text.isdecimal() and len(text) <= 64:
                if 0 < int(text) <= 10**9:
                    return int(text), None
                raise InputError(text)
            return None, parse_duration(text, "--checkpoint-every")
        except InputError:
            raise InputError(
                f"--checkpoint-every '{format_text(text)}' is neither steps nor a time: write a positive number of "
                "steps, or a time such as 90s or 5m"
            ) from None

    @property
    def classifies(self) -> bool:
        """Whether the class of a text is learned."""
        return self.task == "classification"

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
    "seed": (-1, 2**63 - 1, "a whole number from 0 to 2**63 - 1"),
    "threads": (0.0, 4096, "a positive whole number"),
    "min_battery": (0.0, 100, "a percentage above 0 and at most 100, such as 20"),
}


def flag(name: str) -> str:
    """The command-line spelling of an option: batch_size -> --batch-size."""
    return "--" + name.replace("_", "-")


def _shown(value: float) -> str:
    """A number for a message; TOML can give whole numbers that are too large for Python to show."""
    try:
        return f"{value:g}"
    except OverflowError:
        return f"of {value.bit_length()} bits" if isinstance(value, int) else str(value)


def _number_problems(options: RunOptions) -> list[str]:
    for name in (*_RANGES, "eval_fraction"):  # from Python anything may come
        value = getattr(options, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            return [f"{flag(name)} {format_text(str(value), 40)!r} is no number: give one"]
    problems = []
    for name, (above, most, allowed) in _RANGES.items():
        value = getattr(options, name)
        if value is not None and not above < value <= most:
            problems.append(f"{flag(name)} {_shown(value)} is out of range: give {allowed}")
    if not 0 < options.eval_fraction < 1:
        problems.append(f"--eval-fraction {options.eval_fraction:g} is out of range: give a number between 0 and 1")
    quantities = {"memory": parse_bytes, "time": parse_duration, "energy": parse_energy}
    for name, parse in quantities.items():
        try:
            if getattr(options, name) is not None:
                parse(getattr(options, name), flag(name))
        except InputError as error:
            problems.append(str(error))
    try:
        _ = options.checkpoint_interval
    except InputError as error:
        problems.append(str(error))
    return problems


def _choice_problems(options: RunOptions) -> list[str]:
    problems = []
    if options.task == "classification" and options.format:
        problems.append(
            f"--format {format_text(options.format)} goes with --task generation: give --columns text=NAME,label=NAME, "
            "or leave it out where the fields are called text (or sentence) and label"
        )
    if options.columns and options.format:
        problems.append(f"--columns and --format {options.format} both say which fields to read: leave one of them out")
    for item in dataclasses.fields(options):
        choices = item.metadata.get("choices")
        value = getattr(options, item.name)
        if choices and value not in choices and not (value is None and item.default is None):
            known = ", ".join(choices)
            shown = format_text(value)
            problems.append(f"{flag(item.name)} '{shown}' is not one of {known}{nearest(str(value), choices)}")
        elif item.name != "columns" and isinstance(value, str) and any(one < " " or one == "\x7f" for one in value):
            problems.append(f"{flag(item.name)} '{format_text(value)}' holds a control character: leave it out")
    return problems


def option_type(item: dataclasses.Field[Any]) -> type:
    """The plain type of an option's value: str, int, float or bool."""
    text = str(item.type).replace(" | None", "")
    return {"str": str, "int": int, "float": float, "bool": bool}[text]


def read_options(path: Path) -> dict[str, Any]:
    """Options from a TOML file, as the keyword arguments of RunOptions.

    Raises: InputError for a missing file, malformed TOML, an unknown key (names the nearest) or a wrong type.
    """
    shown = format_text(path, None)
    if not path.is_file():
        raise InputError(f"options file '{shown}' does not exist: give the path of a .toml file after --config")
    tree = read_toml(path, "rho = 0.5", "options file")
    known = {item.name: item for item in dataclasses.fields(RunOptions)}
    values: dict[str, Any] = {}
    for key, value in tree.items():
        name = key.replace("-", "_")
        if name not in known:
            near = nearest(name, known)
            raise InputError(f"{shown}: unknown key '{format_text(key)}'{near}: `edgegt run --help` lists the options")
        values[name] = _checked(path, key, value, option_type(known[name]))
    return values


def options_of(tree: Mapping[str, Any], path: Path) -> RunOptions:
    """The options that a run wrote to a JSON file; those that only another version knows are left out.

    Raises: InputError for a value of another type or out of range.
    """
    values = {}
    for item in dataclasses.fields(RunOptions):
        if item.name in tree:
            value = tree[item.name]
            empty = value is None and item.default is None
            values[item.name] = value if empty else _checked(path, item.name, value, option_type(item))
    return RunOptions(**values)


def _checked(path: Path, key: str, value: Any, wanted: type) -> Any:
    if wanted is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**300:
        return float(value)
    if isinstance(value, wanted) and not (wanted is int and isinstance(value, bool)):
        return value
    try:
        shown = format_text(repr(value))
    except (ValueError, RecursionError):  # a number of thousands of digits, or lists in lists
        shown = "(too long to show)"
    where = f"{format_text(path, None)}: {key}"
    raise InputError(f"{where} = {shown} should be of type {wanted.__name__}: change the value")


def merge_options(file: Mapping[str, Any], command_line: Mapping[str, Any]) -> RunOptions:
    """Options of the file, overridden by those given on the command line."""
    return RunOptions(**{**file, **command_line})
