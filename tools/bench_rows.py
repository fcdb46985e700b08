"""The rows of the benchmark against peers: the same tokens for `edgegt run` and for everything it is compared with.

Rows are words of a tokenizer with one id per word over the model's whole vocabulary, drawn from Zipf's law with a
fixed seed, so that a shape with random weights has data of any length without downloading a tokenizer. They are written
as a user's file, read back by edgegt's own reading, and put into batches in the order in which a run trains on them;
peers get these batches as tensors.

For some families transformers builds a tokenizer of their own kind from any file's vocabulary and merges. So the words
(' A', ' B', ... ' Aa', ' Ab', ...) are those of byte-level BPE, each merged from the word without its last letter. That
reads the same everywhere: what a merge begins with begins with a space, and no two letters merge by themselves.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

SPECIAL = ("<eos>", "<pad>", "<unk>")
SPACE = "Ġ"
LETTERS = (SPACE, *ascii_uppercase, *ascii_lowercase)
SEED = 0
HELD_OUT = 4
TRAIN_FILE, HELD_OUT_FILE, BATCHES_FILE = "rows.jsonl", "held_out.jsonl", "batches.safetensors"


@dataclass(frozen=True)
class Size:
    """Rows of a batch, inputs of a row, and how many of these predict a token that is learned."""

    rows: int
    tokens: int
    supervised: int

    def __post_init__(self) -> None:
        if not 2 <= self.supervised < self.tokens:
            raise ValueError(f"{self.supervised} supervised of {self.tokens} tokens: give 2 to {self.tokens - 1}")


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Write a tokenizer of `vocabulary` ids into a model folder: special ones and letters first, then words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = words(vocabulary)
    ids = {token: index for index, token in enumerate((*SPECIAL, *LETTERS, *known))}
    tokenizer = Tokenizer(models.BPE(ids, [(word[:-1], word[-1]) for word in known]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    eos, pad, unknown = SPECIAL
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, pad_token=pad, unk_token=unknown
    ).save_pretrained(folder)


def words(vocabulary: int) -> list[str]:
    """The words of a vocabulary of so many ids, the most frequent first, with a space as byte-level BPE writes it.

    Raises: ValueError when there is no room for any.
    """
    taken = len(SPECIAL) + len(LETTERS)
    count = vocabulary - taken
    if count < 1:
        raise ValueError(f"a vocabulary of {vocabulary} has no room for words: {taken} ids are taken")
    found = [SPACE + letter for letter in ascii_uppercase]
    for word in found:
        if len(found) >= count:
            break
        found += [word + letter for letter in ascii_lowercase]
    return found[:count]


def write_rows(folder: Path, vocabulary: int, size: Size, steps: int) -> None:
    """Write the files of prompts and completions: `steps` batches to train on, and a few held-out rows."""
    draw = random.Random(SEED)
    known = [word.replace(SPACE, " ") for word in words(vocabulary)]
    weights = list(accumulate(1 / (rank + 1) for rank in range(len(known))))

    def text(count: int) -> str:
        return "".join(draw.choices(known, cum_weights=weights, k=count))

    for name, count in ((TRAIN_FILE, steps * size.rows), (HELD_OUT_FILE, HELD_OUT)):
        with (folder / name).open("w", encoding="utf-8") as file:
            for _ in range(count):
                # Inputs are prompt and completion but for the last token, which is the end that edgegt appends.
                row = {"prompt": text(size.tokens - size.supervised + 1), "completion": text(size.supervised - 1)}
                file.write(json.dumps(row) + "\n")


def write_batches(folder: Path, model: Path, size: Size, steps: int) -> None:
    """Write the first batches of a run on these rows as tensors: input_ids and labels, int64 [steps, rows, tokens].

    labels: what each position predicts, -100 where nothing is learned; they are shifted already.
    """
    import torch
    from safetensors.torch import save_file

    found = list(batches(folder, model, size, steps))
    labels = torch.full((steps, size.rows, size.tokens), -100, dtype=torch.int64)
    for index, batch in enumerate(found):
        labels[index, :, size.tokens - batch.labels.shape[1] :] = batch.labels
    tensors = {"input_ids": torch.stack([batch.input_ids for batch in found]), "labels": labels}
    save_file(tensors, folder / BATCHES_FILE)


def batches(folder: Path, model: Path, size: Size, steps: int) -> list[Any]:
    """The first batches of a run on these rows, as edgegt reads, tokenises, orders and pads them.

    Raises: ValueError when they are not of the size that was asked for.
    """
    from transformers import AutoTokenizer

    from edgegt.data import collate, length_bucketed, read_rows, tokenize

    tokenizer = AutoTokenizer.from_pretrained(str(model), local_files_only=True)
    examples, _ = tokenize(read_rows(folder / TRAIN_FILE, None).rows, tokenizer, size.tokens)
    order = length_bucketed([len(example.inputs) for example in examples], size.rows, SEED, 0)[:steps]
    made = [collate([examples[index] for index in rows], tokenizer.pad_token_id) for rows in order]
    for batch in made:
        shape = tuple(batch.input_ids.shape)
        if shape != (size.rows, size.tokens) or batch.supervised != size.rows * size.supervised:
            raise ValueError(f"a batch is {shape} with {batch.supervised} supervised tokens, wanted is {size}")
    return made


def read_batches(folder: Path) -> list[tuple[Tensor, Tensor]]:
    """(input_ids, labels), int64 [rows, tokens] each, of every step."""
    from safetensors.torch import load_file

    tensors = load_file(folder / BATCHES_FILE)
    return list(zip(tensors["input_ids"], tensors["labels"], strict=True))
