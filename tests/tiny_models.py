"""Random models of a few thousand weights, one per family, and what tests do with them: save, load in int8, batches."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BartConfig,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    T5Config,
)

from edgegt.architecture import auto_class, has_own_head, is_router, untie_head
from edgegt.data import Batch, Example, Row, collate
from edgegt.model import Int8Model, load_int8
from edgegt.quant import Backend, TorchBackend
from edgegt.source import open_source, read_config

SHARED = Path(__file__).resolve().parents[2] / "shared"
VOCABULARY = 320
CPU = torch.device("cpu")
_IDS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_WIDE = {**_IDS, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
_ONE_OF_THREE = {**_WIDE, "hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1}
_FALCON = {**_IDS, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
_T5 = {
    "vocab_size": VOCABULARY, "d_model": 64, "d_ff": 96, "num_heads": 4, "d_kv": 16, "decoder_start_token_id": 0,
    "initializer_factor": 0.3,
}  # fmt: skip
_GROUPED = {**_WIDE, "num_key_value_heads": 2, "max_position_embeddings": 128}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

# Mixtures of experts. Their routers are made decisive (`float_model`): near a tie the last bit chooses the expert.
MIXTURES: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: MixtralConfig(**_GROUPED, num_local_experts=4, num_experts_per_tok=2),
    "qwen2-moe": lambda: Qwen2MoeConfig(
        **_GROUPED, **_EXPERTS, shared_expert_intermediate_size=48, mlp_only_layers=[1],
    ),
    "qwen3-moe": lambda: Qwen3MoeConfig(**_GROUPED, **_EXPERTS, head_dim=16, norm_topk_prob=True),
}  # fmt: skip

FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**_GROUPED, tie_word_embeddings=True),
    "llama-untied": lambda: LlamaConfig(**_GROUPED, tie_word_embeddings=False),
    "gpt2": lambda: GPT2Config(**_IDS, n_embd=64, n_layer=3, n_head=4, n_positions=128),
    "opt": lambda: OPTConfig(
        **_IDS, hidden_size=64, ffn_dim=96, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=64,
        max_position_embeddings=128,
    ),
    "qwen2": lambda: Qwen2Config(**_GROUPED),
    "qwen3": lambda: Qwen3Config(**_GROUPED, head_dim=16),
    "mistral": lambda: MistralConfig(**_GROUPED, head_dim=16),
    "phi3": lambda: Phi3Config(**_GROUPED),
    "gpt-neox": lambda: GPTNeoXConfig(**_WIDE, max_position_embeddings=128),
    "gemma3": lambda: Gemma3TextConfig(**_GROUPED, head_dim=16, sliding_window=8),
    "smollm": lambda: LlamaConfig(**_ONE_OF_THREE, max_position_embeddings=128, tie_word_embeddings=True),
    "bloom": lambda: BloomConfig(**_IDS, hidden_size=64, n_layer=3, n_head=4),
    "gemma2": lambda: Gemma2Config(**_GROUPED, head_dim=16, sliding_window=8),
    "falcon": lambda: FalconConfig(**_FALCON, new_decoder_architecture=False, parallel_attn=True),
    "falcon-grouped": lambda: FalconConfig(**_FALCON, new_decoder_architecture=True, num_kv_heads=2),
    "falcon-alibi": lambda: FalconConfig(**_FALCON, alibi=True, multi_query=False, parallel_attn=False, bias=True),
    **{name: MIXTURES[name] for name in ("mixtral", "qwen2-moe")},
}  # fmt: skip

# Encoder-decoders.
PAIRS: dict[str, Callable[[], Any]] = {
    "t5": lambda: T5Config(**_T5, num_layers=3),
    "flan-t5": lambda: T5Config(
        **_T5, num_layers=2, num_decoder_layers=3, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    ),
    "bart": lambda: BartConfig(
        **_IDS, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=96, decoder_ffn_dim=80, max_position_embeddings=128, decoder_start_token_id=0,
    ),
}  # fmt: skip


EVERY = FAMILIES | PAIRS
START = 0


def float_model(config: Any, attention: str | None = "eager", untied: bool = False, seed: int = 0) -> Any:
    """transformers' own float32 model with random weights, in eval mode (no dropout); attention None: its default."""
    torch.manual_seed(seed)
    options = {} if attention is None else {"attn_implementation": attention}
    config = copy.deepcopy(config)
    config._experts_implementation = "eager"
    model = auto_class(config).from_config(config, dtype=torch.float32, **options).eval()
    if untied or has_own_head(config):
        untie_head(model)
    with torch.no_grad():
        for module in model.modules():
            for router in (p for p in module.parameters(recurse=False) if is_router(module, p)):
                router.normal_(0, 0.3)
    return model


def save_model(folder: Path, config: Any, seed: int = 0, **options: Any) -> Any:
    """Save a random model with safetensors; returns it. Norms and biases are made different from 1 and 0."""
    model = float_model(config, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder, **options)
    return model


def load(folder: Path, cache: Path, backend: Backend | None = None, streams: bool = False) -> Int8Model:
    """The saved model in int8, with torch's own integer products unless a backend is given."""
    given = read_config(str(folder)), open_source(str(folder)), cache, backend or TorchBackend(), CPU
    return load_int8(*given, streams)


def examples(count: int, seed: int = 0, vocabulary: int = VOCABULARY, longest: int = 20) -> list[Example]:
    """Rows of random ids: a prompt, then a completion that the prompt says something about."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        prompt = tuple(draw.randrange(3, vocabulary) for _ in range(draw.randint(4, longest)))
        made.append(Example((1, *prompt), (*prompt[: draw.randint(2, 6)], 2), Row("p", "c", number + 1)))
    return made


def batch_of(count: int, seed: int = 0, vocabulary: int = VOCABULARY, start: int | None = None) -> Batch:
    """One batch of random rows; start: of an encoder-decoder, what its decoder begins with."""
    return collate([replace(example, start=start) for example in examples(count, seed, vocabulary)], 0)


def start_of(family: str) -> int | None:
    """What the decoder of an encoder-decoder begins with."""
    return START if family in PAIRS else None


def logits_of(module: Any, batch: Batch) -> torch.Tensor:
    """transformers' logits of the kept positions."""
    inputs: dict[str, Any] = {"decoder_input_ids": batch.decoder_input_ids}
    if batch.decoder_input_ids is None:
        inputs = {"position_ids": batch.position_ids, "logits_to_keep": batch.shape.kept}
    with torch.no_grad():
        read = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        found: torch.Tensor = module(**read, **inputs, use_cache=False).logits
        return found


def some_selections(names: Sequence[str], count: int, seed: int = 0) -> list[set[str]]:
    """Every first and last name alone, then random choices of 1 to 10 names."""
    draw = random.Random(seed)
    drawn = [set(draw.sample(list(names), min(len(names), draw.choice([1, 1, 2, 5, 10])))) for _ in range(count)]
    return [{names[0]}, {names[-1]}, set(names), *drawn]
