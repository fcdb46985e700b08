"""Makes a small T5 from scratch on texts at hand, so that an encoder-decoder can be tried without a download.

    python tools/pretrain_t5.py --output t5 --minutes 10 notes.txt talks.jsonl:text=dialogue

A byte-level BPE is trained on the texts, then a T5 of the FLAN form (gated units, a head of its own) learns to fill in
spans that were cut out of them (arXiv 1910.10683, section 3.3: 15 % of the tokens, in spans of 3) and, of every other
window, to go on after its first half (prefix language modelling, section 3.2.1). A run ends by the clock, so the
weights come out alike, not the same, when it is repeated.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import T5Config, T5ForConditionalGeneration

from edgegt.data import parse_columns, read_rows

PAD, END, UNKNOWN, FIRST_SENTINEL, SENTINELS = 0, 1, 2, 3, 32
SPECIALS = ("<pad>", "</s>", "<unk>", *(f"<extra_id_{number}>" for number in range(SENTINELS)))
CORRUPTED, SPAN = 0.15, 3
WIDTH = 256
Pair = tuple[list[int], list[int]]


def texts_of(sources: Sequence[str]) -> list[str]:
    """Every row of the files as one text; behind a colon the columns, as --columns of edgegt has them.

    Of conversations only what is not the assistant's: its answers are left for fine-tuning.
    """
    found = []
    for source in sources:
        path, _, columns = source.partition(":")
        for row in read_rows(Path(path), parse_columns(columns) if columns else None).rows:
            turns = "\n".join(turn.text for turn in row.turns if turn.role != "assistant")
            found.append(turns or row.context + row.completion)
    return found


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE that ends every text with end-of-text, as T5's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(SPECIALS), show_progress=False, initial_alphabet=alphabet,
    ))  # fmt: skip
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, output: Path) -> None:
    """What AutoTokenizer reads."""
    tokenizer.save(str(output / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    (output / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def build_model(vocabulary: int, layers: int) -> T5ForConditionalGeneration:
    """A T5 of the FLAN form with random weights, those of the head small enough to begin near a uniform guess."""
    model = T5ForConditionalGeneration(T5Config(
        vocab_size=vocabulary, d_model=WIDTH, d_kv=32, d_ff=2 * WIDTH, num_layers=layers, num_decoder_layers=layers,
        num_heads=8, feed_forward_proj="gated-gelu", tie_word_embeddings=False, dropout_rate=0.0, pad_token_id=PAD,
        eos_token_id=END, decoder_start_token_id=PAD,
    ))  # fmt: skip
    with torch.no_grad():
        model.lm_head.weight.mul_(WIDTH**-0.5)
    return model


def corrupted(ids: Sequence[int], draw: random.Random) -> Pair:
    """The ids with spans replaced by sentinels, and these spans behind their sentinels."""
    spans = max(1, min(SENTINELS - 1, round(len(ids) * CORRUPTED / SPAN)))
    starts = sorted(draw.sample(range(0, max(spans, len(ids) - SPAN), SPAN + 1), k=min(spans, len(ids) // (SPAN + 1))))
    read: list[int] = []
    written: list[int] = []
    at = 0
    for number, start in enumerate(starts):
        read += [*ids[at:start], FIRST_SENTINEL + number]
        written += [FIRST_SENTINEL + number, *ids[start : start + SPAN]]
        at = start + SPAN
    return [*read, *ids[at:], END], [*written, END]


def continued(ids: Sequence[int], draw: random.Random) -> Pair:
    """The beginning of the ids, and the rest of them."""
    cut = draw.randint(len(ids) // 4, 3 * len(ids) // 4)
    return [*ids[:cut], END], [*ids[cut:], END]


def pairs(documents: Sequence[Sequence[int]], length: int, seed: int) -> Iterator[Pair]:
    """Windows of the documents, corrupted or cut in two anew in every pass."""
    draw = random.Random(seed)
    windows = [ids[at : at + length] for ids in documents for at in range(0, len(ids), length)]
    windows = [window for window in windows if len(window) >= 4 * SPAN]
    while True:
        draw.shuffle(windows)
        yield from (draw.choice((corrupted, continued))(window, draw) for window in windows)


def padded(sides: Sequence[Sequence[int]], filler: int) -> torch.Tensor:
    """int64 [rows, longest], filled up on the right."""
    longest = max(map(len, sides))
    return torch.tensor([[*side, *[filler] * (longest - len(side))] for side in sides])


def pretrain(model: T5ForConditionalGeneration, stream: Iterator[Pair], args: argparse.Namespace) -> None:
    """AdamW until the clock runs out, the rate warmed up and then falling with what is left of the time."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    started, step, losses = time.perf_counter(), 0, []
    while (spent := (time.perf_counter() - started) / (60 * args.minutes)) < 1:
        batch = [next(stream) for _ in range(args.batch_size)]
        read, labels = padded([one for one, _ in batch], PAD), padded([two for _, two in batch], -100)
        optimizer.param_groups[0]["lr"] = args.lr * min(1.0, (step + 1) / 100) * max(0.05, 1 - spent)
        loss = model(input_ids=read, attention_mask=(read != PAD).long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        step += 1
        if step % 100 == 0:
            print(f"step {step}, {spent:.0%} of the time: loss {sum(losses[-100:]) / 100:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("sources", nargs="+", metavar="FILE[:COLUMNS]")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens of a window")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    if args.threads:
        torch.set_num_threads(args.threads)
    texts = texts_of(args.sources)
    tokenizer = train_tokenizer(texts, args.vocabulary)
    documents = [encoded.ids[:-1] for encoded in tokenizer.encode_batch(texts)]
    model = build_model(tokenizer.get_vocab_size(), args.layers)
    tokens = sum(map(len, documents))
    print(f"{len(texts)} texts, {tokens:,} tokens; {model.num_parameters():,} parameters")
    pretrain(model.train(), pairs(documents, args.length, args.seed), args)
    model.eval().save_pretrained(args.output)
    save_tokenizer(tokenizer, args.output)


if __name__ == "__main__":
    main()
