"""The output layer and its loss in chunks of positions, so that the logits of a batch never exist at once.

    loss = sum_i logsumexp(l_i) - l_i[label_i],    l = f(x W^T + bias),    dl = f' (softmax(l) - onehot)

The gradient of a summed cross-entropy needs nothing from above but one factor, so each chunk forms its gradients to the
hidden states, the master and the bias while its logits exist, in their memory, and backward only multiplies. Positions
without a label are left out of every product. Beside the stored gradients a chunk takes 6.0 to 6.4 bytes per logit, and
8.3 where a weight has two planes or the logits a soft cap (9.3 with the float reference backend; all measured).
f is what some models do to their logits: a factor (Cohere, Granite) and a soft cap, cap tanh(l / cap) (Gemma).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from edgegt.architecture import is_encoder_decoder, text_config
from edgegt.chunks import chunk_positions
from edgegt.data.batches import IGNORE
from edgegt.errors import InputError
from edgegt.quant import Backend

VERIFIED = 1e-4
# Below e^-60 of the likeliest token nothing reaches a float32 sum, and denormal numbers make a CPU seven times slower.
FAINTEST = -60.0


class Head(Protocol):
    """What the loss needs of an output layer; Int8Linear is one. master: what is trained of it, None when frozen."""

    out_features: int
    backend: Backend
    master: Any
    bias: Any

    def logits(self, q: Tensor, scale: Tensor) -> Tensor:
        """float32 [n, out] of a quantised input."""
        ...

    def input_gradient(self, dy: Tensor, evenly: bool = False) -> Tensor:
        """float32 [n, in] of dy [n, out]; evenly: small values of dy are not rounded away."""
        ...

    def master_gradient(self, dy: Tensor, q: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
        """float32, of the master's shape; added to `out` in place when given."""
        ...


@dataclass(frozen=True)
class LogitMap:
    """l -> cap tanh(factor l / cap), or factor l without a cap."""

    factor: float = 1.0
    cap: float | None = None

    def apply(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """The mapped logits, in the memory of these without a cap, and the tanh that `back_` asks for."""
        if self.cap is None:
            return (logits if self.factor == 1.0 else logits.mul_(self.factor)), None
        tanh = logits.mul_(self.factor / self.cap).tanh_()
        return tanh * self.cap, tanh

    def back_(self, gradient: Tensor, tanh: Tensor | None) -> Tensor:
        """The gradient to the logits before the map, in place; `tanh` is overwritten."""
        if tanh is not None:
            gradient.mul_(tanh.square_().neg_().add_(1))
        return gradient if self.factor == 1.0 else gradient.mul_(self.factor)


def logit_map(module: Any) -> LogitMap:
    """What this transformers model does to its logits, from its text config."""
    config = text_config(module.config)
    factor = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    if getattr(config, "scale_decoder_outputs", False):  # T5 scales what its head reads, which is the same
        factor *= float(config.d_model) ** -0.5
    cap = getattr(config, "final_logit_softcapping", None)
    return LogitMap(factor, None if cap is None else float(cap))


def head_loss(module: Any, hidden: Tensor, labels: Tensor, lse: Tensor | None = None, factor: float = 1.0) -> Tensor:
    """Sum of the cross-entropy in nats over labels [...] other than -100, of hidden states [..., in], times `factor`.

    labels may stay on the CPU. lse: float32 [labelled positions], filled with the logsumexp of each. factor: given
    here it costs nothing, while scaling the result makes backward pass over the largest gradient once more.
    The result can be differentiated once.
    """
    head: Head = module.get_output_embeddings()
    labels = labels.reshape(-1)
    at = (labels != IGNORE).nonzero().squeeze(1)
    job = _Job(head, logit_map(module), at.to(hidden.device), labels[at].to(hidden.device), lse, factor)
    operands = (hidden.reshape(-1, hidden.shape[-1]), head.master, head.bias)
    if torch.is_grad_enabled() and any(operand is not None and operand.requires_grad for operand in operands):
        return _head_loss(*operands, job)
    return _run(job, operands[0], (False, False, False))[0]


def base_model(module: Any) -> Any:
    """The part of a causal language model below its output layer. Raises: InputError when there is none."""
    base = getattr(module, getattr(module, "base_model_prefix", "") or " ", None)
    if base is None:
        raise InputError(f"{type(module).__name__} has no base model below its head: give a causal language model")
    return base


def last_hidden(module: Any, input_ids: Tensor, attention_mask: Tensor, **inputs: Any) -> Tensor:
    """What the head reads at every position, [rows, positions, in]; of an encoder-decoder at the decoder's."""
    if not is_encoder_decoder(module.config):
        found: Tensor = base_model(module)(input_ids=input_ids, attention_mask=attention_mask, **inputs)[0]
        return found
    states = module.get_encoder()(input_ids=input_ids, attention_mask=attention_mask)[0]
    found = module.get_decoder()(
        input_ids=inputs["decoder_input_ids"], encoder_hidden_states=states, encoder_attention_mask=attention_mask,
        use_cache=False,
    )[0]  # fmt: skip
    return found


@torch.no_grad()
def verify_head(module: Any, head: Head, device: torch.device) -> None:
    """Hold the head on the base model's output against the model's own logits, on five positions; nothing is metered.

    Raises: InputError when they differ by more than 1e-4 of their size.
    """
    meter = getattr(module, "flop_meter", None)
    ids = torch.arange(1, 6, device=device).remainder_(head.out_features).unsqueeze(0)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    if is_encoder_decoder(module.config):
        inputs["decoder_input_ids"] = ids
    with nullcontext() if meter is None else meter.off():
        expected = module(**inputs).logits[0].to(torch.float32)
        hidden = last_hidden(module, **inputs)[0]
        logits = logit_map(module).apply(head.logits(*head.backend.quantize_tokens(hidden)))[0]
    same_shape = logits.shape == expected.shape
    error = float((logits - expected).norm() / expected.norm().clamp_min(1e-30)) if same_shape else float("inf")
    if not error <= VERIFIED:
        raise InputError(
            f"{type(module).__name__} post-processes its logits in a way edgegt does not know: they differ by "
            f"{error:.1e} from its head's (allowed {VERIFIED:.0e}); give another model"
        )


@dataclass(frozen=True, eq=False)
class _Job:
    """at: int64 [m], the labelled positions; labels: int64 [m], theirs."""

    head: Head
    map: LogitMap
    at: Tensor
    labels: Tensor
    lse: Tensor | None
    factor: float


@dataclass(eq=False)
class _Gradients:
    """Sums over the chunks so far; None for what is not asked for."""

    hidden: Tensor | None = None
    master: Tensor | None = None
    bias: Tensor | None = None


def _run(job: _Job, hidden: Tensor, needs: tuple[bool, bool, bool]) -> tuple[Tensor, _Gradients]:
    """The loss of hidden [n, in], and its gradients to hidden, master and bias where needed."""
    head, device = job.head, hidden.device
    found = _Gradients(
        hidden=torch.zeros(hidden.shape, dtype=torch.float32, device=device) if needs[0] else None,
        bias=torch.zeros(head.bias.shape, dtype=torch.float32, device=device) if needs[2] else None,
    )
    loss = torch.zeros((), device=device)
    count = job.at.shape[0]
    if needs[1] and count == 0:
        found.master = torch.zeros(head.master.shape, dtype=torch.float32, device=device)
    trained = 0 if head.master is None else int(head.master.numel())
    step = chunk_positions(head.out_features, count, trained)
    for start in range(0, count, step):
        loss += _chunk(job, hidden, slice(start, start + step), needs, found)
    return loss.mul_(job.factor), found


def _chunk(job: _Job, hidden: Tensor, part: slice, needs: tuple[bool, bool, bool], found: _Gradients) -> Tensor:
    """The loss of one chunk; its gradients are added to `found`."""
    head, at, target = job.head, job.at[part], job.labels[part].unsqueeze(1)
    q, scale = head.backend.quantize_tokens(hidden.index_select(0, at))
    logits, tanh = job.map.apply(head.logits(q, scale))
    picked = logits.gather(1, target)
    top = logits.amax(1, keepdim=True)
    size = logits.sub_(top).clamp_min_(FAINTEST).exp_().sum(1, keepdim=True)
    lse = top.add_(size.log())
    if job.lse is not None:
        job.lse[part] = lse.squeeze(1)
    if any(needs):
        softmax = logits.mul_(size.reciprocal_().mul_(job.factor))
        softmax.scatter_add_(1, target, torch.full_like(target, -job.factor, dtype=softmax.dtype))
        gradient = job.map.back_(softmax, tanh)
        del tanh
        if found.hidden is not None:
            found.hidden[at] = head.input_gradient(gradient, evenly=True)
        if needs[1]:
            found.master = head.master_gradient(gradient, q, scale, found.master)
        if found.bias is not None:
            found.bias += gradient.sum(0)
    return lse.sub_(picked).sum()


class _HeadLoss(torch.autograd.Function):
    """The loss with all gradients formed forward; backward multiplies and gives them away."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, master: Tensor | None, bias: Tensor | None, job: _Job) -> Tensor:
        ctx.dtype = hidden.dtype
        loss, ctx.found = _run(job, hidden, ctx.needs_input_grad[:3])
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found: _Gradients | None = ctx.found
        if found is None:
            raise RuntimeError("the loss of the head was differentiated twice")
        ctx.found = None
        factor = float(grads[0])
        for gradient in (found.hidden, found.master, found.bias):
            if gradient is not None and factor != 1.0:
                gradient.mul_(factor)
        hidden = None if found.hidden is None else found.hidden.to(ctx.dtype)
        return hidden, found.master, found.bias, None


_head_loss = cast(Callable[..., Tensor], _HeadLoss.apply)
