"""The float32 twin of a run for bench_quality.py: the same tensors in the same rounds, by the same loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgegt.log import Log


class FloatTwin:
    """transformers' float32 model of which exactly what another run's plans say is trained, round by round.

    The head is a matrix of its own where a plan trains it, as in the int8 model; of a head of which only some rows are
    trained, the other rows get no gradient and stay. Optimizer states stay for tensors that are selected again.
    """

    def __init__(self, setup: Any, log: Log, plans: Path, folder: Any) -> None:
        import torch

        from edgegt.architecture import head_name
        from edgegt.full import FloatTrainee
        from edgegt.optimizer import AdamW
        from edgegt.run import keeper_of

        self.keeper = keeper_of(setup, folder, log)
        trainee = FloatTrainee(setup, log, self.keeper)
        self.setup, self.log, self.plans = setup, log, read_plans(plans)
        self.module, self.meter, self.progress = trainee.module, trainee.meter, trainee.progress
        head, layer = head_name(self.module), self.module.get_output_embeddings()
        if layer.weight is self.module.get_input_embeddings().weight:
            layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
        self.parameters: dict[str, Any] = dict(self.module.named_parameters())
        self.head, self.resting = head, torch.zeros(layer.weight.shape[0], 1, dtype=torch.bool)  # rows of the head
        if any(plan["head_rows"] is not None for plan in self.plans):
            self.resting[:] = True
            self.resting[list(setup.corpus.used_tokens)] = False
            self.parameters[head].register_hook(lambda gradient: gradient.masked_fill(self.resting, 0.0))
        self.optimizer = AdamW(False, setup.options.weight_decay)

    def train(self) -> None:
        """All rounds, through edgegt's own loop."""
        from edgegt.data import collate
        from edgegt.optimizer import schedule
        from edgegt.train import Parts, Recipe, train_round

        setup, options = self.setup, self.setup.options
        total = setup.schedule.steps
        recipe = Recipe(
            lambda done: schedule(options.schedule, setup.lr, done, total, options.warmup),
            options.max_grad_norm, total, 2 * setup.full_flops, lambda shape: 0,
        )  # fmt: skip
        for index, plan in enumerate(self.plans):
            live = {name: self.parameters[name] for name in plan["selected"]}
            for name, parameter in self.parameters.items():
                parameter.requires_grad_(name in live)
            first = plan["first_step"]
            batches = [
                (epoch, collate([setup.corpus.train[i] for i in indices], setup.pad_id))
                for epoch, indices in setup.schedule.batches[first : first + plan["steps"]]
            ]
            parts = Parts(self.module, setup.device, live, self._step, lambda: None, self.meter, setup.watch)
            fused = all(batch.shape.rows <= plan["micro_batch"] for _, batch in batches)
            train_round(parts, recipe, batches, plan["micro_batch"], index, self.progress, self.keeper.metrics,
                        self.log.step, fused)  # fmt: skip

    def _step(self, name: str, gradient: Any, lr: float) -> None:
        weight = self.parameters[name].data
        before = weight.clone() if name == self.head else None
        self.optimizer.update(name, weight, gradient, lr)
        if before is not None:
            weight.copy_(before.where(self.resting, weight))  # weight decay would shrink the rows that rest


def read_plans(folder: Path) -> list[dict[str, Any]]:
    """plan-0.json, plan-1.json, ... of a run folder."""
    paths = sorted(folder.glob("plan-*.json"), key=lambda path: int(path.stem.rpartition("-")[2]))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]
