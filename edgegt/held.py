"""What a model in training holds, counted tensor by tensor, by the names of the memory model."""

from __future__ import annotations

from edgegt.cost import CostTable
from edgegt.memory import Formats, plane_bytes, state_bytes
from edgegt.model import Int8Model
from edgegt.quant import Int8Embedding, Int8Linear
from edgegt.selection import Trainables


def base_bytes(model: Int8Model) -> int:
    """Bytes of the int8 model as it was loaded, each tensor once."""
    held = {id(tensor): tensor.nbytes for tensor in model.vectors.values()}
    for module in model.module.modules():
        if isinstance(module, (Int8Linear, Int8Embedding)):
            held[id(module.weight.q)] = module.weight.nbytes
    return sum(held.values())


def added_bytes(model: Int8Model) -> int:
    """Bytes of the planes that training has added to the base."""
    return sum(linear.added_bytes for linear in model.linears.values())


def held_terms(trainables: Trainables) -> dict[str, int]:
    """Masters, planes, states, and planes of demoted tensors, measured."""
    live, states = trainables.live, trainables.optimizer.states.values()
    planes = {name: linear.added_bytes for name, linear in trainables.model.linears.items()}
    return {
        "masters": sum(parameter.nbytes for parameter in live.values()),
        "planes": sum(planes[name] for name in live if name in planes),
        "demoted": sum(size for name, size in planes.items() if name not in live),
        "optimizer": sum(tensor.nbytes for state in states for tensor in state.tensors().values()),
    }


def planned_bytes(trainables: Trainables, table: CostTable, formats: Formats) -> int:
    """What training holds now, as planned: masters, planes and states of live tensors, planes of resting ones.

    Without those of weights that are always trained, which every peak has.
    """
    weights = {weight.name: weight for weight in table.weights}
    live = sum(state_bytes(weights[name], False, formats) for name in trainables.live if name in weights)
    return live + sum(plane_bytes(weights[name]) for name in trainables.resting)
