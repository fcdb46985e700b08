"""The computations that ONNX files hold, as modules to be traced: what goes in and comes out, and under which names.

A decoder reads tokens after a past of keys and values, which may be empty, and gives the logits and the past that the
next call needs. An encoder-decoder is two files: its encoder also makes what the decoder's attention to it reads, so
that this is done once per answer.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgegt.architecture import is_encoder_decoder

# The sizes that a form is traced with; all of them are free in the file.
_ROWS, _PAST, _TOKENS, _READ = 2, 3, 4, 5
MODEL, ENCODER, DECODER = "model.onnx", "encoder_model.onnx", "decoder_model.onnx"


@dataclass(frozen=True)
class Form:
    """One file: the module that is traced, example inputs in its order, and the names of both ends.

    axes: of each input, which dimensions are free and what they are called.
    """

    file: str
    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    axes: dict[str, dict[int, str]]


def forms_of(model: Any) -> list[Form]:
    """The files that a float language model is exported as. Raises: as a forward pass of it."""
    if is_encoder_decoder(model.config):
        return _pair(model)
    return [_decoder(model)]


def _decoder(model: Any) -> Form:
    heads = _heads(model)
    past = {name: torch.zeros(_ROWS, count, _PAST, size) for name, (count, size) in heads.items()}
    inputs = {
        "input_ids": torch.ones(_ROWS, _TOKENS, dtype=torch.int64),
        "attention_mask": torch.ones(_ROWS, _PAST + _TOKENS, dtype=torch.int64),
        "position_ids": torch.arange(_PAST, _PAST + _TOKENS).repeat(_ROWS, 1),
        **{f"past_key_values.{name}": value for name, value in past.items()},
    }
    axes = {
        "input_ids": {0: "batch_size", 1: "sequence_length"},
        "attention_mask": {0: "batch_size", 1: "total_sequence_length"},
        "position_ids": {0: "batch_size", 1: "sequence_length"},
    } | {f"past_key_values.{name}": {0: "batch_size", 2: "past_sequence_length"} for name in past}
    outputs = ("logits", *(f"present.{name}" for name in past))
    return Form(MODEL, _Decoder(model), inputs, outputs, axes)


def _pair(model: Any) -> list[Form]:
    own, other = _pair_heads(model)
    mask = {"attention_mask": torch.ones(_ROWS, _READ, dtype=torch.int64)}
    read = {"input_ids": torch.ones(_ROWS, _READ, dtype=torch.int64), **mask}
    axes: dict[str, dict[int, str]] = {name: {0: "batch_size", 1: "encoder_sequence_length"} for name in read}
    crossed = tuple(f"present.{name}" for name in other)
    encoder = Form(ENCODER, _Encoder(model), read, ("last_hidden_state", *crossed), axes)
    before = {name: torch.zeros(_ROWS, count, _PAST, size) for name, (count, size) in own.items()}
    across = {name: torch.zeros(_ROWS, count, _READ, size) for name, (count, size) in other.items()}
    inputs = {
        "input_ids": torch.ones(_ROWS, _TOKENS, dtype=torch.int64),
        "encoder_attention_mask": mask["attention_mask"],
        **{f"past_key_values.{name}": value for name, value in (before | across).items()},
    }
    axes = {
        "input_ids": {0: "batch_size", 1: "sequence_length"},
        "encoder_attention_mask": {0: "batch_size", 1: "encoder_sequence_length"},
    }
    axes |= {f"past_key_values.{name}": {0: "batch_size", 2: "past_sequence_length"} for name in before}
    axes |= {f"past_key_values.{name}": {0: "batch_size", 2: "encoder_sequence_length"} for name in across}
    decoder = _PairDecoder(model, len(before) // 2)
    return [encoder, Form(DECODER, decoder, inputs, ("logits", *(f"present.{name}" for name in before)), axes)]


def takes_positions(model: Any) -> bool:
    """Whether the model reads position_ids; one that does not has them as an input that nothing reads."""
    return "position_ids" in inspect.signature(model.forward).parameters


class _Decoder(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.positions = takes_positions(model)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor) -> Any:
        where = {"position_ids": position_ids} if self.positions else {}
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=_cache(past), use_cache=True, **where
        )
        return out.logits, *_flat(out.past_key_values)


class _Encoder(nn.Module):
    """The encoder, and the keys and values of the decoder's attention to it, which read nothing else."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        from transformers import DynamicCache, EncoderDecoderCache

        states = self.model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask)[0]
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        self.model.get_decoder()(
            input_ids=input_ids[:, :1], encoder_hidden_states=states, encoder_attention_mask=attention_mask,
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        return states, *_flat(cache.cross_attention_cache)


class _PairDecoder(nn.Module):
    def __init__(self, model: Any, layers: int) -> None:
        super().__init__()
        self.model = model
        self.layers = layers

    def forward(self, input_ids: Tensor, encoder_attention_mask: Tensor, *past: Tensor) -> Any:
        from transformers import EncoderDecoderCache
        from transformers.modeling_outputs import BaseModelOutput

        own, other = past[: 2 * self.layers], past[2 * self.layers :]
        cache = EncoderDecoderCache(_cache(own), _cache(other))
        # Their keys and values are there already: of the encoder's states only the shape is looked at.
        states = torch.zeros(1, dtype=other[0].dtype).expand(*encoder_attention_mask.shape, width_of(self.model))
        out = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states), attention_mask=encoder_attention_mask,
            decoder_input_ids=input_ids, past_key_values=cache, use_cache=True,
        )  # fmt: skip
        return out.logits, *_flat(out.past_key_values.self_attention_cache)


def width_of(model: Any) -> int:
    """Of an encoder-decoder, the size of an encoder's state."""
    return int(model.config.d_model)


def _cache(past: tuple[Tensor, ...]) -> Any:
    """A cache that holds these keys and values, in turn for each layer, and drops none where a window slides."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer in range(len(past) // 2):
        cache.update(past[2 * layer], past[2 * layer + 1], layer)
    return cache


def _flat(cache: Any) -> list[Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def _heads(model: Any) -> dict[str, tuple[int, int]]:
    """Key/value heads and size of a head, of each layer's keys and values."""
    from transformers import DynamicCache

    # A mask of ones, without which some families look into the tokens for padding.
    mask = {"attention_mask": torch.ones(1, 2, dtype=torch.int64, device="meta")}
    return _named(_seen(model, DynamicCache(), mask), "{layer}.{part}")


def _pair_heads(model: Any) -> tuple[dict[str, tuple[int, int]], dict[str, tuple[int, int]]]:
    from transformers import DynamicCache, EncoderDecoderCache

    ids = {"decoder_input_ids": torch.ones(1, 2, dtype=torch.int64, device="meta")}
    cache = _seen(model, EncoderDecoderCache(DynamicCache(), DynamicCache()), ids)
    own, other = cache.self_attention_cache, cache.cross_attention_cache
    return _named(own, "{layer}.decoder.{part}"), _named(other, "{layer}.encoder.{part}")


def _seen(model: Any, cache: Any, inputs: dict[str, Tensor]) -> Any:
    """The cache after a forward pass of shapes alone."""
    shapes = {name: tensor.to("meta") for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    ids = torch.ones(1, 2, dtype=torch.int64, device="meta")
    with torch.no_grad():
        torch.func.functional_call(model, shapes, (), {"input_ids": ids, "past_key_values": cache, **inputs})
    return cache


def _named(cache: Any, pattern: str) -> dict[str, tuple[int, int]]:
    found = {}
    for index, layer in enumerate(cache.layers):
        for part, tensor in (("key", layer.keys), ("value", layer.values)):
            found[pattern.format(layer=index, part=part)] = int(tensor.shape[1]), int(tensor.shape[3])
    return found
