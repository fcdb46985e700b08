"""What the planner maximises: importance, with the head first.

Importance is measured before the steps that it is to predict. At the start of a shift of domain it is large in every
layer and says little for the head, which later decides more than any choice among the blocks: on stories260K and E2E,
1066 steps at half of the FLOPs, the head came 30th of 47 in the first measurement and first in the second. So a head
that can be afforded is trained; the rest competes by importance. Numbers: docs/decisions.md.
"""

from __future__ import annotations

from collections.abc import Mapping

from edgegt.cost import CostTable


def values_of(importance: Mapping[str, float], table: CostTable) -> dict[str, float]:
    """The value of each weight: its importance, and for the head as much as everything else together."""
    everything = sum(importance.values())
    return {
        weight.name: everything if weight.kind == "head" else importance.get(weight.name, 0.0)
        for weight in table.weights
    }
