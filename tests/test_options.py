"""Options: every range and choice has its message, the TOML reader refuses the unknown, the command line wins."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from edgegt.errors import InputError
from edgegt.options import RunOptions, flag, merge_options, option_type, read_options

OUT_OF_RANGE: list[tuple[str, Any]] = [
    ("rho", 0.0), ("rho", 2.0), ("rho", -0.5), ("rho", float("nan")), ("epochs", 0.0), ("steps", 0), ("steps", -3),
    ("round_epochs", 0.0), ("batch_size", 0), ("batch_size", 10**6), ("max_length", 7), ("lr", 0.0), ("lr", 11.0),
    ("lr", float("nan")), ("warmup", -0.1), ("warmup", 1.0), ("weight_decay", -0.1), ("weight_decay", 2.0),
    ("max_grad_norm", 0.0), ("eval_fraction", 0.0), ("eval_fraction", 1.0), ("eval_rows", 0), ("threads", 0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_a_number_out_of_range_is_refused_with_flag_value_and_range(name: str, value: Any) -> None:
    with pytest.raises(InputError) as refusal:
        RunOptions(**{name: value})
    text = str(refusal.value)
    assert text.startswith(f"{flag(name)} {value:g} is out of range: give a ")
    assert "\n" not in text


@pytest.mark.parametrize(
    ("name", "value"),
    [("rho", 1.0), ("rho", 0.01), ("warmup", 0.0), ("warmup", 0.9), ("weight_decay", 0.0), ("weight_decay", 1.0),
     ("max_length", 8), ("batch_size", 1), ("steps", 1), ("epochs", 0.1), ("threads", 1), ("eval_fraction", 0.5)],
)  # fmt: skip
def test_the_ends_of_a_range_are_allowed(name: str, value: float) -> None:
    assert getattr(RunOptions(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value", "meant"), [("strategy", "greentrain", "greentrainer"), ("schedule", "cosin", "cosine")]
)
def test_an_unknown_choice_names_all_and_the_nearest(name: str, value: str, meant: str) -> None:
    with pytest.raises(InputError, match=rf"{flag(name)} '{value}' is not one of .*\(did you mean '{meant}'\?\)"):
        RunOptions(**{name: value})


def test_the_memory_budget_is_read_as_bytes() -> None:
    assert RunOptions().memory_bytes is None
    assert RunOptions(memory="4GiB").memory_bytes == 4 * 2**30
    with pytest.raises(InputError, match="--memory '4 GB of RAM' is not a size"):
        RunOptions(memory="4 GB of RAM")


def test_all_problems_are_said_at_once() -> None:
    with pytest.raises(InputError) as refusal:
        RunOptions(rho=2.0, batch_size=0, strategy="best", memory="much")
    for word in ("--rho 2", "--batch-size 0", "--strategy 'best'", "--memory 'much'"):
        assert word in str(refusal.value)


def test_every_option_has_help_a_plain_type_and_a_valid_default() -> None:
    defaults = RunOptions()
    for item in dataclasses.fields(RunOptions):
        assert item.metadata["help"], item.name
        value = getattr(defaults, item.name)
        assert value is None or type(value) is option_type(item), item.name
    with pytest.raises(dataclasses.FrozenInstanceError):
        defaults.rho = 0.3


def test_options_come_from_toml_in_either_spelling(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('rho = 1\nbatch-size = 4\nmax_length = 64\nmodel = "m"\nexamples = false\nlr = 1e-3\n')
    values = read_options(path)
    assert values == {"rho": 1.0, "batch_size": 4, "max_length": 64, "model": "m", "examples": False, "lr": 1e-3}
    assert isinstance(values["rho"], float)


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("rho = 0.3\nseed = 7\n")
    options = merge_options(read_options(path), {"rho": 0.6})
    assert (options.rho, options.seed, options.epochs) == (0.6, 7, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rhoo = 0.5", "unknown key 'rhoo' (did you mean 'rho'?)"),
        ("batchsize = 4", "unknown key 'batchsize' (did you mean 'batch_size'?)"),
        ("[run]\nrho = 0.5", "unknown key 'run'"),
        ('rho = "half"', "rho = 'half' should be of type float"),
        ("steps = 1.5", "steps = 1.5 should be of type int"),
        ("steps = true", "steps = True should be of type int"),
        ("rho = true", "rho = True should be of type float"),
        ("examples = 1", "examples = 1 should be of type bool"),
        ("model = 3", "model = 3 should be of type str"),
        ("rho = ", "not valid TOML"),
    ],
)
def test_a_bad_file_is_refused_with_its_name_and_a_remedy(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(InputError) as refusal:
        read_options(path)
    assert str(refusal.value).startswith(f"{path}: ")
    assert expected in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.toml' does not exist"):
        read_options(tmp_path / "nothing.toml")


def test_a_file_with_a_value_out_of_range_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("rho = 3.0\n")
    with pytest.raises(InputError, match="--rho 3 is out of range"):
        merge_options(read_options(path), {})
