"""Full fine-tuning in float32, as transformers runs it: the strategy to compare with, through the same loop.

Every tensor is trained, the head sees every position, states are float32. Its FLOPs are by definition rho = 1.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from edgegt.architecture import is_transposed
from edgegt.attention import register_attention
from edgegt.cache import cache_dir
from edgegt.cost import BatchShape, Work
from edgegt.data import Batch, collate
from edgegt.data.batches import IGNORE
from edgegt.errors import BudgetError
from edgegt.flops import FlopMeter, attach
from edgegt.folder import RunFolder
from edgegt.log import Log
from edgegt.memory import LIBRARY_BYTES, slack_bytes, worst_shape
from edgegt.optimizer import AdamW, schedule
from edgegt.patch import save_patch
from edgegt.prepare import Setup
from edgegt.rates import of_profile
from edgegt.source import fingerprint
from edgegt.train import Parts, Progress, Recipe, train_round
from edgegt.trainee import interrupted, stopped_by_signals
from edgegt.units import format_bytes
from edgegt.version import __version__

# Log-probabilities and two gradients of that size exist at the loss.
_LOGIT_BYTES = 12


class FloatTrainee:
    """The float model of one run, all of it trained."""

    backend = "float32"
    probe_flops = 0

    def __init__(self, setup: Setup, log: Log) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        self.setup, self.log = setup, log
        self._check()
        self.module: Any = AutoModelForCausalLM.from_pretrained(
            str(setup.source.directory), dtype=torch.float32, attn_implementation=register_attention(),
            local_files_only=True, trust_remote_code=False, use_safetensors=True,
        ).to(setup.device).eval()  # fmt: skip
        self.meter = FlopMeter()
        attach(self.module, self.meter)
        self.fingerprint = fingerprint(setup.source, cache_dir() / "fingerprints.json")
        self.progress = Progress()
        self.complete = False
        self.after_s = 0.0

    def _check(self) -> None:
        """Raises: BudgetError when full fine-tuning does not fit even with one row at a time."""
        setup = self.setup
        least = sum(full_terms(setup, 1).values())
        if least > setup.memory_bytes:
            raise BudgetError(
                f"full fine-tuning needs {math.ceil(least / 2**20)} MiB and the budget is "
                f"{format_bytes(setup.memory_bytes)}: give --memory {math.ceil(least / 2**20)}MiB, or the default "
                "strategy",
                smallest_bytes=least,
            )

    def train(self, folder: RunFolder, outcome: Any) -> None:
        """One round over all batches. Raises: Interrupted after the step in which a signal came."""
        self.folder = folder
        setup, options = self.setup, self.setup.options
        micro_batch = self._micro_batch()
        terms = full_terms(setup, micro_batch)
        outcome.predicted_flops, outcome.predicted_peak, outcome.memory_terms = (
            setup.full_flops, sum(terms.values()), terms,
        )  # fmt: skip
        table, shapes = setup.need.table, setup.schedule.shapes
        outcome.device_step_s = of_profile(setup.resolved.profile).full_step_s(table, shapes[len(shapes) // 2])
        parameters = dict(self.module.named_parameters())
        self._record_plan(micro_batch, terms, list(parameters))
        optimizer = AdamW(False, options.weight_decay)

        def step(name: str, gradient: torch.Tensor, lr: float) -> None:
            optimizer.update(name, parameters[name].data, gradient, lr)

        batches = [
            (epoch, _everywhere(collate([setup.corpus.train[i] for i in rows], setup.pad_id, options.max_length)))
            for epoch, rows in setup.schedule.batches
        ]
        total = setup.schedule.steps
        recipe = Recipe(
            lambda done: schedule(options.schedule, setup.lr, done, total, options.warmup),
            options.max_grad_norm, total, setup.flops, lambda shape: 0, deadline=setup.deadline(self.after_s),
        )  # fmt: skip
        parts = Parts(self.module, setup.device, parameters, step, lambda: None, self.meter, setup.watch)
        self.log.start_steps(total)
        with stopped_by_signals(self.progress):
            train_round(parts, recipe, batches, micro_batch, 0, self.progress, self.folder.metrics,
                        self.log.step)  # fmt: skip
        if self.progress.stop is not None:
            raise interrupted(self.progress, total, self.folder)
        if self.progress.late:
            self.log.fallback(f"the time budget ended training after step {self.progress.step} of {total}")
        self.complete = True

    def save(self, folder: RunFolder) -> None:
        """The patch: every tensor, matrices as [out, in]."""
        about = self.setup.source.name, __version__, self.setup.corpus.separator
        save_patch(folder.patch, whole_patch(self.module), self.fingerprint, *about)

    @property
    def held_bytes(self) -> int:
        """What the float model takes more than the int8 base that evaluation is planned with."""
        return self.setup.need.table.float_bytes - self.setup.need.table.base_bytes

    def _micro_batch(self) -> int:
        rows = self.setup.options.batch_size
        while rows > 1 and sum(full_terms(self.setup, rows).values()) > self.setup.memory_bytes:
            rows //= 2
        return rows

    def _record_plan(self, micro_batch: int, terms: dict[str, int], names: list[str]) -> None:
        setup = self.setup
        table = setup.need.table
        self.folder.write("plan-0.json", {
            "round": 0, "first_step": 0, "steps": setup.schedule.steps, "strategy": "full", "selected": names,
            "recompute": [], "micro_batch": micro_batch,
            "accumulation": -(-setup.options.batch_size // micro_batch), "value": 0.0, "optimality_gap": 0.0,
            "predicted": {"flops": setup.full_flops, "flops_ratio": 1.0, "peak_bytes": sum(terms.values()),
                          "step_s": 0.0},
            "budget": {"flops": setup.flops, "memory_bytes": setup.memory_bytes}, "memory": terms,
            "candidates": [{"name": w.name, "kind": w.kind, "block": w.block, "numel": w.numel, "importance": 0.0,
                            "selected": True} for w in table.weights],
            "notes": [],
        })  # fmt: skip


def whole_patch(module: Any) -> dict[str, torch.Tensor]:
    """Every tensor of a float model as a patch holds it: on the CPU, matrices of linears as [out, in]."""
    turned = {f"{name}.weight" for name, part in module.named_modules() if is_transposed(part)}
    found = {name: parameter.detach().cpu() for name, parameter in module.named_parameters()}
    return {name: tensor.t() if name in turned else tensor for name, tensor in found.items()}


def full_terms(setup: Setup, micro_batch: int) -> dict[str, int]:
    """Named terms of the peak of full fine-tuning in float32."""
    table, rows = setup.need.table, min(micro_batch, setup.options.batch_size)
    shape = worst_shape(table, setup.schedule.shapes, rows, setup.need.vocabulary)
    everything = (1 << len(table.weights)) - 1
    inputs = {weight.stage: 3 * weight.shape[1] for weight in table.weights if weight.kind == "linear"}
    kept = table.saved_work(everything) + Work(token=sum(inputs.values()))
    largest_weight = max(weight.numel for weight in table.weights)
    terms = {
        "floor": setup.need.floor_bytes,
        "libraries": 2 * LIBRARY_BYTES,
        "base": table.float_bytes,
        "optimizer": 2 * table.float_bytes,
        "gradients": table.float_bytes if rows < setup.options.batch_size else 3 * 4 * largest_weight,
        "activations": kept.at(shape),
        "logits": _LOGIT_BYTES * shape.rows * shape.tokens * setup.need.vocabulary,
        "transient": table.widest.at(shape),
    }
    terms["slack"] = slack_bytes(terms)
    return terms


def _everywhere(batch: Batch) -> Batch:
    """The same batch with the head on every position, as transformers computes the loss."""
    shape = BatchShape(batch.shape.rows, batch.shape.tokens, batch.shape.tokens)
    labels = torch.full((shape.rows, shape.tokens), IGNORE, dtype=batch.labels.dtype)
    labels[:, shape.tokens - batch.shape.kept :] = batch.labels
    return replace(batch, labels=labels, shape=shape)
