"""A transformers model whose matrices are int8 from the start, built over the base store.

The skeleton is made with its matrices on the meta device, so that no float matrix is ever allocated; then linears and
embeddings are replaced by int8 ones that map the store, and norms, biases and learned positions are read as float32.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from edgegt.architecture import (
    all_layers,
    auto_class,
    block_in,
    has_own_head,
    head_name,
    is_classifier,
    is_experts,
    is_head_tied,
    is_int8,
    is_linear,
    is_lookup,
    is_router,
    is_transposed,
    matrix_shape,
    stacks_of,
    untie_head,
)
from edgegt.attention import register_attention, use_causal
from edgegt.classifier import begin_fresh, head_of, initial, not_drawn
from edgegt.errors import InputError
from edgegt.experts import use_experts
from edgegt.flops import FlopMeter, attach
from edgegt.fused import fuse
from edgegt.head import verify_head
from edgegt.pieces import pieces_of
from edgegt.quant import Backend, InputCache, Int8Embedding, Int8Experts, Int8Linear, Int8Weight, dequantize
from edgegt.source import Source, fingerprint
from edgegt.store import BaseStore, Entry, base_store
from edgegt.stream import BaseStream, absent, frozen_weight


@dataclass
class Int8Model:
    """The model and handles to what can be trained, by name: int8 linears and float vectors.

    The head and stacked experts are among the linears, the routers of experts among the vectors. head: the name of a
    language model's head, empty of a classifier. fresh: weights that the files lack, float and always trained.
    stream: what brings the layers into memory and lets go of them, where they are not all there.
    """

    module: Any
    linears: dict[str, Int8Linear]
    vectors: dict[str, nn.Parameter]
    head: str
    tied: bool
    meter: FlopMeter
    source: Source
    store: BaseStore
    fingerprint: str
    device: torch.device
    inputs: InputCache
    notes: list[str] = field(default_factory=list)
    _entries: dict[str, Entry] = field(default_factory=dict)
    fresh: dict[str, nn.Parameter] = field(default_factory=dict)
    stream: BaseStream | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes that it tells apart, none of a language model."""
        head = head_of(self.module.config)
        return head.labels if head else ()

    @property
    def spared_bytes(self) -> int:
        """Bytes of the base that were never in memory together with the rest; 0 where it is not streamed."""
        return self.stream.spared_bytes if self.stream else 0

    def float_parameter(self, name: str) -> nn.Parameter:
        """A vector, or a weight that the files lack. Raises: KeyError for any other name."""
        return self.fresh[name] if name in self.fresh else self.vectors[name]

    def original(self, name: str, rows: torch.Tensor | None = None) -> torch.Tensor:
        """The float32 tensor [out, in] of the pretrained model, from disk; from int8 if the source is gone.

        rows: only these rows of it; no more is ever held.
        """
        entry = self._entries[name]
        try:
            if entry.more:
                joined: torch.Tensor = self.source.joined(entry.pieces, rows)
                return joined.to(self.device)
            tensor: torch.Tensor = self.source.tensor(entry.stored_as)
            tensor = tensor.t() if entry.transposed else tensor.reshape(-1, tensor.shape[-1])
            tensor = tensor if rows is None else tensor[rows.cpu()]
            return tensor.to(torch.float32, memory_format=torch.contiguous_format, copy=True).to(self.device)
        except (OSError, KeyError) as error:
            line = f"the float weights of {name} could not be read ({error}): its master starts from int8"
            if line not in self.notes:
                self.notes.append(line)
            weight = frozen_weight(self.store, entry.name, self.device)
            if rows is None:
                return dequantize(weight)
            return dequantize(Int8Weight(weight.q[rows], weight.scale[rows]))

    def reset(self, name: str) -> None:
        """Put a linear or a vector back to what was loaded, frozen."""
        if name in self.fresh:
            self.fresh[name].data.copy_(initial(self.module.config, name, self.fresh[name].shape))
        elif name in self.vectors:
            self.vectors[name].data.copy_(self.store.tensor(name))
            self.vectors[name].requires_grad_(False)
        elif self.tied and name == self.head:
            self.linears[name].restore(self.module.get_input_embeddings().weight)
        else:
            self.linears[name].restore(frozen_weight(self.store, name, self.device))


def load_int8(
    config: Any, source: Source, cache: Path, backend: Backend, device: torch.device, streams: bool = False
) -> Int8Model:
    """The model in int8 on `device`, quantised into the cache on first use. streams: with one layer there at a time.

    Raises: InputError when the files lack a tensor that the architecture needs.
    """
    model, head, tied = outline(config, source)
    fresh = begin_fresh(model, device)
    embedding = _name_of(model, model.get_input_embeddings())
    trainable = {name for name, p in model.named_parameters() if p.requires_grad and _in_float(model, name, p)}
    entries = list(_entries(model, source, head, tied, set(fresh)))
    identity = fingerprint(source, cache / "fingerprints.json")
    store = base_store(source, identity, entries, cache)
    meter, inputs = FlopMeter(), InputCache()
    linears = _fill(model, store, entries, backend, inputs, meter, device, streams)
    if tied:
        shared, bias = model.get_input_embeddings().weight, model.get_output_embeddings().bias
        linears[head] = Int8Linear(shared, bias, name=head, backend=backend, inputs=inputs, meter=meter)
        model.set_output_embeddings(linears[head])
    vectors = {name: p for name, p in model.named_parameters() if name in trainable and name not in fresh}
    left = [name for name, p in model.named_parameters() if p.is_meta]
    if left:
        raise InputError(f"'{left[0]}' was not filled: the architecture {type(model).__name__} is not supported yet")
    model.to(device).eval().requires_grad_(False)
    for parameter in fresh.values():
        parameter.requires_grad_(True)
    fuse(model, backend.kernels)
    use_experts(model, backend.kernels)
    if backend.kernels is not None:
        use_causal(model, backend.kernels)
    attach(model, meter)
    stream = _stream(model, linears, entries, store, device) if streams else None
    if head:
        verify_head(model, linears[head], device)
    by_name = {entry.name: entry for entry in entries}
    if tied:
        by_name[head] = by_name[embedding]
    handles = model, linears, vectors, head, tied, meter, source, store, identity, device, inputs
    return Int8Model(*handles, [], by_name, fresh, stream)


def _stream(
    model: Any, linears: dict[str, Int8Linear], entries: list[Entry], store: BaseStore, device: torch.device
) -> BaseStream:
    layers = all_layers(model)
    members: list[dict[str, Int8Linear]] = [{} for _ in layers]
    for entry in entries:
        if 0 <= entry.block < len(layers) and entry.name in linears:
            members[entry.block][entry.name] = linears[entry.name]
    return BaseStream(layers, members, store, device)


def head_is_apart(config: Any, source: Source) -> bool:
    """Whether the files have a head of their own although the config ties it, as an exported T5's may be."""
    if is_classifier(config) or has_own_head(config):
        return False
    model = skeleton(copy.deepcopy(config))
    return _head_is_apart(model, source, head_name(model))


def outline(config: Any, source: Source, attention: str | None = None) -> tuple[Any, str, bool]:
    """The skeleton, its head apart where the files have it so; the head's name, and whether it is the embedding's.

    The name of a classifier's head is empty. attention: transformers' name of it; None: the one that counts.
    """
    model = skeleton(copy.deepcopy(config), attention)
    head = head_name(model)
    if head and _head_is_apart(model, source, head):
        untie_head(model)
    return model, head, bool(head) and is_head_tied(model)


def skeleton(config: Any, attention: str | None = None) -> Any:
    """The float architecture with its matrices on the meta device and small tensors in place."""
    attention, auto = attention or register_attention(), auto_class(config)
    with _NoMatrices(), not_drawn(config):
        try:
            return auto.from_config(config, dtype=torch.float32, attn_implementation=attention)
        except (ValueError, KeyError):  # an architecture with attention of its own
            return auto.from_config(config, dtype=torch.float32, attn_implementation="eager")


def _lookup(weight: Int8Weight, module: Any) -> Int8Embedding:
    """The int8 form of a lookup, with the constant that it scales its rows by."""
    scaled_by = getattr(module, "embed_scale", None)
    return Int8Embedding(weight, embed_scale=None if scaled_by is None else float(scaled_by))


class _NoMatrices(TorchFunctionMode):
    """Sends every new uninitialised matrix to the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            size = args[0] if args and not isinstance(args[0], int) else args
            if len(size) >= 2:
                kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _head_is_apart(model: Any, source: Source, head: str) -> bool:
    """Whether the files have a head of their own where the architecture ties it, as transformers sees it too."""
    embedding = model.get_input_embeddings()
    if not is_head_tied(model):
        return False
    stored = pieces_of(model, source.files).found
    own, shared = stored.get(head), stored.get(_name_of(model, embedding))
    if own is None or shared is None:
        return False
    return has_own_head(model.config) or not torch.equal(source.tensor(own[0]), source.tensor(shared[0]))


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(f"{name}.weight" for name, module in model.named_modules() if module is wanted)


def _in_float(model: Any, name: str, parameter: nn.Parameter) -> bool:
    """Whether this is a norm, a bias or a router."""
    return parameter.ndim < 2 or is_router(model.get_submodule(name.rpartition(".")[0]), parameter)


def _entries(model: Any, source: Source, head: str, tied: bool, fresh: set[str]) -> Iterator[Entry]:
    stacks = stacks_of(model)
    stored, seen = _stored_as(model, source), set()
    for module_name, module in model.named_modules():
        for short, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{short}"
            if (tied and name == head) or name in fresh or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            found = stored.get(name)
            if found is None:
                raise InputError(f"the model in '{source.directory}' lacks the tensor '{name}': fetch the model again")
            block = block_in(name, stacks, head)
            int8 = is_int8(module, parameter)
            rows = matrix_shape(module, parameter)[0] if is_experts(module) else 0
            yield Entry(name, found[0], block, int8, int8 and is_transposed(module), found[1:], rows)


def names_in_files(model: Any, source: Source) -> dict[str, str]:
    """What the files call each parameter, by all names that the model has for it.

    Those that they lack are left out, and stacks of experts, of which files may have a tensor per expert.
    """
    stacks = {f"{path}." for path, module in model.named_modules() if is_experts(module)}
    found = _stored_as(model, source)
    return {name: files[0] for name, files in found.items() if f"{name.rpartition('.')[0]}." not in stacks}


def _stored_as(model: Any, source: Source) -> dict[str, tuple[str, ...]]:
    """The files' tensors that make up each parameter, by all names that the model has for it.

    Raises: InputError for a tensor that would be merged in a way that is not known here.
    """
    prefix, pieces = getattr(model, "base_model_prefix", ""), pieces_of(model, source.files)
    found: dict[str, tuple[str, ...]] = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        spellings = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
        spelled = next((spelling for spelling in spellings if spelling in pieces.found), None)
        merged = next((pieces.unknown[spelling] for spelling in spellings if spelling in pieces.unknown), None)
        if spelled is not None:
            found[name] = pieces.found[spelled]
        elif merged is not None:
            raise InputError(
                f"'{name}' would be made from '{merged}' in a way that edgegt does not know: save the model with "
                "save_pretrained(..., save_original_format=False) once"
            )
    return found


def _fill(
    model: Any, store: BaseStore, entries: list[Entry], backend: Backend, inputs: InputCache, meter: FlopMeter,
    device: torch.device, streams: bool,
) -> dict[str, Int8Linear]:  # fmt: skip
    linears: dict[str, Int8Linear] = {}
    layers = range(len(all_layers(model)))
    lookups = [(path, module) for path, module in model.named_modules() if is_lookup(module)]
    for entry in entries:
        if not entry.int8:
            owner, _, short = entry.name.rpartition(".")
            value = nn.Parameter(store.tensor(entry.name).clone().to(device), requires_grad=False)
            setattr(model.get_submodule(owner), short, value)
    for entry in entries:
        if not entry.int8:
            continue
        place, _, short = entry.name.rpartition(".")
        module = model.get_submodule(place)
        away = streams and entry.block in layers and not is_lookup(module)
        weight = frozen_weight(store, entry.name, torch.device("cpu") if away else device)
        weight = absent(weight) if away else weight
        if is_linear(module):
            linear = Int8Linear(weight, module.bias, name=entry.name, backend=backend, inputs=inputs, meter=meter)
            linears[entry.name] = linear
            model.set_submodule(place, linear)
        elif is_experts(module):
            count = module.get_parameter(short).shape[0]
            experts = Int8Experts(weight, experts=count, name=entry.name, backend=backend, inputs=inputs, meter=meter)
            linears[entry.name] = experts
            delattr(module, short)
            setattr(module, short, experts)
        else:  # an encoder and a decoder look up in the same one
            lookup = _lookup(weight, module)
            for path in [path for path, other in lookups if other.weight is module.weight]:
                model.set_submodule(path, lookup)
    return linears
