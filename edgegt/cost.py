"""What training costs: FLOPs and saved bytes of every choice of tensors, as numbers that need no torch.

A cost table is made once by `trace` and is then enough to plan with. It rests on one fact of reverse-mode
differentiation: the gradient to an operand of an operation is computed if and only if the operand depends on a
trained weight, and the same holds for what the operation keeps for it. So a table is a forward cost, a `dw` cost per
weight, and a list of *paths*: FLOPs and bytes that are paid as soon as any one of a set of weights is trained.
One multiply-accumulate is 2 FLOPs. The sets are bit masks: bit k stands for `weights[k]`.

A layer (`Block`) may be recomputed: what it keeps for backward shrinks to its input, and its forward is paid again.

Reference: PyTorch's autograd semantics; the full fine-tuning it is compared with is arXiv 2309.13192, section 3.1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class BatchShape:
    """Rows, tokens per row (padded), and positions per row that reach the head.

    Of an encoder-decoder, `tokens` are the encoder's and `kept` the decoder's.
    labelled: how many of all rows' kept positions have a label, on which alone the head runs; 0 where unknown: all.
    """

    rows: int
    tokens: int
    kept: int
    labelled: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Work:
    """A quantity (FLOPs or bytes) that is linear in rows, tokens, squared tokens and kept positions.

    kept counts positions with a label, on which the head runs. Of an encoder-decoder only: decoder counts the decoder's
    positions, labelled or not; cross and kept_pair are tokens times these, and their squares.
    """

    row: int = 0
    token: int = 0
    pair: int = 0
    kept: int = 0
    cross: int = 0
    kept_pair: int = 0
    decoder: int = 0

    def at(self, shape: BatchShape) -> int:
        """The quantity for one batch."""
        return self.over(Totals.of([shape]))

    def over(self, totals: Totals) -> int:
        """The quantity summed over batches."""
        return (
            self.row * totals.row
            + self.token * totals.token
            + self.pair * totals.pair
            + self.kept * totals.kept
            + self.cross * totals.cross
            + self.kept_pair * totals.kept_pair
            + self.decoder * totals.decoder
        )

    def total(self, shapes: Iterable[BatchShape]) -> int:
        """The quantity summed over batches."""
        return self.over(Totals.of(shapes))

    def __add__(self, other: Work) -> Work:
        return Work(
            self.row + other.row,
            self.token + other.token,
            self.pair + other.pair,
            self.kept + other.kept,
            self.cross + other.cross,
            self.kept_pair + other.kept_pair,
            self.decoder + other.decoder,
        )

    def parts(self) -> list[Work]:
        """The terms apart."""
        return [Work(**{name: value}) for name, value in asdict(self).items()]

    @property
    def attention(self) -> Work:
        """The part that grows with pairs of positions: the products of attention."""
        return Work(pair=self.pair, cross=self.cross, kept_pair=self.kept_pair)


@dataclass(frozen=True)
class Totals:
    """What a linear quantity needs to know of any number of batches: the sums of its variables."""

    row: int
    token: int
    pair: int
    kept: int
    cross: int
    kept_pair: int
    decoder: int = 0

    @classmethod
    def of(cls, shapes: Iterable[BatchShape]) -> Totals:
        """The sums over these batches."""
        row = token = pair = kept = cross = kept_pair = decoder = 0
        for shape in shapes:
            row += shape.rows
            token += shape.rows * shape.tokens
            pair += shape.rows * shape.tokens**2
            kept += shape.labelled or shape.rows * shape.kept
            cross += shape.rows * shape.tokens * shape.kept
            kept_pair += shape.rows * shape.kept**2
            decoder += shape.rows * shape.kept
        return cls(row, token, pair, kept, cross, kept_pair, decoder)


@dataclass(frozen=True)
class Weight:
    """One tensor that can be trained.

    kind: 'linear' (int8 in the base), 'head' (the output layer, untied when trained) or 'vector' (float in the base: a
    norm weight, a bias, or the matrix of a router). block: index of its layer, -1 below the layers, the number of
    layers above them. stage: weights with the same number read one and the same input.
    experts: how many matrices are stacked in it, of which a token passes some; 1 of any other weight.
    """

    name: str
    kind: str
    block: int
    shape: tuple[int, ...]
    stage: int
    dw: Work
    experts: int = 1

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    def per_position(self, size: int) -> Work:
        """So much for every position that the weight reads."""
        if self.dw.kept:
            return Work(kept=size)
        if self.dw.decoder:
            return Work(decoder=size)
        return Work(token=size) if self.dw.token else Work(row=size)


@dataclass(frozen=True)
class Path:
    """FLOPs of gradients to inputs, and bytes kept for backward, paid once any of `weights` (bit mask) is trained.

    block: the layer whose recomputation frees the bytes; -1 when none does (above the layers, or shared by several).
    """

    weights: int
    flops: Work
    saved_bytes: Work
    block: int = -1


@dataclass(frozen=True)
class Block:
    """One layer, as recomputing it sees it.

    forward: FLOPs to pay again; input_bytes: what is kept instead; weights (bit mask): those in or below it, any of
    which makes it take part in backward.
    """

    forward: Work
    input_bytes: Work
    weights: int


@dataclass(frozen=True)
class CostTable:
    """The costs of one model. `forward` has the head on kept positions only, `head` is its share of it.

    layers: one entry per layer, in the order of `Weight.block` (an encoder's layers, then a decoder's).
    encoder_decoder: whether the kept positions are a decoder's own.
    always: weights that no choice leaves out (a classifier's head that the files lack), float and trained in every
    step; their FLOPs are in paths that every weight is in. hidden: numbers of a hidden state, where there is no head.
    """

    blocks: int
    weights: tuple[Weight, ...]
    paths: tuple[Path, ...]
    layers: tuple[Block, ...]
    forward: Work
    head: Work
    parameters: int
    base_bytes: int
    float_bytes: int
    widest: Work = field(default_factory=Work)
    encoder_decoder: bool = False
    always: tuple[Weight, ...] = ()
    hidden: int = 0

    @property
    def width(self) -> int:
        """Numbers of a hidden state, as the head reads them."""
        return max((weight.shape[1] for weight in self.weights if weight.kind == "head"), default=self.hidden)

    @cached_property
    def head_size(self) -> int:
        """Rows of the head that can be trained: the vocabulary, or fewer after `with_head_rows`; 0 without a head."""
        return max((weight.shape[0] for weight in self.weights if weight.kind == "head"), default=0)

    @property
    def largest_weight(self) -> int:
        """Elements of the largest matrix, of experts one's alone: bytes of one int8 plane of it."""
        return max(weight.numel // weight.experts for weight in self.weights if weight.kind != "vector")

    @cached_property
    def layer_bytes_int8(self) -> tuple[int, ...]:
        """Bytes of each layer's int8 matrices with their scales: what need not be in memory but when the layer runs."""
        sizes = [0] * self.blocks
        for weight in self.weights:
            if weight.kind != "vector" and 0 <= weight.block < self.blocks:
                sizes[weight.block] += weight.numel + 2 * weight.shape[0]
        return tuple(sizes)

    def resident_bytes(self, streamed: int) -> int:
        """Bytes of the base where, of the layers below this one, one is in memory at a time."""
        sizes = self.layer_bytes_int8[:streamed]
        return self.base_bytes - sum(sizes) + max(sizes, default=0)

    def scored(self, shape: BatchShape) -> int:
        """Positions of a row whose logits full fine-tuning computes: all, a decoder's, or the one of a class."""
        return shape.kept if self.encoder_decoder or not self.head_size else shape.tokens

    def mask(self, selected: Iterable[str]) -> int:
        """Bit mask of the weights with these names. Raises KeyError for a name that is not in the table."""
        index = {weight.name: bit for bit, weight in enumerate(self.weights)}
        mask = 0
        for name in selected:
            mask |= 1 << index[name]
        return mask

    def with_head_apart(self) -> CostTable:
        """The table when the files have a head of its own although the config ties it to the embedding."""
        (head,) = (weight for weight in self.weights if weight.kind == "head")
        return replace(
            self,
            parameters=self.parameters + head.numel,
            base_bytes=self.base_bytes + head.numel + 2 * head.shape[0],
            float_bytes=self.float_bytes + 4 * head.numel,
        )

    def with_head_rows(self, rows: int) -> CostTable:
        """The table when only this many rows of the head are trained.

        Their part of the head's product runs once more forward and for the gradient to its input, since the frozen
        rows stay one tensor: the head's `dw` counts all three.
        """
        weights = []
        for weight in self.weights:
            if weight.kind == "head":
                product = Work(kept=2 * rows * weight.shape[1])
                weight = replace(weight, shape=(rows, weight.shape[1]), dw=product + product + product)
            weights.append(weight)
        return replace(self, weights=tuple(weights))

    def train_work(self, mask: int, recompute: Iterable[int] = ()) -> Work:
        """FLOPs of forward and backward when the weights in `mask` are trained and these layers recomputed."""
        work = self.forward
        for path in self.paths:
            if path.weights & mask:
                work += path.flops
        for bit, weight in enumerate(self.weights):
            if mask >> bit & 1:
                work += weight.dw
        for index in set(recompute):
            if self.layers[index].weights & mask:
                work += self.layers[index].forward
        return work

    def below(self, boundary: int) -> Work:
        """FLOPs of the forward pass of the layers below this one."""
        return sum((layer.forward for layer in self.layers[:boundary]), Work())

    def full_work(self) -> Work:
        """FLOPs of full fine-tuning as transformers runs it: forward and twice that, the head on every position."""
        everywhere = self.head.kept
        head_everywhere = Work(decoder=everywhere) if self.encoder_decoder else Work(token=everywhere)
        forward = self.forward + Work(kept=-self.head.kept) + head_everywhere
        return forward + forward + forward

    def probe_work(self) -> Work:
        """FLOPs of one importance batch: forward, recomputation of the layers, every gradient, the head's logits again.

        Where the head can be trained in some rows only, their logits alone are computed again.
        """
        everything = (1 << len(self.weights)) - 1
        recomputed = self.forward + Work(kept=-self.head.kept)
        if self.head == Work():
            recomputed = sum((layer.forward for layer in self.layers), Work())
        again = sum(2 * weight.numel for weight in self.weights if weight.kind == "head")
        return self.train_work(everything) + recomputed + Work(kept=again)

    def saved_work(self, mask: int, recompute: Iterable[int] = ()) -> Work:
        """Bytes kept between forward and backward when the weights in `mask` are trained, these layers recomputed."""
        work, again = Work(), set(recompute)
        for path in self.paths:
            if path.weights & mask and path.block not in again:
                work += path.saved_bytes
        for index in again:
            if self.layers[index].weights & mask:
                work += self.layers[index].input_bytes
        return work

    def layer_bytes(self, index: int, mask: int = -1) -> Work:
        """Bytes that one layer keeps for backward when the weights in `mask` (all by default) are trained."""
        work = Work()
        for path in self.paths:
            if path.block == index and path.weights & mask:
                work += path.saved_bytes
        return work

    def to_json(self) -> dict[str, Any]:
        """A plain tree for costs.json; bit masks become hexadecimal text."""
        tree = asdict(self)
        for entry in (*tree["paths"], *tree["layers"]):
            entry["weights"] = hex(entry["weights"])
        return tree

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> CostTable:
        """The table that `to_json` wrote."""
        fields = dict(tree)
        for key in ("weights", "always"):
            fields[key] = tuple(
                Weight(**{**weight, "shape": tuple(weight["shape"]), "dw": Work(**weight["dw"])})
                for weight in tree.get(key, ())
            )
        fields["paths"] = tuple(
            Path(int(path["weights"], 16), Work(**path["flops"]), Work(**path["saved_bytes"]), path["block"])
            for path in tree["paths"]
        )
        fields["layers"] = tuple(
            Block(Work(**layer["forward"]), Work(**layer["input_bytes"]), int(layer["weights"], 16))
            for layer in tree["layers"]
        )
        for key in ("forward", "head", "widest"):
            fields[key] = Work(**tree[key])
        return cls(**fields)
