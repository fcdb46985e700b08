"""A base that is not in memory as a whole: of the layers below a boundary, one has its int8 weights at a time.

A layer's file is mapped when it begins to run, and let go when another one does: forward, when it is recomputed, or in
a backward pass that recomputes every layer. So memory holds what lies outside the layers, the layers from the boundary
upwards once they ran, and one of those below. A mapping that nobody holds is unmapped, and its pages do not count any
more; on a GPU the layer's copy there is freed in the same way. What a layer that is away would be computed with has no
data, so that using it is an error and never a wrong number. Norms and biases always stay, and planes that were trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from edgegt.quant import Int8Linear, Int8Weight
from edgegt.store import BaseStore


class BaseStream:
    """The layers of one model, each with its frozen linears by name. Every layer is streamed but inside `from_layer`.

    most_bytes: the most that was there of all layers at once; spared_bytes: what never was. Tensors are counted whole.
    """

    def __init__(
        self, layers: Sequence[Any], linears: Sequence[Mapping[str, Int8Linear]], store: BaseStore, device: torch.device
    ) -> None:  # fmt: skip
        self.store, self.device = store, device
        self.linears = [dict(members) for members in linears]
        self.most_bytes = 0
        self._bytes = sum(linear.weight.nbytes for members in linears for linear in members.values())
        self._lasting = len(layers)  # the first layer that stays once it ran
        for index, layer in enumerate(layers):
            layer.forward = self._arriving(index, layer.forward)
            self.store.release(self._keys(index))

    @contextmanager
    def from_layer(self, first: int) -> Iterator[None]:
        """For a while, layers from this one upwards stay in memory once they ran."""
        before, self._lasting = self._lasting, first
        try:
            yield
        finally:
            self._lasting = before
            self._leave(before)

    @property
    def spared_bytes(self) -> int:
        """Bytes of the layers' frozen weights that were never there with the others."""
        return self._bytes - self.most_bytes

    @property
    def there_bytes(self) -> int:
        """Bytes of the layers' frozen weights that are mapped, or on the GPU, now."""
        return sum(linear.weight.nbytes for members in self.linears for linear in members.values() if _is_there(linear))

    def leave(self) -> None:
        """Let go of every layer."""
        self._leave(len(self.linears))

    def _arriving(self, index: int, forward: Any) -> Any:
        def run(*args: Any, **named: Any) -> Any:
            self._leave(self._lasting, index)
            self._load(index)
            return forward(*args, **named)

        return run

    def _load(self, index: int) -> None:
        away = {name: linear for name, linear in self.linears[index].items() if linear.weight.q.is_meta}
        for name, linear in away.items():
            linear.restore(frozen_weight(self.store, name, self.device))
            if self.device.type != "cpu":  # copied: what it was read from need not stay as well
                self.store.release(self._keys(index))
        if away:
            self.most_bytes = max(self.most_bytes, self.there_bytes)

    def _leave(self, below: int, but: int = -1) -> None:
        """Let go of what is there of the layers below this one."""
        for index, members in enumerate(self.linears[:below]):
            there = [linear for linear in members.values() if index != but and _is_there(linear)]
            for linear in there:
                linear.restore(absent(linear.weight))
            if there:
                self.store.release(self._keys(index))

    def _keys(self, index: int) -> list[str]:
        return [f"{name}.{part}" for name in self.linears[index] for part in ("q", "scale")]


def frozen_weight(store: BaseStore, name: str, device: torch.device) -> Int8Weight:
    """The int8 weight `name` of the store: mapped, or a copy on a GPU."""
    return Int8Weight(*(store.tensor(f"{name}.{part}").to(device) for part in ("q", "scale")))


def absent(weight: Int8Weight) -> Int8Weight:
    """What stands for a weight that is not in memory: its shape."""
    return Int8Weight(weight.q.to("meta"), weight.scale.to("meta"))


def _is_there(linear: Int8Linear) -> bool:
    """Whether its weight is frozen, and has data."""
    return linear.weight.low is None and not linear.weight.q.is_meta
