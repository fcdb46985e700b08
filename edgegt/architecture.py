"""What the trace and the loader both need to know about a transformers model, told by its modules, not its family."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from edgegt.errors import InputError

# Fewer rows than these in a lookup stay float.
FEWEST_ROWS = 64
# What `classifier` puts into a config: the classes that the model tells apart.
CLASSES = "edgegt_classes"


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a matrix product with a weight: nn.Linear (no router made of one), or GPT-2's Conv1D."""
    product = isinstance(module, nn.Linear) and not hasattr(module, "num_experts")
    return product or type(module).__name__ == "Conv1D"


def is_transposed(module: nn.Module) -> bool:
    """Whether the module stores its weight as [in, out], as GPT-2's Conv1D does."""
    return type(module).__name__ == "Conv1D"


def is_lookup(module: nn.Module) -> bool:
    """Whether the module is a plain embedding (its rows may be scaled by a constant); learned positions are not.

    Nor are tables of a few rows, such as T5's biases of positions: int8 would save nothing there.
    """
    plain = type(module) is nn.Embedding or hasattr(module, "embed_scale")
    return plain and int(cast(Any, module).num_embeddings) >= FEWEST_ROWS


def is_experts(module: nn.Module) -> bool:
    """Whether the module holds the stacked weights [experts, out, in] of a mixture, as transformers marks them."""
    return all(hasattr(module, flag) for flag in ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm"))


def is_router(module: nn.Module, parameter: Any) -> bool:
    """Whether this is a matrix that a module multiplies by itself, as the routers of mixtures do; it stays in float."""
    held = is_linear(module) or is_lookup(module) or isinstance(module, nn.Embedding)
    return parameter.ndim == 2 and not held


def is_int8(module: nn.Module, parameter: Any) -> bool:
    """Whether the base keeps this parameter in int8: matrices of linears, plain embeddings and experts."""
    if is_experts(module):
        return bool(parameter.ndim == 3)
    return parameter.ndim == 2 and (is_linear(module) or is_lookup(module))


def matrix_shape(module: nn.Module, parameter: Any) -> tuple[int, ...]:
    """The shape in which a parameter is trained: [out, in] of a matrix, and experts' outputs one after another."""
    shape = tuple(parameter.shape)
    if len(shape) == 3:
        return shape[0] * shape[1], shape[2]
    return shape[::-1] if len(shape) == 2 and is_transposed(module) else shape


def layers_of(model: nn.Module) -> tuple[str, int]:
    """Name and length of the module list that holds the model's layers (the longest one that is in no other).

    Raises: InputError when there is none.
    """
    lists = [(name, len(module)) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outer = [
        (count, name)
        for name, count in lists
        if not any(name.startswith(f"{other}.") for other, length in lists if length and other != name)
    ]
    if not outer:
        raise InputError(f"{type(model).__name__} has no list of layers: only transformer language models can be tuned")
    count, name = max(outer)
    return name, count


def stacks_of(model: Any) -> tuple[tuple[str, int], ...]:
    """Names and lengths of the lists of layers as they run: an encoder's and then a decoder's, or the only list."""
    if not is_encoder_decoder(model.config):
        return (layers_of(model),)
    stacks = []
    for part in (model.get_encoder(), model.get_decoder()):
        name, count = layers_of(part)
        owner = next(path for path, module in model.named_modules() if module is part)
        stacks.append((f"{owner}.{name}", count))
    return tuple(stacks)


def all_layers(model: Any) -> list[nn.Module]:
    """The layers as they run: an encoder's and then a decoder's, or those of the only list."""
    return [layer for name, _ in stacks_of(model) for layer in cast(Any, model.get_submodule(name))]


def auto_class(config: Any) -> Any:
    """transformers' class for the model of this config: causal language model, encoder-decoder, or classification."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

    if is_classifier(config):
        return AutoModelForSequenceClassification
    return AutoModelForSeq2SeqLM if is_encoder_decoder(config) else AutoModelForCausalLM


def decoder_start(config: Any) -> int | None:
    """The id that an encoder-decoder's answers begin with; None of a decoder-only model.

    Raises: InputError when the config does not say it.
    """
    if not is_encoder_decoder(config):
        return None
    found = getattr(config, "decoder_start_token_id", None)
    if not isinstance(found, int):
        raise InputError(f"'{config.model_type}' has no decoder_start_token_id in its config.json: add it")
    return found


def is_encoder_decoder(config: Any) -> bool:
    """Whether the config describes two stacks of layers, the second reading the first's output."""
    return bool(getattr(config, "is_encoder_decoder", False))


def is_classifier(config: Any) -> bool:
    """Whether the model says the class of a text, and has no language model's head (see `classifier`)."""
    return getattr(config, CLASSES, None) is not None


def outputs_of(config: Any) -> int:
    """How many logits the head makes: one per token that the model knows, or per class."""
    return len(getattr(config, CLASSES).labels) if is_classifier(config) else int(config.get_text_config().vocab_size)


def text_config(config: Any) -> Any:
    """The config of the language model in it: itself, unless it describes models for several kinds of input.

    Raises: InputError when there is more than one language model in it.
    """
    if is_encoder_decoder(config):
        return config
    try:
        return config.get_text_config()
    except ValueError as error:
        kind = getattr(config, "model_type", "?")
        raise InputError(f"'{kind}' has several language models: give one decoder-only model") from error


def positions_of(config: Any) -> int | None:
    """How many tokens a row may have, prompt and answer together; None where nothing limits it."""
    found = getattr(text_config(config), "max_position_embeddings", None)
    return int(found) if isinstance(found, int) and found > 0 else None


def block_of(name: str, layers: str, blocks: int, head: str) -> int:
    """Index of the layer that the weight belongs to; -1 below the layers, `blocks` above them."""
    return block_in(name, ((layers, blocks),), head)


def block_in(name: str, stacks: Sequence[tuple[str, int]], head: str) -> int:
    """`block_of` for several lists, numbered through; what follows the encoder's layers belongs to the last of them."""
    first = 0
    for position, (layers, count) in enumerate(stacks):
        match = re.match(re.escape(layers) + r"\.(\d+)\.", name)
        if match:
            return first + int(match[1])
        first += count
        inside = name.startswith(layers.rpartition(".")[0] + ".") and "emb" not in name
        if inside and position < len(stacks) - 1:
            return first - 1
    return first if name == head or "emb" not in name else -1


def has_own_head(config: Any) -> bool:
    """Whether the head is a matrix of its own although the config ties it to the embedding, as T5's always does.

    transformers' T5Config keeps what the file said about ties in `scale_decoder_outputs`: false for FLAN-T5 and T5 1.1.
    """
    return getattr(config, "scale_decoder_outputs", None) is False


def is_head_tied(model: Any) -> bool:
    """Whether the head of a float language model is the embedding's matrix."""
    tied: bool = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return tied


def untie_head(model: Any) -> None:
    """Give the head a matrix of its own, like the one it has."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())


def head_name(model: Any) -> str:
    """Name of the output layer's weight; empty of a classifier, whose head is a linear like the others."""
    if is_classifier(model.config):
        return ""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is head:
            return f"{name}.weight"
    raise InputError(f"{type(model).__name__} has no output layer: give a causal language model")
