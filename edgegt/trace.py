"""From a model's config to its cost table: one traced forward, without weights and without knowing the family.

The float model is built on fake tensors (shapes and no data), run once for each of four shapes, and its autograd graph
is read: a node depends on the weights below it, which says when each gradient is computed and each saved tensor is
kept. Weights that save one and the same input tensor form a stage. Four shapes are enough to solve for the
coefficients of rows, tokens, squared tokens and kept positions, so that the table holds for every batch.

Attention is counted as two products forward and two for each of them backward, whichever kernel runs (the convention
of transformers' eager attention and of FlopCounterMode on it).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from edgegt.architecture import block_of, head_name, is_int8, layers_of
from edgegt.cost import BatchShape, CostTable, Path, Weight, Work
from edgegt.errors import InputError

_SHAPES = (BatchShape(1, 16, 8), BatchShape(1, 32, 8), BatchShape(1, 48, 8), BatchShape(1, 16, 12))
_SCALE_BYTES = 2
_TOKEN_SCALE_BYTES = 4
_READ_OPERAND = {"MmBackward0": "_saved_self", "AddmmBackward0": "_saved_mat1", "LinearBackward0": "_saved_input"}


@dataclass
class _Reading:
    """What one traced forward says; the lists have the same order for every shape."""

    forward: int = 0
    head: int = 0
    dw: dict[str, int] = field(default_factory=dict)
    stages: dict[str, int] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    paths: list[tuple[int, int]] = field(default_factory=list)
    saved: list[tuple[int, int]] = field(default_factory=list)


def trace(config: Any, dtype: torch.dtype = torch.float32) -> CostTable:
    """The cost table of the causal language model that `config` describes.

    Raises: InputError when the architecture is unknown to transformers or has weights that no path explains.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = _build(config, dtype)
        readings = [_read(model, shape) for shape in _SHAPES]
        return _table(model, config, readings)


def _build(config: Any, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    config.tie_word_embeddings = False
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, KeyError, AttributeError) as error:
        kind = getattr(config, "model_type", "?")
        raise InputError(
            f"architecture '{kind}' cannot be built as a causal language model ({str(error).splitlines()[0][:120]}): "
            "give a decoder-only model that this version of transformers knows"
        ) from error
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.ndim <= 2)
    for module in embeddings:
        module.weight.requires_grad_(False)
    experts = [name for name, parameter in model.named_parameters() if parameter.ndim > 2]
    if experts:
        raise InputError(
            f"'{experts[0]}' has {model.get_parameter(experts[0]).ndim} dimensions: mixtures of experts and "
            "convolutions are not supported; give a dense decoder-only model"
        )
    return model.eval()


def _read(model: Any, shape: BatchShape) -> _Reading:
    ids = torch.zeros(shape.rows, shape.tokens, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[:, 0] = 0
    keep = {"logits_to_keep": shape.kept}
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **keep).logits
    if logits.shape[1] != shape.kept:
        raise InputError(f"{type(model).__name__} does not know logits_to_keep: this architecture is not supported yet")
    return _Reader(model).read(logits)


class _Reader:
    """Walks one autograd graph from the leaves up and collects FLOPs and saved bytes with the weights they wait for."""

    def __init__(self, model: Any) -> None:
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.bits = {name: 1 << bit for bit, name in enumerate(candidates(model))}
        self.head = head_name(model)
        held = [*model.parameters(), *model.buffers()]
        self.permanent = {tensor.untyped_storage()._cdata for tensor in held}
        self.deps: dict[Any, int] = {}
        self.leaf: dict[Any, str] = {}
        self.saved: dict[int, tuple[int, int]] = {}
        self.inputs: dict[int, int] = {}
        self.out = _Reading()

    def read(self, logits: torch.Tensor) -> _Reading:
        for node in _leaves_first(logits.grad_fn):
            self._visit(node)
        self.out.saved = list(self.saved.values())
        return self.out

    def _visit(self, node: Any) -> None:
        kind = node.name()
        below = [fn for fn, _ in node.next_functions]
        if kind.endswith("AccumulateGrad"):
            name = self.names[id(node.variable)]
            self.deps[node], self.leaf[node] = self.bits.get(name, 0), name
            return
        masks = [self.deps[fn] if fn is not None else 0 for fn in below]
        union = 0
        for mask in masks:
            union |= mask
        self.deps[node] = union
        if kind in ("TBackward0", "TransposeBackward0", "PermuteBackward0") and below[0] in self.leaf:
            self.leaf[node] = self.leaf[below[0]]
        if kind in ("MmBackward0", "AddmmBackward0", "BmmBackward0", "LinearBackward0"):
            self._product(node, kind, below, masks)
        elif kind.startswith("ScaledDotProduct"):
            self._attention(node, masks, union)
        elif kind == "MulBackward0":
            self._keep(node, {"_saved_self": masks[1], "_saved_other": masks[0]})
        else:
            self._keep(node, {name: union for name in dir(node) if name.startswith("_saved_")})

    def _product(self, node: Any, kind: str, below: list[Any], masks: list[int]) -> None:
        left, right = (1, 2) if kind == "AddmmBackward0" else (0, 1)
        out_shape = tuple(node._input_metadata[0].shape)
        weight = self.leaf.get(below[right])
        if weight is None:
            flops = 2 * prod(out_shape) * node._saved_self.shape[-1]
            self.out.forward += flops
            self.out.paths += [(masks[left], flops), (masks[right], flops)]
            self._keep(node, {"_saved_self": masks[right], "_saved_mat2": masks[left]})
            return
        read = getattr(node, _READ_OPERAND[kind])
        flops = 2 * prod(out_shape) * read.shape[-1]
        self.out.forward += flops
        if weight == self.head:
            self.out.head += flops
        self.out.dw[weight] = flops
        self.out.rows[weight] = prod(out_shape[:-1])
        self.out.paths.append((masks[left], flops))
        key = read.untyped_storage()._cdata
        self.out.stages[weight] = self.inputs.setdefault(key, len(self.inputs))

    def _attention(self, node: Any, masks: list[int], union: int) -> None:
        query, key = node._saved_query.shape, node._saved_key.shape
        flops = 2 * prod(query[:-1]) * key[-2] * query[-1]
        self.out.forward += 2 * flops
        q, k, v = masks[:3]
        self.out.paths += [(q, flops), (k, flops), (q | k, flops), (v, flops)]
        self._keep(node, {name: union for name in dir(node) if name.startswith("_saved_")})

    def _keep(self, node: Any, attributes: dict[str, int]) -> None:
        for name, mask in attributes.items():
            value = getattr(node, name, None)
            for tensor in value if isinstance(value, (tuple, list)) else [value]:
                if isinstance(tensor, torch.Tensor) and mask:
                    storage = tensor.untyped_storage()
                    if storage._cdata not in self.permanent:
                        before = self.saved.get(storage._cdata, (0, 0))[0]
                        self.saved[storage._cdata] = (before | mask, storage.nbytes())


def candidates(model: Any) -> list[str]:
    """Names of the weights that can be chosen: linears, the head, norms and biases; in the order of the parameters."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _leaves_first(root: Any) -> Iterator[Any]:
    done: set[Any] = set()
    stack: list[tuple[Any, bool]] = [(root, False)]
    while stack:
        node, expanded = stack.pop()
        if node is None or node in done:
            continue
        if expanded:
            done.add(node)
            yield node
        else:
            stack.append((node, True))
            stack.extend((fn, False) for fn, _ in reversed(node.next_functions))


def _solve(values: list[int]) -> Work:
    """Coefficients of row, token, squared token and kept position from the values at the four shapes."""
    at_16, at_32, at_48, more_kept = values
    kept = (more_kept - at_16) // 4
    pair = (at_48 - 2 * at_32 + at_16) // 512
    token = (at_32 - at_16 - pair * 768) // 16
    return Work(row=at_16 - token * 16 - pair * 256 - kept * 8, token=token, pair=pair, kept=kept)


def _table(model: Any, config: Any, readings: list[_Reading]) -> CostTable:
    first = readings[0]
    layers, blocks = layers_of(model)
    head = head_name(model)
    names = candidates(model)
    weights = tuple(_weight(model, name, readings, layers, blocks, head) for name in names)
    unseen = [w.name for w in weights if w.kind != "vector" and w.name not in first.dw]
    if unseen:
        raise InputError(
            f"'{unseen[0]}' is used in a way that the trace does not follow: architecture not supported yet"
        )
    paths = _merge(
        [(mask, _solve([r.paths[i][1] for r in readings]), Work()) for i, (mask, _) in enumerate(first.paths)]
        + [(mask, Work(), _solve([r.saved[i][1] for r in readings])) for i, (mask, _) in enumerate(first.saved)]
        + _stage_inputs(weights)
    )
    parameters = dict(model.named_parameters())
    tied = bool(getattr(config, "tie_word_embeddings", False))
    counted = {name: p for name, p in parameters.items() if not (tied and name == head)}
    return CostTable(
        blocks=blocks,
        weights=weights,
        paths=paths,
        forward=_solve([r.forward for r in readings]),
        head=_solve([r.head for r in readings]),
        parameters=sum(p.numel() for p in counted.values()),
        base_bytes=_base_bytes(model, counted),
        float_bytes=sum(4 * p.numel() for p in counted.values()),
        widest=Work(token=max(_transient(w) for w in weights if w.kind == "linear")),
    )


def _weight(model: Any, name: str, readings: list[_Reading], layers: str, blocks: int, head: str) -> Weight:
    shape = tuple(model.get_parameter(name).shape)
    module = model.get_submodule(name.rpartition(".")[0])
    if type(module).__name__ == "Conv1D" and len(shape) == 2:
        shape = shape[::-1]
    linear = len(shape) == 2
    kind = "head" if name == head else "linear" if linear else "vector"
    stage = readings[0].stages.get(name, -1)
    dw = _solve([reading.dw[name] for reading in readings]) if name in readings[0].dw else Work()
    return Weight(name, kind, block_of(name, layers, blocks, head), shape, stage, dw)


def _stage_inputs(weights: tuple[Weight, ...]) -> list[tuple[int, Work, Work]]:
    """A trained linear keeps its input in int8, once per stage, with one float32 scale per token."""
    stages: dict[int, int] = {}
    width: dict[int, Work] = {}
    for bit, weight in enumerate(weights):
        if weight.kind != "vector":
            stages[weight.stage] = stages.get(weight.stage, 0) | 1 << bit
            size = weight.shape[1] + _TOKEN_SCALE_BYTES
            width[weight.stage] = Work(kept=size) if weight.kind == "head" else Work(token=size)
    return [(mask, Work(), width[stage]) for stage, mask in stages.items()]


def _merge(terms: list[tuple[int, Work, Work]]) -> tuple[Path, ...]:
    """One path per distinct set of weights; terms that wait for no weight cost nothing."""
    merged: dict[int, tuple[Work, Work]] = {}
    for mask, flops, saved in terms:
        if mask:
            before = merged.get(mask, (Work(), Work()))
            merged[mask] = (before[0] + flops, before[1] + saved)
    return tuple(Path(mask, flops, saved) for mask, (flops, saved) in merged.items())


def _base_bytes(model: Any, counted: dict[str, Any]) -> int:
    total = 0
    for name, parameter in counted.items():
        if is_int8(model.get_submodule(name.rpartition(".")[0]), parameter):
            rows = max(parameter.shape) if parameter.ndim == 2 else 0
            total += parameter.numel() + _SCALE_BYTES * rows
        else:
            total += 4 * parameter.numel()
    return total


def _transient(weight: Weight) -> int:
    """Bytes per token while the product of this weight runs: integer and float output, input in float and int8."""
    out, width = weight.shape
    return 8 * max(out, width) + 5 * min(out, width)
