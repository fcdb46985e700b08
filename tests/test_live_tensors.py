"""The counter of live tensors against tensors whose bytes are known by heart."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from live_tensors import LiveTensors

KIB = 2**10
ROWS = 256  # float32 vectors of 1 KiB


def test_a_tensor_counts_from_its_making_to_its_end() -> None:
    with LiveTensors() as live:
        a = torch.empty(ROWS)
        assert live.now == KIB
        b = a + 1
        assert live.now == 2 * KIB
        del a
        assert live.now == KIB
        del b
        assert (live.now, live.peak) == (0, 2 * KIB)


def test_what_was_there_before_is_not_counted() -> None:
    before = torch.ones(ROWS)
    with LiveTensors() as live:
        before.add_(1)
        view, same = before.view(16, 16), before.detach()
        assert live.now == 0
        assert view.shape == (16, 16) and same.shape == (ROWS,)


def test_views_count_once_and_hold_the_whole_storage() -> None:
    with LiveTensors() as live:
        part = torch.empty(4, ROWS)[1:2].t()
        copies = [part.view_as(part), part.detach(), part.unsqueeze(0)]
        assert live.now == 4 * KIB
        del part
        gc.collect()
        assert live.now == 4 * KIB
        copies.clear()
        assert live.now == 0


def test_a_storage_whose_python_object_went_first_is_not_taken_for_dead() -> None:
    with LiveTensors() as live:
        kept = torch.nn.Parameter(torch.empty(ROWS))
        storage = kept.untyped_storage()
        del storage
        gc.collect()
        assert live.now == KIB
        del kept
        assert live.now == 0


def test_data_from_python_lists_counts() -> None:
    with LiveTensors() as live:
        made = torch.tensor([1.0] * ROWS)
        assert live.now == made.untyped_storage().nbytes() == KIB


def test_resizes_are_followed_in_both_directions() -> None:
    with LiveTensors() as live:
        a = torch.empty(ROWS)
        a.resize_(3 * ROWS)
        assert live.now == 3 * KIB
        a.untyped_storage().resize_(0)
        assert (live.now, live.peak) == (0, 3 * KIB)
        a.untyped_storage().resize_(5 * KIB)
        assert (live.now, live.peak) == (5 * KIB, 5 * KIB)
        out = torch.empty(0)
        torch.add(torch.ones(ROWS), 1, out=out)
        assert live.now == 6 * KIB


def test_the_count_stays_true_after_the_block() -> None:
    with LiveTensors() as live:
        a, b = torch.empty(ROWS), torch.empty(2 * ROWS)
    del a
    assert live.now == 2 * KIB
    c = b * 2
    assert live.now == 2 * KIB and c.shape == b.shape
    del b
    assert live.now == 0


def test_the_peak_can_be_reset_and_is_explained() -> None:
    with LiveTensors() as live:
        small, large = torch.empty(ROWS), torch.zeros(4, ROWS, dtype=torch.float64)
        half = large.half()
        del large
        small2 = torch.empty(ROWS)
        top = live.largest()
        assert [entry.nbytes for entry in top] == [8 * KIB, 2 * KIB, KIB]
        assert (top[0].shape, top[0].dtype, top[0].op) == ((4, ROWS), torch.float64, "aten.zeros.default")
        assert live.largest(1) == top[:1] and "(4, 256)" in str(top[0])
        live.reset_peak()
        assert live.peak == live.now == 4 * KIB
        del half, small, small2
        assert [entry.nbytes for entry in live.largest()] == [2 * KIB, KIB, KIB]
    assert live.peak == 4 * KIB


def test_backward_is_seen_gradient_by_gradient() -> None:
    x = torch.ones(64, 256)
    weight = torch.ones(256, 256, requires_grad=True)
    threads = []
    weight.register_hook(lambda grad: threads.append(threading.current_thread().name))
    with LiveTensors() as live:
        y = x @ weight
        z = y.exp()
        loss = z.sum()
        assert live.now == 2 * 64 * KIB + 4
        del y
        assert live.now == 64 * KIB + 4  # matmul keeps its operands, exp its result
        live.reset_peak()
        loss.backward()
        # exp's gradient, which is the matrix product's too, and the weight's
        assert live.peak >= 64 * KIB + 256 * KIB
        assert any(entry.op.startswith("aten.mm") and entry.shape == (256, 256) for entry in live.largest())
        del loss, z
        assert live.now == 256 * KIB == weight.grad.nbytes
    assert threads == [threading.current_thread().name]


def test_gradients_freed_in_backward_do_not_add_up() -> None:
    weights = [torch.ones(ROWS, requires_grad=True) for _ in range(8)]

    def free(parameter: torch.Tensor) -> None:
        parameter.grad = None

    with LiveTensors() as live:
        kept = sum((weight * 2).sum() for weight in weights)
        kept.backward()
        together = live.peak
        for weight in weights:
            weight.grad = None
            weight.register_post_accumulate_grad_hook(free)
        del kept
        live.reset_peak()
        again = sum((weight * 2).sum() for weight in weights)
        again.backward()
        assert live.peak < together - 4 * KIB
        del again
        assert live.now == 0


class _Doubled(torch.autograd.Function):
    """y = 2 x, with a temporary of four times the size in each direction."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        wide = x.repeat(4)
        ctx.save_for_backward(wide[: x.numel()].to(torch.int8))
        return wide[: x.numel()] * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        assert ctx.saved_tensors[0].dtype == torch.int8
        wide = grad.repeat(4)
        return wide[: grad.numel()] * 2


def test_custom_autograd_functions_are_seen_in_both_directions() -> None:
    x = torch.ones(ROWS, requires_grad=True)
    with LiveTensors() as live:
        y = _Doubled.apply(x)
        assert live.now == KIB + ROWS  # y, and what is saved in int8
        assert live.peak == 5 * KIB + ROWS
        live.reset_peak()
        y.sum().backward()
        assert live.peak >= KIB + ROWS + 4 * KIB
        assert max(live.largest(), key=lambda entry: entry.nbytes).op == "aten.repeat.default"
        del y
        assert live.now == KIB == x.grad.nbytes


def test_recomputation_shows_as_fewer_bytes_before_backward() -> None:
    x = torch.ones(64, 64, requires_grad=True)

    def body(t: torch.Tensor) -> torch.Tensor:
        return t.exp().sin().tanh()

    with LiveTensors() as live:
        plain = body(x)
        kept = live.now
        del plain
        again = checkpoint(body, x, use_reentrant=False)
        assert live.now == again.nbytes < kept
        again.sum().backward()
        assert live.peak >= kept


def test_integer_products_and_int8_quantisation_are_seen() -> None:
    a, b = torch.ones(32, 64, dtype=torch.int8), torch.ones(64, 128, dtype=torch.int8)
    with LiveTensors() as live:
        product = torch._int_mm(a, b)
        assert live.now == 4 * 32 * 128 == product.nbytes
        assert live.largest(1)[0].op == "aten._int_mm.default"


def test_operations_written_in_python_are_looked_into() -> None:
    bnb = pytest.importorskip("bitsandbytes.functional")
    x = torch.linspace(-1, 1, 16 * 64).reshape(16, 64)
    expected = bnb.int8_vectorwise_quant(x)[0]
    with LiveTensors() as live:
        q, scale, _ = bnb.int8_vectorwise_quant(x)
        assert live.now == q.nbytes + scale.nbytes
        assert live.peak > live.now + x.nbytes  # its float temporaries
    assert torch.equal(q, expected)


def test_a_step_of_the_8_bit_optimizer_is_as_without_the_counter() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    start, gradient = torch.randn(128, 64), torch.randn(128, 64)

    def stepped() -> torch.Tensor:
        weight = torch.nn.Parameter(start.clone())
        weight.grad = gradient
        bnb.optim.AdamW8bit([weight], lr=1e-2).step()
        return weight.data

    with LiveTensors() as live:
        counted = stepped()
        gc.collect()
        assert live.peak >= start.nbytes + 2 * start.numel()  # the weight and two states of a byte
    assert torch.equal(counted, stepped())


@torch.library.custom_op("live_tensors_test::shifted", mutates_args=())
def _shifted(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, x, x])[: x.numel()] + 1


_shifted.register_autograd(lambda ctx, grad: grad * 3)


def test_a_custom_operation_keeps_its_result_and_its_gradient() -> None:
    x = torch.ones(ROWS, requires_grad=True)
    with LiveTensors() as live:
        y = _shifted(x)
        assert live.peak == 4 * KIB and live.now == KIB
        y.sum().backward()
    assert torch.equal(y, torch.full((ROWS,), 2.0))
    assert torch.equal(x.grad, torch.full((ROWS,), 3.0))


def test_an_exception_leaves_nothing_behind() -> None:
    plain = torch.UntypedStorage.resize_
    with pytest.raises(RuntimeError), LiveTensors() as live:
        torch.empty(3) @ torch.empty(4)
    assert torch.UntypedStorage.resize_ is plain
    assert live.now == 0


@pytest.mark.gpu
def test_backward_on_a_gpu_is_seen_from_the_engines_own_thread() -> None:
    x = torch.ones(64, 256, device="cuda")
    weight = torch.ones(256, 256, device="cuda", requires_grad=True)
    with LiveTensors() as live:
        loss = (x @ weight).exp().sum()
        live.reset_peak()
        loss.backward()
        assert any(entry.op.startswith("aten.mm") for entry in live.largest())
        del loss
        assert live.now == 256 * KIB
