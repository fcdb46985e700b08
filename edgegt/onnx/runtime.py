"""ONNX files in onnxruntime: one call over several rows.

Keys and values stay onnxruntime's own arrays between two calls, so that a step copies none of them in Python.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgegt.errors import InputError
from edgegt.onnx.forms import DECODER, ENCODER, MODEL
from edgegt.units import format_text

Array = np.ndarray[Any, Any]


def runtime() -> Any:
    """onnxruntime. Raises: InputError when it is not installed."""
    try:
        import onnxruntime
    except ImportError as error:
        raise InputError("onnxruntime is not installed: pip install edgegt[export]") from error
    return onnxruntime


@dataclass
class Past:
    """Keys and values by input name: what was read, and of an encoder-decoder what its encoder made."""

    held: dict[str, Any] = field(default_factory=dict)
    across: dict[str, Any] = field(default_factory=dict)

    def first(self, count: int) -> Past:
        """Of what was read, the first `count` tokens."""
        ort = runtime()
        cut = {
            name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value.numpy()[:, :, :count]))
            for name, value in self.held.items()
        }
        return Past(cut, self.across)


class OnnxModel:
    """The file, or the two files, in a folder. Raises: InputError when they are not there or cannot be run."""

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        self.pairs = (folder / DECODER).is_file()
        self._decoder = _session(folder / (DECODER if self.pairs else MODEL), threads)
        self._encoder = _session(folder / ENCODER, threads) if self.pairs else None
        self._outputs = [one.name for one in self._decoder.get_outputs()]
        self._given = {one.name: one.shape for one in self._decoder.get_inputs()}
        self._own = [f"past_key_values.{name.removeprefix('present.')}" for name in self._outputs[1:]]
        lacking = {"input_ids", *self._own} - set(self._given)
        if lacking or not self._own:
            raise InputError(f"'{folder}' has no model with a past ({', '.join(sorted(lacking))}): export it again")
        self.about: dict[str, str] = dict(self._decoder.get_modelmeta().custom_metadata_map)

    def empty(self, rows: int) -> Past:
        """The past before the first token."""
        ort = runtime()
        shapes = {name: (rows, self._given[name][1], 0, self._given[name][3]) for name in self._own}
        return Past({
            name: ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype=np.float32)) for name, shape in shapes.items()
        })  # fmt: skip

    def read(self, ids: Array, mask: Array) -> Past:
        """What the encoder makes of ids and mask, int64 [rows, tokens], with an empty past."""
        assert self._encoder is not None
        ort = runtime()
        names = [one.name for one in self._encoder.get_outputs()]
        given = {"input_ids": ids, "attention_mask": mask}
        found = self._encoder.run_with_ort_values(
            names[1:], {k: ort.OrtValue.ortvalue_from_numpy(v) for k, v in given.items()}
        )
        past = self.empty(ids.shape[0])
        across = {
            f"past_key_values.{name.removeprefix('present.')}": value
            for name, value in zip(names[1:], found, strict=True)
        }
        return Past(past.held, across)

    def forward(self, ids: Array, mask: Array, positions: Array | None, past: Past) -> tuple[Array, Past]:
        """float32 logits [rows, tokens, vocabulary], and the past with these ids (int64 [rows, tokens]) in it.

        mask: int64, of all tokens so far; of an encoder-decoder, of what its encoder read.
        """
        ort = runtime()
        given = {"input_ids": ids, "encoder_attention_mask" if self.pairs else "attention_mask": mask}
        if positions is not None:
            given["position_ids"] = positions
        inputs = {name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value)) for name, value in given.items()}
        found = self._decoder.run_with_ort_values(self._outputs, {**inputs, **past.held, **past.across})
        return found[0].numpy(), Past(dict(zip(self._own, found[1:], strict=True)), past.across)


def _session(path: Path, threads: int | None) -> Any:
    ort = runtime()
    if not path.is_file():
        raise InputError(
            f"'{format_text(path, None)}' is not there: give the folder that `edgegt export --to onnx` wrote"
        )
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of many kinds, which onnxruntime does not export
        said = str(error).strip().splitlines()[0]
        raise InputError(f"onnxruntime cannot run '{format_text(path, None)}' ({said}): export it again") from error
