"""ONNX files in onnxruntime: one call over several rows, and the engine that answers with them.

Keys and values stay onnxruntime's own arrays between two calls, so that a step copies none of them in Python.
"""

from __future__ import annotations

import os.path
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

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
        found = self._encoder.run_with_ort_values(names[1:], {k: ort.OrtValue.ortvalue_from_numpy(v) for k, v in given.items()})
        past = self.empty(ids.shape[0])
        across = {f"past_key_values.{name.removeprefix('present.')}": value for name, value in zip(names[1:], found, strict=True)}
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


class OnnxEngine:
    """The loop's engine over ONNX files, one answer at a time; as `decoding.Engine`."""

    def __init__(self, model: OnnxModel, eos: Sequence[int], positions: int | None, start: int | None) -> None:
        self.model = model
        self.eos = tuple(eos)
        self.positions = positions
        self.start = start
        self.reused = 0
        self._read: list[int] = []
        self._past = Past()
        self._encoded: tuple[tuple[int, ...], Past] | None = None

    def prefill(self, ids: Sequence[int]) -> torch.Tensor:
        """As `decoding.Engine`."""
        if self.start is not None:
            return self._encode(tuple(ids))
        known = len(os.path.commonprefix([self._read, list(ids[:-1])]))  # noqa: RUF071
        past = self.model.empty(1) if known == 0 else self._past
        self._past = past if known in (0, len(self._read)) else past.first(known)
        self._read, self.reused = list(ids[:known]), known
        return self._forward(ids[known:])

    def step(self, token: int) -> torch.Tensor:
        """As `decoding.Engine`."""
        return self._forward((token,))

    def _encode(self, ids: tuple[int, ...]) -> torch.Tensor:
        same = self._encoded is not None and self._encoded[0] == ids
        self.reused = len(ids) if same else 0
        if self._encoded is None or not same:
            row = np.array([ids], dtype=np.int64)
            self._encoded = ids, self.model.read(row, np.ones_like(row))
        self._read, self._past = [], self._encoded[1]
        assert self.start is not None
        return self._forward((self.start,))

    def _forward(self, ids: Sequence[int]) -> torch.Tensor:
        read, self._read = self._read, []
        row = np.array([list(ids)], dtype=np.int64)
        before, after = len(read), len(read) + len(ids)
        if self._encoded is not None and self.start is not None:
            mask, positions = np.ones((1, len(self._encoded[0])), dtype=np.int64), None
        else:
            mask, positions = np.ones((1, after), dtype=np.int64), np.arange(before, after, dtype=np.int64)[None]
        logits, self._past = self.model.forward(row, mask, positions, self._past)
        self._read = [*read, *ids]
        return torch.from_numpy(logits[0, -1].copy())


def _session(path: Path, threads: int | None) -> Any:
    ort = runtime()
    if not path.is_file():
        raise InputError(f"'{format_text(path, None)}' is not there: give the folder that `edgegt export --to onnx` wrote")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of many kinds, which onnxruntime does not export
        said = str(error).strip().splitlines()[0]
        raise InputError(f"onnxruntime cannot run '{format_text(path, None)}' ({said}): export it again") from error
