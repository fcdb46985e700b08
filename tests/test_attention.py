"""Causal attention by the compiled kernel against float64, and which masks are taken for causal ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from edgegt.attention import Seen, causal_attention, register_attention, seen_of, use_causal
from edgegt.cache import cache_dir
from edgegt.cost import BatchShape
from edgegt.native import Kernels, build, compiler_words
from edgegt.trace import trace
from tiny_models import FAMILIES, float_model

# rows, heads, heads of keys, tokens, size, window, first keys: beside strips of 12, blocks of 48 and panels of 32.
CASES = [
    (1, 1, 1, 1, 4, 0, [0]),
    (2, 3, 1, 31, 8, 0, [0, 5]),
    (2, 4, 2, 32, 64, 0, [31, 0]),
    (1, 2, 2, 33, 96, 7, [3]),
    (3, 2, 1, 49, 20, 0, [0, 12, 48]),
    (2, 2, 2, 100, 16, 40, [0, 64]),
    (2, 6, 3, 97, 80, 1, [1, 96]),
    (2, 1, 1, 200, 32, 0, [200, 0]),  # a row of nothing but padding
]


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    if not compiler_words():
        pytest.skip("no C compiler here")
    return Kernels(build.library(cache_dir()))


def visible(tokens: int, window: int, starts: list[int]) -> Tensor:
    """Boolean [rows, 1, tokens, tokens]."""
    at = torch.arange(tokens)
    near = (at <= at[:, None]) & (at > at[:, None] - (window or tokens))
    return (near & (at >= torch.tensor(starts)[:, None, None])).unsqueeze(1)


def reference(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    """[B, T, H, D] in the operands' own precision; a query that sees nothing gives 0."""
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    shares = (q @ k.transpose(2, 3) * scale).masked_fill(~seen, -1e30).softmax(-1) * seen
    return (shares @ v).transpose(1, 2)


@pytest.mark.parametrize("laid", ["tokens first", "heads first"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_are_those_of_float64(kernels: Kernels, case: Any, laid: str) -> None:
    rows, heads, groups, tokens, size, window, starts = case
    draw = torch.Generator().manual_seed(0)

    def drawn(count: int) -> Tensor:
        shape = (rows, tokens, count, size) if laid == "tokens first" else (rows, count, tokens, size)
        values = torch.randn(shape, generator=draw, dtype=torch.float64)
        return (values.transpose(1, 2) if laid == "tokens first" else values).requires_grad_()

    exact, seen = [drawn(count) for count in (heads, groups, groups)], visible(tokens, window, starts)
    expected = reference(*exact, seen, 0.3)
    live = seen.any(-1).transpose(1, 2).unsqueeze(-1)
    dout = torch.randn(expected.shape, generator=draw, dtype=torch.float64) * live
    operands = [x.detach().float().requires_grad_() for x in exact]
    out = causal_attention(*operands, Seen(torch.tensor(starts), window), 0.3, kernels)
    found = torch.autograd.grad(out, operands, dout.float())
    for ours, theirs in zip((out, *found), (expected, *torch.autograd.grad(expected, exact, dout)), strict=True):
        assert torch.isfinite(ours).all() and ours.shape == theirs.shape
        assert float((ours - theirs).detach().abs().max()) <= 2e-5 * max(1.0, float(theirs.detach().abs().max()))


def test_results_do_not_depend_on_threads(kernels: Kernels) -> None:
    draw = torch.Generator().manual_seed(0)
    operands = [torch.randn(1, heads, 130, 16, generator=draw).requires_grad_() for heads in (6, 2, 2)]
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out = causal_attention(*operands, Seen(torch.tensor([3])), 0.25, kernels)
            found.append((out, *torch.autograd.grad(out.square().sum(), operands)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for others in found[1:] for x, y in zip(found[0], others, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("operand", [0, 1, 2])
def test_what_is_no_number_is_not_lost(kernels: Kernels, operand: int, bad: float) -> None:
    operands = [torch.ones(1, 1, 40, 8) for _ in range(3)]
    operands[operand][0, 0, 20, 3] = bad
    out = causal_attention(*operands, Seen(torch.zeros(1, dtype=torch.int64)), 1.0, kernels)
    assert not torch.isfinite(out[0, 20]).all()


@pytest.mark.parametrize("case", CASES[1:-1], ids=str)
def test_masks_of_padding_and_windows_are_recognised(case: Any) -> None:
    *_, tokens, _, window, starts = case
    found = seen_of(visible(tokens, window, starts))
    assert found is not None and found.starts.tolist() == starts
    assert torch.equal(visible(tokens, found.window, starts), visible(tokens, window, starts))


def test_other_masks_are_not() -> None:
    causal = visible(8, 0, [0])
    for name, mask in {
        "both directions": torch.ones(1, 1, 8, 8, dtype=torch.bool),
        "a hole": causal & (torch.arange(8) != 3),
        "padding on the right": causal & (torch.arange(8) < 6),
        "two texts": causal & ((torch.arange(8) < 4) == (torch.arange(8)[:, None] < 4)),
        "one query": causal[:, :, -1:],
    }.items():
        assert seen_of(mask) is None, name


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "gpt2", "opt", "mistral", "gpt-neox", "phi3"])
def test_a_padded_batch_gives_the_logits_and_gradients_of_eager_attention(kernels: Kernels, family: str) -> None:
    ours, eager = float_model(FAMILIES[family](), register_attention()), float_model(FAMILIES[family]())
    eager.load_state_dict(ours.state_dict())
    use_causal(ours, kernels)
    ids = torch.arange(60).reshape(2, 30) % 50
    attention = torch.ones_like(ids)
    attention[1, :11] = 0
    found = []
    for model in (ours, eager):
        logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits[attention.bool()]
        logits.square().mean().backward()
        found.append((logits, [p.grad for p in model.parameters() if p.grad is not None]))
    assert "_CausalAttentionBackward" in nodes_of(found[0][0])
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5, rtol=1e-4)
    for mine, theirs in zip(found[0][1], found[1][1], strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6 + 1e-4 * float(theirs.abs().max()))


def nodes_of(tensor: Tensor) -> set[str]:
    names, stack, done = set(), [tensor.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is not None and node not in done:
            done.add(node)
            names.add(node.name())
            stack += [below for below, _ in node.next_functions]
    return names


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_a_trace_counts_the_same_flops_and_keeps_less(family: str) -> None:
    causal, plain = trace(FAMILIES[family](), causal=True), trace(FAMILIES[family]())
    assert causal.forward == plain.forward and causal.full_work() == plain.full_work()
    shape = BatchShape(4, 256, 64)
    kept = [sum(path.saved_bytes.at(shape) for path in table.paths) for table in (causal, plain)]
    assert kept[0] < kept[1]
