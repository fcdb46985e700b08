"""What one traced forward says: its autograd graph, read from the leaves up, and the layers that made its nodes.

A node depends on the weights below it, which says when each gradient is computed and each saved tensor is kept. Nodes
carry the number of their creation, so the numbers seen when a layer starts and ends tell which nodes are its own; what
they keep is freed when the layer is recomputed. Weights that read one tensor, one after another, form a stage.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import nn

from edgegt.architecture import head_name, is_router
from edgegt.attention import CAUSAL_NODE
from edgegt.classifier import fresh_of
from edgegt.errors import InputError
from edgegt.experts import EXPERTS_NODE

NO_LAYER = -1
_READ_OPERAND = {"MmBackward0": "_saved_self", "AddmmBackward0": "_saved_mat1", "LinearBackward0": "_saved_input"}
_PRODUCTS = (*_READ_OPERAND, "BmmBackward0", "BaddbmmBackward0")
_WITH_ADDEND = ("AddmmBackward0", "BaddbmmBackward0")
_TURNS = ("TBackward0", "TransposeBackward0", "PermuteBackward0")


@dataclass
class LayerReading:
    """One layer: forward FLOPs, bytes of each input that it alone reads, weights (bit mask) that reach its output."""

    forward: int = 0
    inputs: list[int] = field(default_factory=list)
    weights: int = 0


@dataclass(frozen=True)
class Routed:
    """A stacked weight of experts: rows of its input per token, and bytes between the two products of a token."""

    inputs: int
    between: int


@dataclass
class Reading:
    """What one traced forward says; the lists have the same order for every shape.

    paths: (weights, FLOPs of a gradient), head_path the place of the head's; saved: (weights, layer or NO_LAYER,
    bytes of a storage); routed: the weights of experts, by name.
    """

    forward: int = 0
    head: int = 0
    dw: dict[str, int] = field(default_factory=dict)
    stages: dict[str, int] = field(default_factory=dict)
    paths: list[tuple[int, int]] = field(default_factory=list)
    saved: list[tuple[int, int, int]] = field(default_factory=list)
    layers: list[LayerReading] = field(default_factory=list)
    head_path: int = -1
    routed: dict[str, Routed] = field(default_factory=dict)


@dataclass
class Span:
    """One layer's run: the numbers of the nodes made just before and just after, and what went in and came out."""

    index: int
    before: int
    inputs: list[torch.Tensor]
    after: int = 0
    outputs: list[torch.Tensor] = field(default_factory=list)


@contextmanager
def noting_layers(layers: Sequence[nn.Module]) -> Iterator[list[Span]]:
    """Collects one span per run of each layer, in the order of the runs."""
    spans: list[Span] = []
    handles = []
    for index, layer in enumerate(layers):

        def start(_: Any, args: Any, kwargs: Any, index: int = index) -> None:
            spans.append(Span(index, _node_number(), list(_tensors((args, kwargs)))))

        def end(_: Any, __: Any, out: Any) -> None:
            spans[-1].after, spans[-1].outputs = _node_number(), list(_tensors(out))

        handles += [layer.register_forward_pre_hook(start, with_kwargs=True), layer.register_forward_hook(end)]
    try:
        yield spans
    finally:
        for handle in handles:
            handle.remove()


def candidates(model: Any) -> list[str]:
    """Names of the weights that can be chosen: linears, the head, norms and biases; in the order of the parameters."""
    always = fresh_of(model.config)
    return [name for name, p in model.named_parameters() if p.requires_grad and name not in always]


def read_graph(model: Any, logits: torch.Tensor, spans: Sequence[Span]) -> Reading:
    """FLOPs and saved bytes of the forward that made `logits`, with the weights they wait for.

    Raises: InputError when a matrix is used twice, or a layer ran out of turn.
    """
    turns = [span.index for span in spans]
    if turns != list(range(len(turns))):
        raise InputError(
            f"the layers of {type(model).__name__} run in the order {turns[:8]}, not each once: "
            "this architecture is not supported yet"
        )
    return _Reader(model, spans).read(logits)


class _Reader:
    """Walks one graph. deps: weights that each node depends on; saved: (weights, layer, bytes) by storage."""

    def __init__(self, model: Any, spans: Sequence[Span]) -> None:
        self.names = {id(p): name for name, p in model.named_parameters()}
        chosen_from = candidates(model)
        self.bits = {name: 1 << bit for bit, name in enumerate(chosen_from)}
        # What depends on a weight that is always trained is paid whatever is chosen.
        self.bits |= dict.fromkeys(fresh_of(model.config), (1 << len(chosen_from)) - 1)
        self.head = head_name(model)
        self.routers = {
            f"{path}.{name}"
            for path, module in model.named_modules()
            for name, parameter in module.named_parameters(recurse=False)
            if is_router(module, parameter)
        }
        held = [*model.parameters(), *model.buffers()]
        self.permanent = {tensor.untyped_storage()._cdata for tensor in held}
        self.spans = spans
        self.starts = [span.before for span in spans]
        self.deps: dict[Any, int] = {}
        self.leaf: dict[Any, str] = {}
        self.saved: dict[int, tuple[int, int, int]] = {}
        self.reads: list[tuple[int, int, str]] = []
        self.attributes: dict[str, list[str]] = {}
        self.out = Reading(layers=[LayerReading() for _ in spans])

    def read(self, logits: torch.Tensor) -> Reading:
        for node in _leaves_first(logits.grad_fn):
            self._visit(node)
        self._number_stages()
        self._read_layers()
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
        if kind in _TURNS and below[0] in self.leaf:
            self.leaf[node] = self.leaf[below[0]]
        if kind in _PRODUCTS:
            self._product(node, kind, below, masks)
        elif kind.startswith("ScaledDotProduct"):
            self._attention(node, node._saved_query, node._saved_key, masks, union)
        elif kind == CAUSAL_NODE:
            query, key, *_ = node.saved_tensors
            self._attention(node, query, key, masks, union)
        elif kind == EXPERTS_NODE:
            self._experts(node, below, masks, union)
        elif kind == "MulBackward0":
            self._keep(node, {"_saved_self": masks[1], "_saved_other": masks[0]})
        else:
            self._keep(node, dict.fromkeys(self._saving(node, kind), union))

    def _product(self, node: Any, kind: str, below: list[Any], masks: list[int]) -> None:
        left, right = (1, 2) if kind in _WITH_ADDEND else (0, 1)
        out_shape = tuple(node._input_metadata[0].shape)
        weight = self.leaf.get(below[right])
        if weight is None:
            first, second = (
                ("_saved_batch1", "_saved_batch2") if kind == "BaddbmmBackward0" else ("_saved_self", "_saved_mat2")
            )
            operand, other = getattr(node, first), getattr(node, second)
            flops = 2 * prod(out_shape) * (other.shape[-2] if operand is None else operand.shape[-1])
            self._forward(node, flops)
            self.out.paths += [(masks[left], flops), (masks[right], flops)]
            self._keep(node, {first: masks[right], second: masks[left]})
            return
        self._once(weight)
        read = getattr(node, _READ_OPERAND[kind])
        flops = 2 * prod(out_shape) * read.shape[-1]
        self._forward(node, flops)
        if weight == self.head:
            self.out.head += flops
            self.out.head_path = len(self.out.paths)
        self.out.dw[weight] = flops
        self.out.paths.append((masks[left], flops))
        if weight in self.routers:  # its product is in float, and so is what it keeps of its input
            self._keep(node, {_READ_OPERAND[kind]: masks[right]})
        else:
            self.reads.append((node._sequence_nr(), read.untyped_storage()._cdata, weight))

    def _experts(self, node: Any, below: list[Any], masks: list[int], union: int) -> None:
        """One product of experts, and with shares what follows their first: see `experts`."""
        weight = self.leaf[below[1]]
        self._once(weight)
        tokens, read, *more = node.saved_tensors
        self._forward(node, node.flops)
        self.out.dw[weight] = node.flops
        self.out.paths.append((masks[0], node.flops))
        self.reads.append((node._sequence_nr(), read.untyped_storage()._cdata, weight))
        self.out.routed[weight] = Routed(node.inputs, node.between)
        layer = self._layer_of(node)
        self._keep_storage(tokens, union, layer)
        if more:
            share, *outputs = more
            self._keep_storage(read, masks[0], layer)
            self._keep_storage(share, masks[0] | masks[1], layer)
            for tensor in outputs:
                self._keep_storage(tensor, masks[2], layer)

    def _once(self, weight: str) -> None:
        if weight in self.out.dw:
            raise InputError(
                f"'{weight}' is used more than once: architectures that share layers are not supported yet"
            )

    def _attention(self, node: Any, query: torch.Tensor, key: torch.Tensor, masks: list[int], union: int) -> None:
        flops = 2 * prod(query.shape[:-1]) * key.shape[-2] * query.shape[-1]
        self._forward(node, 2 * flops)
        q, k, v = masks[:3]
        self.out.paths += [(q, flops), (k, flops), (q | k, flops), (v, flops)]
        self._keep(node, dict.fromkeys(self._saving(node, node.name()), union))

    def _saving(self, node: Any, kind: str) -> list[str]:
        """Attributes that hold what nodes of this kind save; `saved_tensors` is that of functions written in Python."""
        if kind not in self.attributes:
            self.attributes[kind] = [n for n in dir(node) if n.startswith("_saved_") or n == "saved_tensors"]
        return self.attributes[kind]

    def _keep(self, node: Any, attributes: dict[str, int]) -> None:
        layer = self._layer_of(node)
        for name, mask in attributes.items():
            if mask:
                for tensor in _tensors(getattr(node, name, None)):
                    self._keep_storage(tensor, mask, layer)

    def _keep_storage(self, tensor: torch.Tensor, mask: int, layer: int) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.permanent:
            before, owner, _ = self.saved.get(storage._cdata, (0, layer, 0))
            shared = owner if owner == layer else NO_LAYER
            self.saved[storage._cdata] = (before | mask, shared, storage.nbytes())

    def _forward(self, node: Any, flops: int) -> None:
        self.out.forward += flops
        layer = self._layer_of(node)
        if layer != NO_LAYER:
            self.out.layers[layer].forward += flops

    def _layer_of(self, node: Any) -> int:
        number = node._sequence_nr()
        layer = bisect_right(self.starts, number) - 1
        return layer if layer >= 0 and number < self.spans[layer].after else NO_LAYER

    def _number_stages(self) -> None:
        """The int8 form of an input is made once for readers in a row; a later reader makes another."""
        stage, last = -1, None
        for _, storage, weight in sorted(self.reads):
            if storage != last:
                stage, last = stage + 1, storage
            self.out.stages[weight] = stage

    def _read_layers(self) -> None:
        """A layer's own inputs are what its recomputation keeps.

        What one layer makes for several, or the encoder for the decoder's layers, is counted once, and always; what
        the model makes for all layers before the first (masks, rotations) counts as autograd keeps it.
        """
        readers: dict[int, list[int]] = {}
        tensors: dict[int, torch.Tensor] = {}
        made: set[int] = set()
        for span, layer in zip(self.spans, self.out.layers, strict=True):
            for tensor in span.outputs:
                layer.weights |= self.deps.get(tensor.grad_fn, 0)
                made.add(tensor.untyped_storage()._cdata)
            for key, tensor in {tensor.untyped_storage()._cdata: tensor for tensor in span.inputs}.items():
                if key not in self.permanent:
                    readers.setdefault(key, []).append(span.index)
                    tensors[key] = tensor
        for key, found in readers.items():
            tensor = tensors[key]
            if len(found) == 1:
                self.out.layers[found[0]].inputs.append(tensor.untyped_storage().nbytes())
            elif key in made or tensor.requires_grad:
                for index in found:
                    self._keep_storage(tensor, self.out.layers[index].weights, NO_LAYER)


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


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _node_number() -> int:
    """A number above those of all nodes made so far and below those of all nodes to come."""
    node: Any = (torch.zeros(1, requires_grad=True) * 1).grad_fn
    return int(node._sequence_nr())
