"""An int8 model in a training loop of one's own: PyTorch's optimizers, PyTorch's backward, and a patch at the end.

The loop sees float masters as its parameters. Their int8 planes are made anew before the next forward, so that nothing
has to be called after `optimizer.step()`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgegt.cache import cache_dir
from edgegt.classifier import as_classifier, check_writes, known_labels
from edgegt.errors import InputError, nearest
from edgegt.log import Log
from edgegt.model import Int8Model, load_int8
from edgegt.patch import save_patch
from edgegt.prepare import choose_kernels
from edgegt.source import open_source, read_config
from edgegt.version import __version__


class Int8Trainable:
    """A transformers model in int8 (`module`; calling this calls it), of which `select` makes tensors trainable.

    The head and stacked experts are trained as [out, in] like every linear; a tied head becomes a matrix of its own.
    """

    def __init__(self, model: Int8Model) -> None:
        self.module = model.module
        self._model = model
        self._masters: dict[str, nn.Parameter] = {}
        self._live: list[str] = []
        self._stale: set[str] = set()
        self._versions: dict[str, int] = {}
        self._hooks: dict[str, Any] = {}
        self.module.register_forward_pre_hook(lambda *_: self._refresh())
        self.select(())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the transformers model gives: logits, and the loss where labels are given."""
        return self.module(*args, **kwargs)

    @property
    def names(self) -> tuple[str, ...]:
        """What can be selected: linears, the head, norms and biases."""
        return tuple(sorted({*self._model.linears, *self._model.vectors}))

    @property
    def selected(self) -> tuple[str, ...]:
        """What is trained now; a head that the files lack always is."""
        return tuple(self._live)

    def select(self, names: Iterable[str]) -> None:
        """Train exactly these tensors. One that was trained before goes on from where it was, as the same parameter.

        Raises: InputError for a name that cannot be trained.
        """
        wanted = list(dict.fromkeys([*names, *self._model.fresh]))
        for name in wanted:
            if name not in self._model.linears and name not in self._model.vectors and name not in self._model.fresh:
                near = nearest(name, self.names)
                raise InputError(f"'{name}' cannot be trained{near}: give some of what `names` lists")
        self._refresh()
        for name in [name for name in self._live if name not in wanted]:
            self._rest(name)
        for name in wanted:
            if name not in self._live:
                self._wake(name)
        self._live = wanted

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters of what is selected, float32: of linears their masters [out, in]. For an optimizer."""
        return [self._masters[name] for name in self._live]

    def save_patch(self, path: str | Path, separator: str = "") -> None:
        """Write everything that was trained so far as a patch, for `edgegt eval`, `generate` and `export`.

        separator: what stood between prompt and completion, as `edgegt generate` will put it there.
        Raises: InputError when nothing was selected; DiskError.
        """
        if not self._masters:
            raise InputError("nothing was selected, so there is nothing to save: call select(...) and train first")
        tensors = {name: self._masters[name].detach().cpu() for name in sorted(self._masters)}
        model = self._model
        save_patch(
            Path(path), tensors, model.fingerprint, model.source.name, __version__, separator, model.labels
        )  # fmt: skip

    def _wake(self, name: str) -> None:
        linear = self._model.linears.get(name)
        if linear is None:
            self._masters[name] = self._model.float_parameter(name)
            self._masters[name].requires_grad_(True)
            return
        known = self._masters.get(name)
        linear.promote(self._model.original(name) if known is None else known.detach())
        if known is not None:
            linear.master = known
        assert linear.master is not None
        self._masters[name] = linear.master
        self._versions[name] = linear.master._version
        self._hooks[name] = linear.master.register_post_accumulate_grad_hook(lambda _: self._stale.add(name))

    def _rest(self, name: str) -> None:
        self._masters[name].grad = None
        if name in self._model.linears:
            self._model.linears[name].demote()
            self._hooks.pop(name).remove()
        else:
            self._masters[name].requires_grad_(False)

    def _refresh(self) -> None:
        """Bring the planes up to the masters that changed: by their version, or, as not every optimizer counts that up,
        because a gradient came.
        """
        self._model.inputs.clear()
        for name in self._live:
            linear = self._model.linears.get(name)
            if linear is None:
                continue
            version = self._masters[name]._version
            if name in self._stale or version != self._versions[name]:
                linear.refresh()
                self._versions[name] = version
        self._stale.clear()


def load_int8_model(model: str | Path, labels: Sequence[str] = ()) -> Int8Trainable:
    """A Hugging Face model folder or hub id in int8, on the GPU where there is one, with nothing selected yet.

    labels: the classes, in the order of the logits, of a model that is to say the class of a text; a head that the
    files lack is then selected from the beginning. Raises: InputError for a model that cannot be loaded.
    """
    name = str(model)
    source, config = open_source(name), read_config(name)
    if labels or known_labels(config):
        config = as_classifier(config, tuple(labels) or known_labels(config), 0, source.files)
    else:
        check_writes(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kernels = choose_kernels(device, Log())
    return Int8Trainable(load_int8(config, source, cache_dir(), kernels.backend, device))
