"""The frozen prefix of a run: what the layers below the lowest trained one give, computed once per row and kept.

All rows that are kept are computed before the first step that uses them, in the batches of their layout, and every
step uses what was stored: so a run that was killed and goes on uses the same bits. What a file held that was lost is
computed again in the same batches. FLOPs of making the states count once, whichever process made them.
Of a streamed base one layer is in memory at a time, so that many batches pass a layer before the next one comes: the
same batches through the same layers, and the same bits. A file is written when its batches passed all of them.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgegt.cost import BatchShape, CostTable
from edgegt.data import Batch, Example, collate, split_micro
from edgegt.errors import EdgegtError, is_out_of_memory
from edgegt.hidden import HiddenStore, identity_of, key_of
from edgegt.model import Int8Model
from edgegt.planner import Plan
from edgegt.prefix import Rows, fill_group_bytes
from edgegt.process import trim
from edgegt.selection import Resting
from edgegt.skipping import AGREES, Skipper
from edgegt.version import __version__

FOLDER = "hidden"
File = Sequence[tuple[int, ...]]


def _emptied(batches: list[list[_Piece]]) -> Iterator[Tensor]:
    """Of each batch the states of its rows, float32 [tokens, width]; it is let go of with that."""
    while batches:
        yield torch.cat([piece.of_tokens() for piece in batches.pop(0)])


class NotKept(EdgegtError):
    """States cannot be kept here, and why."""


class FrozenPrefix:
    """What is kept, or was last, for one model in training. examples: its rows; rows: None where nothing may be kept.

    hits, visits, read_bytes: rows that were read and rows that were trained on while states were kept, and bytes read;
    saved_flops: of the forward passes that did not run; fill_s: seconds that this process computed and wrote states.
    """

    def __init__(
        self, model: Int8Model, table: CostTable, folder: Path, rows: Rows | None, examples: tuple[Example, ...],
        pad_id: int, numerics: str,
    ) -> None:  # fmt: skip
        self.model, self.table, self.folder, self.rows = model, table, folder, rows
        self.examples, self.pad_id, self.numerics = examples, pad_id, numerics
        self.boundary = self.visits = self.hits = self.read_bytes = self.saved_flops = 0
        self.nbytes = self.kept_rows = 0
        self.fill_s = 0.0
        self._counted = ""
        self._store: HiddenStore | None = None
        self._skipper: Skipper | None = None
        self._verified: set[int] = set()

    def state(self) -> dict[str, Any]:
        """What a resumed run needs of it."""
        names = ("boundary", "kept_rows", "nbytes", "visits", "hits", "read_bytes", "saved_flops", "_counted")
        return {name: getattr(self, name) for name in names}

    def restore(self, tree: Mapping[str, Any]) -> None:
        """Be where `state` was; what is on the disk is looked at when it is needed."""
        for name, value in tree.items():
            setattr(self, name, value)
        self._close()

    def facts(self) -> dict[str, int]:
        """What run.json says of it. bytes: on the disk; read_bytes: from it, over all visits."""
        return {
            "boundary": self.boundary, "rows": self.kept_rows, "hits": self.hits, "visits": self.visits,
            "bytes": self.nbytes, "read_bytes": self.read_bytes, "saved_flops": self.saved_flops,
        }  # fmt: skip

    def step_facts(self) -> dict[str, float]:
        """The same for a line of metrics, so far; nothing where nothing is kept."""
        if self._store is None:
            return {}
        return {
            "cache_hits": self.hits, "cache_visits": self.visits, "cache_read_bytes": self.read_bytes,
            "saved_flops": self.saved_flops,
        }  # fmt: skip

    def ready(self, chosen: Plan, resting: Mapping[str, Resting], stopped: Callable[[], bool]) -> bool:
        """Have the states that a plan counts on; False when it was stopped before they were all there.

        Raises: NotKept when they cannot be computed or kept.
        """
        if chosen.boundary == 0 or self.rows is None:
            self.remove()
            return True
        identity = self._identity(chosen, resting)
        if self._store is not None and self._store.identity == identity:
            return True
        self._close()
        self.boundary = chosen.boundary
        began = time.perf_counter()
        try:
            return self._fill(chosen, identity, stopped)
        except NotKept:
            raise
        except Exception as error:
            if not (isinstance(error, EdgegtError) or is_out_of_memory(error)):
                raise
            raise NotKept(str(error).splitlines()[0] if str(error) else type(error).__name__) from error
        finally:
            self.fill_s += time.perf_counter() - began
            self.model.inputs.clear()

    @contextmanager
    def used(self) -> Iterator[None]:
        """For a while, the layers below the boundary do not run for rows whose states are kept, nor stay in memory."""
        skipper, stream = self._skipper, self.model.stream
        staying = stream.from_layer(self.boundary if skipper else 0) if stream else nullcontext()
        with staying, skipper.skipping(self._states) if skipper else nullcontext():
            yield

    @contextmanager
    def unused(self) -> Iterator[None]:
        """Within `used`, have all layers run for a while, for rows that are none of the kept.

        Of a streamed base no layer stays then, so that it takes what evaluation is planned with.
        """
        stream = self.model.stream
        passing = nullcontext() if stream is None else stream.from_layer(len(stream.linears))
        try:
            with nullcontext() if self._skipper is None else self._skipper.running(), passing:
                yield
        finally:
            self.model.inputs.clear()

    def missing_shape(self, batch: Batch) -> BatchShape:
        """The part of a batch for which the layers below the boundary run."""
        assert self._store is not None
        missing = len(self._store.missing(self._keys(batch.input_ids, batch.attention_mask)))
        return BatchShape(missing, batch.shape.tokens, batch.shape.kept)

    def cost(self, batch: Batch, whole: int) -> int:
        """FLOPs of a step on a batch that would take `whole` FLOPs without kept states."""
        if self._store is None:
            return whole
        below = self.table.below(self.boundary)
        return whole - below.at(batch.shape) + below.at(self.missing_shape(batch))

    def remove(self) -> None:
        """Delete what is kept."""
        self._close()
        if not self.hits:  # else it is what was kept
            self.boundary = 0
        shutil.rmtree(self.folder, ignore_errors=True)

    def _close(self) -> None:
        self._store = self._skipper = None

    def _identity(self, chosen: Plan, resting: Mapping[str, Resting]) -> str:
        """Changed by the base, the boundary, what was trained below it, which rows are kept, and what computes."""
        names = {weight.name for weight in self.table.weights if weight.block < chosen.boundary}
        trained = sorted((name, place.seal) for name, place in resting.items() if name in names)
        import transformers

        versions = __version__, torch.__version__, transformers.__version__
        return identity_of(
            self.model.fingerprint, chosen.boundary, trained, chosen.cache_first, self.numerics, versions
        )

    def _fill(self, chosen: Plan, identity: str, stopped: Callable[[], bool]) -> bool:
        assert self.rows is not None
        folder, layout = self.folder / identity[:16], self.rows.layout(chosen.cache_first)
        for other in self.folder.glob("*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)  # first, so that the budget of the disk holds
        store, skipper = HiddenStore(folder, identity, self.rows.width), Skipper(self.model.module, chosen.boundary)
        parts = self._parts(chosen.boundary)
        self._verify(parts, layout.files[0][0], chosen.boundary)
        counts, begun = self._counted != identity, dict(self.model.meter.by_kind)
        named = [[[self._named(identity, row) for row in batch] for batch in file] for file in layout.files]
        for group in self._groups(layout.files, chosen.boundary):
            missing = []
            for number in group:
                there = store.open(number, named[number])
                if there is None:
                    missing.append(number)
                elif counts:
                    for kind, flops in there.items():
                        self.model.meter.add(kind, flops)
            with nullcontext() if counts else self.model.meter.off():
                made = self._made(parts, [layout.files[number] for number in missing], chosen.micro_batch, stopped)
            if made is None:  # what is there counts when it is found again
                self.model.meter.by_kind.clear()
                self.model.meter.by_kind.update(begun)
                return False
            for number in missing:
                batches, spent = made.pop(0)
                store.write(number, named[number], _emptied(batches), spent)
            trim()  # rows are smaller than what goes back by itself, and lie between what stays
        self._counted, self._store, self._skipper = identity, store, skipper
        self.nbytes, self.kept_rows = store.nbytes, len(layout.rows)
        return True

    def _parts(self, boundary: int) -> list[Skipper]:
        """Up to which layers rows are computed at a time: up to the boundary at once, or layer by layer."""
        ends = range(1, boundary + 1) if self.model.stream else [boundary]
        return [Skipper(self.model.module, end) for end in ends]

    def _groups(self, files: Sequence[File], boundary: int) -> list[list[int]]:
        """The numbers of the files that are made together: as many as there is room for, or one."""
        assert self.rows is not None
        room = fill_group_bytes(self.table, boundary) if self.model.stream else 0
        groups: list[list[int]] = []
        left = 0
        for number, file in enumerate(files):
            shapes = [self.rows.shape(batch) for batch in file]
            size = 4 * self.rows.width * sum(shape.rows * shape.tokens for shape in shapes)
            if size > left or not groups:
                groups.append([])
                left = room
            groups[-1].append(number)
            left -= size
        return groups

    def _made(
        self, parts: Sequence[Skipper], files: Sequence[File], micro_batch: int, stopped: Callable[[], bool]
    ) -> list[tuple[list[list[_Piece]], dict[str, int]]] | None:
        """Of each file its batches in pieces that passed all layers, and the FLOPs they took; None when stopped."""
        meter = self.model.meter
        pieces = [[self._pieces(batch, micro_batch) for batch in file] for file in files]
        flops: list[dict[str, int]] = [{} for _ in files]
        for place, skipper in enumerate(parts):
            below = parts[place - 1] if place else None
            if stopped():
                return None
            for file, spent in zip(pieces, flops, strict=True):
                before = dict(meter.by_kind)
                for piece in (piece for batch in file for piece in batch):
                    piece.pass_through(skipper, below, self.model.device)
                for kind, after in meter.by_kind.items():
                    spent[kind] = spent.get(kind, 0) + after - before.get(kind, 0)
        return list(zip(pieces, flops, strict=True))

    def _pieces(self, rows: Sequence[int], micro_batch: int) -> list[_Piece]:
        batch = collate([self.examples[row] for row in rows], self.pad_id)
        return [_Piece(part) for part in split_micro(batch, micro_batch)]

    def _verify(self, parts: Sequence[Skipper], rows: tuple[int, ...], boundary: int) -> None:
        """Raises: NotKept when the model does not give the same with its lowest layers replaced."""
        if boundary in self._verified:
            return
        batch = collate([self.examples[row] for row in rows[:2]], self.pad_id)
        try:
            with self.model.meter.off():
                error = parts[-1].differs(batch, self.model.device)
                states = parts[-1].capture(batch, self.model.device).cpu()
                if len(parts) > 1:
                    piece = _Piece(batch)
                    for below, skipper in zip([None, *parts], parts, strict=False):
                        piece.pass_through(skipper, below, self.model.device)
                    error = max(error, float((piece.states - states).norm() / states.norm().clamp_min(1e-30)))
        except (EdgegtError, TypeError, ValueError, AttributeError, LookupError) as problem:
            raise NotKept(
                f"{type(self.model.module).__name__} does not run without its lowest layers ({problem})"
            ) from problem
        if not error <= AGREES:
            raise NotKept(
                f"{type(self.model.module).__name__} differs by {error:.1e} when its lowest layers are replaced"
            )
        assert self.rows is not None
        if states.shape[-1] != self.rows.width:
            raise NotKept(f"its hidden states have {states.shape[-1]} numbers, and its head reads {self.rows.width}")
        self._verified.add(boundary)

    def _states(self, ids: Tensor, mask: Tensor, compute: Callable[[list[int]], Tensor]) -> Tensor:
        """The states of a batch: of kept rows from the disk, of others computed."""
        assert self._store is not None and self.rows is not None
        keys = self._keys(ids, mask)
        missing = self._store.missing(keys)
        out = torch.zeros((*ids.shape, self.rows.width), dtype=torch.float32)
        read = self._store.read_bytes
        for row, key in enumerate(keys):
            if key in self._store.places:
                state, first = self._store.read(key), int(mask[row].argmax())
                out[row, first : first + len(state)] = state
        out = out.to(ids.device)
        if missing:
            out[missing] = compute(missing)
        self.visits += len(keys)
        self.hits += len(keys) - len(missing)
        self.read_bytes += self._store.read_bytes - read
        self.saved_flops += self.table.below(self.boundary).at(BatchShape(len(keys) - len(missing), ids.shape[1], 1))
        return out

    def _keys(self, ids: Tensor, mask: Tensor) -> list[str]:
        assert self._store is not None
        return [
            key_of(self._store.identity, row[there].tolist())
            for row, there in zip(ids.cpu(), mask.cpu().bool(), strict=True)
        ]

    def _named(self, identity: str, row: int) -> tuple[str, int]:
        inputs = self.examples[row].inputs
        return key_of(identity, inputs), len(inputs)


class _Piece:
    """A micro-batch on its way through the layers. states: where it is, [rows, tokens, width] on the CPU."""

    def __init__(self, batch: Batch) -> None:
        self.batch, self.states = batch, torch.empty(0)

    def pass_through(self, skipper: Skipper, below: Skipper | None, device: torch.device) -> None:
        """Go on to where `skipper` ends, from where `below` ends or from the start."""
        states = self.states.to(device)
        given = below.skipping(lambda ids, mask, compute: states) if below else nullcontext()
        with given:
            self.states = skipper.capture(self.batch, device).cpu()

    def of_tokens(self) -> Tensor:
        """float32 [tokens, width], one row after another."""
        return self.states[self.batch.attention_mask.bool()]
