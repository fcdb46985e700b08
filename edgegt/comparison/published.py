"""GreenTrainer as it was published (arXiv 2309.13192, sections 3.2 and 3.3), on a float model.

Importance of a tensor: its change by one optimizer step, times its gradient after that step, negated: how much the loss
falls. What is chosen by it, under FLOPs alone, is the published dynamic program's. It takes parameters in the model's
order, where a tied head is the embedding at the bottom, which a share of the FLOPs never reaches: so that is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any, NamedTuple

from edgegt.baselines import published_selection
from edgegt.cost import BatchShape, CostTable

if TYPE_CHECKING:
    from torch import Tensor


class Chain(NamedTuple):
    """Tensors from the loss downward: FLOPs of their weight gradients, of the way to the next, and of both at most."""

    names: list[str]
    dw: list[int]
    dy: list[int]
    budget: int


def chain_of(table: CostTable, shape: BatchShape, tied: bool, rho: float) -> Chain:
    """The chain at a batch's shape, and what rho leaves for backward. The head is on every position, as transformers
    runs it; a tied one is left out.
    """
    at = BatchShape(shape.rows, shape.tokens, shape.tokens)
    depth = {
        bit: sum(path.flops.at(at) for path in table.paths if path.weights >> bit & 1)
        for bit, weight in enumerate(table.weights)
        if weight.kind != "head" or not tied
    }
    order = sorted(depth, key=lambda bit: (depth[bit], -bit))
    ways = [depth[bit] for bit in order]
    dy = [after - before for before, after in zip(ways, [*ways[1:], ways[-1]], strict=True)]
    budget = int(rho * table.full_work().at(at)) - table.forward.at(at) - ways[0]
    weights = [table.weights[bit] for bit in order]
    return Chain([weight.name for weight in weights], [weight.dw.at(at) for weight in weights], dy, budget)


def select(model: Any, names: Sequence[str]) -> None:
    """Train exactly these parameters."""
    wanted = set(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)


def chosen(model: Any, loss: Callable[[], Tensor], step: Callable[[], None], chain: Chain) -> list[str]:
    """What is trained next. loss: of one batch; step: updates what has a gradient, and drops the gradients.

    Weights are put back afterwards, the optimizer keeps its states. Tensors that backward cannot reach within rho are
    left frozen from the start.
    """
    import torch

    parameters = dict(model.named_parameters())
    reached, spent = 0, 0
    while reached < len(chain.names) and spent <= chain.budget:
        spent += chain.dy[reached]
        reached += 1
    select(model, chain.names[:reached])
    before = {name: parameters[name].detach().clone() for name in chain.names[:reached]}
    loss().backward()
    step()
    change = {name: parameters[name].detach() - old for name, old in before.items()}
    loss().backward()
    values = []
    for name in chain.names:
        gradient = parameters[name].grad
        values.append(-float((gradient * change[name]).sum()) if gradient is not None else 0.0)
    step()
    with torch.no_grad():
        for name, old in before.items():
            parameters[name].copy_(old)
    most = max(map(abs, values)) or 1.0
    # In a process of its own: the memory of our port of the program is not that of training.
    with ProcessPoolExecutor(1, get_context("spawn")) as apart:
        found = apart.submit(
            published_selection, tuple(chain.dw), tuple(chain.dy), tuple(value / most for value in values), chain.budget
        ).result()
    return [chain.names[position] for position in found]
