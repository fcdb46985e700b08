"""The arithmetic floor of a training step: what its products and its attention alone would take on this machine.

    floor = sum over the step of seconds(product),    floor_share = floor / seconds of the step

The step is run once on tensors without data (`meta`), which says every product with its shape: y = x W^T of each
linear, dx = dy W where backward needs it, dw = dy^T x where the weight is trained, and each attention forward and
backward. Of edgegt's plans the trained weights' second plane and recomputed layers count too, and the head is on the
supervised positions. Each distinct product is then run alone, with as many threads as the methods had, on memory that
is reused, and the best of a few runs counts: int8 by `torch._int_mm`, float32 by `torch.mm`, attention by
`scaled_dot_product_attention` in float32 and its gradient. Peers compute in float32, edgegt y and dx in int8; dw of
edgegt has two formats and its attention two kernels, and its floor is the faster. Everything else (norms, quantising,
softmax of the loss, optimizer, dispatch, fresh memory) is what the share leaves out. A kernel faster than torch's can
have a share above 1.

FLOPs of the same step are counted by torch's FlopCounterMode, attention by its two plain products and two for each of
them backward. Products of 8-bit peers are counted and measured as if they ran in float32, as their gradients do.

Run by bench.py:  python tools/bench_floor.py PRODUCTS.json SECONDS.json --threads 2
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

sys.path.append(str(Path(__file__).resolve().parents[1]))  # after PYTHONPATH, which may name another copy

from edgegt.attention import MULTIPLE, Seen, causal_attention
from edgegt.cache import cache_dir
from edgegt.quant import choose_backend

ATTENTION = "bench"
TURNS, RUNS, LEAST_RUNS, BUDGET_S = 3, 5, 2, 0.5


@dataclass(frozen=True, order=True)
class Product:
    """One product. kind: 'y', 'dx', 'dw', 'attention' or 'attention_back'.

    form: 'float32', 'int8', 'causal' (edgegt's attention) or 'faster' (of those its kind has). size: tokens, inputs
    and outputs of the linear, or rows, heads, queries, keys and width of a head.
    """

    kind: str
    form: str
    size: tuple[int, ...]


@dataclass
class Step:
    """What a step computes: how often each product, in float32, and FLOPs as torch counts them."""

    products: Counter[Product] = field(default_factory=Counter)
    by_weight: list[tuple[str, Product]] = field(default_factory=list)
    flops: int = 0

    def note(self, name: str, kind: str, size: tuple[int, ...]) -> None:
        """One more product of the module of this name."""
        product = Product(kind, "float32", size)
        self.products[product] += 1
        self.by_weight.append((name, product))


def step_of(config: Any, prepare: Callable[[Any], Any], rows: int, tokens: int, kept: int = 0) -> Step:
    """The products and FLOPs of one training step of the float model that `prepare` makes ready to train.

    kept: last positions that reach the head, 0 for all.
    """
    from transformers import AutoModelForCausalLM

    found = Step()
    _register_attention()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.float32, attn_implementation=ATTENTION
        )
        model = prepare(model.train())
        inputs = torch.zeros(rows, tokens, dtype=torch.int64)
    for name, module in model.named_modules():
        module.__dict__["bench_note"] = partial(found.note, name)
        if isinstance(module, torch.nn.Linear):
            module.__dict__["forward"] = partial(_linear, module)
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=inputs, logits_to_keep=kept, use_cache=False).logits
        logits.sum().backward()
    found.flops = counter.get_total_flops()
    return found


def int8_products(
    step: Step, trained: Iterable[str], again: Callable[[str], bool], head: str, rows: int
) -> Counter[Product]:
    """The products of edgegt's plan, from those of the same step in float32.

    trained: names of trained weights, which have a second plane; again: whether a module is in a recomputed layer.
    head: name of the head's module, of which `rows` rows are trained apart (0: all of it, or none).
    """
    planes = {name.removesuffix(".weight") for name in trained}
    counted: Counter[Product] = Counter()
    for name, product in step.by_weight:
        times = 2 if product.kind in ("y", "attention") and again(name) else 1
        if product.kind.startswith("attention"):
            counted[Product(product.kind, "faster", product.size)] += times
            continue
        form = "faster" if product.kind == "dw" else "int8"
        apart = (*product.size[:2], rows) if name == head and rows and name in planes else None
        if product.kind == "dw":
            counted[Product("dw", form, apart or product.size)] += times
            continue
        counted[Product(product.kind, form, product.size)] += times
        if apart:
            counted[Product(product.kind, form, apart)] += times
        if product.kind == "y" and name in planes:
            counted[Product("y", form, apart or product.size)] += times
    return counted


def floor_of(products: Counter[Product], seconds: dict[Product, float]) -> float:
    """Seconds of all of them."""
    return sum(times * seconds[product] for product, times in products.items())


def to_json(products: Iterable[Product]) -> list[list[Any]]:
    """Products in order, as a plain tree."""
    return [[product.kind, product.form, list(product.size)] for product in sorted(products)]


def measure(products: Sequence[Product]) -> list[float]:
    """Seconds of each product alone: the best of a few runs, in turns that lie apart in time."""
    turns = [[_seconds_of(product) for product in products] for _ in range(TURNS)]
    return [min(spent) for spent in zip(*turns, strict=True)]


def _seconds_of(product: Product) -> float:
    if product.form == "faster":
        forms = ("float32", "causal" if product.kind.startswith("attention") else "int8")
        return min(_seconds_of(Product(product.kind, form, product.size)) for form in forms)
    run = _attention_run(product) if product.kind.startswith("attention") else _product_run(product)
    spent: list[float] = []
    started = time.perf_counter()
    run()
    while len(spent) < LEAST_RUNS or (len(spent) < RUNS and time.perf_counter() - started < BUDGET_S):
        start = time.perf_counter()
        run()
        spent.append(time.perf_counter() - start)
    return min(spent)


def _product_run(product: Product) -> Callable[[], object]:
    """The product of a linear as a call: y [n, out], dx [n, in] or dw [out, in], into the same memory each time."""
    tokens, width, out = product.size
    int8 = product.form == "int8"

    def operand(*shape: int) -> Tensor:
        if int8:
            return torch.randint(-127, 128, shape, dtype=torch.int8)
        return torch.randn(*shape)

    weight, x, dy = (out, width), (tokens, width), (tokens, out)
    if product.kind == "y":
        left, right = operand(*x), operand(*weight).t()
    elif product.kind == "dx":
        left, right = operand(*dy), operand(*weight)
    else:
        left, right = operand(*dy).t().contiguous() if int8 else operand(*dy).t(), operand(*x)
    result = torch.empty(left.shape[0], right.shape[1], dtype=torch.int32 if int8 else torch.float32)
    return partial(torch._int_mm if int8 else torch.mm, left, right, out=result)


def _attention_run(product: Product) -> Callable[[], object]:
    """Attention forward, or its gradients alone, as a call; causal, and with all keys seen that lie before the rows."""
    rows, heads, queries, keys, width = product.size
    q = torch.randn(rows, heads, queries, width)
    k, v = torch.randn(rows, heads, keys, width), torch.randn(rows, heads, keys, width)
    mask = None if queries == keys else torch.ones(queries, keys, dtype=torch.bool).tril_(keys - queries)
    forward: Callable[..., Tensor] = partial(scaled_dot_product_attention, attn_mask=mask, is_causal=mask is None)
    kernels = choose_backend(torch.device("cpu"), cache_dir()).backend.kernels
    if product.form == "causal" and mask is None and width % MULTIPLE == 0 and kernels is not None:
        seen, scale = Seen(torch.zeros(rows, dtype=torch.int64)), width**-0.5
        forward = lambda q, k, v: causal_attention(q, k, v, seen, scale, kernels)  # noqa: E731
    if product.kind == "attention":
        return partial(forward, q, k, v)
    operands = [tensor.requires_grad_() for tensor in (q, k, v)]
    out = forward(*operands)
    dy = torch.ones_like(out)
    return lambda: torch.autograd.grad(out, operands, dy, retain_graph=True)


def _linear(module: Any, x: Tensor) -> Tensor:
    return _noted(x, module.weight, module.bias, module.bench_note)


class _Noted(torch.autograd.Function):
    """A linear that notes its products as they run."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, note: Callable[..., None]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.note, ctx.size = note, (x.numel() // x.shape[-1], weight.shape[1], weight.shape[0])
        note("y", ctx.size)
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy = grads[0].reshape(-1, weight.shape[0])
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            ctx.note("dx", ctx.size)
            dx = (dy @ weight).reshape(x.shape)
        if ctx.needs_input_grad[1]:
            ctx.note("dw", ctx.size)
            dw = dy.t() @ x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[2]:
            db = dy.sum(0)
        return dx, dw, db, None


_noted = cast(Callable[..., Tensor], _Noted.apply)


def _register_attention() -> None:
    """Without a mask of this name transformers makes none, which would ask for numbers where there are none."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _noted_attention)


def _noted_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """Attention by plain products; notes its sizes, and its backward when a gradient arrives."""
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    size = (*query.shape[:3], key.shape[2], query.shape[3])
    module.bench_note("attention", size)
    out = (query @ key.transpose(2, 3)).softmax(-1) @ value
    if out.requires_grad:
        out.register_hook(lambda gradient: module.bench_note("attention_back", size))
    return out.transpose(1, 2).contiguous(), None


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure products alone; started by bench.py.")
    parser.add_argument("products", type=Path)
    parser.add_argument("seconds", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    tree = json.loads(args.products.read_text(encoding="utf-8"))
    products = [Product(kind, form, tuple(size)) for kind, form, size in tree]
    args.seconds.write_text(json.dumps(measure(products)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
