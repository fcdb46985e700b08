"""A model whose lowest layers do not run: they return hidden states that were computed before.

Everything beside hidden states (masks, rotary tables, positions) the model makes above its layers, and goes on doing
so; the embedding's output is read by nobody and stands in as zeros without memory. What a family's layers take and give
is not known here: the lowest are asked once (`capture`), and `differs` says whether the model agrees with itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from edgegt.architecture import all_layers
from edgegt.data import Batch
from edgegt.errors import EdgegtError
from edgegt.head import base_model
from edgegt.loss import class_logits, kept_hidden

AGREES = 1e-5
# States of a batch [rows, tokens, width] from its ids and mask (both int64 [rows, tokens]), and what computes them.
States = Callable[[Tensor, Tensor, Callable[[list[int]], Tensor]], Tensor]


class _Captured(Exception):
    """Ends a forward pass at the boundary."""


class Skipper:
    """The layers of `module` below `boundary`."""

    def __init__(self, module: Any, boundary: int) -> None:
        self.module, self.layers = module, all_layers(module)[:boundary]
        self.base, self.embedding = base_model(module), module.get_input_embeddings()
        self._computing = False
        self._extra: int | None = None  # what a layer returns beside the states, where it returns a tuple

    def capture(self, batch: Batch, device: torch.device) -> Tensor:
        """The hidden states [rows, tokens, width] that enter the boundary."""
        return self._captured(lambda: output_of(self.module, batch, device))

    @contextmanager
    def skipping(self, states: States) -> Iterator[None]:
        """For a while, have the layers below the boundary return `states` of each batch instead of running."""
        held: list[Any] = []

        def before(base: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            if self._computing:
                return
            ids = args[0] if args else named.get("input_ids")
            mask = named.get("attention_mask")
            if ids is None or mask is None:
                raise EdgegtError("the model is called without token ids or mask")

            def compute(rows: list[int]) -> Tensor:
                at = torch.tensor(rows, device=ids.device)
                some = {
                    name: value.index_select(0, at) if _is_batched(value, len(ids)) else value
                    for name, value in named.items()
                }
                return self._captured(lambda: base(*(value.index_select(0, at) for value in args), **some))

            with torch.no_grad():
                held[:] = [self._as_given(states(ids, mask, compute))]

        def given(forward: Any) -> Any:
            def run(*args: Any, **named: Any) -> Any:
                return forward(*args, **named) if self._computing else held[0]

            return run

        def nothing(forward: Any) -> Any:
            def run(ids: Tensor, *args: Any, **named: Any) -> Tensor:
                if self._computing:
                    out: Tensor = forward(ids, *args, **named)
                    return out
                return torch.zeros((), device=ids.device).expand(*ids.shape, self.embedding.embedding_dim)

            return run

        handle = self.base.register_forward_pre_hook(before, with_kwargs=True)
        try:
            with _replaced(self.layers, given), _replaced([self.embedding], nothing):
                yield
        finally:
            handle.remove()
            held.clear()

    @contextmanager
    def running(self) -> Iterator[None]:
        """While layers are skipped, have all of them run again for a while."""
        self._computing = True
        try:
            yield
        finally:
            self._computing = False

    @torch.no_grad()
    def differs(self, batch: Batch, device: torch.device) -> float:
        """The relative error of the model's output on a batch when its lowest layers are given what they computed."""
        expected = output_of(self.module, batch, device)
        states = self.capture(batch, device)  # also learns the form
        states = states * batch.attention_mask.to(device).unsqueeze(-1)
        with self.skipping(lambda ids, mask, compute: states):
            found = output_of(self.module, batch, device)
        return float((found - expected).norm() / expected.norm().clamp_min(1e-30))

    def _as_given(self, states: Tensor) -> Any:
        """The states in the form in which the layers return them; what else they return is left out."""
        return states if self._extra is None else (states, *[None] * self._extra)

    def _captured(self, forward: Callable[[], object]) -> Tensor:
        found: list[Tensor] = []

        def stopping(last: Any) -> Any:
            def run(*args: Any, **named: Any) -> Any:
                given = last(*args, **named)
                self._extra = len(given) - 1 if isinstance(given, tuple) else None
                found.append(given if self._extra is None else given[0])
                raise _Captured

            return run

        self._computing = True
        try:
            with torch.no_grad(), _replaced([self.layers[-1]], stopping):
                forward()
        except _Captured:
            return found[0]
        finally:
            self._computing = False
        raise EdgegtError("the model does not run its layers in order")


def output_of(module: Any, batch: Batch, device: torch.device) -> Tensor:
    """What the head reads of a batch; of a classifier the logits."""
    return class_logits(module, batch, device) if batch.classes else kept_hidden(module, batch, device)


def _is_batched(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == rows


@contextmanager
def _replaced(modules: list[Any], change: Callable[[Any], Any]) -> Iterator[None]:
    """Have these modules run something else for a while."""
    before = [module.__dict__.get("forward") for module in modules]
    try:
        for module in modules:
            module.forward = change(module.forward)
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            module.__dict__.pop("forward", None)
            if own is not None:
                module.forward = own
