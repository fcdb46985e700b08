"""Answers a prompt with a decoder-only model that `edgegt export RUN --to onnx` wrote: onnxruntime, tokenizers, numpy.

    python onnx_generate.py DIR "PROMPT" [TOKENS]

The first call reads the whole prompt with an empty past; each call after it reads one token and what is remembered.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


def stop_ids(folder: Path) -> set[int]:
    """The ids that end an answer, from the generation config or else the config."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.exists() else None
        if found is not None:
            return set(found) if isinstance(found, list) else {found}
    return set()


def empty_past(session: onnxruntime.InferenceSession) -> dict[str, np.ndarray]:
    """A past of no positions: [1, heads, 0, size] for each key and value."""
    past = {}
    for entry in session.get_inputs():
        if entry.name.startswith("past_key_values."):
            _, heads, _, size = entry.shape
            past[entry.name] = np.zeros((1, heads, 0, size), dtype=np.float32)
    return past


def generate(folder: Path, prompt: str, most: int) -> str:
    """The greedy answer of at most so many tokens."""
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    wanted = {entry.name for entry in session.get_inputs()}
    outputs = [entry.name for entry in session.get_outputs()]
    ends, past = stop_ids(folder), empty_past(session)
    ids, seen = tokenizer.encode(prompt).ids, 0
    answer: list[int] = []
    while len(answer) < most:
        seen += len(ids)
        inputs = {
            "input_ids": np.array([ids], dtype=np.int64),
            "attention_mask": np.ones((1, seen), dtype=np.int64),
            "position_ids": np.arange(seen - len(ids), seen, dtype=np.int64)[None],
        }
        given = {name: value for name, value in inputs.items() if name in wanted}
        found = dict(zip(outputs, session.run(None, given | past), strict=True))
        token = int(found["logits"][0, -1].argmax())
        if token in ends:
            break
        answer.append(token)
        ids = [token]
        past = {name: found[name.replace("past_key_values.", "present.")] for name in past}
    return tokenizer.decode(answer)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit('usage: python onnx_generate.py DIR "PROMPT" [TOKENS]')
    print(generate(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if len(sys.argv) == 4 else 64))
