"""`edgegt export --to onnx`: ONNX files and what is needed to run them, as a folder, checked before it is there."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgegt.card import Exported
from edgegt.disk import replacing_folder
from edgegt.errors import EdgegtError, InputError
from edgegt.export import base_of, copy_beside, new_folder, say_what_was_done, subject_patch, write_card, write_config
from edgegt.log import Log
from edgegt.patch import Patch
from edgegt.units import format_bytes

# Weights above this lie beside the graph, from where a runtime maps them; a protobuf ends at 2 GiB.
EXTERNAL_BYTES = 2**28
BITS = (8, 32)
NEEDED = ("onnx", "onnx_ir", "onnxruntime", "onnxscript")


def export_onnx(
    run: str | None, model: str | None, patch: str | None, output: str, bits: int = 8, force: bool = False,
    log: Log | None = None,
) -> Path:  # fmt: skip
    """Write a run, or --model with --patch, as a folder with ONNX files; bits: of its matrices, 8 or 32.

    Raises: InputError for what cannot be exported; EdgegtError when the files compute something else than PyTorch.
    """
    import torch

    from edgegt.onnx.float_model import float_model
    from edgegt.pretrained import open_pretrained

    log = log or Log()
    if bits not in BITS:
        raise InputError(f"--bits {bits} is not one of {', '.join(map(str, BITS))}")
    if lacking := [name for name in NEEDED if find_spec(name) is None]:
        raise InputError(f"--to onnx needs {', '.join(lacking)}: pip install edgegt[export]")
    given = subject_patch(run, patch)
    base = open_pretrained(base_of(run, model))
    base.check(given)
    path = new_folder(output, force, (base.source.directory, given.path), log)
    made_from = float_model(base, given)
    with replacing_folder(path, force) as partly, torch.no_grad():
        done = Exported(given.names, f"ONNX, {bits} bits" if bits < 32 else "ONNX, float32", 0, [], library="onnx")
        for file in _files(made_from, partly, bits, _about(run, given, bits), log):
            done.files.append(file.name)
            done.total_bytes += file.stat().st_size
        write_config(base, given, partly, "float32", done)
        done.notes.clear()  # on how transformers would read a head's weights
        weights = {file.name for file in base.source.files.values()}
        done.left_out = copy_beside(base.source.directory, weights, partly)
        done.notes += _compared(made_from, partly, bits)
        write_card(base, given, run, partly, done)
    say_what_was_done(done, log)
    return path


def _files(model: Any, folder: Path, bits: int, about: dict[str, str], log: Log) -> Iterator[Path]:
    """Trace and write file after file, each checked by onnx."""
    import onnx
    import onnx_ir as ir

    from edgegt.onnx.forms import forms_of
    from edgegt.onnx.graph import trace
    from edgegt.onnx.weights import fill_float, fill_int8

    for form in forms_of(model.module):
        log.say(f"{form.file}: tracing {type(model.module).__name__}")
        traced = trace(form)
        if bits == 8:
            fill_int8(
                traced, model.value, {name: at for name, at in model.matrices().items() if name in traced.weights}
            )
        else:
            fill_float(traced, model.value)
        traced.model.metadata_props.update(about)
        place, beside = folder / form.file, f"{form.file}.data"
        size = sum(value.const_value.nbytes for value in traced.model.graph.initializers.values())
        ir.save(traced.model, place, external_data=beside if size > EXTERNAL_BYTES else None)
        try:
            onnx.checker.check_model(place)
        except onnx.checker.ValidationError as error:
            raise EdgegtError(f"onnx refuses the exported {form.file} ({str(error).splitlines()[0]})") from error
        yield place
        if (folder / beside).is_file():
            yield folder / beside


def _about(run: str | None, patch: Patch, bits: int) -> dict[str, str]:
    """What stands in the files: how a prompt is asked, and what they were made of."""
    from edgegt.folder import RunFolder

    found = {"separator": patch.about.get("separator", ""), "base": patch.fingerprint, "bits": str(bits)}
    if run is not None and RunFolder(Path(run)).options().data is None:
        found["household"] = "yes"
    return {f"edgegt.{key}": value for key, value in found.items()}


def _compared(model: Any, folder: Path, bits: int) -> list[str]:
    """A line on how near the files are to PyTorch, where memory allows it. Raises: EdgegtError when they are not."""
    import psutil

    from edgegt.onnx.parity import ALLOWED, compare, reference

    needed, free = int(4 * model.parameters * 1.2), psutil.virtual_memory().available
    if needed > free:
        short = f"its float32 form takes {format_bytes(needed)}, and {format_bytes(free)} are free"
        return [f"not compared with PyTorch: {short}"]
    model.load()
    expected = reference(model)
    for parameter in model.module.parameters():
        parameter.data = parameter.data.new_empty(0)
    found = compare(folder, expected)
    if bits == 32 and not found.error <= ALLOWED:
        raise EdgegtError(
            f"the ONNX files compute something else than PyTorch ({found.line()}; allowed {ALLOWED}): use --to hf"
        )
    return [found.line()]
