"""How the next token is picked from the logits: the likeliest one, or a draw by transformers' own logits processors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgegt.errors import InputError, NotFinite
from edgegt.units import format_text

if TYPE_CHECKING:
    import torch

GENERATION_CONFIG = "generation_config.json"
# Of each number what is allowed, in words and as a test.
_ALLOWED: dict[str, tuple[str, Callable[[float], bool]]] = {
    "temperature": ("0 (the likeliest token) or a number from 0.01 to 100", lambda x: x == 0 or 0.01 <= x <= 100),
    "top_k": ("0 (all tokens) or a positive whole number", lambda x: x >= 0 and x == int(x)),
    "top_p": ("a number above 0 and up to 1", lambda x: 0 < x <= 1),
    "min_p": ("a number from 0 to 1", lambda x: 0 <= x <= 1),
    "repetition_penalty": ("a number from 0.1 to 10, 1 for none", lambda x: 0.1 <= x <= 10),
    "seed": ("a whole number from 0 to 2^63 - 1", lambda x: 0 <= x < 2**63),
}
_DRAWING = ("top_k", "top_p", "min_p")


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 takes the likeliest token. top_k 0, top_p 1, min_p 0 and repetition_penalty 1 change nothing.

    Raises: InputError for a number out of range, and for one that temperature 0 would leave without effect.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, value in self._given().items():
            if value is not None:
                _check(name, value, _flag(name))

    def _given(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def with_flags(self, flags: Mapping[str, Any]) -> Sampling:
        """These with what the user gave (None: not given). One that needs a draw asks for temperature 1."""
        given = {name: value for name, value in flags.items() if value is not None}
        drawing = [name for name in _DRAWING if given.get(name, getattr(Sampling, name)) != getattr(Sampling, name)]
        if drawing and given.get("temperature") == 0:
            raise InputError(
                f"{_flag(drawing[0])} draws tokens, and --temperature 0 takes the likeliest: leave one of them out"
            )
        if given.get("temperature") == 0:
            given = {name: getattr(Sampling, name) for name in _DRAWING} | given
        elif drawing and "temperature" not in given and self.temperature == 0:
            given["temperature"] = 1.0
        return replace(self, **given)

    def words(self) -> str:
        """'temperature 0.6, top-p 0.9', or 'the likeliest token each time'."""
        changed = [
            f"{name.replace('_', '-')} {value:g}"
            for name, value in self._given().items()
            if name not in ("temperature", "seed") and value != getattr(Sampling, name)
        ]
        first = f"temperature {self.temperature:g}" if self.temperature else "the likeliest token each time"
        return ", ".join([first, *changed])

    def picker(self) -> Callable[[Sequence[int], torch.Tensor], int]:
        """A function of (ids so far, float32 logits [vocabulary]) that picks the next id.

        Without a seed every picker draws otherwise.
        """
        import torch
        from transformers import generation

        processors = generation.LogitsProcessorList()
        if self.repetition_penalty != 1:
            processors.append(generation.RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty)))
        if self.temperature and self.temperature != 1:
            processors.append(generation.TemperatureLogitsWarper(float(self.temperature)))
        if self.temperature and self.top_k:
            processors.append(generation.TopKLogitsWarper(int(self.top_k)))
        if self.temperature and self.top_p < 1:
            processors.append(generation.TopPLogitsWarper(float(self.top_p)))
        if self.temperature and self.min_p:
            processors.append(generation.MinPLogitsWarper(float(self.min_p)))
        draw = torch.Generator()
        if self.seed is None:
            draw.seed()
        else:
            draw.manual_seed(self.seed)

        def pick(read: Sequence[int], logits: torch.Tensor) -> int:
            if processors:
                ids: Any = torch.tensor([list(read)], device=logits.device)
                logits = processors(ids, logits.unsqueeze(0))[0]
            if not self.temperature:
                return int(logits.argmax())
            shares = logits.softmax(-1).cpu()
            if not bool(shares.isfinite().all()):
                raise NotFinite("the model's logits are not finite: check its weights, or train again at a lower --lr")
            return int(torch.multinomial(shares, 1, generator=draw))

        return pick


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check(name: str, value: Any, called: str) -> None:
    allowed, test = _ALLOWED[name]
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not test(value):
        raise InputError(f"{called} {format_text(str(value), 40)} is out of range: give {allowed}")


@dataclass(frozen=True)
class Defaults:
    """What a model's files say of answers. sampling: None where generation_config.json says nothing about it.

    first: the id that an encoder-decoder's answer must begin with.
    """

    sampling: Sampling | None = None
    eos: tuple[int, ...] = ()
    first: int | None = None


def generation_defaults(directory: Path) -> Defaults:
    """The defaults that a model folder has. Without that file, config.json says which ids end and begin an answer.

    Raises: InputError when the file cannot be read, or a number in it is out of range.
    """
    path = directory / GENERATION_CONFIG
    if not path.is_file():
        path = directory / "config.json"
    if not path.is_file():
        return Defaults()
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no JSON ({error}): correct it, or delete it") from error
    if not isinstance(said, dict):
        raise InputError(f"{path} is no JSON object: correct it, or delete it")
    listed = said.get("eos_token_id")
    eos = tuple(one for one in (listed if isinstance(listed, list) else [listed]) if type(one) is int)
    first = said.get("forced_bos_token_id")
    first = first if type(first) is int else None
    if path.name != GENERATION_CONFIG:
        return Defaults(None, eos, first)
    names = ["repetition_penalty", *(("temperature", *_DRAWING) if said.get("do_sample") is True else ())]
    given = {name: said[name] for name in names if said.get(name) is not None}
    for name, value in given.items():
        _check(name, value, f"{path}: {name}")
    if said.get("do_sample") is True:
        given.setdefault("temperature", 1.0)
    found = Sampling(**given)
    return Defaults(None if found == Sampling() else found, eos, first)
