"""Random models that say the class of a text, encoders and decoders, with and without a head in their files."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    RobertaConfig,
)

from edgegt.classifier import as_classifier, begin_fresh, reads_both_ways
from edgegt.data import Batch, Example, Row, collate
from edgegt.model import Int8Model, load_int8
from edgegt.quant import Backend, TorchBackend
from edgegt.source import open_source, read_config
from tiny_models import _WIDE, CPU, FAMILIES, VOCABULARY

LABELS = ("circle", "line", "point")
_BERT = {**_WIDE, "max_position_embeddings": 64}
ENCODERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: BertConfig(**_BERT),
    "roberta": lambda: RobertaConfig(**{**_BERT, "pad_token_id": 1, "bos_token_id": 0, "max_position_embeddings": 66}),
    "distilbert": lambda: DistilBertConfig(
        vocab_size=VOCABULARY, pad_token_id=0, dim=64, hidden_dim=96, n_layers=3, n_heads=4, max_position_embeddings=64
    ),
    "electra": lambda: ElectraConfig(**_BERT, embedding_size=48),
    "modernbert": lambda: ModernBertConfig(
        **_BERT, global_attn_every_n_layers=2, local_attention=16, cls_token_id=1, sep_token_id=2
    ),
}
DECODERS = {name: FAMILIES[name] for name in ("llama", "gpt2", "qwen2", "opt", "bloom", "gpt-neox", "falcon")}
CLASSIFIERS = ENCODERS | DECODERS


def config_of(family: str, fresh: bool = True) -> Any:
    """The family's config as a classifier's; fresh: as of files of a language model, else of files with the head."""
    config = CLASSIFIERS[family]()
    if not fresh:
        config.architectures, config.id2label = ["XForSequenceClassification"], dict(enumerate(LABELS))
    return as_classifier(config, LABELS, 0, None)


def float_classifier(config: Any, attention: str = "eager", seed: int = 0) -> Any:
    """transformers' own float32 model; what the files would lack is as `config` says."""
    torch.manual_seed(seed)
    auto = AutoModelForSequenceClassification
    model = auto.from_config(copy.deepcopy(config), dtype=torch.float32, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
            elif parameter.shape[0] == len(LABELS):
                parameter.mul_(20)  # else all logits are the same within int8's errors
    begin_fresh(model, CPU)
    return model


def save_classifier(folder: Path, family: str, fresh: bool) -> Any:
    """Save the whole classifier, or what lies below its head; returns the float classifier."""
    model = float_classifier(config_of(family, fresh))
    if fresh:
        below = AutoModel.from_config(CLASSIFIERS[family]())
        below.load_state_dict(model.base_model.state_dict(), strict=False)
        below.save_pretrained(folder)
    else:
        plain = copy.deepcopy(model.config)
        delattr(plain, "edgegt_classes")
        model.config = plain
        model.save_pretrained(folder)
    return model


def load_classifier(
    folder: Path, cache: Path, backend: Backend | None = None, streams: bool = False
) -> Int8Model:  # fmt: skip
    """The saved model in int8 as a classifier of LABELS."""
    source = open_source(str(folder))
    config = as_classifier(read_config(str(folder)), LABELS, 0, source.files)
    return load_int8(config, source, cache, backend or TorchBackend(), CPU, streams)


def rows_of_ids(family: str, count: int, seed: int = 0) -> list[Example]:
    """Rows of random ids, each with a class."""
    draw, right = random.Random(seed), reads_both_ways(CLASSIFIERS[family]())
    made = []
    for number in range(count):
        ids = tuple(draw.randrange(3, VOCABULARY) for _ in range(draw.randint(5, 30)))
        made.append(Example(ids, (), Row("t", "c", number + 1), label=draw.randrange(len(LABELS)), right=right))
    return made


def classes_batch(family: str, count: int = 6, seed: int = 0) -> Batch:
    """One batch of them, padded as the family wants it."""
    return collate(rows_of_ids(family, count, seed), 1 if family == "roberta" else 0)
