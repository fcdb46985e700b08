"""Peak memory of training, as named terms that are linear in the choice of tensors.

    floor        interpreter, libraries, tokenised data: what the process holds before the model
    base         the int8 model with its scales, norms and biases (counted whole: mapped pages become resident)
    masters      float32 masters of the trained tensors
    planes       their two int8 planes, from which their products are computed
    optimizer    8-bit AdamW states (float32 below 4096 elements, as bitsandbytes keeps them)
    gradients    all gradients when micro-batches are accumulated, otherwise the largest one (it is applied and freed)
    demoted      two planes of each tensor trained in an earlier round
    activations  what backward keeps (from the cost table)
    logits       the head's log-probabilities and two gradients of that size, on the kept positions, at the loss
    transient    what the widest product of the layers needs beyond that, later in backward
    libraries    code, kernels and threads loaded on first use, after the floor was measured (3 to 15 MiB were seen)
    slack        allocator fragmentation and what the model does not name: 8 % of the tensors above, and 6 MiB

Bytes everywhere. On a discrete GPU the same terms hold for device memory, with the floor of the CUDA context.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from edgegt.cost import BatchShape, CostTable, Weight, Work
from edgegt.units import MIB

MASTER_BYTES = 4
PLANE_BYTES = 2
GRADIENT_BYTES = 4
LOGIT_BYTES = 12
SMALL_TENSOR = 4096
SLACK_SHARE = 0.08
SLACK_BYTES = 6 * MIB
LIBRARY_BYTES = 19 * MIB


def optimizer_bytes(weight: Weight, eight_bit: bool = True) -> int:
    """Bytes of the two AdamW states of one trained tensor."""
    if not eight_bit or weight.numel < SMALL_TENSOR:
        return 8 * weight.numel
    return 2 * weight.numel + weight.numel // 32


def plane_bytes(weight: Weight) -> int:
    """Bytes of the int8 planes of one trained or demoted tensor (none for a norm or bias)."""
    return 0 if weight.kind == "vector" else PLANE_BYTES * weight.numel


def state_bytes(weight: Weight, accumulate: bool, eight_bit: bool = True) -> int:
    """Bytes that training this tensor adds for as long as the round lasts."""
    gradient = GRADIENT_BYTES * weight.numel if accumulate else 0
    return MASTER_BYTES * weight.numel + plane_bytes(weight) + optimizer_bytes(weight, eight_bit) + gradient


def fused_gradient_bytes(weight: Weight, freed_bytes: int = 0) -> int:
    """Bytes while one gradient exists (it, and working copies of its optimizer step) beyond logits freed by then."""
    return max(0, 2 * GRADIENT_BYTES * weight.numel - freed_bytes)


def freed_logit_bytes(table: CostTable, worst: BatchShape, vocabulary: int) -> int:
    """Bytes of logits that are gone when the first gradient is formed and no product's transient has taken."""
    return max(0, (LOGIT_BYTES - 4) * worst.rows * worst.kept * vocabulary - table.widest.at(worst))


def worst_shape(table: CostTable, shapes: Iterable[BatchShape], micro_batch: int, vocabulary: int) -> BatchShape:
    """A shape that needs as much memory as any micro-batch, whatever is selected, whatever gradient is the largest.

    It starts as the micro-batch that needs most with everything selected, and grows, term by term, by whichever
    micro-batch some selection could make need more; a selection saves between nothing and everything of each kind.
    """
    saved = table.saved_work((1 << len(table.weights)) - 1)
    micro = {BatchShape(min(micro_batch, shape.rows), shape.tokens, shape.kept) for shape in shapes}

    def ends(shape: BatchShape) -> tuple[int, int]:
        """Bytes at the loss or later without a gradient, and later with one that outweighs the loss."""
        logits = vocabulary * shape.rows * shape.kept
        later = 4 * logits + table.widest.at(shape)
        return max(LOGIT_BYTES * logits, later), later

    def shortfall(worst: BatchShape, shape: BatchShape) -> int:
        lacking = max(need - there for need, there in zip(ends(shape), ends(worst), strict=True))
        for kind in ("row", "token", "pair", "kept"):
            work = Work(**{kind: getattr(saved, kind)})
            lacking += max(0, work.at(shape) - work.at(worst))
        return lacking

    worst = max(micro, key=lambda shape: (ends(shape)[0] + saved.at(shape), shape.kept))
    while True:
        short = max(micro, key=lambda shape: shortfall(worst, shape))
        if shortfall(worst, short) <= 0:
            return worst
        worst = BatchShape(max(worst.rows, short.rows), max(worst.tokens, short.tokens), max(worst.kept, short.kept))


@dataclass(frozen=True)
class Surroundings:
    """What holds whatever is selected: the floor, tensors trained in earlier rounds, whether states are 8-bit."""

    floor_bytes: int
    demoted: tuple[str, ...] = ()
    eight_bit: bool = True


def fixed_terms(table: CostTable, around: Surroundings, worst: BatchShape, vocabulary: int) -> dict[str, int]:
    """The terms that no selection changes. One logit-sized gradient is still there when the layers' products run."""
    logits = worst.rows * worst.kept * vocabulary
    return {
        "floor": around.floor_bytes,
        "libraries": LIBRARY_BYTES,
        "base": table.base_bytes,
        "logits": LOGIT_BYTES * logits,
        "transient": max(0, table.widest.at(worst) - (LOGIT_BYTES - 4) * logits),
    }


def slack_bytes(terms: dict[str, int]) -> int:
    """Allowance for fragmentation and unnamed buffers, from the other terms."""
    named = sum(value for key, value in terms.items() if key not in ("floor", "base", "libraries", "slack"))
    return int(SLACK_SHARE * named) + SLACK_BYTES


def peak_terms(
    table: CostTable,
    selected: Sequence[str],
    around: Surroundings,
    worst: BatchShape,
    vocabulary: int,
    accumulate: bool,
) -> dict[str, int]:
    """Every named term of the peak for one selection; their sum is the predicted peak in bytes."""
    mask = table.mask(selected)
    chosen = [weight for bit, weight in enumerate(table.weights) if mask >> bit & 1]
    demoted = table.mask(around.demoted) & ~mask
    resting = [weight for bit, weight in enumerate(table.weights) if demoted >> bit & 1]
    terms = fixed_terms(table, around, worst, vocabulary)
    terms["masters"] = sum(MASTER_BYTES * weight.numel for weight in chosen)
    terms["planes"] = sum(plane_bytes(weight) for weight in chosen)
    terms["optimizer"] = sum(optimizer_bytes(weight, around.eight_bit) for weight in chosen)
    if accumulate:
        terms["gradients"] = sum(GRADIENT_BYTES * weight.numel for weight in chosen)
    else:
        freed = freed_logit_bytes(table, worst, vocabulary)
        terms["gradients"] = max((fused_gradient_bytes(weight, freed) for weight in chosen), default=0)
    terms["demoted"] = sum(plane_bytes(weight) for weight in resting)
    terms["activations"] = table.saved_work(mask).at(worst)
    terms["slack"] = slack_bytes(terms)
    return terms
