"""What it saves to keep the hidden states that enter the lowest trained layer, in rows, FLOPs and bytes. No torch.

The layers below the lowest trained one compute the same for a row in every epoch. Their output can be kept once per
row, and then they need not run for it again. All rows that are to be kept are computed before the first step that uses
them, in batches of their own (`Layout`), sorted by length: so what is kept of a row does not depend on when it was
computed, and a batch that is lost can be made again with the same bits.

    forward with boundary b = forward - below(b) over the visits of kept rows + below(b) over the batches that fill

A boundary whose states are on the disk already is not filled again: that term alone makes rounds keep theirs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from edgegt.cost import BatchShape, CostTable, Totals

MODES = ("auto", "on", "off")
# Bytes of one number and of one token's scale, and what a file has around them: its header, per batch and per file.
NUMBER_BYTES, SCALE_BYTES = 2, 4
BATCH_OVERHEAD, FILE_OVERHEAD = 320, 4096
FILE_BYTES = 4 * 2**20
# Of the free space of the disk: the rest is for checkpoints, the patch and others.
FREE_SHARE = 2
Batches = Sequence[tuple[float, tuple[int, ...]]]


@dataclass(frozen=True)
class Layout:
    """Which rows are kept, and in which files. files: of each its batches, as numbers of rows; nbytes: at most."""

    files: tuple[tuple[tuple[int, ...], ...], ...]
    nbytes: int

    @cached_property
    def rows(self) -> frozenset[int]:
        """The rows that are kept."""
        return frozenset(row for file in self.files for batch in file for row in batch)


@dataclass(frozen=True)
class Footing:
    """What kept states do for the batches that are left. skipped: visits of kept rows, in the shapes of their batches.

    fill: the batches that make them, nothing where they are there already. read_bytes: from the disk, over all visits;
    rows, nbytes: what is kept; first: the step from which on rows were counted for it. misses: steps with rows that
    are not kept.
    """

    skipped: Totals
    fill: Totals
    read_bytes: int
    rows: int
    nbytes: int
    first: int
    misses: int = 0

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Footing:
        """What `asdict` gave."""
        return cls(**{**tree, "skipped": Totals(**tree["skipped"]), "fill": Totals(**tree["fill"])})


@dataclass(frozen=True)
class Caching:
    """How states could be kept below any boundary. fresh: newly made; kept: as they are on the disk, below `boundary`.

    wanted: kept even where it saves nothing. bytes_per_s: the storage's.
    """

    fresh: Footing
    bytes_per_s: float
    wanted: bool = False
    kept: Footing | None = None
    boundary: int = 0

    def to_json(self) -> dict[str, Any]:
        """A plain tree."""
        return asdict(self)

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Caching:
        """What `to_json` gave."""
        kept = tree["kept"]
        footings = {
            "fresh": Footing.from_json(tree["fresh"]),
            "kept": None if kept is None else Footing.from_json(kept),
        }
        return cls(**{**tree, **footings})

    def footing(self, boundary: int) -> Footing:
        """What keeping the states below this boundary does."""
        return self.kept if self.kept is not None and boundary == self.boundary else self.fresh


def fill_group_bytes(table: CostTable, boundary: int) -> int:
    """Bytes of float32 states that go through a streamed base together, a layer at a time: each group reads it once.

    While states are made, what the layers from the boundary upwards take in training is free: so much, and one file.
    """
    return max(2 * FILE_BYTES, sum(table.layer_bytes_int8[boundary:]))


class Rows:
    """The training rows of a run, their visits, and what may be kept of them.

    inputs: the token ids of each; shapes: of the batches; width: numbers of a hidden state; limit: bytes on the disk.
    """

    def __init__(
        self, inputs: Sequence[tuple[int, ...]], batches: Batches, shapes: Sequence[BatchShape], width: int,
        batch_size: int, limit: int, bytes_per_s: float, wanted: bool = False,
    ) -> None:  # fmt: skip
        self.batches, self.shapes, self.width, self.limit = batches, shapes, width, limit
        self.batch_size, self.bytes_per_s, self.wanted = batch_size, bytes_per_s, wanted
        self.lengths = [len(ids) for ids in inputs]
        first: dict[tuple[int, ...], int] = {}
        self.same = [first.setdefault(ids, row) for row, ids in enumerate(inputs)]

    @property
    def nbytes(self) -> int:
        """What all rows would take on the disk, about."""
        return sum(self._bytes(row) for row in set(self.same))

    def layout(self, start: int) -> Layout:
        """The rows worth keeping from step `start` on: those visited twice or more, as many as the limit holds."""
        visits = Counter(self.same[row] for _, rows in self.batches[start:] for row in rows)
        least = 1 if self.wanted else 2
        often = sorted((row for row, count in visits.items() if count >= least), key=lambda row: (-visits[row], row))
        # A row may begin a batch, and a batch a file.
        room = self.limit
        kept: list[int] = []
        for row in often:
            size = self._bytes(row) - (-BATCH_OVERHEAD // self.batch_size)
            size -= -FILE_OVERHEAD * self._bytes(row) // FILE_BYTES
            if not kept:
                size += FILE_OVERHEAD + BATCH_OVERHEAD
            if size <= room:
                kept.append(row)
                room -= size
        kept.sort(key=lambda row: (self.lengths[row], row))
        batches = [tuple(kept[at : at + self.batch_size]) for at in range(0, len(kept), self.batch_size)]
        files: list[list[tuple[int, ...]]] = []
        filled = FILE_BYTES
        for batch in batches:
            if filled >= FILE_BYTES:
                files.append([])
                filled = 0
            files[-1].append(batch)
            filled += sum(map(self._bytes, batch))
        return Layout(tuple(map(tuple, files)), self.limit - room)

    def shape(self, batch: Sequence[int]) -> BatchShape:
        """The shape of a batch that fills, as layers below the head see it."""
        return BatchShape(len(batch), max(self.lengths[row] for row in batch), 1)

    def missing(self, layout: Layout, step: int) -> int:
        """How many rows of this step's batch are not kept."""
        return sum(self.same[row] not in layout.rows for row in self.batches[step][1])

    def footing(self, start: int, end: int | None = None, first: int | None = None) -> Footing:
        """Keeping rows for the steps from `start` to `end`. first: they are on the disk, counted from this step on."""
        layout = self.layout(start if first is None else first)
        kept, skipped, read, misses = layout.rows, [], 0, 0
        for (_, rows), shape in zip(self.batches[start:end], self.shapes[start:end], strict=True):
            hits = [self.same[row] for row in rows if self.same[row] in kept]
            misses += len(hits) < len(rows)
            if hits:
                skipped.append(BatchShape(len(hits), shape.tokens, shape.kept))
                read += sum(map(self._bytes, hits))
        fill = [self.shape(batch) for file in layout.files for batch in file] if first is None else []
        return Footing(
            Totals.of(skipped), Totals.of(fill), read, len(kept), layout.nbytes, start if first is None else first,
            misses,
        )  # fmt: skip

    def caching(self, start: int, end: int | None = None, kept: tuple[int, int] | None = None) -> Caching | None:
        """What could be kept for these steps; None for no row. kept: boundary and first step of what is there."""
        fresh = self.footing(start, end)
        if not fresh.rows and kept is None:
            return None
        there = None if kept is None else self.footing(start, end, kept[1])
        return Caching(fresh, self.bytes_per_s, self.wanted, there, kept[0] if kept else 0)

    def _bytes(self, row: int) -> int:
        return self.lengths[row] * (NUMBER_BYTES * self.width + SCALE_BYTES)
