"""Values for the matrices of a traced graph, in float or in 8 bits, each read when it is written.

In 8 bits every 32 weights that follow one another in a row share a scale (symmetric, codes 1 to 255 around 128):

    scale = max |w| / 127,    code = round(w / scale) + 128,    w ~ (code - 128) scale

Products are onnxruntime's MatMulNBits, which quantises its input in the same way, to int8 by blocks of 32. A lookup
takes codes and scales of its rows; a head that is the embedding reads the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from edgegt.onnx.graph import Traced
from edgegt.quant.weight import row_chunks

BLOCK = 32
DOMAIN = "com.microsoft"
ZERO = 128
# What MatMulNBits is told about its input: 4 is int8, 0 is as it comes.
_INT8_INPUT = 4

Value = Callable[[str], torch.Tensor]


def fill_float(traced: Traced, value: Value) -> None:
    """Every matrix in float32. value: a parameter by name, as the module holds it."""
    for name, place in traced.weights.items():
        turned = _only_transposed(place)
        if turned is None:
            _initializer(traced, place, tuple(place.shape), np.float32, _float(value, name))
            continue
        # A matrix that is read transposed only is stored so.
        stored = _added(traced, place.name, _reversed(place), np.float32, _float(value, name, turn=True))
        turned.outputs[0].replace_all_uses_with(stored)
        traced.model.graph.remove(turned, safe=True)


def fill_int8(traced: Traced, value: Value, in_8_bits: Mapping[str, bool]) -> None:
    """The matrices named in `in_8_bits` in 8 bits, all others in float32. True: the module holds it as [in, out]."""
    for name, place in traced.weights.items():
        if name in in_8_bits and not _replace(traced, place, value, name, in_8_bits[name]):
            raise AssertionError(f"'{name}' is used in a way that was not foreseen")
    rest = {name: place for name, place in traced.weights.items() if name not in in_8_bits}
    fill_float(Traced(traced.form, traced.model, rest), value)


def codes(matrix: torch.Tensor) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """uint8 [out, blocks, 32] and float32 scales [out, blocks] of a matrix [out, in], 0 where the last block ends."""
    rows, width = matrix.shape
    blocks = -(-width // BLOCK)
    found = np.full((rows, blocks, BLOCK), ZERO, dtype=np.uint8)
    scales = np.zeros((rows, blocks), dtype=np.float32)
    for part in row_chunks(matrix):
        here = matrix[part].to(torch.float32)
        here = torch.nn.functional.pad(here, (0, blocks * BLOCK - width)).reshape(-1, blocks, BLOCK)
        scale = here.abs().amax(2).div_(127)
        whole = (here / scale.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(2)).round_().clamp_(-127, 127)
        found[part], scales[part] = whole.add_(ZERO).to(torch.uint8).numpy(), scale.numpy()
    return found, scales


def _replace(traced: Traced, place: Any, value: Value, name: str, turned: bool) -> bool:
    """Let all that reads this matrix read codes and scales; False where it is more than a product or a lookup."""
    rows, width = _reversed(place) if turned else tuple(place.shape)
    products, lookups = [], []
    for use in list(place.uses()):
        node = use.node
        if node.op_type == "Gather" and use.idx == 0 and not turned:
            lookups.append(node)
        elif node.op_type == "Transpose" and not turned:
            reads = list(node.outputs[0].uses())
            if not all(_is_product(one, False) for one in reads):
                return False
            products += [one.node for one in reads]
        elif _is_product(use, not turned):
            products.append(node)
        else:
            return False
    held: dict[str, Any] = {}

    def made(index: int) -> Any:
        if not held:
            matrix = value(name)
            held["found"] = codes(matrix.t() if turned else matrix)
        found = held["found"][index]
        if index == 1:
            held.clear()  # the scales are written after the codes
        return found

    blocks = -(-width // BLOCK)
    parts = [
        _added(traced, f"{place.name}.codes", (rows, blocks, BLOCK), np.uint8, lambda: made(0)),
        _added(traced, f"{place.name}.scales", (rows, blocks), np.float32, lambda: made(1)),
    ]
    for node in products:
        _as_product(traced, node, parts, rows, width)
    for node in lookups:
        _as_lookup(traced, node, parts, width)
    for use in list(place.uses()):
        traced.model.graph.remove(use.node, safe=True)  # the transpositions that nothing reads any more
    return True


def _is_product(use: Any, transposes: bool) -> bool:
    """Whether this is x W of MatMul or Gemm with a weight [in, out], or [out, in] where Gemm transposes it itself."""
    node, flags = use.node, {name: value.value for name, value in use.node.attributes.items()}
    if use.idx != 1 or node.op_type not in ("MatMul", "Gemm"):
        return False
    plain = flags.get("transA", 0) == 0 and flags.get("alpha", 1.0) == 1.0 and flags.get("beta", 1.0) == 1.0
    return plain and bool(flags.get("transB", 0)) == transposes


def _as_product(traced: Traced, node: Any, parts: list[Any], rows: int, width: int) -> None:
    """MatMul(x, W) or Gemm(x, W, bias) as MatMulNBits(x, codes, scales, no zero points, no order, bias)."""
    import onnx_ir as ir

    bias = node.inputs[2] if len(node.inputs) > 2 else None
    first = node.inputs[0]
    node.op_type, node.domain = "MatMulNBits", DOMAIN
    node.resize_inputs(3 if bias is None else 6)
    for index, given in enumerate((first, *parts, None, None, bias)[: len(node.inputs)]):
        node.replace_input_with(index, given)
    node.attributes.clear()
    sizes = {"K": width, "N": rows, "bits": 8, "block_size": BLOCK, "accuracy_level": _INT8_INPUT}
    for key, size in sizes.items():
        node.attributes[key] = ir.AttrInt64(key, size)
    traced.model.graph.opset_imports[DOMAIN] = 1


def _as_lookup(traced: Traced, node: Any, parts: list[Any], width: int) -> None:
    """Gather(W, ids) as (Gather(codes, ids) - 128) Gather(scales, ids), in the shape that it had."""
    import onnx_ir as ir

    graph, ids = traced.model.graph, node.inputs[1]

    def before(operator: str, *inputs: Any, **attributes: Any) -> Any:
        made = ir.node(operator, list(inputs), attributes or None)
        made.outputs[0].name = f"{node.outputs[0].name}.{made.op_type.lower()}.{len(graph)}"
        graph.insert_before(node, made)
        return made.outputs[0]

    def constant(label: str, array: Any) -> Any:
        return _added(traced, f"{node.outputs[0].name}.{label}", array.shape, array.dtype, lambda: array)

    found = before("Cast", before("Gather", parts[0], ids), to=ir.DataType.FLOAT)
    found = before("Sub", found, constant("zero", np.array(ZERO, dtype=np.float32)))
    scale = before("Unsqueeze", before("Gather", parts[1], ids), constant("last", np.array([-1], dtype=np.int64)))
    found = before("Mul", found, scale)
    rank = 2 if ids.shape is None else len(ids.shape)
    shape = constant("shape", np.array([*[0] * rank, -1], dtype=np.int64))
    last: tuple[str, tuple[Any, ...]] = "Reshape", (found, shape)
    if width % BLOCK:
        whole, ends = before("Reshape", found, shape), [np.array([end], dtype=np.int64) for end in (0, width, -1)]
        limits = [constant(label, end) for label, end in zip(("from", "to", "axis"), ends, strict=True)]
        last = "Slice", (whole, *limits)
    node.op_type = last[0]
    node.attributes.clear()
    node.resize_inputs(len(last[1]))
    for index, given in enumerate(last[1]):
        node.replace_input_with(index, given)


def _only_transposed(place: Any) -> Any:
    """The transposition that alone reads this matrix; None where something else does."""
    uses = list(place.uses())
    return uses[0].node if len(uses) == 1 and uses[0].node.op_type == "Transpose" else None


def _reversed(place: Any) -> tuple[int, ...]:
    return tuple(place.shape)[::-1]


def _float(value: Value, name: str, turn: bool = False) -> Callable[[], Any]:
    def read() -> Any:
        matrix = value(name).to(torch.float32)
        return (matrix.t() if turn else matrix).contiguous().numpy()

    return read


def _added(traced: Traced, name: str, shape: tuple[int, ...], kind: Any, read: Callable[[], Any]) -> Any:
    import onnx_ir as ir

    place = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.from_numpy(np.dtype(kind))))
    _initializer(traced, place, shape, kind, read)
    return place


def _initializer(traced: Traced, place: Any, shape: tuple[int, ...], kind: Any, read: Callable[[], Any]) -> None:
    """Make the value an initializer that is read when the file is written."""
    import onnx_ir as ir

    dtype = ir.DataType.from_numpy(np.dtype(kind))
    place.const_value = ir.LazyTensor(
        lambda: ir.Tensor(read(), name=place.name), dtype, ir.Shape(shape), name=place.name, cache=False
    )
    traced.model.graph.register_initializer(place)
