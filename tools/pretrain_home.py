"""Makes the small base model that ships with edgegt: trains its tokenizer and pretrains it from scratch.

It exists so that the shipped weights can be made again from the grammar alone (tools/home_grammar.py): nothing is
downloaded.  The base learns the general language of the home assistant; the household's words stay unknown to it.

The shipped weights were made in four runs of this file, each but the first going on from the one before (--start); the
options that differed from the defaults were
  1  --minutes 15 --families 0            --threads 1
  2  --minutes 13 --families 0.5  --lr 2e-3 --seed 1
  3  --minutes 10 --families 0.35 --lr 2e-3 --seed 2 --threads 1
  4  --minutes 9  --families 0.25 --drill 0.25 --lr 1.8e-3 --seed 3 --threads 1
A run ends by the clock, so the weights come out alike, not the same, when this is repeated.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import home_grammar as grammar

SPECIALS = ("<s>", "</s>", "<pad>")
BOS, EOS, PAD = range(3)
CONTEXT = 256
Example = tuple[list[int], int]  # token ids and where the completion starts


def train_tokenizer(vocab_size: int, rows: int) -> Tokenizer:
    """Byte-level BPE; every digit is a token of its own so that numbers can be copied."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\d"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(SPECIALS), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    texts = (row.text + grammar.SEP + grammar.completion(row.action)
             for row in itertools.islice(grammar.pretraining_stream(seed=1, family_share=0.0), rows))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B:1",
                                                             special_tokens=[("<s>", BOS)])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Writes what AutoTokenizer reads; the class is given by the name that every transformers release knows."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
              "pad_token": "<pad>", "model_max_length": CONTEXT, "clean_up_tokenization_spaces": False}
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def build_model(vocab_size: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=CONTEXT, tie_word_embeddings=True, bos_token_id=BOS,
        eos_token_id=EOS, pad_token_id=PAD,
    )
    return LlamaForCausalLM(config)


def examples(tokenizer: Tokenizer, seed: int, family_share: float, drill_share: float) -> Iterator[Example]:
    """<s> prompt completion </s>, tokenized in two parts exactly as fine-tuning does."""
    for row in grammar.pretraining_stream(seed, family_share=family_share, drill_share=drill_share):
        prompt = tokenizer.encode(row.text + grammar.SEP).ids
        answer = tokenizer.encode(grammar.completion(row.action), add_special_tokens=False).ids
        yield prompt + answer + [EOS], len(prompt)


def batches(source: Iterator[Example], size: int, rng: random.Random) -> Iterator[list[Example]]:
    """Batches of similar lengths, so that little is wasted on padding."""
    while True:
        pool = sorted(itertools.islice(source, size * 16), key=lambda example: len(example[0]))
        groups = [pool[start:start + size] for start in range(0, len(pool), size)]
        rng.shuffle(groups)
        yield from groups


def tensors(batch: list[Example], prompt_weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and the weight of predicting each of them; padding stands on the right and weighs nothing."""
    length = max(len(ids) for ids, _ in batch)
    tokens = torch.full((len(batch), length), PAD)
    weights = torch.zeros(len(batch), length)
    for index, (ids, start) in enumerate(batch):
        tokens[index, :len(ids)] = torch.tensor(ids)
        weights[index, :start] = prompt_weight
        weights[index, start:len(ids)] = 1.0
    return tokens, weights


def loss_of(model: LlamaForCausalLM, tokens: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The weighted loss to train on, and the plain loss on completions to look at."""
    logits: torch.Tensor = model(input_ids=tokens[:, :-1]).logits
    each = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    weight = weights[:, 1:].flatten()
    answer = (weight == 1.0).float()
    return (each * weight).sum() / weight.sum(), float((each.detach() * answer).sum() / answer.sum())


def rate(progress: float, peak: float) -> float:
    """Short warm-up, then a cosine down to a fiftieth."""
    if progress < 0.02:
        return peak * (0.05 + progress / 0.02)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def optimizer_of(model: LlamaForCausalLM, peak: float) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95))


def pretrain(model: LlamaForCausalLM, tokenizer: Tokenizer, args: argparse.Namespace) -> dict[str, Any]:
    """Trains until the time is up; what it did goes to the report."""
    optimizer = optimizer_of(model, args.lr)
    source = batches(examples(tokenizer, 2 + args.seed, args.families, args.drill), args.batch, random.Random(0))
    began, seconds, step, smooth = time.monotonic(), args.minutes * 60.0, 0, 0.0
    model.train()
    while (elapsed := time.monotonic() - began) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = rate(elapsed / seconds, args.lr)
        loss, shown = loss_of(model, *tensors(next(source), args.prompt_weight))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        smooth = shown if step == 1 else 0.98 * smooth + 0.02 * shown
        if step % 200 == 0:
            print(f"step {step} {elapsed:.0f} s completion loss {smooth:.4f}", flush=True)
        if step % 1000 == 0:
            model.save_pretrained(args.out)
    return {"steps": step, "rows": step * args.batch, "seconds": round(time.monotonic() - began),
            "completion_loss": round(smooth, 4), "parameters": model.num_parameters()}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Pretrain the shipped home assistant.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--prompt-weight", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="one is quicker on a machine that others use too")
    parser.add_argument("--families", type=float, default=0.5, help="share of rows spoken in invented households")
    parser.add_argument("--drill", type=float, default=0.0, help="share of rows full of numbers")
    parser.add_argument("--start", type=Path, help="go on from this base instead of from scratch")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.start is None:
        tokenizer = train_tokenizer(args.vocab, rows=30000)
        model = build_model(tokenizer.get_vocab_size())
    else:
        tokenizer = Tokenizer.from_file(str(args.start / "tokenizer.json"))
        model = LlamaForCausalLM.from_pretrained(args.start)
    save_tokenizer(tokenizer, args.out)
    model.generation_config.max_new_tokens = 64
    model.generation_config.do_sample = False
    report = pretrain(model, tokenizer, args)
    model.save_pretrained(args.out)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
