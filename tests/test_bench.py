"""The benchmark against peers: its rows, its count of FLOPs and products, its floor, and one small bench as it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tiny_models import FAMILIES, save_model

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))

from bench import line_of, model_folder, prepare_work, table, verdicts
from bench_chart import draw
from bench_floor import Product, floor_of, int8_products, measure, step_of
from bench_methods import Bench, edgegt_words, failed, timed
from bench_peers import METHODS, published_chain, train
from bench_rows import Size, batches, read_batches, write_batches, write_rows, write_tokenizer
from edgegt.comparison.published import select
from edgegt.cost import BatchShape
from edgegt.trace import trace

ROOT = Path(__file__).resolve().parents[1]
KEYS = {"name", "shape", "step_s", "tokens_per_s", "peak_bytes", "flops_ratio", "floor_share"}
SIZE = Size(2, 24, 8)
NEEDS_PEFT = ("lora", "lora-8bit", "prefix")


def config() -> Any:
    """A tiny Llama with a vocabulary of a size that no other number has, and a tied head."""
    found = FAMILIES["llama"]()
    found.vocab_size, found.tie_word_embeddings = 211, True
    return found


def whole(names: Any) -> Any:
    """What makes a model ready to train these parameters."""

    def prepare(model: Any) -> Any:
        select(model, names)
        return model

    return prepare


def a_bench(work: Path, steps: int = 2) -> Bench:
    return Bench("tiny", model_folder("tiny", work / "weights", work), work, SIZE, steps, 1, 60.0)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    save_model(tmp_path / "weights", config())
    return tmp_path


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize(("tokens", "supervised"), [(24, 8), (256, 64), (9, 2)])
def test_rows_have_exactly_the_wanted_lengths_in_edgegts_own_reading(
    tmp_path: Path, tokens: int, supervised: int, family: str
) -> None:
    size = Size(3, tokens, supervised)
    save_model(tmp_path, FAMILIES[family]())
    write_tokenizer(tmp_path, 211)
    write_rows(tmp_path, 211, size, 2)
    made = batches(tmp_path, tmp_path, size, 2)
    assert [tuple(batch.input_ids.shape) for batch in made] == [(3, tokens)] * 2
    assert [batch.supervised for batch in made] == [3 * supervised] * 2
    assert all(bool(batch.attention_mask.all()) for batch in made)
    assert all(int(batch.input_ids.max()) < 211 and int(batch.input_ids.min()) > 2 for batch in made)


def test_peers_get_the_batches_that_a_run_trains_on(tmp_path: Path) -> None:
    save_model(tmp_path, config())
    write_tokenizer(tmp_path, 211)
    write_rows(tmp_path, 211, SIZE, 3)
    write_batches(tmp_path, tmp_path, SIZE, 2)
    made = batches(tmp_path, tmp_path, SIZE, 2)
    for batch, (inputs, labels) in zip(made, read_batches(tmp_path), strict=True):
        assert inputs.equal(batch.input_ids)
        assert labels[:, -8:].equal(batch.labels) and bool((labels[:, :-8] == -100).all())
        assert inputs[:, -7:].equal(labels[:, -8:-1])  # each position predicts the next input


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="64 supervised of 64 tokens"):
        Size(4, 64, 64)


def test_full_fine_tuning_is_counted_as_the_cost_table_does() -> None:
    shape = BatchShape(2, 24, 24)
    counted = step_of(config(), METHODS["full"], 2, 24).flops
    assert counted == pytest.approx(trace(config()).full_work().at(shape), rel=1e-3)


def test_last_layers_costs_the_forward_pass_and_a_third_of_the_layers_backward() -> None:
    found = config()
    found.num_hidden_layers = 6
    full = step_of(found, METHODS["full"], 2, 24)
    last = step_of(found, METHODS["last-layers"], 2, 24)
    forward = sum(times for product, times in last.products.items() if product.kind == "y")
    trained = sum(times for product, times in last.products.items() if product.kind == "dw")
    assert forward == 6 * 7 + 1 and trained == 2 * 7 + 1
    assert 1 / 3 < last.flops / full.flops < 0.75


def test_lora_saves_the_weight_gradients_and_adds_its_own() -> None:
    pytest.importorskip("peft", reason="the extra 'bench' is not installed")
    full, lora = (step_of(config(), METHODS[name], 2, 24) for name in ("full", "lora"))
    of_rank = [product for product in lora.products if 8 in product.size[1:]]
    assert {product.kind for product in of_rank} == {"y", "dx", "dw"}
    assert not [product for product in lora.products if product.kind == "dw" and product not in of_rank]
    frozen = sum(2 * times * a * b * c for p, times in lora.products.items()
                 if p not in of_rank and p.kind in ("y", "dx") for a, b, c in [p.size])  # fmt: skip
    assert frozen < lora.flops
    assert lora.flops - 2 / 3 * full.flops < 0.5 * full.flops


def test_prefix_tuning_attends_to_virtual_tokens() -> None:
    pytest.importorskip("peft", reason="the extra 'bench' is not installed")
    products = step_of(config(), METHODS["prefix"], 2, 24).products
    assert {product.size[3] for product in products if product.kind == "attention"} == {44}


def test_products_of_a_plan_are_int8_with_a_second_plane_where_trained() -> None:
    untied = config()
    untied.tie_word_embeddings = False
    layers, last = untied.num_hidden_layers, untied.num_hidden_layers - 1
    down = f"model.layers.{last}.mlp.down_proj"
    trained = [f"{down}.weight", "lm_head.weight"]
    step = step_of(untied, whole(trained), 2, 24, kept=8)
    width, wide = untied.hidden_size, untied.intermediate_size
    counted = int8_products(step, trained, lambda name: False, "lm_head", 0)
    assert counted[Product("y", "int8", (48, wide, width))] == layers + 1
    assert counted[Product("y", "int8", (16, width, 211))] == 2
    assert counted[Product("dx", "int8", (16, width, 211))] == 1
    assert counted[Product("dw", "faster", (48, wide, width))] == 1
    assert not [product for product in counted if product.kind == "dx" and product.size[0] == 48]
    rows = int8_products(step, trained, lambda name: name == down, "lm_head", 50)
    assert rows[Product("y", "int8", (16, width, 50))] == 2 and rows[Product("dw", "faster", (16, width, 50))] == 1
    assert rows[Product("y", "int8", (48, wide, width))] == layers + 3  # twice, in both planes


def test_the_floor_of_a_small_plan_is_the_sum_of_its_products() -> None:
    attention = (2, 4, 24, 24, 16)
    products = [
        Product("y", "int8", (48, 64, 96)), Product("dx", "int8", (48, 64, 96)), Product("dw", "faster", (48, 64, 96)),
        Product("y", "float32", (48, 64, 96)), Product("attention", "float32", attention),
        Product("attention_back", "float32", attention), Product("attention_back", "float32", (2, 4, 24, 44, 16)),
    ]  # fmt: skip
    seconds = dict(zip(products, measure(products), strict=True))
    assert all(0 < value < 0.1 for value in seconds.values())
    counted = Counter({products[0]: 3, products[5]: 1})
    assert floor_of(counted, seconds) == pytest.approx(3 * seconds[products[0]] + seconds[products[5]])


def test_published_selection_has_no_tied_head_and_goes_from_the_loss_down() -> None:
    names, dw, dy, budget = published_chain(config(), (2, 24))
    assert names[0] == "model.norm.weight" and "lm_head.weight" not in names
    assert names[-1].startswith("model.layers.0.") and budget > 0
    assert len(dw) == len(dy) == len(names) and min(dy) >= 0


def test_a_row_has_the_keys_of_the_contract_whether_it_ran_or_not(work: Path) -> None:
    bench = a_bench(work)
    ran, did_not = timed(bench, "full", [9.0, 9.0, 1.0, 3.0, 50.0], 2**20), failed(bench, "lora", "no module 'peft'")
    assert set(ran) >= KEYS and set(did_not) >= KEYS
    assert ran["step_s"] == 2.0 and ran["tokens_per_s"] == 24.0
    assert "did not run: no module 'peft'" in line_of(did_not)
    assert verdicts([did_not]) == [(False, "tiny lora: did not run")]
    assert verdicts([ran | {"floor_share": 0.9}]) == []
    assert [good for good, _ in verdicts([ran | {"floor_share": 1.1}])] == [False]
    [(good, said)] = verdicts([ran | {"floor_share": 0.9, "others": 1.25}])
    assert not good and "other programs took 1.25 processors" in said
    ours = ran | {"name": "edgegt-0.5", "floor_share": 1.1, "used_of_budget": 0.94, "head_trained": True}
    assert [good for good, _ in verdicts([ours])] == [False, True]


def test_the_words_of_a_run_are_options_that_exist(work: Path) -> None:
    from edgegt.cli import main as edgegt

    words = edgegt_words(a_bench(work), "edgegt-0.5", 2**30, work / "out")
    assert "--rho" in words and words[words.index("--max-length") + 1] == "24"
    with pytest.raises(SystemExit) as end:
        edgegt([*words, "--help"])
    assert not end.value.code


def test_chart_shows_every_method_that_ran(tmp_path: Path) -> None:
    row = {"shape": "tiny", "peak_bytes": 2**30}
    rows = [{**row, "name": "full", "step_s": 2.0}, {**row, "name": "edgegt-0.5", "step_s": 1.0},
            {**row, "name": "lora", "step_s": None, "problem": "no"}]  # fmt: skip
    draw(rows, tmp_path / "chart.svg")
    draw(rows, tmp_path / "again.svg")
    assert (tmp_path / "chart.svg").read_text() == (tmp_path / "again.svg").read_text()
    with pytest.raises(ValueError, match="nothing to draw"):
        draw(rows[2:], tmp_path / "none.svg")


@pytest.mark.parametrize("name", METHODS)
def test_a_peer_trains_and_its_loss_falls(work: Path, name: str) -> None:
    if name in NEEDS_PEFT:
        pytest.importorskip("peft", reason="the extra 'bench' is not installed")
    bench = a_bench(work)
    prepare_work(bench, config(), [name])
    [first, _, *_] = read_batches(work)
    chain = published_chain(config(), (SIZE.rows, SIZE.tokens)) if name == "greentrainer-published" else None
    result = train(name, bench.model, [first] * 4, chain)
    assert len(result["steps"]) == 4 and result["losses"][-1] < result["losses"][0]
    assert (result["selected"] is None) == (chain is None)


def test_a_small_bench_from_end_to_end(work: Path) -> None:
    out = work / "rows.json"
    words = [
        sys.executable, str(ROOT / "tools" / "bench.py"), "--shape", "tiny", "--model", str(work / "weights"),
        "--methods", "full", "edgegt-0.5", "--batch-size", "2", "--tokens", "24",
        "--supervised", "8", "--steps", "2", "--threads", "1", "--work", str(work / "work"), "--json", str(out),
        "--chart", str(work / "chart.svg"),
    ]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ})
    rows = json.loads(out.read_text())
    assert [row["name"] for row in rows] == ["full", "edgegt-0.5"], done.stdout + done.stderr
    assert all(set(row) >= KEYS and row.get("problem") is None for row in rows), done.stdout
    full, ours = rows
    assert full["flops_ratio"] == 1.0
    assert 0.4 < ours["flops_ratio"] <= 0.5
    assert all(0 < row["floor_share"] < 2 and row["peak_bytes"] > 2**26 for row in rows)
    assert table(rows) in done.stdout
    assert (work / "chart.svg").is_file()
