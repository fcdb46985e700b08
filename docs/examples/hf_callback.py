"""transformers' Trainer as it is, within half of the FLOPs of full training: one line more.

pip install "edgegt[hf]" && python docs/examples/hf_callback.py
"""

import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import edgegt
from edgegt import home

tokenizer = AutoTokenizer.from_pretrained(home.MODEL)
model = AutoModelForCausalLM.from_pretrained(home.MODEL, dtype=torch.float32)


def tokenized(row):
    prompt, completion = (tokenizer(row[side])["input_ids"] for side in ("prompt", "completion"))
    completion = [*completion, tokenizer.eos_token_id]
    return {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}


def collate(rows):
    width = max(len(row["input_ids"]) for row in rows)
    filled = {"input_ids": tokenizer.pad_token_id or 0, "labels": -100}
    batch = {
        name: torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])
        for name, value in filled.items()
    }
    batch["attention_mask"] = torch.tensor([[int(at < len(row["input_ids"])) for at in range(width)] for row in rows])
    return batch


rows = [tokenized(json.loads(line)) for line in home.TRAIN.read_text(encoding="utf-8").splitlines()]
selection = edgegt.SelectionCallback(rho=0.5)
trainer = Trainer(
    model,
    TrainingArguments("hf-run", max_steps=40, learning_rate=2e-3, logging_steps=20, report_to=[], disable_tqdm=True),
    train_dataset=rows,
    data_collator=collate,
    callbacks=[selection],
)
trainer.train()
print(f"{selection.share:.1%} of the FLOPs of full training, {len(selection.selected)} tensors, the last round:")
print("\n".join(selection.selected))
