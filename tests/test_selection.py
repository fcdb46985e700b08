"""Selecting, dropping and selecting again: what is chosen changes, what is not stays bit for bit, nothing is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from edgegt.cost import Weight, Work
from edgegt.loss import supervised_loss
from edgegt.memory import Formats, state_bytes
from edgegt.model import Int8Model
from edgegt.optimizer import AdamW, eight_bit_works
from edgegt.selection import Trainables
from tiny_models import FAMILIES, batch_of, load, save_model

UP, DOWN = "model.layers.2.mlp.up_proj.weight", "model.layers.2.mlp.down_proj.weight"
QUERY, NORM, HEAD = "model.layers.1.self_attn.q_proj.weight", "model.layers.2.input_layernorm.weight", "lm_head.weight"
EIGHT_BIT = eight_bit_works(torch.device("cpu")) is None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", FAMILIES["llama"]())
    return tmp_path / "model"


def trainables_of(folder: Path, name: str) -> Trainables:
    return Trainables(load(folder, folder.parent / "cache"), AdamW(EIGHT_BIT), folder.parent / name)


def train(trainables: Trainables, steps: int, seed: int = 0) -> None:
    """Steps on random batches with the tensors that are live."""
    model = trainables.model
    for step in range(steps):
        batch = batch_of(4, seed=seed + step)
        (supervised_loss(model.module, batch, model.device) / batch.supervised).backward()
        for name, parameter in trainables.live.items():
            assert parameter.grad is not None, name
            gradient, parameter.grad = parameter.grad, None
            trainables.step(name, gradient, 5e-3)
        model.inputs.clear()


def held(model: Int8Model, name: str) -> tuple[torch.Tensor, ...]:
    """Copies of what the model computes with for this tensor: both planes and the scale, or the vector."""
    if name in model.vectors:
        return (model.vectors[name].detach().clone(),)
    weight = model.linears[name].weight
    planes = [weight.q, weight.scale.view(torch.int16)] + ([] if weight.low is None else [weight.low])
    return tuple(plane.clone() for plane in planes)


def same(left: tuple[torch.Tensor, ...], right: tuple[torch.Tensor, ...]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def logits(model: Int8Model) -> torch.Tensor:
    batch = batch_of(3, seed=99)
    with torch.no_grad():
        return model.module(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids,
            use_cache=False,
        ).logits  # fmt: skip


def states(trainables: Trainables, name: str) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in trainables.optimizer.states[name].tensors().items()}


def test_after_a_re_selection_the_new_change_and_the_dropped_are_bit_identical(folder: Path) -> None:
    trainables = trainables_of(folder, "parked")
    model = trainables.model
    everything = [*model.linears, *model.vectors]
    trainables.select([UP, QUERY, NORM])
    train(trainables, 2)
    before = {name: held(model, name) for name in everything}
    trainables.select([DOWN, HEAD, "model.norm.weight", UP])
    train(trainables, 2)
    for name in everything:
        expected = name in (DOWN, HEAD, "model.norm.weight", UP)
        assert same(before[name], held(model, name)) is not expected, name


def test_dropping_changes_no_output_bit(folder: Path) -> None:
    trainables = trainables_of(folder, "parked")
    trainables.select([UP, QUERY, NORM, HEAD])
    train(trainables, 2)
    before = logits(trainables.model)
    trainables.select([DOWN])
    trainables.select([])
    # DOWN was promoted to 16 bits in between; put the int8 form back to compare what the dropped ones compute
    assert trainables.live == {}
    assert not any(parameter.requires_grad for parameter in trainables.model.module.parameters())
    again = trainables_of(folder, "other")
    again.select([UP, QUERY, NORM, HEAD])
    train(again, 2)
    assert torch.equal(logits(again.model), before)
    again.select([])
    assert torch.equal(logits(again.model), before)


def test_selected_dropped_and_selected_again_has_lost_nothing(folder: Path) -> None:
    names = [UP, QUERY, NORM, HEAD]
    stayed, left = trainables_of(folder, "stayed"), trainables_of(folder, "left")
    for trainables in (stayed, left):
        trainables.select(names)
        train(trainables, 3)
    left.select([])
    assert not left.optimizer.states
    assert set(left.resting) == set(names)
    left.select(names)
    assert left.resting == {}
    for name in names:
        assert torch.equal(left.live[name], stayed.live[name]), name
        assert same(held(left.model, name), held(stayed.model, name)), name
        before, after = states(stayed, name), states(left, name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before), name
    for trainables in (stayed, left):
        train(trainables, 3, seed=50)
    for name in names:
        assert torch.equal(left.live[name], stayed.live[name]), name
    assert torch.equal(logits(left.model), logits(stayed.model))


def test_a_master_starts_from_the_float_weights(folder: Path) -> None:
    trainables = trainables_of(folder, "parked")
    trainables.select([UP, NORM])
    tensors = load_file(str(folder / "model.safetensors"))
    assert torch.equal(trainables.live[UP], tensors[UP])
    assert torch.equal(trainables.live[NORM], tensors[NORM])


def test_masters_are_the_live_and_the_resting_ones(folder: Path) -> None:
    trainables = trainables_of(folder, "parked")
    assert trainables.masters() == {}
    trainables.select([UP, NORM])
    train(trainables, 1)
    rested = {name: trainables.live[name].detach().clone() for name in (UP, NORM)}
    trainables.select([DOWN])
    train(trainables, 1)
    masters = trainables.masters()
    assert list(masters) == sorted([UP, NORM, DOWN])
    assert torch.equal(masters[UP], rested[UP])
    assert torch.equal(masters[NORM], rested[NORM])
    assert torch.equal(masters[DOWN], trainables.live[DOWN])
    assert all(tensor.dtype == torch.float32 for tensor in masters.values())


def test_a_vector_that_was_dropped_stays_as_it_was_trained(folder: Path) -> None:
    trainables = trainables_of(folder, "parked")
    start = trainables.model.vectors[NORM].detach().clone()
    trainables.select([NORM])
    train(trainables, 2)
    trained = trainables.model.vectors[NORM].detach().clone()
    assert not torch.equal(trained, start)
    trainables.select([UP])
    train(trainables, 2)
    assert torch.equal(trainables.model.vectors[NORM], trained)
    assert not trainables.model.vectors[NORM].requires_grad
    assert trainables.model.vectors[NORM].grad is None


def test_selecting_the_same_again_touches_nothing(folder: Path) -> None:
    trainables = trainables_of(folder, "parked")
    trainables.select([UP, NORM])
    train(trainables, 1)
    parameter, moments = trainables.live[UP], trainables.optimizer.states[UP]
    trainables.select([NORM, UP])
    assert trainables.live[UP] is parameter
    assert trainables.optimizer.states[UP] is moments
    assert not trainables.parked.exists()


def test_a_tensor_dropped_before_its_first_step_comes_back_without_states(folder: Path) -> None:
    trainables = trainables_of(folder, "parked")
    trainables.select([UP])
    trainables.select([])
    trainables.select([UP])
    assert UP not in trainables.optimizer.states
    train(trainables, 1)
    assert trainables.optimizer.states[UP].step == 1


FORMATS = [
    Formats(master, states)
    for master in ("float32", "bfloat16")
    for states in ("float32", *(["8-bit"] if EIGHT_BIT else []))
]


@pytest.mark.parametrize("rows", [None, torch.arange(0, 320, 5)], ids=["whole head", "64 rows"])
@pytest.mark.parametrize("formats", FORMATS, ids=lambda formats: f"{formats.master}, {formats.states}")
def test_what_training_holds_is_what_memory_planned(folder: Path, formats: Formats, rows: torch.Tensor | None) -> None:
    trainables = trainables_of(folder, "parked")
    trainables.configure(formats, rows)
    model, vectors = trainables.model, trainables.model.vectors
    names = [UP, QUERY, NORM, HEAD]
    trainables.select(names)
    train(trainables, 1)
    for name in names:
        kind = "vector" if name in vectors else "head" if name == HEAD else "linear"
        weight = Weight(name, kind, 0, tuple(trainables.live[name].shape), 0, Work())
        held = sum(value.nbytes for key, value in trainables.tensors(name).items() if key not in ("step", "rows"))
        held += 0 if kind == "vector" else model.linears[name].added_bytes
        index = 8 * len(rows) if name == HEAD and rows is not None else 0
        assert held == state_bytes(weight, False, formats) + index, name
        assert trainables.live[name].dtype == (torch.float32 if kind == "vector" else getattr(torch, formats.master))


def test_formats_are_chosen_before_the_first_selection(folder: Path) -> None:
    trainables = trainables_of(folder, "parked")
    assert trainables.formats == Formats(states="8-bit" if EIGHT_BIT else "float32")
    trainables.configure(Formats("bfloat16", "float32"), None)
    assert trainables.optimizer.eight_bit is False
    trainables.select([UP])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="before the first selection"):
            trainables.configure(Formats(), None)
        trainables.select([])


def test_an_unknown_name_is_a_key_error(folder: Path) -> None:
    with pytest.raises(KeyError):
        trainables_of(folder, "parked").select(["model.embed_tokens.weight"])
