"""Peak memory of training, as named terms that are linear in the choice of tensors and of recomputed layers.

The peak is at the loss, where every layer's activations are held and the logits of one chunk of positions exist; or
when backward begins, where the widest product runs and a gradient is formed; or when a recomputed layer has its turn,
where what the layers above it kept is gone. All three are planned.

    floor        interpreter, libraries, tokenised data: what the process holds before the model
    libraries    code, kernels and threads loaded on first use, after the floor was measured; and, with accumulation,
                 what the heap keeps between micro-batches
    base         the int8 model with its scales, norms and biases (mapped pages become resident: counted whole, or,
                 where it is streamed, without the layers below the boundary but the largest of them)
    masters      float masters of the trained tensors
    planes       their two int8 planes, from which their products are computed
    optimizer    AdamW states
    gradients    all of them when micro-batches are accumulated; and the largest one at its time (applied and freed)
    demoted      two planes of each tensor trained in an earlier round
    activations  what backward keeps (from the cost table), without what recomputed layers would have kept
    recomputed   the largest recomputed layer, while its backward runs (nothing when the peak is at the loss)
    logits       one chunk of supervised positions, and the head's gradient to its input (nothing when it is later)
    transient    the widest product of the layers (nothing when the peak is at the loss)
    fragments    holes in the heap, where small tensors of a micro-batch lay between lasting ones
    slack        allocator fragmentation and what the model does not name: a share of the tensors above, and a constant

Bytes everywhere. On a discrete GPU the same terms hold for device memory, with the floor of the CUDA context.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from edgegt.chunks import chunk_elements, chunk_positions
from edgegt.cost import BatchShape, CostTable, Weight, Work
from edgegt.units import MIB

PLANE_BYTES = 2
GRADIENT_BYTES = 4
LOGIT_BYTES = 8.5
HIDDEN_BYTES = 13
SMALL_TENSOR = 4096
SLACK_SHARE = 0.02
SLACK_BYTES = 6 * MIB
LIBRARY_BYTES = 31 * MIB // 2
HEAP_BYTES = 5 * MIB
FRAGMENTS_PERCENT = 20
HOLES_PERCENT = 25
MAPPED_ELEMENTS = MAPPED_BYTES = 2**18
MASTER_BYTES = {"float32": 4, "bfloat16": 2}
_UNNAMED = ("floor", "base", "libraries", "slack")


@dataclass(frozen=True)
class Formats:
    """Number formats of what training adds: `master` is 'float32' or 'bfloat16', `states` 'float32' or '8-bit'.

    states: the two AdamW moments of a trained tensor. Norms and biases keep float32 masters always.
    """

    master: str = "float32"
    states: str = "8-bit"


@dataclass(frozen=True)
class Surroundings:
    """What holds whatever is selected: the floor, and tensors trained in earlier rounds.

    copy_bytes: of a frozen weight that a kernel copies while its gradient to the input is formed (CUDA; else 0).
    streamed: of the layers below this one, one at a time is in memory.
    """

    floor_bytes: int
    demoted: tuple[str, ...] = ()
    copy_bytes: int = 0
    streamed: int = 0


@dataclass(frozen=True)
class Setting:
    """The batches and the manner of training that a peak is predicted for.

    worst: a shape that needs as much memory as any micro-batch. accumulate: gradients live until the optimizer step.
    labelled: at most this many kept positions of a micro-batch have a label, on which alone the head runs; 0: all.
    holes: percent of what backward keeps that is lost in the heap (see `holes_percent`).
    """

    worst: BatchShape
    vocabulary: int
    accumulate: bool
    formats: Formats = field(default_factory=Formats)
    labelled: int = 0
    holes: int = 0

    @classmethod
    def of(
        cls, table: CostTable, shapes: Sequence[BatchShape], vocabulary: int, micro_batch: int, batch_size: int,
        formats: Formats,
    ) -> Setting:  # fmt: skip
        """The setting of these batches, cut into micro-batches of at most this many rows."""
        worst = worst_shape(table, shapes, micro_batch, vocabulary)
        labelled, holes = most_labelled(shapes, micro_batch), holes_percent(table, shapes, micro_batch, worst)
        return cls(worst, vocabulary, micro_batch < batch_size, formats, labelled, holes)


def master_bytes(weight: Weight, formats: Formats) -> int:
    """Bytes of the master of one trained tensor; norms and biases have float32 ones."""
    return (4 if weight.kind == "vector" else MASTER_BYTES[formats.master]) * weight.numel


def optimizer_bytes(weight: Weight, formats: Formats) -> int:
    """Bytes of the two AdamW states of one trained tensor."""
    if formats.states == "float32" or weight.numel < SMALL_TENSOR:
        return 8 * weight.numel
    return 2 * weight.numel + weight.numel // 32


def plane_bytes(weight: Weight) -> int:
    """Bytes of the int8 planes of one trained or demoted tensor (none for a norm or bias)."""
    return 0 if weight.kind == "vector" else PLANE_BYTES * weight.numel + 2 * weight.shape[0]


def state_bytes(weight: Weight, accumulate: bool, formats: Formats) -> int:
    """Bytes that training this tensor adds for as long as the round lasts."""
    state = master_bytes(weight, formats) + plane_bytes(weight) + optimizer_bytes(weight, formats)
    return state + GRADIENT_BYTES * weight.numel if accumulate else state


def fragment_bytes(weight: Weight, accumulate: bool, formats: Formats) -> int:
    """Bytes of the heap that training this tensor leaves unusable; seen with accumulation only.

    Of a large tensor every part is mapped apart (see `process`), so that it leaves no holes.
    """
    if not accumulate or weight.numel >= MAPPED_ELEMENTS:
        return 0
    return FRAGMENTS_PERCENT * state_bytes(weight, accumulate, formats) // 100


def gradient_bytes(weight: Weight) -> int:
    """Bytes of one gradient while it is formed; the head's exists at the loss, the others later."""
    return GRADIENT_BYTES * weight.numel


def loss_bytes(weight: Weight) -> int:
    """Bytes that training the head adds at the loss: its gradient, and wider chunks of logits."""
    return gradient_bytes(weight) + _wider_bytes(weight)


def logit_bytes(table: CostTable, shape: BatchShape, vocabulary: int, labelled: int = 0) -> int:
    """Bytes at the loss: one chunk of logits, and what the head reads and gives back on the kept positions.

    labelled: how many of the kept positions have a label; 0 where that is not known: all.
    """
    positions = shape.rows * shape.kept
    chunk = chunk_positions(vocabulary, labelled or positions)
    return int(LOGIT_BYTES * vocabulary * chunk) + HIDDEN_BYTES * positions * table.width


def passing_bytes(table: CostTable, around: Surroundings, setting: Setting) -> tuple[int, int]:
    """Bytes that exist for a moment: at the loss, and while the widest product of the layers runs."""
    logits = logit_bytes(table, setting.worst, setting.vocabulary, setting.labelled)
    return logits + around.copy_bytes, table.widest.at(setting.worst) + around.copy_bytes


def kept_bytes(works: Iterable[Work], setting: Setting) -> tuple[int, int]:
    """Bytes that backward keeps of these operands, and the holes in the heap that come with them."""
    held = [work.at(setting.worst) for work in works]
    return sum(held), sum(size * setting.holes // 100 for size in held)


def holes_percent(table: CostTable, shapes: Iterable[BatchShape], micro_batch: int, worst: BatchShape) -> int:
    """Holes that small tensors leave in the heap, in percent of what backward keeps of the worst micro-batch.

    A micro-batch leaves them when its hidden states are too small to be mapped apart (see `process`).
    """
    tokens = [min(shape.rows, micro_batch) * shape.tokens for shape in shapes]
    small = max((count for count in tokens if 4 * count * table.width < MAPPED_BYTES), default=0)
    return -(-HOLES_PERCENT * small // (worst.rows * worst.tokens))


def most_labelled(shapes: Iterable[BatchShape], micro_batch: int) -> int:
    """The most labelled positions that a micro-batch of these batches can have."""
    return max(
        min(shape.labelled or shape.rows * shape.kept, min(micro_batch, shape.rows) * shape.kept) for shape in shapes
    )


def worst_shape(table: CostTable, shapes: Iterable[BatchShape], micro_batch: int, vocabulary: int) -> BatchShape:
    """A shape that needs as much memory as any micro-batch, whatever is selected.

    It starts as the micro-batch that needs most with everything selected, and grows by whichever micro-batch some
    selection could make need more; a selection saves between nothing and everything of each kind.
    """
    saved = table.saved_work((1 << len(table.weights)) - 1)
    micro = {BatchShape(min(micro_batch, shape.rows), shape.tokens, shape.kept) for shape in shapes}
    parts = [part for part in saved.parts() if part.at(BatchShape(1, 1, 1))]

    def demands(shape: BatchShape) -> list[int]:
        return [logit_bytes(table, shape, vocabulary), table.widest.at(shape), *(part.at(shape) for part in parts)]

    known = {shape: demands(shape) for shape in micro}
    worst = max(micro, key=lambda shape: (sum(known[shape]), shape.kept))
    while True:
        there = demands(worst)

        def shortfall(shape: BatchShape, there: list[int] = there) -> int:
            return sum(max(0, need - have) for need, have in zip(known[shape], there, strict=True))

        short = max(micro, key=shortfall)
        if shortfall(short) == 0:
            return worst
        worst = BatchShape(max(worst.rows, short.rows), max(worst.tokens, short.tokens), max(worst.kept, short.kept))


def fixed_terms(table: CostTable, around: Surroundings, shape: BatchShape, vocabulary: int) -> dict[str, int]:
    """The terms of a forward pass over this shape that keeps nothing: evaluation, and the base of everything else."""
    return _fixed_terms(table, around, Setting(shape, vocabulary, False))


def always_bytes(table: CostTable, accumulate: bool, formats: Formats) -> int:
    """Bytes of the weights that every choice trains: masters, states, gradients and what these leave in the heap."""
    return sum(
        state_bytes(weight, accumulate, formats) + fragment_bytes(weight, accumulate, formats)
        for weight in table.always
    )


def _fixed_terms(table: CostTable, around: Surroundings, setting: Setting) -> dict[str, int]:
    logits, transient = passing_bytes(table, around, setting)
    return {
        "floor": around.floor_bytes,
        "libraries": library_bytes(setting.accumulate),
        "base": table.resident_bytes(around.streamed),
        "logits": logits if logits >= transient else 0,
        "transient": transient if transient > logits else 0,
    }


def library_bytes(accumulate: bool) -> int:
    """Bytes that are loaded or kept whatever is trained, beside the floor and the model."""
    return LIBRARY_BYTES + (HEAP_BYTES if accumulate else 0)


def slack_bytes(terms: dict[str, int]) -> int:
    """Allowance for fragmentation and unnamed buffers, from the other terms."""
    return int(SLACK_SHARE * sum(value for key, value in terms.items() if key not in _UNNAMED)) + SLACK_BYTES


def peak_terms(
    table: CostTable, selected: Sequence[str], recompute: Sequence[int], around: Surroundings, setting: Setting
) -> dict[str, int]:
    """Every named term of the peak for one selection; their sum is the predicted peak in bytes."""
    mask = table.mask(selected)
    chosen = [weight for bit, weight in enumerate(table.weights) if mask >> bit & 1] + list(table.always)
    demoted = table.mask(around.demoted) & ~mask
    resting = [weight for bit, weight in enumerate(table.weights) if demoted >> bit & 1]
    terms = _fixed_terms(table, around, setting)
    terms["masters"] = sum(master_bytes(weight, setting.formats) for weight in chosen)
    terms["planes"] = sum(plane_bytes(weight) for weight in chosen)
    terms["optimizer"] = sum(optimizer_bytes(weight, setting.formats) for weight in chosen)
    terms["demoted"] = sum(plane_bytes(weight) for weight in resting)
    terms["gradients"] = GRADIENT_BYTES * sum(weight.numel for weight in chosen) if setting.accumulate else 0
    terms["fragments"] = sum(fragment_bytes(weight, setting.accumulate, setting.formats) for weight in chosen)
    phase = max(_phases(table, mask, chosen, recompute, around, setting), key=lambda phase: sum(phase.values()))
    terms |= phase | {name: terms[name] + phase[name] for name in ("gradients", "fragments")}
    terms["slack"] = slack_bytes(terms)
    return terms


def _phases(
    table: CostTable,
    mask: int,
    chosen: Sequence[Weight],
    recompute: Sequence[int],
    around: Surroundings,
    setting: Setting,
) -> list[dict[str, int]]:
    """What is held at the loss, when backward begins, and in the backward of each recomputed layer."""
    kept, holes = kept_bytes(_saved(table, mask, recompute), setting)
    head = max((gradient_bytes(weight) for weight in chosen if weight.kind == "head"), default=0)
    largest = max((gradient_bytes(weight) for weight in chosen if weight.kind != "head"), default=0)
    logits, transient = passing_bytes(table, around, setting)
    wider = max((_wider_bytes(weight) for weight in chosen if weight.kind == "head"), default=0)
    later = {"logits": 0, "transient": transient, "gradients": largest}
    held = {"activations": kept, "fragments": holes, "recomputed": 0}
    phases = [{**held, "logits": logits + wider, "gradients": head, "transient": 0}, {**held, **later}]
    again = set(recompute)
    for index in reversed(range(table.blocks)):
        if not table.layers[index].weights & mask:
            break
        if index in again:
            whole, its_holes = kept_bytes(saved_by(table, index), setting)
            phases.append({"activations": kept, "fragments": holes + its_holes, "recomputed": whole, **later})
        else:
            gone, its_holes = kept_bytes(saved_by(table, index, mask), setting)
            kept, holes = kept - gone, holes - its_holes
    return phases


def _wider_bytes(head: Weight) -> int:
    """What the chunks of a trained head take above those of a frozen one, at most."""
    return int(LOGIT_BYTES * (chunk_elements(head.numel) - chunk_elements()))


def _saved(table: CostTable, mask: int, recompute: Sequence[int]) -> list[Work]:
    """What backward keeps, operand by operand (see CostTable.saved_work)."""
    again = set(recompute)
    works = [path.saved_bytes for path in table.paths if path.weights & mask and path.block not in again]
    return works + [table.layers[index].input_bytes for index in again if table.layers[index].weights & mask]


def saved_by(table: CostTable, index: int, mask: int = -1) -> list[Work]:
    """What one layer keeps for backward, operand by operand, when the weights in `mask` are trained."""
    return [path.saved_bytes for path in table.paths if path.block == index and path.weights & mask]
