"""Shapes of well-known models, stated here as the facts they are, so that measuring needs nothing downloaded.

base-7m is not well-known: it is the small pretrained Llama that edgegt's own numbers of quality come from.

A shape is what config.json says: enough for a cost table and for a plan. Where weights are needed too, they are drawn
at random and written piece by piece, so that a 70B model can be made on a small machine: memory and time do not depend
on what the numbers are.

    python tools/shapes.py smollm2-135m /tmp/smollm2 --tokenizer-from FOLDER
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

MIB, GIB = 2**20, 2**30
SHARD_BYTES = 2 * GIB
PIECE = 1 << 22  # elements drawn at a time
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "spiece.model",
)  # fmt: skip
STORED = {"float16": "F16", "bfloat16": "BF16"}


def _llama(vocab: int, hidden: int, wide: int, layers: int, heads: int, key_heads: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab, "hidden_size": hidden,
        "intermediate_size": wide, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": key_heads, "hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "bos_token_id": 1, "eos_token_id": 2, "dtype": "bfloat16", **more,
    }  # fmt: skip


def _qwen2(vocab: int, hidden: int, wide: int, layers: int, heads: int, key_heads: int, tied: bool) -> dict[str, Any]:
    of_qwen = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "max_position_embeddings": 32768, "tie_word_embeddings": tied, "bos_token_id": 151643, "eos_token_id": 151643,
    }  # fmt: skip
    return _llama(vocab, hidden, wide, layers, heads, key_heads, **of_qwen)


def _llama_3(hidden: int, wide: int, layers: int, heads: int) -> dict[str, Any]:
    ids = {"bos_token_id": 128000, "eos_token_id": 128001}
    return _llama(128256, hidden, wide, layers, heads, 8, rope_theta=5e5, max_position_embeddings=8192, **ids)


@dataclass(frozen=True)
class Shape:
    """What config.json says, and the number of parameters as published (a tied head counts once)."""

    config: dict[str, Any]
    parameters: int


SHAPES: dict[str, Shape] = {
    "llama-2-7b": Shape(_llama(32000, 4096, 11008, 32, 32, 32, max_position_embeddings=4096), 6_738_415_616),
    "llama-3-8b": Shape(_llama_3(4096, 14336, 32, 32), 8_030_261_248),
    "llama-3-70b": Shape(_llama_3(8192, 28672, 80, 64), 70_553_706_496),
    "qwen2.5-0.5b": Shape(_qwen2(151936, 896, 4864, 24, 14, 2, tied=True), 494_032_768),
    "qwen2.5-1.5b": Shape(_qwen2(151936, 1536, 8960, 28, 12, 2, tied=True), 1_543_714_304),
    "qwen2.5-7b": Shape(_qwen2(152064, 3584, 18944, 28, 28, 4, tied=False), 7_615_616_512),
    "opt-2.7b": Shape({
        "architectures": ["OPTForCausalLM"], "model_type": "opt", "vocab_size": 50272, "hidden_size": 2560,
        "ffn_dim": 10240, "num_hidden_layers": 32, "num_attention_heads": 32, "word_embed_proj_dim": 2560,
        "max_position_embeddings": 2048, "do_layer_norm_before": True, "activation_function": "relu",
        "tie_word_embeddings": True, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1, "dtype": "float16",
    }, 2_651_596_800),
    "bloomz-3b": Shape({
        "architectures": ["BloomForCausalLM"], "model_type": "bloom", "vocab_size": 250880, "hidden_size": 2560,
        "n_layer": 30, "n_head": 32, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 3, "dtype": "float16",
    }, 3_002_557_440),
    "flan-t5-3b": Shape({
        "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "vocab_size": 32128, "d_model": 2048,
        "d_ff": 5120, "d_kv": 64, "num_layers": 24, "num_decoder_layers": 24, "num_heads": 32,
        "feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 32, "is_encoder_decoder": True,
        "tie_word_embeddings": False, "decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
        "dtype": "bfloat16",
    }, 2_849_757_184),
    "base-7m": Shape(_llama(4096, 256, 688, 8, 8, 4, max_position_embeddings=512, tie_word_embeddings=True,
                            rms_norm_eps=1e-6, rope_theta=1e4, bos_token_id=0, eos_token_id=1), 6_852_864),
    "smollm2-135m": Shape(_llama(49152, 576, 1536, 30, 9, 3, rope_theta=1e5, max_position_embeddings=8192,
                                 tie_word_embeddings=True, bos_token_id=0, eos_token_id=0), 134_515_008),
    "tinyllama-1.1b": Shape(_llama(32000, 2048, 5632, 22, 32, 4, max_position_embeddings=2048), 1_100_048_384),
}  # fmt: skip


def config_of(name: str) -> dict[str, Any]:
    """The config.json of a shape. Raises: KeyError for a name that is not in SHAPES."""
    return copy.deepcopy(SHAPES[name].config)


def write_config(name: str, folder: Path, **other: Any) -> Path:
    """Write config.json alone, which is all that a plan needs, with `other` values where given; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(name) | other, indent=1) + "\n", encoding="utf-8")
    return folder


def write_random_model(
    name: str, folder: Path, tokenizer_from: Path | None, seed: int = 0, stored: str = "bfloat16",
    shard: int = SHARD_BYTES,
) -> Path:  # fmt: skip
    """Write config.json, another model's tokenizer if given, and random weights in shards of about `shard` bytes.

    stored: 'float16' or 'bfloat16'. Weights are normal with a deviation of 0.02, norms 1 and biases 0; a tied head is
    not written. Needs about 25 MiB beside torch, however large the model. Returns the folder.
    Raises: ValueError when the weights are not as many as published.
    """
    import torch

    write_config(name, folder, dtype=stored)
    for file in TOKENIZER_FILES:
        if tokenizer_from is not None and (tokenizer_from / file).is_file():
            shutil.copyfile(tokenizer_from / file, folder / file)
    tensors = tensors_of(config_of(name))
    count = sum(math.prod(shape) for shape in tensors.values())
    if count != SHAPES[name].parameters:
        raise ValueError(f"{name} has {count:,} weights, published are {SHAPES[name].parameters:,}: correct its shape")
    generator = torch.Generator().manual_seed(seed)
    shards = list(_shards(tensors, shard))
    files = {f"model-{number:05}-of-{len(shards):05}.safetensors": names for number, names in enumerate(shards, 1)}
    for file, names in files.items():
        _write_shard(folder / file, {tensor: tensors[tensor] for tensor in names}, generator, stored)
    where = {tensor: file for file, names in files.items() for tensor in names}
    index = {"metadata": {"total_size": 2 * count}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return folder


def tensors_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint's tensors, as transformers names them; a tied tensor once, by its first name.

    The head is there if the config says that it is not tied, even where transformers' skeleton ties it all the same
    (its T5 does, until a checkpoint that has a head is loaded).
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    kind = AutoModelForSeq2SeqLM if config.get("is_encoder_decoder") else AutoModelForCausalLM
    settings = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    with torch.device("meta"):
        model = kind.from_config(AutoConfig.for_model(config["model_type"], **settings))
    tensors = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    head = model.get_output_embeddings()
    if not config["tie_word_embeddings"] and head is not None:
        name = next(name for name, module in model.named_modules() if module is head) + ".weight"
        tensors[name] = tuple(head.weight.shape)
    return tensors


def _shards(tensors: dict[str, tuple[int, ...]], most: int) -> Iterator[list[str]]:
    """The names of each shard in order; a shard has one tensor or at most `most` bytes."""
    names: list[str] = []
    filled = 0
    for name, shape in tensors.items():
        size = 2 * math.prod(shape)
        if names and filled + size > most:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += size
    yield names


def _write_shard(path: Path, tensors: dict[str, tuple[int, ...]], generator: Any, stored: str) -> None:
    """One safetensors file, drawn as it is written: eight bytes of length, a JSON header, then the tensors in order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": STORED[stored], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in tensors.items():
            _write_tensor(file, name, shape, generator, stored)


def _write_tensor(file: IO[bytes], name: str, shape: tuple[int, ...], generator: Any, stored: str) -> None:
    import torch

    left = math.prod(shape)
    while left:
        size = min(left, PIECE)
        if name.endswith("bias"):
            piece = torch.zeros(size)
        elif len(shape) == 1:
            piece = torch.ones(size)
        else:
            piece = torch.randn(size, generator=generator).mul_(0.02)
        file.write(piece.to(getattr(torch, stored)).view(torch.uint8).numpy().data)
        left -= size


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a model of a well-known shape with random weights.")
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer-from", type=Path, help="model folder to copy a tokenizer from (else: config only)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stored", choices=STORED, default="bfloat16", help="format of the numbers on disk")
    args = parser.parse_args()
    if args.tokenizer_from is None:
        print(write_config(args.name, args.folder))
    else:
        print(write_random_model(args.name, args.folder, args.tokenizer_from, args.seed, args.stored))


if __name__ == "__main__":
    main()
