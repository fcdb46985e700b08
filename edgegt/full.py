"""Full fine-tuning in float32, as transformers runs it: the strategy to compare with, through the same loop.

Every tensor is trained, the head sees every position, states are float32. Its FLOPs are by definition rho = 1.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from edgegt.architecture import (
    auto_class,
    has_own_head,
    is_classifier,
    is_head_tied,
    is_transposed,
    matrix_shape,
    untie_head,
)
from edgegt.attention import register_attention
from edgegt.cache import cache_dir
from edgegt.checkpoint import Saved
from edgegt.classifier import begin_fresh
from edgegt.cost import BatchShape, Weight, Work
from edgegt.data import Batch, collate
from edgegt.data.batches import IGNORE
from edgegt.errors import BudgetError, EdgegtError
from edgegt.flops import FlopMeter, attach
from edgegt.guard import StepBack
from edgegt.keeper import Keeper
from edgegt.log import Log
from edgegt.memory import LIBRARY_BYTES, slack_bytes, worst_shape
from edgegt.optimizer import AdamW, Moments, schedule
from edgegt.patch import save_patch
from edgegt.prepare import Setup
from edgegt.process import trim
from edgegt.rates import of_profile
from edgegt.recovery import go_back, leave_out
from edgegt.rounds import Predicted
from edgegt.sealed import Item
from edgegt.signals import end_if_asked, stopped_by_signals
from edgegt.source import fingerprint
from edgegt.train import Dropped, NoRoom, Parts, Progress, Recipe, train_round
from edgegt.units import format_bytes
from edgegt.version import __version__

# Log-probabilities and two gradients of that size exist at the loss.
_LOGIT_BYTES = 12


class FloatTrainee:
    """The float model of one run, all of it trained."""

    backend = "float32"
    probe_flops = 0

    def __init__(self, setup: Setup, log: Log, keeper: Keeper) -> None:
        self.setup, self.log, self.keeper = setup, log, keeper
        self._check()
        self.module = load_float(setup)
        self.meter = FlopMeter()
        attach(self.module, self.meter)
        self.fingerprint = fingerprint(setup.source, cache_dir() / "fingerprints.json")
        self.optimizer = AdamW(False, setup.options.weight_decay)
        self.parameters: dict[str, torch.nn.Parameter] = dict(self.module.named_parameters())
        self.progress, self.predicted = Progress(), Predicted()
        self.micro_batch = self._micro_batch()
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

    def train(self) -> None:
        """One round over all batches. Raises: Interrupted after the step in which a signal came."""
        total = self.setup.schedule.steps
        self._predict()
        if self.progress.step == 0:
            self.keeper.save(wait=True)
        self.log.start_steps(total)
        with stopped_by_signals(self.progress):
            while not self._train_round():
                pass
        end_if_asked(self.progress, total, self.keeper)
        if self.progress.late:
            self.log.fallback(f"the time budget ended training after step {self.progress.step} of {total}")
        self.keeper.save()
        self.complete = True

    def save(self) -> None:
        """The patch: every tensor, matrices as [out, in]."""
        self.keeper.checkpoints.finish()
        about = self.setup.source.name, __version__, self.setup.corpus.separator, self.setup.corpus.labels
        save_patch(self.keeper.folder.patch, whole_patch(self.module), self.fingerprint, *about)

    def state(self) -> dict[str, Any]:
        """Everything but tensors that an exact resume needs."""
        return {
            "progress": self.progress.to_json(), "flops_by_kind": dict(self.meter.by_kind),
            "micro_batch": self.micro_batch, "memory_bytes": self.setup.memory_bytes, "resting": {},
            "live": list(self.parameters),
        }  # fmt: skip

    def tensors(self) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """Every tensor with its optimizer states, if it has some, in the order in which a step changes them."""
        states = self.optimizer.states
        return {
            name: {"master": self.parameters[name].detach(), **(states[name].tensors() if name in states else {})}
            for name in reversed(self.parameters)
        }

    def restore(self, saved: Saved) -> None:
        """Be as the checkpoint says, bit for bit."""
        state = saved.state
        self.progress.restore(state["progress"])
        self.micro_batch = state["micro_batch"]
        if state["memory_bytes"] < self.setup.memory_bytes:
            self.setup = replace(self.setup, memory_bytes=state["memory_bytes"])
            self.keeper.guard.lower(state["memory_bytes"])
        self.meter.by_kind.clear()
        self.meter.by_kind.update(state["flops_by_kind"])
        self.put_back(saved)

    def put_back(self, saved: Saved) -> None:
        """Have the tensors of a checkpoint, and nothing else of it."""
        for name, parameter in self.parameters.items():
            kept = {key: value.to(parameter.device) for key, value in saved.tensors(name).items()}
            parameter.data.copy_(kept["master"])
            self.optimizer.states.pop(name, None)
            if "first" in kept:
                self.optimizer.states[name] = Moments.from_tensors(kept)

    def _predict(self) -> None:
        setup, terms = self.setup, full_terms(self.setup, self.micro_batch)
        self.predicted.flops, self.predicted.peak, self.predicted.memory_terms = (
            setup.full_flops, sum(terms.values()), terms,
        )  # fmt: skip
        table, shapes = setup.need.table, setup.schedule.shapes
        self.predicted.device_step_s = of_profile(setup.resolved.profile).full_step_s(table, shapes[len(shapes) // 2])
        self._record_plan(self.micro_batch, terms, list(self.parameters))

    def _train_round(self) -> bool:
        """The steps that are left; False when something went wrong, and was dealt with."""
        setup, options, total = self.setup, self.setup.options, self.setup.schedule.steps
        recipe = Recipe(
            lambda done: schedule(options.schedule, setup.lr, done, total, options.warmup),
            options.max_grad_norm, total, setup.flops, lambda shape: 0, deadline=setup.deadline(self.after_s),
        )  # fmt: skip
        parts = Parts(
            self.module, setup.device, self.parameters, self._update, lambda: None, self.meter, setup.watch,
            self.keeper.facts,
        )  # fmt: skip
        self.keeper.guard.begin()
        try:
            train_round(
                parts, recipe, self._batches(), self.micro_batch, 0, self.progress, self.keeper.metrics,
                self._after_step, fused=self.micro_batch >= max(shape.rows for shape in setup.schedule.shapes),
            )  # fmt: skip
        except Dropped as error:
            leave_out(self, self.keeper, error)
        except NoRoom as error:
            self._step_back(self.keeper.guard.failed(error.reason, self.predicted.peak, error.torn))
        except StepBack as back:
            self._step_back(back)
        else:
            return True
        return False

    def _update(self, name: str, gradient: torch.Tensor, lr: float) -> None:
        self.keeper.checkpoints.wait_for(name)
        self.optimizer.update(name, self.parameters[name].data, gradient, lr)

    def _after_step(self, entry: dict[str, Any]) -> None:
        self.log.step(entry)
        self.keeper.after_step(self.predicted.peak, entry["step_s"])

    def _batches(self) -> Iterator[tuple[float, Batch]]:
        setup = self.setup
        for epoch, indices in setup.schedule.batches[self.progress.step :]:
            rows = [setup.corpus.train[i] for i in indices]
            yield epoch, everywhere(collate(rows, setup.pad_id))

    def _step_back(self, back: StepBack) -> None:
        """Smaller micro-batches: nothing else can be given up when everything is trained."""
        before = self.micro_batch
        if back.torn:
            go_back(self, self.keeper, "to take back a step that was broken off")
            self.micro_batch = min(before, self.micro_batch)
        while self.micro_batch > 1 and sum(full_terms(self.setup, self.micro_batch).values()) > back.budget_bytes:
            self.micro_batch //= 2
        if self.micro_batch == before and not back.must:
            self.log.fallback(f"{back.reason}, and nothing smaller can be trained")
            return
        fits = sum(full_terms(self.setup, self.micro_batch).values()) <= back.budget_bytes
        if not fits and not (back.guess and self.micro_batch < before):
            raise EdgegtError(
                f"{back.reason}: full fine-tuning cannot go on within {format_bytes(back.budget_bytes)}; end other "
                "programs"
            )
        text = f"{back.reason}: micro-batches of {self.micro_batch} rows instead of {before}"
        self.log.fallback(text)
        self.keeper.record({"kind": "memory", "text": text, "budget_bytes": back.budget_bytes})
        if fits and back.must:
            self.setup = replace(self.setup, memory_bytes=back.budget_bytes)
        trim()
        self.setup.watch.hold(self.setup.memory_bytes)
        self.keeper.guard.lower(self.setup.memory_bytes)
        self._predict()
        self.keeper.save()

    @property
    def held_bytes(self) -> int:
        """What the float model takes more than the int8 base that evaluation is planned with."""
        return self.setup.need.table.float_bytes - self.setup.need.table.base_bytes

    @property
    def standing_bytes(self) -> int:
        """What training holds between two steps beside the int8 base that evaluation is planned with."""
        return self.held_bytes + 2 * self.setup.need.table.float_bytes

    def _micro_batch(self) -> int:
        rows = self.setup.options.batch_size
        while rows > 1 and sum(full_terms(self.setup, rows).values()) > self.setup.memory_bytes:
            rows //= 2
        return rows

    def _record_plan(self, micro_batch: int, terms: dict[str, int], names: list[str]) -> None:
        setup = self.setup
        table = setup.need.table
        self.keeper.folder.write("plan-0.json", {
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


def load_float(setup: Setup) -> Any:
    """transformers' own float32 model, in eval mode (no dropout), with attention that is counted."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    classes = {"config": copy.deepcopy(setup.config), "ignore_mismatched_sizes": True}
    module: Any = auto_class(setup.config).from_pretrained(
        str(setup.source.directory), dtype=torch.float32, attn_implementation=register_attention(),
        local_files_only=True, trust_remote_code=False, use_safetensors=True,
        **(classes if is_classifier(setup.config) else {}),
    ).to(setup.device).eval()  # fmt: skip
    begin_fresh(module, setup.device)
    # transformers ties a head whose values equal the embedding's; an architecture with its own never shares it.
    if has_own_head(module.config) and is_head_tied(module):
        untie_head(module)
    return module


def whole_patch(module: Any) -> dict[str, Item]:
    """Every tensor of a float model as a patch holds it, to be fetched one by one: linears and experts as [out, in]."""
    found = {}
    for name, parameter in module.named_parameters():
        part, tensor = module.get_submodule(name.rpartition(".")[0]), parameter.detach()
        tensor = tensor.t() if tensor.ndim == 2 and is_transposed(part) else tensor
        found[name] = Item.of(name, tensor.reshape(matrix_shape(part, parameter)))
    return found


def full_terms(setup: Setup, micro_batch: int) -> dict[str, int]:
    """Named terms of the peak of full fine-tuning in float32."""
    table, rows = setup.need.table, min(micro_batch, setup.options.batch_size)
    shape = worst_shape(table, setup.schedule.shapes, rows, setup.need.vocabulary)
    everything = (1 << len(table.weights)) - 1
    inputs = {weight.stage: _inputs_kept(weight) for weight in table.weights if weight.kind == "linear"}
    kept = table.saved_work(everything) + sum(inputs.values(), Work())
    largest_weight = max(weight.numel for weight in table.weights)
    terms = {
        "floor": setup.need.floor_bytes,
        "libraries": 2 * LIBRARY_BYTES,
        "base": table.float_bytes,
        "optimizer": 2 * table.float_bytes,
        "gradients": table.float_bytes if rows < setup.options.batch_size else 3 * 4 * largest_weight,
        "activations": kept.at(shape),
        "logits": _LOGIT_BYTES * shape.rows * table.scored(shape) * setup.need.vocabulary,
        "transient": table.widest.at(shape),
    }
    terms["slack"] = slack_bytes(terms)
    return terms


def _inputs_kept(weight: Weight) -> Work:
    """Bytes that a linear keeps here of its input, more than in int8, at every position that it reads.

    transformers' experts copy a token for each expert, and keep what is between and after their products as well.
    """
    if weight.experts > 1:
        return Work(token=7 * weight.shape[1] * (weight.dw.token * weight.experts // (2 * weight.numel)))
    return weight.per_position(3 * weight.shape[1])


def everywhere(batch: Batch) -> Batch:
    """The same batch with the head on every position, as transformers computes the loss."""
    if batch.classes:
        return batch
    if batch.decoder_input_ids is not None:
        return replace(batch, shape=replace(batch.shape, labelled=0))
    shape = BatchShape(batch.shape.rows, batch.shape.tokens, batch.shape.tokens)
    labels = torch.full((shape.rows, shape.tokens), IGNORE, dtype=batch.labels.dtype)
    labels[:, shape.tokens - batch.shape.kept :] = batch.labels
    return replace(batch, labels=labels, shape=shape)
