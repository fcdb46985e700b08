"""From a model's config to its cost table: one traced forward, without weights and without knowing the family.

The float model is built on fake tensors (shapes and no data), run once for each of a few shapes, and its autograd graph
is read (`graph`). Four shapes are enough to solve for the coefficients of rows, tokens, squared tokens and kept
positions, six for those of an encoder-decoder, so that the table holds for every batch. One more, with more rows, tells
what is there once for all rows; it is counted for each. Two rows are the fewest: one row hides copies of shared heads.

Attention is counted as two products forward and two for each of them backward, whichever kernel runs (the convention
of transformers' eager attention and of FlopCounterMode on it).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from edgegt.architecture import (
    all_layers,
    auto_class,
    block_in,
    has_own_head,
    head_name,
    is_classifier,
    is_encoder_decoder,
    is_experts,
    is_int8,
    is_router,
    matrix_shape,
    stacks_of,
    text_config,
)
from edgegt.attention import register_attention, use_causal
from edgegt.classifier import fresh_of, not_drawn
from edgegt.cost import BatchShape, Block, CostTable, Path, Weight, Work
from edgegt.errors import InputError
from edgegt.experts import use_experts
from edgegt.fused import fuse
from edgegt.graph import NO_LAYER, Reading, Routed, candidates, noting_layers, read_graph

_MORE_ROWS = BatchShape(4, 16, 8)
_SHAPES = (BatchShape(2, 16, 8), BatchShape(2, 32, 8), BatchShape(2, 48, 8), BatchShape(2, 16, 12))
_ONE_LABEL = tuple(BatchShape(shape.rows, shape.tokens, 1) for shape in (_MORE_ROWS, *_SHAPES))
_CROSS_SHAPES = (BatchShape(2, 16, 16), BatchShape(2, 32, 12))
_SCALE_BYTES = 2
_TOKEN_SCALE_BYTES = 4


def trace(config: Any, dtype: torch.dtype = torch.float32, causal: bool = False) -> CostTable:
    """The cost table of the model that `config` describes: decoder-only, an encoder-decoder, or a classifier.

    Of a classifier a row has one kept position: what runs once per row is counted by the row.

    causal: attention will run as the causal node (`attention`), which keeps less than torch's kernel.
    Raises: InputError when the architecture is unknown to transformers or has weights that no path explains.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, tied = _build(text_config(config), dtype)
        if causal and dtype == torch.float32:
            use_causal(model, None)
        shapes = (*_SHAPES, *_CROSS_SHAPES) if is_encoder_decoder(model.config) else _SHAPES
        every = _ONE_LABEL if is_classifier(model.config) else (_MORE_ROWS, *shapes)
        readings = [_read(model, shape) for shape in every]
        return _table(model, tied, readings)


def _build(config: Any, dtype: torch.dtype) -> tuple[Any, bool]:
    """The model with a head of its own, and whether its head was the embedding."""
    form = "an encoder-decoder" if is_encoder_decoder(config) else "a causal language model"
    form = "a classifier" if is_classifier(config) else form
    try:
        with not_drawn(config):
            model = _as_trained(auto_class(config), config, dtype)
    except (ValueError, KeyError, AttributeError, RuntimeError) as error:
        kind = getattr(config, "model_type", "?")
        raise InputError(
            f"architecture '{kind}' cannot be built as {form} ({str(error).splitlines()[0][:120]}): "
            "give a decoder-only model that this version of transformers knows"
        ) from error
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    head = None if is_classifier(config) else model.get_submodule(head_name(model).rpartition(".")[0])
    shared = head is not None and any(module.weight is head.weight for module in embeddings)
    if head is not None and shared:
        head.weight = nn.Parameter(torch.empty_like(head.weight))
    for module in embeddings:
        module.weight.requires_grad_(False)
    fuse(model)
    use_experts(model)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 2 and not is_experts(model.get_submodule(name.rpartition(".")[0])):
            raise InputError(
                f"'{name}' has {parameter.ndim} dimensions and is not the weight of experts as transformers stacks "
                "them: convolutions and the like are not supported; give another language model"
            )
    return model.eval(), shared and not has_own_head(config)


def _as_trained(auto: Any, config: Any, dtype: torch.dtype) -> Any:
    """The model with the attention that training uses; with transformers' own where it knows no other."""
    try:
        return auto.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation=register_attention())
    except (ValueError, KeyError):  # an architecture with attention of its own
        return auto.from_config(copy.deepcopy(config), dtype=dtype)


def _read(model: Any, shape: BatchShape) -> Reading:
    ids = torch.zeros(shape.rows, shape.tokens, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[:, 0] = 0
    if is_encoder_decoder(model.config):
        inputs: dict[str, Any] = {"decoder_input_ids": torch.zeros(shape.rows, shape.kept, dtype=torch.long)}
    else:
        inputs = {} if is_classifier(model.config) else {"logits_to_keep": shape.kept}
    with noting_layers(all_layers(model)) as spans:
        try:
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **inputs).logits
        except Exception as error:  # a model's own code raises whatever it likes
            line = (str(error).splitlines() or [type(error).__name__])[0][:120]
            raise InputError(
                f"'{model.config.model_type}' cannot be traced ({line}): this architecture is not supported yet"
            ) from error
    if is_classifier(model.config):
        return read_graph(model, logits, spans)
    if logits.shape[1] != shape.kept:
        raise InputError(f"{type(model).__name__} does not know logits_to_keep: this architecture is not supported yet")
    return read_graph(model, logits, spans)


def _solve(values: Sequence[int]) -> Work:
    """Coefficients per row from the values with more rows and at the shapes; two more are of an encoder-decoder."""
    more_rows, *measured = values
    per_row = [value // 2 for value in measured] if more_rows == 2 * measured[0] else measured
    at_16, at_32, at_48, more_kept, *crossed = per_row
    cross = kept_pair = 0
    if crossed:
        most_kept, more_both = crossed
        kept_pair = (most_kept - 2 * more_kept + at_16) // 32
        cross = (more_both - at_32 - more_kept + at_16) // 64
    kept = (more_kept - at_16 - kept_pair * 80 - cross * 64) // 4
    pair = (at_48 - 2 * at_32 + at_16) // 512
    token = (at_32 - at_16 - pair * 768 - cross * 128) // 16
    row = at_16 - token * 16 - pair * 256 - kept * 8 - cross * 128 - kept_pair * 64
    return Work(row, token, pair, kept, cross, kept_pair)


def _table(model: Any, tied: bool, readings: list[Reading]) -> CostTable:
    first = readings[0]
    head, stacks = head_name(model), stacks_of(model)
    weights = tuple(_weight(model, name, readings, stacks, head) for name in candidates(model))
    unseen = [w.name for w in weights if len(w.shape) > 1 and w.name not in first.dw]
    if unseen:
        raise InputError(
            f"'{unseen[0]}' is used in a way that the trace does not follow: architecture not supported yet"
        )
    blocks = len(first.layers)
    flops = [_solve(column) for column in zip(*([flops for _, flops in r.paths] for r in readings), strict=True)]
    saved = [_solve(column) for column in zip(*([size for _, _, size in r.saved] for r in readings), strict=True)]
    forward, head_forward = _solve([r.forward for r in readings]), _solve([r.head for r in readings])
    if is_encoder_decoder(model.config):
        rest = forward + Work(kept=-head_forward.kept)
        forward = _of_decoder(rest) + head_forward
        flops = [work if place == first.head_path else _of_decoder(work) for place, work in enumerate(flops)]
        saved = [_of_decoder(work) for work in saved]
    paths = _merge(
        [(mask, NO_LAYER, work, Work()) for (mask, _), work in zip(first.paths, flops, strict=True)]
        + [(mask, layer, Work(), work) for (mask, layer, _), work in zip(first.saved, saved, strict=True)]
        + _stage_inputs(weights, blocks, first.routed)
        + _always(model, readings, (1 << len(weights)) - 1)
    )
    counted = {name: p for name, p in model.named_parameters() if not (tied and name == head)}
    return CostTable(
        blocks=blocks,
        weights=weights,
        paths=paths,
        layers=tuple(_layer(model, readings, index) for index in range(blocks)),
        forward=forward,
        head=head_forward,
        parameters=sum(p.numel() for p in counted.values()),
        base_bytes=_base_bytes(model, counted),
        float_bytes=sum(4 * p.numel() for p in counted.values()),
        widest=_widest(weights, first.routed),
        encoder_decoder=is_encoder_decoder(model.config),
        always=tuple(_fresh_weight(model, name, blocks) for name in fresh_of(model.config)),
        hidden=int(text_config(model.config).hidden_size) if is_classifier(model.config) else 0,
    )


def _fresh_weight(model: Any, name: str, blocks: int) -> Weight:
    """A weight that is always trained, float like a vector. What its gradient costs is a path of every choice."""
    return Weight(name, "vector", blocks, tuple(model.get_parameter(name).shape), -1, Work())


def _always(model: Any, readings: list[Reading], everything: int) -> list[tuple[int, int, Work, Work]]:
    """The gradients of weights that are always trained, and the float inputs that they keep."""
    terms = []
    for name in fresh_of(model.config):
        if name in readings[0].dw:
            dw, width = _solve([reading.dw[name] for reading in readings]), model.get_parameter(name).shape[1]
            kept = Work(token=4 * width) if dw.token else Work(row=4 * width)
            terms.append((everything, NO_LAYER, dw, kept))
    return terms


def _of_decoder(work: Work) -> Work:
    """What `_solve` found to grow with an encoder-decoder's kept positions, and is not the head's: labels or not."""
    return replace(work, kept=0, decoder=work.kept)


def _layer(model: Any, readings: list[Reading], index: int) -> Block:
    forward = _solve([reading.layers[index].forward for reading in readings])
    columns = zip(*(reading.layers[index].inputs for reading in readings), strict=True)
    inputs = sum(map(_solve, columns), Work())
    if is_encoder_decoder(model.config):
        forward, inputs = _of_decoder(forward), _of_decoder(inputs)
    return Block(forward, inputs, readings[0].layers[index].weights)


def _weight(model: Any, name: str, readings: list[Reading], stacks: Sequence[tuple[str, int]], head: str) -> Weight:
    parameter, module = model.get_parameter(name), model.get_submodule(name.rpartition(".")[0])
    shape = matrix_shape(module, parameter)
    linear = len(shape) == 2 and not is_router(module, parameter)
    kind = "head" if name == head else "linear" if linear else "vector"
    stage = readings[0].stages.get(name, -1)
    dw = _solve([reading.dw[name] for reading in readings]) if name in readings[0].dw else Work()
    if is_encoder_decoder(model.config) and kind != "head":
        dw = _of_decoder(dw)
    experts = parameter.shape[0] if parameter.ndim == 3 else 1
    return Weight(name, kind, block_in(name, stacks, head), shape, stage, dw, experts)


def _stage_inputs(
    weights: tuple[Weight, ...], blocks: int, routed: dict[str, Routed]
) -> list[tuple[int, int, Work, Work]]:
    """A trained linear keeps its input in int8, once per stage, with one float32 scale per position."""
    stages: dict[int, int] = {}
    inputs: dict[int, tuple[int, Work]] = {}
    for bit, weight in enumerate(weights):
        if weight.kind != "vector":
            stages[weight.stage] = stages.get(weight.stage, 0) | 1 << bit
            size = weight.shape[1] + _TOKEN_SCALE_BYTES
            size *= routed[weight.name].inputs if weight.name in routed else 1
            layer = weight.block if weight.block < blocks else NO_LAYER
            inputs[weight.stage] = layer, weight.per_position(size)
    return [(mask, inputs[stage][0], Work(), inputs[stage][1]) for stage, mask in stages.items()]


def _merge(terms: list[tuple[int, int, Work, Work]]) -> tuple[Path, ...]:
    """One path per distinct set of weights and layer; terms that wait for no weight cost nothing."""
    merged: dict[tuple[int, int], tuple[Work, Work]] = {}
    for mask, layer, flops, saved in terms:
        if mask:
            before = merged.get((mask, layer), (Work(), Work()))
            merged[mask, layer] = (before[0] + flops, before[1] + saved)
    return tuple(Path(mask, flops, saved, layer) for (mask, layer), (flops, saved) in merged.items())


def _widest(weights: tuple[Weight, ...], routed: dict[str, Routed]) -> Work:
    """Bytes that the widest product of the layers needs, over the tokens and over a decoder's own positions."""
    linears = [weight for weight in weights if weight.kind == "linear"]
    sizes = {weight.name: _transient(weight, routed.get(weight.name)) for weight in linears}
    return Work(
        token=max((sizes[weight.name] for weight in linears if weight.dw.token), default=0),
        decoder=max((sizes[weight.name] for weight in linears if weight.dw.decoder), default=0),
    )


def _base_bytes(model: Any, counted: dict[str, Any]) -> int:
    total = 0
    for name, parameter in counted.items():
        if name in fresh_of(model.config):
            continue  # it is a master
        if is_int8(model.get_submodule(name.rpartition(".")[0]), parameter):
            rows = max(parameter.shape) if parameter.ndim == 2 else parameter.shape[0] * parameter.shape[1]
            total += parameter.numel() + _SCALE_BYTES * rows
        else:
            total += 4 * parameter.numel()
    return total


def _transient(weight: Weight, routed: Routed | None) -> int:
    """Bytes per token while the product of this weight runs: integer and float output, input in float and int8.

    Of experts one runs at a time, and may see every token; what is between their products exists for all of them.
    """
    out, width = weight.shape
    if routed is not None:
        out //= weight.experts
    return 8 * max(out, width) + 5 * min(out, width) + (routed.between if routed is not None else 0)
