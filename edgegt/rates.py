"""Seconds and joules of training, predicted as a sum over choices, from rates that are measured or a profile's.

Every term is linear in what is chosen (a trained tensor, a path that backward takes, a recomputed layer), so that a
planner can hold a run to a time as it does to FLOPs. Besides the products a step is made of elementwise work: norms,
rotary embeddings, gates, residuals. It is proportional to what backward keeps, so its rates are per *kept byte*: the
bytes of `saved_work`, whether they are kept or not. Weights and products on a small batch are limited by dispatch.

Peak rates of a profile are not reached; a calibrated profile has rates that were. See `of_profile`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from edgegt.cost import BatchShape, Block, CostTable, Path, Totals, Weight
from edgegt.profile import Profile

UTILISATION = 0.3
BANDWIDTH_SHARE = 0.7
# Bytes read and written per kept byte by the elementwise operations of a Llama layer, counted one by one: 21 and 39
# tensors of its width against 10 kept.
FORWARD_TRAFFIC = 2.0
BACKWARD_TRAFFIC = 4.0
# Bytes kept by a Llama layer per byte of its input: 2 norms, q, k, v, o and 2 of 8/3 the width.
KEPT_PER_INPUT = 10.0
# Bytes read and written per logit: scaling the head's product, log-softmax, and their gradients.
_LOGIT_TRAFFIC = 56
# Bytes read and written per trained element: clipping, 8-bit AdamW, two planes.
_UPDATE_TRAFFIC = 48
# bitsandbytes' 8-bit AdamW on a processor is bound by arithmetic: as slow as if it moved 6 times as much (measured).
_CPU_UPDATE_SLOWDOWN = 6
_GPU_KINDS = ("jetson", "geforce")
_PROFILE_DISPATCH_S = 2e-3
_LINEARS = 7
_PROFILE_UPDATE_S = 1e-4


@dataclass(frozen=True)
class Rates:
    """What a machine reaches. FLOP/s unless said otherwise.

    int8, int8_back: int8 linears and the gradients to their inputs, quantising included. dw: weight gradients from the
    int8 input. attention: its products. float32: float linears (full fine-tuning only). forward_bytes, backward_bytes:
    elementwise work in kept bytes/s. logits: logits/s through loss and back. optimizer: elements/s of clipping, AdamW
    and refreshing planes, with 8-bit states; optimizer_float32: with float32 states (0: as fast). dispatch_s: seconds
    per layer and micro-batch that do not depend on sizes, forward and backward. update_s: the same per trained tensor
    and step.
    """

    int8: float
    int8_back: float
    dw: float
    attention: float
    float32: float
    forward_bytes: float
    backward_bytes: float
    logits: float
    optimizer: float
    dispatch_s: float = 0.0
    update_s: float = 0.0
    optimizer_float32: float = 0.0

    def of_states(self, states: str) -> Rates:
        """The rates when optimizer states are 'float32' or '8-bit'."""
        fast = self.optimizer_float32 if states == "float32" else 0.0
        return replace(self, optimizer=fast) if fast else self

    def trained_s(self, weight: Weight, totals: Totals, steps: int) -> float:
        """What training this tensor adds on its own: dw, the second plane's product, optimizer and planes."""
        product = weight.dw.over(totals)
        update = weight.numel / self.optimizer + self.update_s
        return product / self.dw + product / self.int8 + steps * update

    def path_s(self, path: Path, totals: Totals) -> float:
        """What the gradients of this path add: products through linears and attention, and elementwise work."""
        attention = path.flops.attention.over(totals)
        linear = path.flops.over(totals) - attention
        kept = path.saved_bytes.over(totals)
        return linear / self.int8_back + attention / self.attention + kept / self.backward_bytes

    def layer_s(self, layer: Block, totals: Totals) -> float:
        """Recomputing this layer once: its products, and the elementwise work of a layer of its width."""
        attention = layer.forward.attention.over(totals)
        linear = layer.forward.over(totals) - attention
        kept = KEPT_PER_INPUT * layer.input_bytes.over(totals)
        return linear / self.int8 + attention / self.attention + kept / self.forward_bytes

    def skipped_s(self, table: CostTable, boundary: int, skipped: Totals) -> float:
        """What the layers below the boundary do not take when they do not run for these rows, dispatch aside."""
        return sum(self.layer_s(layer, skipped) for layer in table.layers[:boundary])

    def skipped_dispatch_s(self, boundary: int, skipped: Totals, totals: Totals, micro_batches: int) -> float:
        """Dispatch of the layers below the boundary, where they run for no row of `totals`."""
        return self.dispatch_s * boundary * micro_batches if skipped.row == totals.row else 0.0

    def fixed_s(self, table: CostTable, totals: Totals, steps: int, micro_batches: int) -> float:
        """What no choice changes: forward, head and loss, and the dispatch of all layers in every micro-batch.

        micro_batches: of the whole run. Dispatch counts forward and backward of every layer, so that it is not below
        what a shallow choice takes; steps add nothing else.
        """
        return (
            self._forward_s(table, totals)
            + _logits(table, totals) / self.logits
            + sum(self.trained_s(weight, totals, steps) for weight in table.always)
            + self.dispatch_s * dispatches(table) * max(micro_batches, steps)
        )

    def run_s(
        self,
        table: CostTable,
        mask: int,
        totals: Totals,
        steps: int,
        micro_batches: int,
        recompute: Iterable[int] = (),
    ) -> float:
        """Seconds of training when the weights in `mask` are trained and these layers recomputed: the sum of terms.

        totals: of all batches. micro_batches: of the whole run.
        """
        trained = [weight for bit, weight in enumerate(table.weights) if mask >> bit & 1]
        again = [table.layers[index] for index in set(recompute)]
        return (
            self.fixed_s(table, totals, steps, micro_batches)
            + sum(self.trained_s(weight, totals, steps) for weight in trained)
            + sum(self.path_s(path, totals) for path in table.paths if path.weights & mask)
            + sum(self.layer_s(layer, totals) for layer in again if layer.weights & mask)
        )

    def step_s(self, table: CostTable, mask: int, shape: BatchShape, micro_batches: int = 1) -> float:
        """Seconds of one optimizer step on a batch of this shape, in so many micro-batches."""
        return self.run_s(table, mask, Totals.of([shape]), 1, micro_batches)

    def full_step_s(self, table: CostTable, shape: BatchShape) -> float:
        """Seconds of one step of full fine-tuning, all of it in float32 and the head on every position."""
        everywhere = Totals.of([BatchShape(shape.rows, shape.tokens, table.scored(shape))])
        work = table.full_work().over(Totals.of([shape]))
        attention = table.full_work().attention.over(Totals.of([shape]))
        kept = _kept(table, Totals.of([shape]))
        return (
            (work - attention) / self.float32
            + attention / self.attention
            + kept / self.forward_bytes
            + kept / self.backward_bytes
            + _logits(table, everywhere) / self.logits
            + table.parameters / (self.optimizer_float32 or self.optimizer)
            + self.update_s * len(table.weights)
            + self.dispatch_s * table.blocks
        )

    def probe_s(self, table: CostTable, totals: Totals) -> float:
        """Seconds of importance probes on batches of these totals: forward twice (recomputation), every gradient.

        Dispatch is not in it, nor the sums over each weight gradient, which grow with the number of batches: measured
        probes took 1.1 to 1.35 times as long.
        """
        work = table.probe_work()
        attention = work.attention.over(totals)
        dw = sum(weight.dw.over(totals) for weight in table.weights)
        back = sum(path.flops.over(totals) - path.flops.attention.over(totals) for path in table.paths)
        kept = _kept(table, totals)
        return (
            (work.over(totals) - attention - dw - back) / self.int8
            + back / self.int8_back
            + dw / self.dw
            + attention / self.attention
            + 2 * kept / self.forward_bytes
            + kept / self.backward_bytes
            + _logits(table, totals) / self.logits
        )

    def _forward_s(self, table: CostTable, totals: Totals) -> float:
        attention = table.forward.attention.over(totals)
        linear = table.forward.over(totals) - attention
        return linear / self.int8 + attention / self.attention + _kept(table, totals) / self.forward_bytes


def of_profile(profile: Profile) -> Rates:
    """The rates of a device's profile, in its default power mode.

    A calibrated profile's rates are what was reached. Others are peaks, of which small batches are taken to reach 30 %
    (70 % of the bandwidth); not measured. What the profile has no rate for follows from its bandwidth.
    """
    reached, through = (1.0, 1.0) if profile.calibrated else (UTILISATION, BANDWIDTH_SHARE)
    int8 = reached * profile.rate("int8")
    products = profile.rate("fp32") if profile.calibrated else reached * profile.rate("bf16")
    moved = through * profile.power.bandwidth_bytes_per_s
    slowdown = 1 if profile.kind in _GPU_KINDS else _CPU_UPDATE_SLOWDOWN
    rates = Rates(
        int8=int8,
        int8_back=int8,
        dw=products,
        attention=products,
        float32=products,
        forward_bytes=moved / FORWARD_TRAFFIC,
        backward_bytes=moved / BACKWARD_TRAFFIC,
        logits=moved / _LOGIT_TRAFFIC,
        optimizer=moved / (_UPDATE_TRAFFIC * slowdown),
        dispatch_s=_PROFILE_DISPATCH_S,
        update_s=_PROFILE_UPDATE_S,
        optimizer_float32=moved / _UPDATE_TRAFFIC,
    )
    return Rates(**{**vars(rates), **profile.training_rates})


def dispatches(table: CostTable) -> float:
    """Layers' worth of dispatch: each expert multiplies apart, and a product is one of a layer's seven."""
    return table.blocks + sum(weight.experts for weight in table.weights if weight.experts > 1) / _LINEARS


def joules(profile: Profile, seconds: float) -> float:
    """Energy of a run that takes so long, at the watts of the default power mode."""
    return profile.power.watts * seconds


def seconds_for_energy(profile: Profile, energy_j: float) -> float:
    """How long a run may take on so many joules, at the watts of the default power mode."""
    return energy_j / profile.power.watts


def _kept(table: CostTable, totals: Totals) -> int:
    """Bytes that everything trained would keep."""
    return table.saved_work((1 << len(table.weights)) - 1).over(totals)


def _logits(table: CostTable, totals: Totals) -> float:
    """Logits of these batches: the head's FLOPs over two for each of its inputs."""
    widths = [weight.shape[1] for weight in table.weights if weight.kind == "head"]
    return table.head.over(totals) / (2 * widths[0]) if widths else 0.0
