"""Models that say the class of a text: transformers' sequence classification, with an encoder or a decoder.

Which classes there are, and which weights the files lack, travel with the config. A head that the files lack begins
from the seed, stays float and is always trained; one that they have is a linear like the others.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from edgegt.architecture import CLASSES, auto_class, is_classifier, is_encoder_decoder, positions_of, text_config
from edgegt.data import Reading
from edgegt.errors import InputError

_MADE_FOR_IT = "ForSequenceClassification"
_STD = 0.02


@dataclass(frozen=True)
class ClassHead:
    """labels: the classes in the order of the logits. fresh: names of the weights that begin from `seed`."""

    labels: tuple[str, ...]
    fresh: tuple[str, ...] = ()
    seed: int = 0


def head_of(config: Any) -> ClassHead | None:
    """The classes of a config that `as_classifier` made; None of a language model's."""
    found: ClassHead | None = getattr(config, CLASSES, None)
    return found


def fresh_of(config: Any) -> tuple[str, ...]:
    """Names of the weights that the files lack, which are always trained."""
    head = head_of(config)
    return head.fresh if head else ()


def known_labels(config: Any) -> tuple[str, ...]:
    """The classes of the head that the files have; none where they have no such head."""
    if not any(str(name).endswith(_MADE_FOR_IT) for name in getattr(config, "architectures", None) or ()):
        return ()
    found: dict[int, str] = getattr(config, "id2label", None) or {}
    return tuple(str(found[index]) for index in sorted(found))


def reading_of(config: Any, labels: tuple[str, ...] = ()) -> Reading:
    """How rows are read for this model. labels: those of a model that is trained, which must be kept.

    Raises: InputError when transformers has no classification for it, or it is an encoder-decoder.
    """
    kind = getattr(config, "model_type", "?")
    if is_encoder_decoder(config):
        raise InputError(
            f"'{kind}' is an encoder-decoder, and --task classification takes encoders and decoder-only models: leave "
            "--task out, and let it learn to answer with the label's word"
        )
    return Reading(labels or known_labels(config), reads_both_ways(config), bool(labels))


def reads_both_ways(config: Any) -> bool:
    """Whether it is an encoder: one that does not look for the last token of a row to say its class from.

    Raises: InputError when transformers has no classification for this config.
    """
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as KNOWN

    try:
        found: Any = KNOWN[type(text_config(config))]
    except KeyError:
        kind = getattr(config, "model_type", "?")
        raise InputError(
            f"'{kind}' has no classification in transformers: give another model, or leave --task classification out"
        ) from None
    found = found[0] if isinstance(found, tuple) else found
    return "pad_token_id" not in inspect.unwrap(found.forward).__code__.co_names


def check_writes(config: Any) -> None:
    """Raises: InputError for an encoder, of which transformers makes a language model that sees what it should say."""
    if is_encoder_decoder(config) or getattr(config, "is_decoder", False):
        return
    try:
        encoder = reads_both_ways(config)
    except InputError:
        return
    if encoder:
        raise InputError(
            f"'{config.model_type}' is an encoder, which writes no text: train it with --task classification, or give "
            "a decoder-only model"
        )


def as_classifier(config: Any, labels: tuple[str, ...], seed: int, stored: Collection[str] | None) -> Any:
    """The config of the model with one logit per label. stored: names of the files' tensors, None where unknown."""
    reads_both_ways(config)
    known = known_labels(config)
    made_for = (config.architectures or [""])[0]
    config = copy.deepcopy(text_config(config))
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    config.problem_type = "single_label_classification"
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = _some_id(getattr(config, "eos_token_id", None))
    setattr(config, CLASSES, ClassHead(labels, (), seed))
    if stored is None:
        fresh = _likely_fresh(config, known == labels, made_for.endswith("ForMaskedLM"))
    else:
        fresh = _fresh(config, known == labels, stored)
    setattr(config, CLASSES, replace(ClassHead(labels, fresh, seed)))
    return config


def _some_id(eos: Any) -> int:
    found = eos[0] if isinstance(eos, (list, tuple)) and eos else eos
    return found if isinstance(found, int) else 0


def _above(config: Any) -> tuple[list[str], str]:
    """Names of the weights that a language model's files may lack, and the prefix of what they all have."""
    with torch.device("meta"):
        model = auto_class(config).from_config(copy.deepcopy(config))
    prefix = f"{model.base_model_prefix}."
    names = [name for name, _ in model.named_parameters()]
    return [name for name in names if not name.startswith(prefix) or ".pooler." in name], prefix


def _fresh(config: Any, kept: bool, stored: Collection[str]) -> tuple[str, ...]:
    """kept: whether the head that the files may have is for these classes."""
    names, prefix = _above(config)
    below = {name for name in names if name.startswith(prefix)}
    there = {name for name in names if name in stored or name.removeprefix(prefix) in stored}
    return tuple(name for name in names if name not in there or (name not in below and not kept))


def _likely_fresh(config: Any, kept: bool, masked: bool) -> tuple[str, ...]:
    """The same from a config alone: masked language models are saved without a pooler."""
    names, prefix = _above(config)
    return tuple(name for name in names if (masked if name.startswith(prefix) else not kept))


def initial(config: Any, name: str, shape: torch.Size) -> torch.Tensor:
    """What a fresh weight begins with, float32: small random numbers by seed and name, 1 of norms, 0 of biases."""
    head = head_of(config)
    assert head is not None
    if len(shape) < 2:
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    number = int.from_bytes(hashlib.sha256(f"{head.seed}/{name}".encode()).digest()[:6], "big")
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(number))
    return drawn * float(getattr(config, "initializer_range", None) or _STD)


@contextmanager
def not_drawn(config: Any) -> Iterator[None]:
    """transformers ties weights and draws none for a classifier here: some (ModernBERT's) cannot be without memory."""
    from transformers import PreTrainedModel

    drawing = PreTrainedModel.initialize_weights
    if is_classifier(config):
        PreTrainedModel.initialize_weights = lambda self: None
    try:
        yield
    finally:
        PreTrainedModel.initialize_weights = drawing


@torch.no_grad()
def begin_fresh(model: Any, device: torch.device) -> dict[str, nn.Parameter]:
    """Give the fresh weights of a model their first values, and return them by name."""
    found = {}
    for name in fresh_of(model.config):
        owner, _, short = name.rpartition(".")
        value = initial(model.config, name, model.get_parameter(name).shape)
        found[name] = nn.Parameter(value.to(device))
        setattr(model.get_submodule(owner), short, found[name])
    return found


def classifier_positions(config: Any) -> int | None:
    """How many tokens a row may have; RoBERTa and its like number them from behind the padding's id on."""
    most = positions_of(config)
    if most is None or not reads_both_ways(config):
        return most
    config = copy.deepcopy(config)
    setattr(config, CLASSES, ClassHead(("0", "1")))
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    behind = [table.padding_idx for table in tables if getattr(table, "padding_idx", None) is not None]
    return most - 1 - max(behind) if behind else most


def fresh_line(config: Any, numel: int) -> str | None:
    """What is said of weights that begin from the seed; None where the files have all."""
    head = head_of(config)
    if head is None or not head.fresh:
        return None
    owners = dict.fromkeys(name.rpartition(".")[0] for name in head.fresh)
    return (
        f"the files have no head for these {len(head.labels)} classes: the {numel:,} weights of {', '.join(owners)} "
        f"start from seed {head.seed} and are always trained"
    )


def fresh_numel(config: Any) -> int:
    """Elements of the fresh weights."""
    with torch.device("meta"):
        model = auto_class(config).from_config(copy.deepcopy(config))
    return sum(math.prod(model.get_parameter(name).shape) for name in fresh_of(config))
