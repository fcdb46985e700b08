"""The frontier of a run, from what its folder recorded of its first plan: computed once, kept in frontier.json.

It is an extra: where a piece is missing or damaged (an older run, one that trained everything) there is none.
"""

from __future__ import annotations

import json
from typing import Any

from edgegt.cost import BatchShape, CostTable
from edgegt.errors import EdgegtError
from edgegt.frontier import FEWER_POINTS, POINTS, Frontier, frontier_of
from edgegt.memory import Formats, Surroundings
from edgegt.planner import Plan, Problem
from edgegt.prefix import Caching
from edgegt.report.facts import RunFacts
from edgegt.value import values_of

FILE = "frontier.json"
MANY_WEIGHTS, TOO_MANY_WEIGHTS = 150, 320
_DAMAGE = (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError, OverflowError, EdgegtError)

Tree = dict[str, Any]


def frontier_of_run(facts: RunFacts) -> Frontier | None:
    """The frontier around the run's first plan, with its measured importance; None where it cannot be known.

    A table of more than 150 weights gets fewer points, one of more than 320 none, to stay within about 20 seconds.
    """
    try:
        return Frontier.from_json(json.loads((facts.folder / FILE).read_text(encoding="utf-8")))
    except (*_DAMAGE, OSError):
        pass
    try:
        table = CostTable.from_json(json.loads((facts.folder / "costs.json").read_text(encoding="utf-8")))
        problem, first = _problem(facts, table), facts.plans[0]
        probe_flops = int(facts.part("budget")["flops"]) - problem.flops
        if len(table.weights) > TOO_MANY_WEIGHTS or first["strategy"] != "greentrainer" or probe_flops < 0:
            return None
        counts = POINTS if len(table.weights) <= MANY_WEIGHTS else FEWER_POINTS
        return frontier_of(problem, probe_flops, _chosen(first, problem), counts)
    except (*_DAMAGE, OSError):
        return None


def _problem(facts: RunFacts, table: CostTable) -> Problem:
    """The problem of the first round. Raises: KeyError, TypeError or ValueError where it was not recorded."""
    first = facts.plans[0]
    recorded: Tree = first["problem"]
    importance = {str(found["name"]): float(found["importance"]) for found in first["candidates"]}
    shapes = [(BatchShape(*map(int, shape[:-1])), int(shape[-1])) for shape in recorded["shapes"]]
    return Problem(
        table=table,
        values=values_of(importance, table),
        shapes=tuple(shape for shape, count in shapes for _ in range(count)),
        flops=int(recorded["flops"]),
        memory_bytes=int(recorded["memory_bytes"]),
        around=Surroundings(int(recorded["floor_bytes"]), tuple(recorded.get("demoted", ()))),
        vocabulary=int(recorded["vocabulary"]),
        batch_size=int(recorded["batch_size"]),
        formats=tuple(Formats(**found) for found in recorded["formats"]),
        head_rows=tuple(recorded["head_rows"]),
        caching=Caching.from_json(recorded["caching"]) if recorded.get("caching") else None,
        streams=recorded.get("streams", False),
    )


def _chosen(first: Tree, problem: Problem) -> Plan:
    """The plan that the run made of this problem."""
    predicted, memory = first["predicted"], first["memory"]
    return Plan(
        strategy=first["strategy"],
        selected=tuple(first["selected"]),
        recompute=tuple(first["recompute"]),
        micro_batch=int(first["micro_batch"]),
        accumulation=int(first["accumulation"]),
        formats=Formats(**first["formats"]),
        head_rows=first["head_rows"],
        value=sum(max(0.0, problem.values[name]) for name in first["selected"]),
        optimality_gap=float(first["optimality_gap"]),
        flops=int(predicted["flops"]),
        flops_ratio=float(predicted["flops_ratio"]),
        seconds=None,
        peak_bytes=int(predicted["peak_bytes"]),
        memory=dict(memory),
        notes=(),
    )
