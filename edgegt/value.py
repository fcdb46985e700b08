"""What the planner maximises: importance, with the head first.

Importance is measured before the steps that it is to predict. At the start of a shift of domain it is large in every
layer and says little for the head, which later decides more than any choice among the blocks: on stories260K and E2E,
1066 steps at half of the FLOPs, the head came 30th of 47 in the first measurement and first in the second. So a head
that can be afforded is trained; the rest competes by importance, tilted towards the loss by (1 + depth)^TILT: what lies
high is paid for anyway on the way down, and its importance lasts. A tensor whose measured importance is zero, as
many are near the end of a run, is still worth training where FLOPs are left over: a part of all importance is shared
out by size. Numbers: docs/decisions.md.
"""

from __future__ import annotations

from collections.abc import Mapping

from edgegt.cost import CostTable

# Of all importance, what is shared out by the number of elements; and how much towards the loss counts.
BY_SIZE, TILT = 0.1, 2.0


def values_of(importance: Mapping[str, float], table: CostTable) -> dict[str, float]:
    """The value of each weight: its importance and size, up to fourfold towards the loss, and the head before all."""
    total, numel = sum(importance.values()), sum(weight.numel for weight in table.weights if weight.kind != "head")
    by_size = BY_SIZE * total / max(1, numel)
    values = {}
    for weight in table.weights:
        value = (1 - BY_SIZE) * importance.get(weight.name, 0.0)
        value += by_size * weight.numel if weight.kind != "head" else 0.0
        values[weight.name] = value * (1 + max(0, weight.block) / max(1, table.blocks)) ** TILT
    everything = sum(values.values())
    return {weight.name: everything if weight.kind == "head" else values[weight.name] for weight in table.weights}
