"""edgegt in ten lines: a model, rows from memory, budgets; then its answers.

python docs/examples/trainer.py
"""

import json

import edgegt
from edgegt import home

rows = [json.loads(line) for line in home.TRAIN.read_text(encoding="utf-8").splitlines()[:240]]
trainer = edgegt.Trainer(home.MODEL, rows, device="auto", rho=0.5, memory="2GiB", steps=30)
trained = trainer.train()
print(f"held-out loss {trained.loss_before:.3f} -> {trained.loss_after:.3f}, {trained.flops_share:.1%} of full FLOPs")
print(rows[0]["prompt"], trainer.generate(rows[0]["prompt"]))
print(trainer.export("my-assistant"))
