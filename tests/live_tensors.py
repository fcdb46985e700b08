"""The tensors that are alive, byte by byte: for predictions of memory where resident memory is too blunt a measure.

Resident memory has the allocator's habits and the libraries in it. Here each storage counts from the operation that
made it until nothing refers to it any more: once, however many views it has, and on whatever device it lies.
Operations written in Python by other libraries (bitsandbytes on CPU) are looked into, so that what they need for a
moment counts too; what a C++ kernel needs inside and gives back before it returns does not.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_OWN_KERNELS = ("aten", "prim", "prims", "inductor")
_COMPOSITE = torch._C.DispatchKey.CompositeExplicitAutograd
_FRESH = torch.ops.aten.lift_fresh.default  # torch.tensor() hands its new data to it as an argument


@dataclass(frozen=True)
class Live:
    """One storage: its bytes, the shape and dtype of the tensor it was made for, and the operation that made it."""

    nbytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    op: str

    def __str__(self) -> str:
        return f"{self.nbytes / 2**20:10.3f} MiB  {str(self.dtype).removeprefix('torch.'):<9} {self.shape}  {self.op}"


class LiveTensors(TorchDispatchMode):
    """While active, counts the bytes of every storage that an operation creates; what was there before is not counted.

    Storages that outlive the block are followed to their end, so `now` stays true after it. Backward is seen too: on
    CPU the autograd engine works in the thread that calls it, and its threads for other devices take over the caller's
    dispatch modes. Not counted: storages on the meta device, and those that no operation made (torch.from_numpy).
    """

    def __init__(self) -> None:
        super().__init__()
        self._live: dict[int, Live] = {}
        self._gone: deque[int] = deque()  # finalizers run anywhere, in any thread: they only leave a note here
        self._now = self._peak = 0
        self._top: list[Live] | None = []  # what was alive at the peak; None: what is alive now
        self._plain_resizes: list[Any] = []

    @property
    def now(self) -> int:
        """Bytes alive."""
        self._settle()
        return self._now

    @property
    def peak(self) -> int:
        """Most bytes alive since the start or the last reset_peak()."""
        return self._peak

    def reset_peak(self) -> None:
        """The peak starts again from what is alive now."""
        self._settle()
        self._peak, self._top = self._now, None

    def largest(self, count: int = 10) -> list[Live]:
        """The largest storages that were alive at the peak, largest first."""
        self._settle()
        held = self._live.values() if self._top is None else self._top
        return sorted(held, key=lambda live: live.nbytes, reverse=True)[:count]

    def __enter__(self) -> Any:
        self._plain_resizes.append(torch.UntypedStorage.resize_)  # no operation, so no dispatch
        torch.UntypedStorage.resize_ = self._watched(torch.UntypedStorage.resize_)
        return super().__enter__()

    def __exit__(self, *about: Any) -> None:
        torch.UntypedStorage.resize_ = self._plain_resizes.pop()
        super().__exit__(*about)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        there = set() if func is _FRESH else {storage._cdata for _, storage in _storages((args, kwargs))}
        out = self._call(func, args, kwargs)
        self._settle()
        for tensor, storage in _storages(out):
            if storage._cdata in self._live:
                self._resized(storage)
            elif storage._cdata not in there:
                self._add(tensor, storage, str(func))
        return out

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The operation itself; with this mode on inside, where its kernel is Python of another library."""
        key = _kernel(func, (args, kwargs))
        if key is None:
            return func(*args, **kwargs)
        with self:
            return func._op_dk(key, *args, **kwargs)

    def _add(self, tensor: torch.Tensor, storage: torch.UntypedStorage, op: str) -> None:
        live = Live(storage.nbytes(), tuple(tensor.shape), tensor.dtype, op)
        self._live[storage._cdata] = live
        weakref.finalize(storage, self._gone.append, storage._cdata).atexit = False
        self._grow(live.nbytes)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        before = self._live[storage._cdata]
        grown = storage.nbytes() - before.nbytes
        if grown < 0:
            self._keep_top()
        self._live[storage._cdata] = replace(before, nbytes=storage.nbytes())
        self._grow(grown)

    def _grow(self, count: int) -> None:
        self._now += count
        if self._now > self._peak:
            self._peak, self._top = self._now, None

    def _settle(self) -> None:
        """Take off what has gone since the last look. Nothing is added in between, so the peak stays exact."""
        while self._gone:
            self._keep_top()
            self._now -= self._live.pop(self._gone.popleft()).nbytes

    def _keep_top(self) -> None:
        """Before anything goes: remember what is alive, if this is the peak."""
        if self._top is None:
            self._top = list(self._live.values())

    def _watched(self, resize: Callable[..., Any]) -> Callable[..., Any]:
        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            resized = resize(storage, size)
            self._settle()
            if storage._cdata in self._live:
                self._resized(storage)
            return resized

        return resize_


def _storages(tree: Any) -> Iterator[tuple[torch.Tensor, torch.UntypedStorage]]:
    """Every tensor in a nest of arguments or results that has a storage with memory, and that storage."""
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            try:
                storage = leaf.untyped_storage()
            except NotImplementedError:  # sparse and other tensors that are several
                continue
            if storage.device.type != "meta":
                yield leaf, storage


def _kernel(func: Any, arguments: Any) -> Any:
    """The dispatch key of a kernel of this operation that can be called itself; None when there is none to find."""
    if not isinstance(func, torch._ops.OpOverload) or func.namespace in _OWN_KERNELS:
        return None
    devices = [tensor.device.type for tensor, _ in _storages(arguments)]
    own = getattr(torch._C.DispatchKey, devices[0].upper(), None) if devices else None
    return next((key for key in (own, _COMPOSITE) if key and func.has_kernel_for_dispatch_key(key)), None)
