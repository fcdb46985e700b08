"""Trained rows of a layer whose other rows stay frozen: products against a float layer, and training in a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from edgegt.loss import supervised_loss
from edgegt.memory import Formats
from edgegt.model import Int8Model
from edgegt.optimizer import AdamW
from edgegt.quant import (
    BACKENDS,
    Backend,
    InputCache,
    Int8Embedding,
    Int8Linear,
    Int8Weight,
    TrainedRows,
    dequantize,
    quantize_rows,
    split_planes,
)
from edgegt.selection import Trainables
from test_quant_linear import CountingMeter, checked, make, saved_by, snr_db, twin
from tiny_models import FAMILIES, batch_of, load, save_model

ROWS = [0, 3, 4, 17, 38]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=list(BACKENDS))
def backend(request: pytest.FixtureRequest, device: torch.device) -> Backend:
    result = checked(request.param, device)
    if not result.ok:
        pytest.skip(f"{request.param} is unavailable on {device.type}: {result.error}")
    return BACKENDS[request.param]()


@pytest.fixture(autouse=True)
def _a_seed() -> None:
    torch.manual_seed(0)


def with_rows(layer: Int8Linear, rows: list[int] = ROWS) -> Tensor:
    """Promote these rows, away from what the frozen ones are; returns the index."""
    index = torch.tensor(rows, device=layer.weight.device)
    values = dequantize(layer.weight)[index]
    layer.promote_rows(values + 0.3 * values.std() * torch.randn_like(values), index)
    return index


def acting(layer: Int8Linear) -> Tensor:
    """The float weight [out, in] that a layer with rows stands for."""
    whole = dequantize(layer.weight)
    if layer.rows is not None:
        whole[layer.rows.index] = dequantize(layer.rows.weight)
    return whole


@pytest.mark.parametrize("rows", [ROWS, [39], list(range(40))], ids=len)
@pytest.mark.parametrize("bias", [False, True])
def test_products_against_a_float_layer(backend: Backend, device: torch.device, rows: list[int], bias: bool) -> None:
    layer = make(backend, device, (96, 40), bias=bias)
    frozen = dequantize(layer.weight)
    index = with_rows(layer, rows)
    linear = twin(layer)
    with torch.no_grad():
        linear.weight.copy_(acting(layer))
    x = torch.randn(7, 30, 96, device=device, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    dy = torch.randn(7, 30, 40, device=device)
    given = dy.clone()
    y, expected = layer(x), linear(other)
    y.backward(dy)
    expected.backward(given)
    assert layer.master is not None and layer.master.grad is not None
    assert x.grad is not None and other.grad is not None and linear.weight.grad is not None
    assert torch.equal(dy, given), "dy is the caller's"
    assert snr_db(y, expected) >= 30 and snr_db(y[..., index], expected[..., index]) >= 30
    assert snr_db(x.grad, other.grad) >= 30
    assert layer.master.grad.shape == (len(rows), 96)
    assert snr_db(layer.master.grad, linear.weight.grad[index]) >= 30
    assert torch.equal(dequantize(layer.weight), frozen)


def test_frozen_columns_of_dy_reach_dx_alone_and_so_do_trained_ones(backend: Backend, device: torch.device) -> None:
    layer = make(backend, device, (96, 40))
    index = with_rows(layer)
    dy = torch.randn(25, 40, device=device)
    dy[:, index] *= 1e6  # its quantisation must not cost the others anything
    small = dy.clone()
    small[:, index] = 0
    dx, expected = layer.input_gradient(small), small @ acting(layer)
    assert snr_db(dx, expected) >= 30
    assert snr_db(layer.input_gradient(dy) - dx, (dy - small) @ acting(layer)) >= 30


def test_other_outputs_are_bit_for_bit_the_frozen_ones(backend: Backend, device: torch.device) -> None:
    layer = make(backend, device, (96, 40), bias=True)
    x = torch.randn(20, 96, device=device)
    base = layer(x)
    index = with_rows(layer)
    others = torch.ones(40, dtype=torch.bool, device=device)
    others[index] = False
    y = layer(x)
    assert torch.equal(y[:, others], base[:, others])
    assert not bool((y[:, index] == base[:, index]).all(0).any())


def test_rows_train_are_dropped_and_come_back(backend: Backend, device: torch.device) -> None:
    layer = make(backend, device, (96, 40), bias=True)
    base, x = layer.weight, torch.randn(20, 96, device=device)
    untouched, plane = layer(x), base.q.clone()
    assert layer.added_bytes == 0
    index = with_rows(layer)
    assert layer.master is not None and layer.rows is not None
    assert layer.added_bytes == len(ROWS) * (2 * 96 + 2 + 8) and "rows=5" in repr(layer)
    before = layer(x).detach()
    with torch.no_grad():
        layer.master.add_(1e-3 * torch.randn_like(layer.master))
    layer.refresh()
    trained = layer(x).detach()
    assert not torch.equal(trained, before)
    master = layer.demote()
    assert torch.equal(layer(x), trained) and layer.master is None
    layer.promote_rows(master, index)
    assert torch.equal(layer(x), trained)
    rows = layer.rows
    layer.restore(base)
    assert torch.equal(layer(x), untouched) and layer.rows is None
    layer.restore(base, rows)
    assert torch.equal(layer(x), trained)
    layer.promote(acting(layer))
    assert layer.rows is None, "a weight that is trained whole has no rows apart"
    assert base.q is not layer.weight.q and torch.equal(base.q, plane)


def test_a_tied_table_stays_when_its_head_is_trained(backend: Backend, device: torch.device) -> None:
    shared = quantize_rows(torch.randn(50, 24, device=device))
    table = Int8Embedding(shared)
    head = Int8Linear(shared, backend=backend, inputs=InputCache())
    ids = torch.arange(50, device=device)
    before = table(ids)
    head.promote(dequantize(shared) + 0.1)
    head.refresh()
    assert table.weight is shared and head.weight is not shared
    assert torch.equal(table(ids), before)


def test_a_tied_table_is_neither_written_nor_copied(backend: Backend, device: torch.device) -> None:
    shared = quantize_rows(torch.randn(50, 24, device=device))
    plane, scale = shared.q.clone(), shared.scale.clone()
    table = Int8Embedding(shared)
    head = Int8Linear(shared, backend=backend, inputs=InputCache())
    ids = torch.arange(50, device=device)
    before = table(ids)
    with_rows(head)
    assert head.master is not None
    head(torch.randn(9, 24, device=device)).square().sum().backward()
    with torch.no_grad():
        head.master.sub_(head.master.grad)
    head.refresh()
    head.demote()
    assert head.weight is shared and table.weight is shared
    assert torch.equal(shared.q, plane) and torch.equal(shared.scale, scale)
    assert torch.equal(table(ids), before)


def test_repeated_products_are_metered(backend: Backend, device: torch.device) -> None:
    x = torch.randn(100, 96, device=device, requires_grad=True)
    layer = make(backend, device, (96, 40))
    with_rows(layer)
    whole, part = 2 * 100 * 96 * 40, 2 * 100 * 96 * len(ROWS)
    meter = layer.meter = CountingMeter()
    layer(x).sum().backward()
    assert meter.flops == {"forward": whole + part, "low_plane": part, "dx": whole + part, "dw": part}
    layer.demote()
    meter = layer.meter = CountingMeter()
    layer(x).sum().backward()
    assert meter.flops == {"forward": whole, "low_plane": 3 * part, "dx": whole}


def test_backward_keeps_one_byte_per_input_whatever_the_rows(device: torch.device) -> None:
    layer = make(BACKENDS["torch"](), device, (96, 40))
    with_rows(layer)
    x = torch.randn(64, 96, device=device)
    y, kept = saved_by(lambda: layer(x))
    assert y.requires_grad and kept == 64 * 96 + 64 * 4


@pytest.mark.parametrize(
    ("index", "values", "reason"),
    [
        (torch.tensor([0, 40]), (2, 96), "from 0 to 40, the rows from 0 to 39"),
        (torch.tensor([-1, 4]), (2, 96), "from -1 to 4"),
        (torch.tensor([4, 4]), (2, 96), "not sorted, or names a row twice"),
        (torch.tensor([4, 2]), (2, 96), "not sorted"),
        (torch.tensor([], dtype=torch.int64), (0, 96), "at least one row"),
        (torch.tensor([[1]]), (1, 96), "of one dimension"),
        (torch.tensor([1], dtype=torch.int32), (1, 96), r"torch\.int32"),
        (torch.tensor([1]), (2, 96), r"values are \(2, 96\), not \(1, 96\)"),
        (torch.tensor([1]), (1, 95), r"values are \(1, 95\)"),
    ],
)  # fmt: skip
def test_an_index_that_does_not_fit_changes_nothing(index: Tensor, values: tuple[int, int], reason: str) -> None:
    layer = make(BACKENDS["torch"](), torch.device("cpu"), (96, 40))
    with pytest.raises(ValueError, match=reason):
        layer.promote_rows(torch.ones(values), index)
    assert layer.rows is None and layer.master is None
    with pytest.raises(ValueError, match=reason):
        TrainedRows.of(index, torch.ones(values), layer.weight.shape)


# --- rows of the head in a whole model -------------------------------------------------------------------------------

HEAD, UP = "lm_head.weight", "model.layers.2.mlp.up_proj.weight"
CHOSEN = torch.tensor([1, 2, 5, 70, 71, 200, 319])


def trainables_of(folder: Path, formats: Formats | None = None, rows: Tensor | None = CHOSEN) -> Trainables:
    trainables = Trainables(load(folder, folder.parent / "cache"), AdamW(False), folder.parent / "parked")
    trainables.configure(formats or Formats(states="float32"), rows)
    return trainables


def train(trainables: Trainables, steps: int) -> None:
    for seed in range(steps):
        batch = batch_of(4, seed=seed)
        (supervised_loss(trainables.model.module, batch, trainables.model.device) / batch.supervised).backward()
        for name, parameter in trainables.live.items():
            assert parameter.grad is not None, name
            gradient, parameter.grad = parameter.grad, None
            trainables.step(name, gradient, 1e-2)
        trainables.model.inputs.clear()


def hidden_and_logits(model: Int8Model) -> tuple[Tensor, Tensor]:
    batch = batch_of(3, seed=9)
    with torch.no_grad():
        out = model.module(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, output_hidden_states=True
        )
    return out.hidden_states[0], out.logits


@pytest.fixture(params=["llama", "llama-untied"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    save_model(tmp_path / "model", FAMILIES[request.param]())
    return tmp_path / "model"


def test_training_changes_these_logits_and_no_others(folder: Path) -> None:
    trainables = trainables_of(folder)
    model = trainables.model
    embedded, before = hidden_and_logits(model)
    plane = model.linears[HEAD].weight.q.clone()
    start = model.original(HEAD)[CHOSEN]
    trainables.select([HEAD])
    assert torch.equal(trainables.live[HEAD], start)
    train(trainables, 3)
    moved = (trainables.live[HEAD] - start).abs().amax(1)
    assert bool((moved > 0).all()), "softmax gives every row a gradient"
    same, after = hidden_and_logits(model)
    others = torch.ones(320, dtype=torch.bool)
    others[CHOSEN] = False
    assert torch.equal(after[..., others], before[..., others])
    assert not torch.equal(after[..., CHOSEN], before[..., CHOSEN])
    assert torch.equal(same, embedded) and torch.equal(model.linears[HEAD].weight.q, plane)


def test_all_rows_learn_what_a_whole_head_learns(folder: Path) -> None:
    ends = []
    for rows in (None, torch.arange(320)):
        trainables = trainables_of(folder, rows=rows)
        trainables.select([HEAD, UP])
        train(trainables, 2)
        ends.append(trainables.masters()[HEAD])
    assert snr_db(ends[1] - trainables.model.original(HEAD), ends[0] - trainables.model.original(HEAD)) > 10


@pytest.mark.parametrize("master", ["float32", "bfloat16"])
def test_dropped_rows_compute_the_same_and_come_back_with_everything(folder: Path, master: str) -> None:
    stayed, left = (trainables_of(folder, Formats(master, "float32")) for _ in range(2))
    for trainables in (stayed, left):
        trainables.select([HEAD, UP])
        train(trainables, 2)
    before = hidden_and_logits(left.model)[1]
    left.select([])
    assert torch.equal(hidden_and_logits(left.model)[1], before)
    assert all(torch.equal(a, b) for a, b in zip(left.masters().values(), stayed.masters().values(), strict=True))
    left.select([HEAD, UP])
    for trainables in (stayed, left):
        train(trainables, 2)
    for name in (HEAD, UP):
        assert left.live[name].dtype == stayed.live[name].dtype == getattr(torch, master)
        assert torch.equal(left.live[name], stayed.live[name]), name
        for key, value in left.tensors(name).items():
            assert torch.equal(value, stayed.tensors(name)[key]), (name, key)
    assert torch.equal(hidden_and_logits(left.model)[1], hidden_and_logits(stayed.model)[1])


def test_masters_name_the_rows(folder: Path) -> None:
    trainables = trainables_of(folder, Formats("bfloat16", "float32"))
    trainables.select([HEAD])
    train(trainables, 1)
    live = trainables.masters()
    trainables.select([UP])
    resting = trainables.masters()
    for found in (live, resting):
        assert torch.equal(found[f"{HEAD}|rows"], CHOSEN)
        assert found[HEAD].dtype == torch.float32 and found[HEAD].shape == (7, 64)
    assert torch.equal(live[HEAD], resting[HEAD]) and UP in resting
    assert isinstance(trainables.model.linears[HEAD].weight, Int8Weight)
    assert torch.equal(split_planes(live[HEAD]).q, trainables.model.linears[HEAD].rows.weight.q)
