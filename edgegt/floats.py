"""Selection in a float model that is not ours: its costs as its own code runs it, importance, and what to train.

The costs are those of the trace, but for two things that the model's own loop does: with gradient checkpointing every
layer below the loss runs forward again, and an attention kernel forms all three of its gradients once it needs one.
"""

from __future__ import annotations

import copy
import math
import random
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from edgegt.architecture import auto_class, is_classifier, is_encoder_decoder, is_head_tied, untie_head
from edgegt.classifier import as_classifier, fresh_of, known_labels
from edgegt.cost import BatchShape, CostTable, Path, Work
from edgegt.errors import BudgetError, InputError
from edgegt.importance import agreement
from edgegt.memory import Surroundings
from edgegt.planner import FORMATS, Problem, plan
from edgegt.trace import trace
from edgegt.value import values_of

# Attention of transformers that is written out in products, each of which autograd leaves out where it can.
_WRITTEN_OUT = "eager"
# Memory is the Trainer's matter. What a weight without measured importance is worth where nothing else fits.
_ANY_BYTES, _LEAST = 1 << 62, 1e-9


@dataclass(frozen=True)
class FloatCosts:
    """table: costs of the model as it runs; always: parameters that are trained in every step."""

    table: CostTable
    config: Any
    always: frozenset[str]

    def shape(self, inputs: Mapping[str, Any]) -> BatchShape:
        """The shape of a batch of keyword arguments; the head runs on every position, as transformers does it.

        Raises: InputError for inputs that are no token ids.
        """
        ids = inputs.get("input_ids")
        ids = inputs.get("inputs_embeds") if ids is None else ids
        if ids is None:
            raise InputError(
                f"the batches have no input_ids (but {', '.join(inputs) or 'nothing'}): FLOPs cannot be counted"
            )
        rows, tokens = int(ids.shape[0]), int(ids.shape[1])
        if is_classifier(self.config):
            return BatchShape(rows, tokens, 1)
        if not is_encoder_decoder(self.config):
            return BatchShape(rows, tokens, tokens)
        found = inputs.get("labels")
        found = inputs.get("decoder_input_ids") if found is None else found
        if found is None:
            raise InputError("the batches have neither labels nor decoder_input_ids: FLOPs cannot be counted")
        return BatchShape(rows, tokens, int(found.shape[1]))

    def full(self) -> Work:
        """FLOPs of training everything, without recomputation."""
        return self.table.full_work()

    def of(self, names: Collection[str]) -> Work:
        """FLOPs of forward and backward when these weights are trained."""
        return self.table.train_work(self.table.mask(names))


def prepare_model(model: Any) -> bool:
    """Give a tied head a matrix of its own, as it has in every model that edgegt trains; whether there was one.

    Raises: InputError when this is no model that can be traced.
    """
    from edgegt.pretrained import can_untie

    if not head_is_shared(model):
        return False
    # Where the architecture can, the config of a saved model says then that its head is its own. Of a copy, because a
    # skeleton chooses its own attention in the config that it is made from.
    apart = can_untie(copy.deepcopy(model.config), model.config.to_dict())
    untie_head(model)
    if apart:
        model.config.tie_word_embeddings = False
    return True


def head_is_shared(model: Any) -> bool:
    """Whether the model has a head, and it is the embedding's matrix."""
    return not is_classifier(_described(model)) and is_head_tied(model)


def costs_of(model: Any) -> FloatCosts:
    """Trace the model as transformers would run it. Raises: InputError for one that cannot be traced, or is another."""
    config = _described(model)
    table = trace(config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    strange = [weight.name for weight in table.weights if sizes.get(weight.name) != weight.numel]
    if strange:
        raise InputError(
            f"{type(model).__name__} has no '{strange[0]}' of the size that its config says: give an unchanged "
            "transformers model, with a head of its own"
        )
    if getattr(model.config, "_attn_implementation", _WRITTEN_OUT) != _WRITTEN_OUT:
        table = _attention_at_once(table)
    if checkpoints(model):
        again = tuple(Path(layer.weights, layer.forward, Work()) for layer in table.layers)
        table = replace(table, paths=table.paths + again)
    return FloatCosts(table, config, frozenset(fresh_of(config)))


def let_backward_end(model: Any) -> None:
    """Take back what transformers does for reentrant gradient checkpointing, which makes backward go all the way down.

    It asks for a gradient of the embedding's output, and T5's attention for one of its bias of positions.
    """
    if getattr(model, "_require_grads_hooks", None):
        model.disable_input_require_grads()
    for module in model.modules():
        if type(module).__name__.endswith("Attention") and getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False


def checkpoints(model: Any) -> bool:
    """Whether the model recomputes its layers in backward."""
    found = getattr(model, "is_activation_checkpointing", None)  # its newer name
    return bool(model.is_gradient_checkpointing if found is None else found)


def importance_of(model: Any, pairs: Iterable[tuple[Any, Any]], names: Collection[str]) -> dict[str, float]:
    """`importance`'s statistic from float gradients: of each pair one batch is A and the other B.

    One gradient of every tensor is held, and a second of one at a time. Random state and .grad are left as found,
    requires_grad is not.
    """
    parameters = {name: p for name, p in model.named_parameters() if name in names}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    sums: dict[str, float] = defaultdict(float)
    with _random_state_kept():
        for first, second in pairs:
            _loss(model, first).backward()
            held: dict[str, torch.Tensor] = {}
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    held[name], parameter.grad = parameter.grad, None
            hooks = [parameters[name].register_post_accumulate_grad_hook(_reduce(name, held, sums)) for name in held]
            try:
                _loss(model, second).backward()
            finally:
                for hook in hooks:
                    hook.remove()
            for parameter in parameters.values():
                parameter.grad = None
    return {name: max(0.0, value) if math.isfinite(value) else 0.0 for name, value in sums.items()}


def choose(
    costs: FloatCosts, importance: Mapping[str, float], candidates: Collection[str], shapes: Sequence[BatchShape],
    share: float, seed: int,
) -> tuple[str, ...]:  # fmt: skip
    """The most valuable of the candidates with which such batches cost at most `share` of full training.

    Where nothing of measured importance fits, what fits is taken. Raises: BudgetError when nothing does, with the
    smallest share that would do; InputError when there is no candidate.
    """
    found = values_of(importance, costs.table)
    values = {name: found[name] for name in candidates}
    flops = int(share * costs.full().total(shapes))
    problem = Problem(costs.table, values, tuple(shapes), flops, _ANY_BYTES, Surroundings(0), 1, 1, FORMATS[:1])
    try:
        try:
            return plan(problem, seed=seed).selected
        except InputError:  # a budget that is too small, or no importance above 0
            if min(values.values(), default=1.0) > 0:
                raise
            anything = {name: max(value, _LEAST) for name, value in values.items()}
            return plan(replace(problem, values=anything), seed=seed).selected
    except BudgetError as error:
        least = error.smallest_rho
        if least is None:
            raise
        raise BudgetError(
            f"{share:.3f} of full training is left for a step, below the smallest reachable {least:.3f} (the forward "
            "pass, and backward to one weight): give a higher rho, or train for more steps",
            smallest_rho=least,
        ) from error


def train_only(model: Any, names: Collection[str]) -> None:
    """Make exactly these parameters trainable; the gradients of the others are dropped."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
        if name not in names:
            parameter.grad = None


def _described(model: Any) -> Any:
    """The config as the trace wants it. Raises: InputError for a model of another task."""
    config = model.config
    if type(model).__name__.endswith("ForSequenceClassification"):
        prefix = f"{model.base_model_prefix}."
        below = {name for name, _ in model.named_parameters() if name.startswith(prefix)}
        config = copy.deepcopy(config)
        config.architectures = [type(model).__name__]
        config = as_classifier(config, known_labels(config), 0, below)
    auto = auto_class(config)
    try:
        expected = auto._model_mapping[type(config)]
    except KeyError:
        expected = ()
    if not isinstance(model, expected):
        raise InputError(
            f"{type(model).__name__} is neither a causal language model, nor an encoder-decoder, nor a model for "
            "sequence classification: give one of these"
        )
    return config


def _attention_at_once(table: CostTable) -> CostTable:
    """The table when a layer's attention has one backward, which makes the gradients of query, key and value."""
    below: dict[int, int] = defaultdict(int)
    for path in table.paths:
        if path.flops.attention != Work():
            below[_top(table, path.weights)] |= path.weights
    paths = []
    for path in table.paths:
        pairs = path.flops.attention
        if pairs == Work():
            paths.append(path)
            continue
        rest = path.flops + Work(pair=-pairs.pair, cross=-pairs.cross, kept_pair=-pairs.kept_pair)
        paths.append(replace(path, flops=rest))
        paths.append(Path(below[_top(table, path.weights)], pairs, Work()))
    return replace(table, paths=tuple(paths))


def _top(table: CostTable, mask: int) -> int:
    return max(weight.block for bit, weight in enumerate(table.weights) if mask >> bit & 1)


def _loss(model: Any, inputs: Any) -> torch.Tensor:
    found: torch.Tensor | None = getattr(model(**inputs), "loss", None)
    if found is None:
        raise InputError("the model returns no loss for the batches of the Trainer: give rows with labels")
    return found


def _reduce(name: str, held: dict[str, torch.Tensor], sums: dict[str, float]) -> Callable[[nn.Parameter], None]:
    def take(parameter: nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        sums[name] += float(agreement(held.pop(name).to(torch.float32), gradient.to(torch.float32)))

    return take


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """torch's generators, Python's and numpy's draw on as if nothing had been drawn here."""
    import numpy

    python, arrays = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(arrays)
