"""What SelectionCallback spends and reaches in transformers' Trainer, against the same Trainer without it.

    python tools/bench_callback.py --model DIR --data FILE --columns prompt=mr,completion=ref

FLOPs are those of torch's FlopCounterMode over the whole training, measurements of importance included, on the same
batches. Attention is transformers' eager one, because the counter does not know torch's kernel on a CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils.logging import disable_progress_bar

sys.path.append(str(Path(__file__).resolve().parents[1]))  # after PYTHONPATH, which may name another copy

from edgegt import SelectionCallback
from edgegt.data import Example, parse_columns, read_rows, split_rows, tokenize
from edgegt.data.examples import IGNORE
from edgegt.source import load_tokenizer


class Counting(TrainerCallback):  # type: ignore[misc]
    """Counts from the first step to the last; the callbacks before it have prepared by then."""

    def __init__(self) -> None:
        self.counter = FlopCounterMode(display=False)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.counter.__enter__()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.counter.__exit__(None, None, None)


def row_of(example: Example) -> dict[str, list[int]]:
    """A row as the Trainer wants it: ids, and labels where something is learned."""
    ids = [*example.prompt, *example.completion]
    return {"input_ids": ids, "labels": [IGNORE] * len(example.prompt) + list(example.completion)}


def collated(rows: list[dict[str, list[int]]], pad: int = 0) -> dict[str, torch.Tensor]:
    """Rows padded on the right."""
    width = max(len(row["input_ids"]) for row in rows)

    def filled(name: str, value: int) -> torch.Tensor:
        return torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])

    there = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
    found = {"input_ids": filled("input_ids", pad), "labels": filled("labels", IGNORE)}
    return found | {"attention_mask": torch.tensor(there)}


def trained(
    arguments: argparse.Namespace, sides: list[list[dict[str, list[int]]]], rho: float | None
) -> dict[str, Any]:
    """One training, without the callback where rho is None: its FLOPs, held-out losses and seconds."""
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    counting, selection = Counting(), None if rho is None else SelectionCallback(rho)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(
                folder, max_steps=arguments.steps, per_device_train_batch_size=arguments.batch_size,
                learning_rate=arguments.lr_full if rho is None else arguments.lr, save_strategy="no",
                warmup_steps=max(1, arguments.steps // 33), report_to=[], use_cpu=True,
                disable_tqdm=True, logging_steps=arguments.steps, seed=arguments.seed,
                activation_checkpointing=arguments.checkpointing, remove_unused_columns=False,
            ),
            train_dataset=sides[0], eval_dataset=sides[1], data_collator=collated,
            callbacks=[counting] if selection is None else [selection, counting],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        before = trainer.evaluate()["eval_loss"]
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        after = trainer.evaluate()["eval_loss"]
    found = {"flops": counting.counter.get_total_flops(), "before": before, "after": after, "seconds": seconds}
    return found if selection is None else found | {"own_share": selection.share, "selected": selection.selected}


def main() -> None:
    """Train both ways and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--columns")
    parser.add_argument("--rho", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3.2e-3)
    parser.add_argument("--lr-full", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpointing", action="store_true")
    arguments = parser.parse_args()
    disable_progress_bar()
    columns = parse_columns(arguments.columns) if arguments.columns else None
    tokenizer = load_tokenizer(Path(arguments.model))
    halves = split_rows(read_rows(Path(arguments.data), columns).rows, 0.1, arguments.seed)
    sides = [[row_of(one) for one in tokenize(rows, tokenizer, 512)[0]] for rows in halves]
    sides[1] = sides[1][:256]
    full, chosen = trained(arguments, sides, None), trained(arguments, sides, arguments.rho)
    print(json.dumps({"full": full, "selected": chosen, "share": chosen["flops"] / full["flops"]}, indent=1))


if __name__ == "__main__":
    main()
