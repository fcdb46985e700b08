"""A callback for transformers' Trainer: the float model as it is, with tensors selected under a FLOPs budget.

The Trainer keeps its loop, optimizer, schedule and checkpoints. At the start of a round the callback measures
importance on rows of the training set, plans, and sets `requires_grad`, so that autograd ends below the lowest chosen
tensor; AdamW leaves out what has no gradient, and keeps the states of what may return. Every training forward counts.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from edgegt.budget import PROBE_ROWS, PROBE_SHARE
from edgegt.cost import BatchShape, Work
from edgegt.errors import BudgetError, InputError
from edgegt.floats import (
    FloatCosts,
    checkpoints,
    choose,
    costs_of,
    head_is_shared,
    importance_of,
    let_backward_end,
    prepare_model,
    train_only,
)
from edgegt.log import Log

# As in a run of edgegt: rounds of a long run.
ROUNDS, ROUNDS_FROM = 2, 40
# Batches that are drawn to know how long rows are; checks per run that what is spent still leads to the budget.
SAMPLED, CHECKS = 8, 20
# Batches whose shapes stand for those to come.
RECENT = 16
# Of rho: how much more may be foreseen before tensors are chosen anew, and what is kept for rows of other lengths.
TOLERANCE, MARGIN = 0.005, 0.005


class SelectionCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Train what is worth most within `rho` of the FLOPs of full training: `Trainer(..., callbacks=[this])`.

    rounds: how often importance is measured (default: twice, once below 40 steps). `share` and `selected` say at any
    time what was spent, of full training on the same batches, and what is trained. One process, one device.
    Raises: InputError when the Trainer or the model is of a kind that this cannot work with; BudgetError when rho is
    below the smallest reachable.
    """

    def __init__(self, rho: float = 0.5, rounds: int | None = None) -> None:
        if not 0 < rho <= 1:
            raise InputError(f"rho {rho:g} is out of range: give a number greater than 0 and at most 1, such as 0.5")
        if rounds is not None and rounds < 1:
            raise InputError(f"rounds {rounds} is out of range: give a positive whole number")
        self.rho, self.rounds = rho, rounds
        self.log = Log()
        self.record: dict[str, Any] = {}
        self._costs: FloatCosts | None = None
        self._full = self._work = Work()
        self._before: dict[str, bool] = {}
        self._hook: Any = None
        self._probing = False

    @property
    def share(self) -> float:
        """FLOPs spent so far, those of measuring importance included, of full training on the same batches."""
        return float(self.record.get("spent", 0) / max(1, self.record.get("full", 0)))

    @property
    def selected(self) -> tuple[str, ...]:
        """Names of the parameters that are trained in this round."""
        return tuple(self.record.get("selected", ()))

    def state(self) -> dict[str, Any]:
        """What the Trainer's checkpoints keep."""
        return {"args": {"rho": self.rho, "rounds": self.rounds}, "attributes": {"record": self.record}}

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Before there is an optimizer: give a tied head a matrix of its own."""
        _check(args, model)
        if prepare_model(model):
            self.log.say("edgegt: the head was the embedding's matrix and has one of its own now, to be trained apart")

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None,
        train_dataloader: Any = None, **_: Any,
    ) -> None:  # fmt: skip
        """Trace the model; go on with the selection of a checkpoint."""
        _check(args, model)
        _check_data(train_dataloader)
        if head_is_shared(model):
            raise InputError(
                "the head is still the embedding's matrix: give SelectionCallback to Trainer(callbacks=[...]), which "
                "asks it before the optimizer is made"
            )
        let_backward_end(model)
        self._costs = costs_of(model)
        self._full = self._costs.full()
        if not self._before:
            self._before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._check_optimizer(model, optimizer)
        if state.global_step == 0:
            self.record = {"round": 0, "selected": [], "values": {}, "spent": 0, "full": 0, "probe": 0, "shapes": []}
        else:
            saved = state.stateful_callbacks.get(type(self).__name__)
            if not saved:
                raise InputError(
                    "the checkpoint is of a training without SelectionCallback: begin anew, or resume without it"
                )
            self.record = dict(saved["attributes"]["record"])
            self._train(model)
        if self._hook is not None:
            self._hook.remove()
        self._hook = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, train_dataloader: Any = None, **_: Any
    ) -> None:
        """Choose what is trained, where a round begins, or where more would be spent than rho allows."""
        rounds = self.rounds or (ROUNDS if state.max_steps >= ROUNDS_FROM else 1)
        due = min(rounds, state.global_step * rounds // max(1, state.max_steps) + 1)
        if self.record["round"] < due:
            self._measure(args, state, model, train_dataloader, rounds)
            self.record["round"] = due
            self._choose(args, state, model, rounds - due)
        elif state.global_step % max(1, state.max_steps // CHECKS) == 0 and self._foreseen(args, state, rounds - due):
            self._choose(args, state, model, rounds - due)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Add what is spent and trained to the Trainer's logs and their history."""
        if logs is None or "loss" not in logs:
            return
        facts = {
            "edgegt/flops_share": round(self.share, 4), "edgegt/selected": len(self.selected),
            "edgegt/round": self.record["round"],
        }  # fmt: skip
        logs.update(facts)
        if state.log_history:
            state.log_history[-1].update(facts)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Say what was spent, and leave the model as it was found."""
        self._hook.remove()
        self._hook = None
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self._before[name])
        self._before = {}
        over = "" if self.share <= self.rho else f", which is more than {self.rho:.0%}"
        self.log.say(
            f"edgegt: {self.share:.2%} of the FLOPs of full training on the same batches were spent{over}; "
            f"{len(self.selected)} tensors were trained in the last round"
        )

    @property
    def _shapes(self) -> list[BatchShape]:
        """Of the last batches, or at first of some that were drawn."""
        return [BatchShape(*shape) for shape in self.record["shapes"]]

    def _candidates(self) -> list[str]:
        assert self._costs is not None
        return [weight.name for weight in self._costs.table.weights if self._before[weight.name]]

    def _count(self, module: Any, args: Any, inputs: Mapping[str, Any]) -> None:
        if self._probing or not module.training or not torch.is_grad_enabled():
            return
        assert self._costs is not None
        shape = self._costs.shape(inputs)
        self.record["shapes"] = [*self.record["shapes"], [shape.rows, shape.tokens, shape.kept]][-RECENT:]
        self.record["spent"] += self._work.at(shape)
        self.record["full"] += self._full.at(shape)

    def _train(self, model: Any) -> None:
        assert self._costs is not None
        self._work = self._costs.of(self.selected)
        train_only(model, {*self.selected, *self._costs.always})

    def _measure(self, args: Any, state: Any, model: Any, loader: Any, rounds: int) -> None:
        """Measure importance on pairs of batches drawn from the training set, and count what that costs."""
        assert self._costs is not None
        left = (state.max_steps - state.global_step) * args.gradient_accumulation_steps
        rows = PROBE_SHARE * self.rho * left * args.train_batch_size / max(1, rounds - self.record["round"])
        rows = int(min(max(rows, PROBE_ROWS[0]), PROBE_ROWS[1]))
        per_batch = max(2, min(args.train_batch_size, rows // 2))
        draw = random.Random(f"{args.seed}/probe/{self.record['round']}")
        batches = [_drawn(loader, per_batch, draw, args.device) for _ in range(max(1, rows // per_batch // 2))]
        if not self.record["shapes"]:
            more = (_drawn(loader, args.train_batch_size, draw, args.device)[0] for _ in range(SAMPLED))
            shapes = [self._costs.shape(inputs) for inputs in more]
            self.record["shapes"] = [[shape.rows, shape.tokens, shape.kept] for shape in shapes]
            self.record["expected"] = self._full.total(shapes) // SAMPLED
        training, self._probing = model.training, True
        try:
            model.train()
            names = {*self._candidates(), *self._costs.always}
            self.record["values"] = importance_of(model, batches, names)
        finally:
            model.train(training)
            self._probing = False
        work = self._costs.of(self._candidates())
        spent = work.total(self._costs.shape(inputs) for pair in batches for inputs in pair)
        self.record["spent"] += spent
        self.record["probe"] = spent

    def _choose(self, args: Any, state: Any, model: Any, later: int) -> None:
        """Choose with what is left for the steps to come, after `later` more measurements."""
        assert self._costs is not None
        coming = self._coming(args, state)
        full = self.record["full"] + coming
        left = self.rho * (1 - MARGIN) * full - self.record["spent"] - later * self.record["probe"]
        try:
            found = choose(
                self._costs, self.record["values"], self._candidates(), self._shapes, max(0.0, left / coming),
                args.seed + self.record["round"],
            )  # fmt: skip
        except BudgetError as error:
            if not self.selected:
                raise
            self.log.fallback(f"edgegt: what is trained stays as it is ({error})")
            found = self.selected
        if set(found) != set(self.selected):
            self.log.say(
                f"edgegt: round {self.record['round']}, from step {state.global_step + 1} on {len(found)} of "
                f"{len(self._costs.table.weights)} tensors are trained"
            )
        self.record["selected"] = list(found)
        self._train(model)

    def _coming(self, args: Any, state: Any) -> int:
        """FLOPs of full training on the batches to come: if they are as long as the last, or what a usual run has left.

        Of both the smaller: what one counts on and does not come would have been spent already.
        """
        steps, shapes = state.max_steps - state.global_step, self._shapes
        alike = steps * args.gradient_accumulation_steps * self._full.total(shapes) // len(shapes)
        usual = state.max_steps * args.gradient_accumulation_steps * self.record["expected"] - self.record["full"]
        return int(max(1, min(alike, usual) if 4 * usual > alike else alike // 4))

    def _foreseen(self, args: Any, state: Any, later: int) -> bool:
        """Whether more than rho would be spent at the end, if it went on like this."""
        coming = self._coming(args, state)
        steps = coming * self._work.total(self._shapes) / max(1, self._full.total(self._shapes))
        spent = self.record["spent"] + steps + later * self.record["probe"]
        return bool(spent > self.rho * (1 + TOLERANCE) * (self.record["full"] + coming))

    def _check_optimizer(self, model: Any, optimizer: Any) -> None:
        """Raises: InputError when the optimizer lacks what may be trained, being made before the model was prepared."""
        there = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        missing = [name for name in self._candidates() if id(model.get_parameter(name)) not in there]
        if missing:
            raise InputError(
                f"the optimizer does not know '{missing[0]}': give SelectionCallback to Trainer(callbacks=[...]), and "
                "let the Trainer make the optimizer"
            )


def _check(args: Any, model: Any) -> None:
    """Raises: InputError for what selection cannot work with, all of it at once."""
    found = {
        "DeepSpeed": args.deepspeed, "FSDP": args.fsdp,
        "several processes or GPUs": args.world_size > 1 or args.n_gpu > 1, "fp16 (take bf16)": args.fp16,
        "a quantised model": getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False),
        "PEFT adapters": hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False),
        "reentrant gradient checkpointing (give use_reentrant=False)": _reentrant(args, model),
    }  # fmt: skip
    problems = [what for what, there in found.items() if there]
    if problems:
        raise InputError(
            f"SelectionCallback does not work with {', '.join(problems)}: it selects tensors of a float model in one "
            "process on one device; leave that out, or the callback"
        )


def _reentrant(args: Any, model: Any) -> bool:
    """Whether checkpointed layers ask for an input with a gradient, which a frozen embedding does not give."""
    given = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")  # the older name
    kwargs: Mapping[str, Any] = next((found for name in given if (found := getattr(args, name, None))), {})
    functions = (getattr(part, "_gradient_checkpointing_func", None) for part in model.modules())
    active = any(getattr(one, "keywords", {}).get("use_reentrant") for one in functions if one is not None)
    return bool(kwargs.get("use_reentrant")) or (active and checkpoints(model))


def _check_data(loader: Any) -> None:
    dataset = getattr(loader, "dataset", None)
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise InputError(
            f"SelectionCallback draws rows from the training set, and a {type(dataset).__name__} has none by number: "
            "give a dataset with a length"
        )


def _drawn(loader: Any, rows: int, draw: random.Random, device: torch.device) -> tuple[Any, Any]:
    """Two batches of random rows; where rows have a class, the same classes in both (see `data.matched`)."""
    dataset, count = loader.dataset, len(loader.dataset)
    first = [draw.randrange(count) for _ in range(rows)]
    members: dict[int | None, list[int]] = {}
    for index in draw.sample(range(count), min(count, 50 * rows)) + first:
        members.setdefault(_class_of(dataset[index]), []).append(index)
    second = [draw.choice(members[_class_of(dataset[index])]) for index in first]
    one, other = ([dataset[index] for index in side] for side in (first, second))
    return _collated(loader, one, device), _collated(loader, other, device)


def _class_of(row: Any) -> int | None:
    label = row.get("labels", row.get("label")) if isinstance(row, Mapping) else None
    label = label.item() if isinstance(label, torch.Tensor) and label.ndim == 0 else label
    return label if isinstance(label, int) else None


def _collated(loader: Any, rows: list[Any], device: torch.device) -> dict[str, Any]:
    batch = loader.collate_fn(rows)
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
