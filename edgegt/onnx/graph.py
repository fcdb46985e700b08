"""A form traced to an ONNX graph, without a weight being read.

torch.export runs the module on shapes alone, so that its matrices may be memory that nobody has touched. They are
inputs of the graph while it is simplified, because the simplifier would otherwise fold them; then each is an
initializer that has a name and a shape and is given its values when the file is written.
"""

from __future__ import annotations

import logging
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch

from edgegt.errors import InputError
from edgegt.onnx.forms import Form

OPSET = 20
_OURS = "model."


@dataclass(frozen=True)
class Traced:
    """weights: the graph's values that stand for parameters, by the parameter's name; they have no data yet."""

    form: Form
    model: Any
    weights: dict[str, Any]


def trace(form: Form) -> Traced:
    """The graph of a form. Raises: InputError when torch cannot export the model."""
    free = {name: dict.fromkeys(form.axes[name], torch.export.Dim.DYNAMIC) for name in form.inputs}
    with _quiet(), _stopped_by_ctrl_c(), torch.no_grad():
        try:
            program = torch.onnx.export(
                form.module, tuple(form.inputs.values()), dynamo=True, optimize=False, verbose=False,
                opset_version=OPSET, dynamic_shapes=_as_arguments(form, free),
                input_names=list(form.inputs), output_names=list(form.outputs),
            )  # fmt: skip
        except torch.onnx.errors.OnnxExporterError as error:
            kind = type(form.module.model).__name__
            said = str(error.__cause__ or error).strip().splitlines()[0]
            raise InputError(f"torch cannot export {kind} to ONNX ({said}): use --to hf") from error
        assert program is not None
        model = program.model
        held = _as_inputs(model.graph, form)
        _in_float(model.graph)
        _simplify(model)
    graph = model.graph
    weights = {}
    for name, value in held.items():
        graph.inputs.remove(value)
        if value.uses():
            value.name = name
            weights[name] = value
    _name_axes(graph, form)
    model.producer_name, model.producer_version, model.graph.name = "edgegt", _version(), form.file.partition(".")[0]
    for node in graph:
        node.metadata_props.clear()  # stack traces, with paths of this machine
    for value in graph.all_values() if hasattr(graph, "all_values") else ():
        value.metadata_props.clear()
    return Traced(form, model, weights)


def _in_float(graph: Any) -> None:
    """Compute in float32, and round, where a model computes in bfloat16 (Falcon's alibi): onnxruntime cannot."""
    import onnx_ir as ir

    half, plain = ir.DataType.BFLOAT16, ir.DataType.FLOAT
    for node in list(graph):
        if node.op_type == "Cast" or not any(given is not None and given.dtype == half for given in node.inputs):
            continue
        for index, given in enumerate(node.inputs):
            if given is not None and given.dtype == half:
                wide = ir.node("Cast", [given], {"to": plain})
                wide.outputs[0].dtype, wide.outputs[0].shape = plain, given.shape
                graph.insert_before(node, wide)
                node.replace_input_with(index, wide.outputs[0])
        for made in node.outputs:
            if made.dtype == half:
                back = ir.node("Cast", [made], {"to": half})
                made.replace_all_uses_with(back.outputs[0])
                back.replace_input_with(0, made)
                back.outputs[0].dtype, back.outputs[0].shape, made.dtype = half, made.shape, plain
                graph.insert_after(node, back)


def _simplify(model: Any) -> None:
    """Fold what is constant and compute once what is computed twice.

    onnxscript's own list of passes without its rewrite rules, which take half of an export and find little: onnxruntime
    has its own.
    """
    import onnx_ir.passes.common as passes
    from onnx_ir.passes import Sequential
    from onnxscript import optimizer

    passes.InlinePass()(model)
    optimizer.fold_constants(model)
    Sequential(
        passes.IdentityEliminationPass(), passes.RemoveUnusedNodesPass(), passes.RemoveUnusedFunctionsPass(),
        passes.RemoveUnusedOpsetsPass(), passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(), passes.CommonSubexpressionEliminationPass(), passes.OutputFixPass(),
        passes.NameFixPass(),
    )(model)  # fmt: skip


def _as_arguments(form: Form, free: dict[str, Any]) -> Any:
    """The free axes as the module's arguments have them: `past` is one of several tensors."""
    fixed = [name for name in form.inputs if not name.startswith("past_key_values.")]
    past = tuple(free[name] for name in form.inputs if name not in fixed)
    return (*(free[name] for name in fixed), *((past,) if past else ()))


def _as_inputs(graph: Any, form: Form) -> dict[str, Any]:
    """Take the parameters with two dimensions and more out of the initializers; by parameter name."""
    held = {}
    network: Any = form.module.model
    every = network.named_parameters(remove_duplicate=False)  # the graph may call it by any of its names
    parameters = {f"{_OURS}{name}": name for name, parameter in every if parameter.ndim >= 2}
    for name in list(graph.initializers):
        if name in parameters:
            value = graph.initializers.pop(name)
            value.const_value = None
            graph.inputs.append(value)
            held[parameters[name]] = value
    return held


def _name_axes(graph: Any, form: Form) -> None:
    """Give the free axes of inputs and outputs their names."""
    import onnx_ir as ir

    for value in graph.inputs:
        axes = form.axes[value.name]
        value.shape = ir.Shape([axes.get(axis, size) for axis, size in enumerate(form.inputs[value.name].shape)])


def _version() -> str:
    from edgegt.version import __version__

    return __version__


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines of the exporter, which speak of what is registered, deprecated, renamed or tried inside it."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextmanager
def _stopped_by_ctrl_c() -> Iterator[None]:
    """Ctrl-C counts although the exporter takes it for a failed attempt and tries on; only in the main thread."""
    before, pressed = signal.getsignal(signal.SIGINT), []

    def stop(number: int, _frame: FrameType | None) -> None:
        pressed.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread() or before is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, stop)
    try:
        yield
    except Exception as error:
        if pressed:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt
