"""What the planner maximises: importance, with the head first.

Importance is measured before the steps that it is to predict. At the start of a shift of domain it is large in every
layer and says little for the head, which later decides more than any choice among the blocks: on stories260K and E2E,
1066 steps at half of the FLOPs, the head came 30th of 47 in the first measurement and first in the second. So a head
that can be afforded is trained; the rest competes by importance, tilted towards the loss by (1 + depth)^2: what lies
high is paid for anyway on the way down, and its importance lasts. Numbers: docs/decisions.md.
"""

from __future__ import annotations

from collections.abc import Mapping

from edgegt.cost import CostTable


def values_of(importance: Mapping[str, float], table: CostTable) -> dict[str, float]:
    """The value of each weight: its importance, up to four times as much towards the loss, and the head before all."""
    values = {
        weight.name: importance.get(weight.name, 0.0) * (1 + max(0, weight.block) / max(1, table.blocks)) ** 2
        for weight in table.weights
    }
    everything = sum(values.values())
    return {weight.name: everything if weight.kind == "head" else values[weight.name] for weight in table.weights}
