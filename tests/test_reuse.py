"""Memory of large tensors: a block is lent again after its tensor died and not before, and what is held is bounded."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from edgegt.cache import cache_dir
from edgegt.errors import EdgegtError
from edgegt.native import build, compiler_words, reuse_memory, reused_bytes
from edgegt.process import trim

BIG = 1 << 16  # float32 elements of the smallest tensor that is kept
PAGE = 1 << 12
needs_compiler = pytest.mark.skipif(not compiler_words("CXX"), reason="no C++ compiler here")


@pytest.fixture
def _reused() -> Iterator[None]:
    reuse_memory(cache_dir())
    gc.collect()
    trim()
    yield
    trim()


in_reused_memory = [needs_compiler, pytest.mark.usefixtures("_reused")]


def state() -> tuple[int, int, int]:
    """Bytes held, in use, and most in use."""
    return reused_bytes()


def used() -> int:
    return state()[1]


class TestReuse:
    """With torch's allocator replaced."""

    pytestmark = in_reused_memory

    @pytest.mark.parametrize("dtype", [torch.float32, torch.int8, torch.bfloat16])
    @pytest.mark.parametrize("shape", [(4 * BIG,), (1025, 1031), (3, 700, 701)])
    def test_a_tensor_takes_whole_pages(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        before = used()
        tensor = torch.empty(shape, dtype=dtype)
        assert used() - before == -(-tensor.nbytes // PAGE) * PAGE and tensor.data_ptr() % 64 == 0
        assert bool((tensor.fill_(3) == 3).all())

    def test_small_ones_stay_on_the_heap(self) -> None:
        before = state()
        kept = [torch.empty(shape) for shape in ((), (0,), (0, 10**9), (BIG - 1,))]
        assert state() == before and len(kept) == 4
        large = torch.empty(BIG)
        assert used() - before[1] == large.nbytes

    def test_a_block_is_lent_again_when_its_tensor_has_died_and_not_before(self) -> None:
        first, second = torch.full((BIG,), 1.0), torch.full((BIG,), 2.0)
        where, held = first.data_ptr(), state()[0]
        assert where != second.data_ptr() and bool((first == 1).all())
        del first
        again = torch.empty(BIG // 2, 2, dtype=torch.int32)
        assert again.data_ptr() == where and state()[0] == held, "of one size, whatever shape and type"
        assert torch.empty(BIG).data_ptr() != where and bool((second == 2).all())

    def test_views_and_arrays_keep_a_block(self) -> None:
        before = used()
        tensor = torch.full((4, BIG), 1.0)
        size = used() - before
        view, array = tensor.t()[3:9, 2], tensor[0].numpy()
        other = torch.empty(0).set_(tensor.untyped_storage(), 7, (5,), (1,))
        del tensor
        assert used() - before == size > 0
        torch.full((4, BIG), 2.0)
        assert bool((view == 1).all()) and bool((other == 1).all()) and bool((array == 1).all())
        del view, other
        assert used() - before == size, "numpy's view keeps it too"
        del array
        assert used() == before

    def test_what_is_kept_for_backward_keeps_its_block(self) -> None:
        x = torch.ones(BIG, requires_grad=True)
        before = used()
        y = x * torch.full((BIG,), 2.0)
        assert used() - before == 2 * y.nbytes, "the product and the factor"
        torch.full((BIG,), 5.0)
        y.sum().backward()
        assert x.grad is not None and bool((x.grad == 2).all())
        del y
        assert used() - before == x.grad.nbytes

    def test_operations_that_ask_for_memory_of_their_own_get_it(self) -> None:
        """oneDNN's, which give it back by its address alone."""
        before = used()
        for rows in (3, 700):
            x = torch.randn(rows, 20, 96, requires_grad=True)
            y = torch.nn.functional.gelu(x)
            y.sum().backward()
            torch.testing.assert_close(y, (x * (1 + torch.erf(x / 2**0.5)) / 2).detach(), rtol=1e-4, atol=1e-5)
        del x, y
        assert used() == before

    def test_no_more_is_held_than_was_in_use_at_once(self) -> None:
        alive: list[Tensor] = []
        draw, start = torch.Generator().manual_seed(0), used()
        for turn in range(300):
            size = PAGE * int(torch.randint(4 * BIG // PAGE, 200, (), generator=draw))
            _, lent, most = state()
            alive.append(torch.empty(size, dtype=torch.int8))
            held, now, after = state()
            assert held <= max(most, lent + size) and now == lent + size and after == max(most, now)
            assert now - start == sum(tensor.nbytes for tensor in alive)
            while len(alive) > turn % 7:
                alive.pop(int(torch.randint(len(alive), (), generator=draw)))
        alive.clear()
        assert used() == start < state()[0] <= state()[2]

    def test_a_trim_gives_back_what_is_free_and_forgets_the_most(self) -> None:
        kept = torch.full((BIG,), 1.0)
        torch.empty(2 * BIG)
        held, lent, most = state()
        assert held - lent == most - lent == 8 * BIG
        trim()
        assert state() == (lent, lent, lent) and bool((kept == 1).all())

    def test_a_tensor_dies_after_the_allocator_was_asked_for_again(self) -> None:
        tensor, before = torch.full((BIG,), 1.0), state()
        reuse_memory(cache_dir())
        assert state() == before and bool((tensor == 1).all())
        del tensor
        assert used() == before[1] - 4 * BIG

    def test_threads_share_it(self) -> None:
        wrong: list[int] = []
        before = used()

        def work(number: int) -> None:
            for turn in range(200):
                tensors = [torch.full((BIG + 1024 * (turn % 3),), number) for _ in range(2)]
                wrong.extend(number for tensor in tensors if not bool((tensor == number).all()))
                if turn % 20 == 0:
                    trim()

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == [] and used() == before


def test_without_a_compiler_its_names_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(EdgegtError, match=r"no C\+\+ compiler was found \(c\+\+, g\+\+, clang\+\+, or \$CXX\)"):
        build.allocator(tmp_path)


def test_a_run_goes_on_without_it_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgegt import prepare

    def refuse(*_: Any) -> None:
        raise EdgegtError("no C++ compiler was found")

    class Lines:
        def __init__(self) -> None:
            self.said: list[str] = []

        def fallback(self, line: str) -> None:
            self.said.append(line)

        def say(self, line: str) -> None:
            pass

    monkeypatch.setenv("EDGEGT_CACHE", str(tmp_path))
    monkeypatch.setattr("edgegt.native.reuse_memory", refuse)
    build.library.cache_clear()
    log: Any = Lines()
    choice = prepare.choose_kernels(torch.device("cpu"), log)
    lines = [line for line in log.said if "no C++ compiler" in line]
    assert len(lines) == (choice.backend.kernels is not None)
