"""AdamW for trained tensors, one tensor at a time, and the learning-rate schedule.

States are keyed by tensor name, so that a tensor can leave and come back with its history, and each tensor counts its
own steps. Where that is asked for, tensors of 4096 elements or more keep both moments in 8 bits with one scale per
block (arXiv 2110.02861), by the compiled kernel, else by bitsandbytes'; otherwise they are float32 (torch's fused
kernel, which makes no temporaries). The two kernels have codes of their own: states belong to the one that made them.
A bfloat16 tensor is updated in float32 and rounded up or down at random, so that the mean is the value (arXiv
1502.02551): rounding to nearest would drop every update below half of its last bit, 0.2 to 0.4 % of the value.
Where float working copies are needed it runs in slices, so that they stay small.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from edgegt.errors import NotFinite
from edgegt.memory import SMALL_TENSOR
from edgegt.native import Kernels

_BLOCK = 256
_SLICE = {"cpu": 1 << 16, "cuda": 1 << 22}  # elements; a multiple of the block


@dataclass
class Moments:
    """AdamW states of one tensor. 8-bit when `absmax1` is set, else float32."""

    step: int
    first: torch.Tensor
    second: torch.Tensor
    absmax1: torch.Tensor | None = None
    absmax2: torch.Tensor | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """The states as named tensors, for a file."""
        named = {"step": torch.tensor(self.step), "first": self.first, "second": self.second}
        if self.absmax1 is not None and self.absmax2 is not None:
            named |= {"absmax1": self.absmax1, "absmax2": self.absmax2}
        return named

    @classmethod
    def from_tensors(cls, named: Mapping[str, torch.Tensor]) -> Moments:
        """The states that `tensors` gave."""
        return cls(int(named["step"]), named["first"], named["second"], named.get("absmax1"), named.get("absmax2"))


class AdamW:
    """Decoupled-weight-decay Adam (arXiv 1711.05101) over named tensors.

    eight_bit: the states of tensors that begin from now on; seed: of random rounding, of bfloat16 tensors and states;
    kernels: the compiled ones, None where there are none.
    """

    def __init__(
        self,
        eight_bit: bool,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        seed: int = 0,
        kernels: Kernels | None = None,
    ) -> None:
        self.eight_bit = eight_bit
        self.weight_decay = weight_decay
        self.betas = betas
        self.seed = seed
        self.kernels = kernels
        self.eps = 1e-8
        self.states: dict[str, Moments] = {}
        self._maps: tuple[torch.Tensor, torch.Tensor] | None = None

    @torch.no_grad()
    def update(self, name: str, parameter: torch.Tensor, gradient: torch.Tensor, lr: float) -> None:
        """One step of the tensor `name` (contiguous, float32 or bfloat16) in place.

        A bfloat16 one is rounded with random bits that depend on the seed, the name and its own step alone.
        """
        state = self.states.get(name) or self._fresh(name, parameter)
        state.step += 1
        values, slopes = parameter.view(-1), gradient.reshape(-1)
        if state.absmax1 is not None and self.kernels is not None and values.device.type == "cpu":
            self._step_native(self.kernels, state, values, slopes.to(torch.float32), lr, self._number(name, state.step))
            return
        step = self._float_step if state.absmax1 is None else self._step_bnb
        rounded = values.dtype == torch.bfloat16
        draw = self._draw(name, state.step, parameter.device) if rounded else None
        # Slices bound the float copies that a bfloat16 tensor or bitsandbytes' kernel needs; nothing else makes any.
        copies = rounded or slopes.dtype != torch.float32 or step == self._step_bnb
        size = _SLICE.get(parameter.device.type, _SLICE["cpu"]) if copies else max(1, values.numel())
        for start in range(0, values.numel(), size):
            part = slice(start, min(start + size, values.numel()))
            working = values[part].to(torch.float32)  # the slice itself unless it is rounded
            step(state, part, working, slopes[part].to(torch.float32), lr)
            if draw is not None:
                round_into(values[part], working, draw)

    def _fresh(self, name: str, parameter: torch.Tensor) -> Moments:
        if self.eight_bit and parameter.numel() >= SMALL_TENSOR:
            blocks = -(-parameter.numel() // _BLOCK)
            zeros = torch.zeros(parameter.numel(), dtype=torch.uint8, device=parameter.device)
            scale = torch.zeros(blocks, device=parameter.device)
            state = Moments(0, zeros, zeros.clone(), scale, scale.clone())
        else:
            zeros = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
            state = Moments(0, zeros, zeros.clone())
        self.states[name] = state
        return state

    def _draw(self, name: str, step: int, device: torch.device) -> torch.Generator:
        return torch.Generator(device).manual_seed(self._number(name, step))

    def _number(self, name: str, step: int) -> int:
        """32 bits that depend on the seed, the tensor's name and its own step."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}/{step}/{name}".encode()).digest()[:4], "little")

    def _float_step(self, state: Moments, part: slice, values: torch.Tensor, gradient: torch.Tensor, lr: float) -> None:
        torch._fused_adamw_(
            [values], [gradient], [state.first.view(-1)[part]], [state.second.view(-1)[part]], [],
            [torch.tensor(float(state.step), device=values.device)], lr=lr, beta1=self.betas[0], beta2=self.betas[1],
            weight_decay=self.weight_decay, eps=self.eps, amsgrad=False, maximize=False,
        )  # fmt: skip

    def _step_native(
        self, kernels: Kernels, state: Moments, values: torch.Tensor, gradient: torch.Tensor, lr: float, key: int
    ) -> None:
        assert state.absmax1 is not None and state.absmax2 is not None
        root = math.sqrt(1 - self.betas[1] ** state.step)
        rates = lr * root / (1 - self.betas[0] ** state.step), *self.betas, self.eps * root, lr * self.weight_decay
        largest = (state.absmax1, state.absmax2)
        kernels.adamw_8bit(values, gradient, state.first, state.second, largest, rates, key)

    def _step_bnb(self, state: Moments, part: slice, values: torch.Tensor, gradient: torch.Tensor, lr: float) -> None:
        import bitsandbytes.functional as bnb

        if self._maps is None:
            maps = bnb.create_dynamic_map(signed=True), bnb.create_dynamic_map(signed=False)
            self._maps = maps[0].to(values.device), maps[1].to(values.device)
        assert state.absmax1 is not None and state.absmax2 is not None
        blocks = slice(part.start // _BLOCK, -(-part.stop // _BLOCK))
        bnb.optimizer_update_8bit_blockwise(
            "adam", gradient, values, state.first[part], state.second[part],
            self.betas[0], self.betas[1], 0.0, 0.0, self.eps, state.step, lr, self._maps[0], self._maps[1],
            state.absmax1[blocks], state.absmax2[blocks], weight_decay=self.weight_decay,
        )  # fmt: skip


def round_into(target: torch.Tensor, values: torch.Tensor, draw: torch.Generator) -> None:
    """Write float32 values [n] into a bfloat16 tensor [n], up or down at random, with the value as the mean.

    A bfloat16 is the upper half of a float32: 16 random bits are added to the lower half, which is then cut off.
    `values` is used as working memory.
    """
    words = torch.empty(-(-values.numel() // 4), dtype=torch.int64, device=values.device)
    words.random_(-(2**63), None, generator=draw)  # four draws of 16 bits each
    bits = values.view(torch.int32)
    bits.add_(words.view(torch.int16)[: values.numel()]).add_(2**15)  # the draws are signed
    target.view(torch.int16).copy_(bits.bitwise_right_shift_(16))


def eight_bit_works(device: torch.device, kernels: Kernels | None = None) -> str | None:
    """None when the 8-bit AdamW runs here and agrees with the float one, else the reason."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2 * SMALL_TENSOR, generator=generator)
    gradients = [torch.randn(2 * SMALL_TENSOR, generator=generator) for _ in range(3)]
    ends = []
    for eight_bit in (True, False):
        parameter, optimizer = start.clone().to(device), AdamW(eight_bit, kernels=kernels)
        try:
            for gradient in gradients:
                optimizer.update("probe", parameter, gradient.to(device), 1e-2)
        except Exception as error:  # any failure of a foreign kernel means the same: it cannot be used here
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]
        ends.append(parameter.cpu() - start)
    relative = float((ends[0] - ends[1]).norm() / ends[1].norm())
    return None if relative < 0.1 else f"its update differs from the float one by {relative:.0%}"


def schedule(kind: str, lr: float, step: int, steps: int, warmup: float) -> float:
    """Learning rate of step 0..steps-1: linear warm-up, then linear or cosine decay to zero, or constant."""
    rising = max(1, round(warmup * steps)) if warmup > 0 else 0
    if step < rising:
        return lr * (step + 1) / rising
    left = 1 - (step - rising) / max(1, steps - rising)
    factors: dict[str, float] = {"linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left)), "constant": 1.0}
    return lr * factors[kind]


def clip(gradient: torch.Tensor, most: float, name: str = "") -> float:
    """Scale the gradient of `name` in place to the norm `most` if it is larger; returns the norm before.

    Raises: NotFinite when the norm is not finite.
    """
    return clip_together([gradient], most, name)


def clip_together(gradients: Sequence[torch.Tensor], most: float, name: str = "") -> float:
    """Scale gradients in place so that their joint norm is at most `most`; returns the norm before.

    Raises: NotFinite when the norm is not finite, before anything is scaled; `name` says whose gradients they are.
    """
    norm = math.sqrt(sum(float(gradient.norm()) ** 2 for gradient in gradients))
    if not math.isfinite(norm):
        raise NotFinite(f"the gradient{f' of {name}' if name else ''} is not finite (its norm is {norm})")
    if norm > most:
        for gradient in gradients:
            gradient.mul_(most / (norm + 1e-6))
    return norm
