"""An int8 model in a plain PyTorch loop: select tensors, train them with any optimizer, save a patch.

python docs/examples/plain_loop.py
edgegt eval --model MODEL --patch plain.safetensors --data FILE
"""

import json

import torch
from transformers import AutoTokenizer

import edgegt
from edgegt import home

tokenizer = AutoTokenizer.from_pretrained(home.MODEL)
model = edgegt.load_int8_model(home.MODEL)
model.select(["lm_head.weight", *(name for name in model.names if ".layers.5." in name)])
optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=5e-4, weight_decay=0.0)

losses = []
for line in home.TRAIN.read_text(encoding="utf-8").splitlines()[:100]:
    row = json.loads(line)
    prompt, completion = (tokenizer(row[side])["input_ids"] for side in ("prompt", "completion"))
    ids = torch.tensor([[*prompt, *completion, tokenizer.eos_token_id]])
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())

print(f"loss of the first ten rows {sum(losses[:10]) / 10:.3f}, of the last ten {sum(losses[-10:]) / 10:.3f}")
model.save_patch("plain.safetensors", separator=home.SEPARATOR)
