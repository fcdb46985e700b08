"""Fused norms, gates and rotations against the layers they come from: logits, gradients, and what is left alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from edgegt.architecture import layers_of
from edgegt.cache import cache_dir
from edgegt.data import Batch
from edgegt.fused import fuse, fused_parts, rms_norm, rotate, silu_mul
from edgegt.native import Kernels, compiler_words, library
from edgegt.recompute import recomputed
from tiny_models import FAMILIES, batch_of, float_model

TAKEN = {"llama": 13, "qwen2": 13, "qwen3": 19, "mistral": 13, "smollm": 13, "gemma2": 16, "gemma3": 22,
         "gpt-neox": 3, "phi3": 10, "gpt2": 0, "bloom": 0}  # fmt: skip
COMPILED = pytest.param(
    True, id="compiled", marks=pytest.mark.skipif(not compiler_words(), reason="no C compiler here")
)
with_and_without = pytest.mark.parametrize("compiled", [pytest.param(False, id="torch"), COMPILED])


def kernels_if(compiled: bool) -> Kernels | None:
    return Kernels(library(cache_dir())) if compiled else None


def model_of(family: str) -> Any:
    """A random model whose norms are not all ones."""
    model = float_model(FAMILIES[family]())
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
    return model


def seen(model: Any, batch: Batch) -> dict[str, Tensor]:
    """Logits where there is a token, and the gradients of a sum of them to every parameter."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
    logits = model(**inputs, use_cache=False).logits[batch.attention_mask.bool()]
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    (logits * weight).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"logits": logits.detach(), **gradients}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(value.norm()) for value in expected.values())
    for name, value in expected.items():  # the gradient to a bias of keys is zero but for rounding
        assert float((found[name] - value).norm()) <= 1e-4 * max(float(value.norm()), 1e-3 * largest), name


@with_and_without
@pytest.mark.parametrize("family", TAKEN)
def test_a_fused_model_is_the_model(family: str, compiled: bool) -> None:
    batch = batch_of(3)
    expected = seen(model_of(family), batch)
    model = model_of(family)
    assert fuse(model, kernels_if(compiled)) == len(list(fused_parts(model))) == TAKEN[family]
    assert_same(seen(model, batch), expected)


def test_what_is_taken_over_of_llama() -> None:
    model = model_of("llama")
    fuse(model)
    kinds = Counter(type(model.get_submodule(name)).__name__ for name in fused_parts(model))
    assert kinds == {"LlamaRMSNorm": 7, "LlamaMLP": 3, "LlamaAttention": 3}
    assert not any("forward" in vars(module) for module in model_of("llama").modules()), "instances alone are changed"


def test_a_part_of_each_head_is_turned_by_gpt_neox_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.gpt_neox import modeling_gpt_neox as theirs

    model, calls, original = model_of("gpt-neox"), [], theirs.apply_rotary_pos_emb
    size = 64 // 4

    def counted(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(cos.shape[-1])
        turned: tuple[Tensor, Tensor] = original(q, k, cos, sin)
        return turned

    fuse(model)
    monkeypatch.setattr(theirs, "apply_rotary_pos_emb", counted)
    seen(model, batch_of(2))
    assert len(calls) == 3 and max(calls) < size


class FooRMSNorm(nn.Module):
    """Named as a norm; `kind` says what it computes."""

    def __init__(self, width: int = 8, eps: float = 1e-6, kind: str = "norm") -> None:
        super().__init__()
        self.weight, self.eps, self.kind = nn.Parameter(torch.ones(width)), eps, kind
        if kind == "bare":
            del self.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "groups":
            return self.weight * (x.unflatten(-1, (-1, 4)) * self.scale(x.unflatten(-1, (-1, 4)))).flatten(-2)
        if self.kind == "bare":
            return x * self.scale(x)
        y = self.weight * x * self.scale(x)
        return {"norm": y, "shift": y + 1e-3, "mean": self.weight * (x - x.mean(-1, keepdim=True)) * self.scale(x)}[
            self.kind
        ]

    def scale(self, x: Tensor) -> Tensor:
        return (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


@pytest.mark.parametrize("kind", ["norm", "shift", "mean", "groups", "bare"])
def test_a_norm_that_computes_something_else_is_left_alone(kind: str) -> None:
    norm = FooRMSNorm(kind=kind)
    model, x = nn.Sequential(FooRMSNorm(), norm), torch.linspace(-1, 2, 24).view(3, 8)
    expected = model(x)
    assert fuse(model) == (2 if kind == "norm" else 1)
    torch.testing.assert_close(model(x), expected)


class BarMLP(nn.Module):
    """Parts named as those of a gated unit; what it computes is doubled."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(8, 8) for _ in range(3))
        self.act_fn = act

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y


class DoubledMLP(BarMLP):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_gate_that_computes_something_else_is_left_alone() -> None:
    assert fuse(BarMLP(nn.SiLU())) == 1
    assert fuse(BarMLP(nn.GELU())) == 0
    assert fuse(DoubledMLP(nn.SiLU())) == 0


@with_and_without
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_norm_is_differentiated_as_by_torch(offset: float, compiled: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight, dy = (torch.randn(shape, generator=draw) for shape in ((2, 9, 40), (40,), (2, 9, 40)))
    for trained in (False, True):
        ours = x.clone().requires_grad_(), weight.clone().requires_grad_(trained)
        theirs = x.double().requires_grad_(), weight.double().requires_grad_()
        rms_norm(*ours, offset, 1e-6, kernels_if(compiled)).backward(dy)
        torch.nn.functional.rms_norm(theirs[0], (40,), theirs[1] + offset, 1e-6).backward(dy.double())
        assert theirs[0].grad is not None and theirs[1].grad is not None
        torch.testing.assert_close(ours[0].grad, theirs[0].grad.float(), rtol=1e-4, atol=1e-5)
        if trained:
            torch.testing.assert_close(ours[1].grad, theirs[1].grad.float(), rtol=1e-4, atol=1e-5)
        assert (ours[1].grad is not None) == trained


@with_and_without
def test_gates_and_rotations_are_differentiated_as_by_torch(compiled: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    kernels = kernels_if(compiled)
    values = [torch.randn(2, 5, 3, 8, generator=draw).transpose(1, 2) for _ in range(4)]
    cosine, sine = (torch.randn(1, 5, 8, generator=draw) for _ in range(2))
    grads = []
    for fused in (True, False):
        gate, up, x = (value.clone().requires_grad_() for value in values[:3])
        if fused:
            y = silu_mul(gate, up, kernels) + rotate(x, cosine, sine, kernels)
        else:
            first, second = x.chunk(2, -1)
            y = silu(gate) * up + x * cosine[:, None] + torch.cat((-second, first), -1) * sine[:, None]
        y.backward(values[3])
        grads.append((y.detach(), gate.grad, up.grad, x.grad))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@with_and_without
def test_gradients_are_the_same_bits_under_recomputation(compiled: bool) -> None:
    model, batch = model_of("qwen3"), batch_of(3)
    fuse(model, kernels_if(compiled))
    expected = seen(model, batch)
    name, count = layers_of(model)
    with recomputed(model.get_submodule(name), range(count)):
        found = seen(model, batch)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_norm_in_half_precision_is_a_number_in_half_precision() -> None:
    x, weight = torch.linspace(-3, 3, 64).view(2, 32).bfloat16(), torch.ones(32, dtype=torch.bfloat16)
    y = rms_norm(x, weight, 0.0, 1e-6, kernels_if(bool(compiler_words())))
    expected = torch.nn.functional.rms_norm(x.double(), (32,), eps=1e-6)
    assert y.dtype == torch.bfloat16 and float((y - expected).norm() / expected.norm()) < 0.02
