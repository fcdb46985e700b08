"""What training costs: FLOPs and saved bytes of every choice of tensors, as numbers that need no torch.

A cost table is made once by `trace` and is then enough to plan with. It rests on one fact of reverse-mode
differentiation: the gradient to an operand of an operation is computed if and only if the operand depends on a
trained weight, and the same holds for what the operation keeps for it. So a table is a forward cost, a `dw` cost per
weight, and a list of *paths*: FLOPs and bytes that are paid as soon as any one of a set of weights is trained.
One multiply-accumulate is 2 FLOPs. The sets are bit masks: bit k stands for `weights[k]`.

Reference: PyTorch's autograd semantics; the full fine-tuning it is compared with is arXiv 2309.13192, section 3.1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class BatchShape:
    """Rows, tokens per row (padded), and positions per row that reach the head."""

    rows: int
    tokens: int
    kept: int


@dataclass(frozen=True)
class Work:
    """A quantity (FLOPs or bytes) that is linear in rows, tokens, squared tokens and kept positions."""

    row: int = 0
    token: int = 0
    pair: int = 0
    kept: int = 0

    def at(self, shape: BatchShape) -> int:
        """The quantity for one batch."""
        per_row = self.row + self.token * shape.tokens + self.pair * shape.tokens**2 + self.kept * shape.kept
        return shape.rows * per_row

    def total(self, shapes: Iterable[BatchShape]) -> int:
        """The quantity summed over batches."""
        return sum(self.at(shape) for shape in shapes)

    def __add__(self, other: Work) -> Work:
        return Work(self.row + other.row, self.token + other.token, self.pair + other.pair, self.kept + other.kept)


@dataclass(frozen=True)
class Weight:
    """One tensor that can be trained.

    kind: 'linear' (int8 in the base), 'head' (the output layer, untied when trained) or 'vector' (a norm weight or a
    bias, float in the base). block: index of its layer, -1 below the layers, the number of layers above them.
    stage: weights with the same number read one and the same input.
    """

    name: str
    kind: str
    block: int
    shape: tuple[int, ...]
    stage: int
    dw: Work

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Path:
    """FLOPs of gradients to inputs, and bytes kept for backward, paid once any of `weights` (bit mask) is trained."""

    weights: int
    flops: Work
    saved_bytes: Work


@dataclass(frozen=True)
class CostTable:
    """The costs of one model. `forward` has the head on kept positions only, `head` is its share of it."""

    blocks: int
    weights: tuple[Weight, ...]
    paths: tuple[Path, ...]
    forward: Work
    head: Work
    parameters: int
    base_bytes: int
    float_bytes: int
    widest: Work = field(default_factory=Work)

    def mask(self, selected: Iterable[str]) -> int:
        """Bit mask of the weights with these names. Raises KeyError for a name that is not in the table."""
        index = {weight.name: bit for bit, weight in enumerate(self.weights)}
        mask = 0
        for name in selected:
            mask |= 1 << index[name]
        return mask

    def train_work(self, mask: int) -> Work:
        """FLOPs of forward and backward when the weights in `mask` are trained."""
        work = self.forward
        for path in self.paths:
            if path.weights & mask:
                work += path.flops
        for bit, weight in enumerate(self.weights):
            if mask >> bit & 1:
                work += weight.dw
        return work

    def full_work(self) -> Work:
        """FLOPs of full fine-tuning as transformers runs it: forward and twice that, the head on every position."""
        head_everywhere = Work(token=self.head.kept)
        forward = self.forward + Work(kept=-self.head.kept) + head_everywhere
        return forward + forward + forward

    def probe_work(self) -> Work:
        """FLOPs of one importance batch: forward, recomputation of the layers, and every gradient."""
        everything = (1 << len(self.weights)) - 1
        recomputed = self.forward + Work(kept=-self.head.kept)
        return self.train_work(everything) + recomputed

    def saved_work(self, mask: int) -> Work:
        """Bytes kept between forward and backward when the weights in `mask` are trained."""
        work = Work()
        for path in self.paths:
            if path.weights & mask:
                work += path.saved_bytes
        return work

    def to_json(self) -> dict[str, Any]:
        """A plain tree for costs.json; bit masks become hexadecimal text."""
        tree = asdict(self)
        for path in tree["paths"]:
            path["weights"] = hex(path["weights"])
        return tree

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> CostTable:
        """The table that `to_json` wrote."""
        fields = dict(tree)
        fields["weights"] = tuple(
            Weight(**{**weight, "shape": tuple(weight["shape"]), "dw": Work(**weight["dw"])})
            for weight in tree["weights"]
        )
        fields["paths"] = tuple(
            Path(int(path["weights"], 16), Work(**path["flops"]), Work(**path["saved_bytes"])) for path in tree["paths"]
        )
        for key in ("forward", "head", "widest"):
            fields[key] = Work(**tree[key])
        return cls(**fields)
