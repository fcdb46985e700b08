"""A run folder such as `edgegt run` leaves, made of plain numbers: what the report's tests read."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from edgegt.cost import BatchShape, Block, CostTable, Weight, Work
from edgegt.cost import Path as Edge
from edgegt.units import GIB, MIB

MATRICES = {
    "self_attn.q_proj": 288 * 288, "self_attn.k_proj": 288 * 288, "self_attn.v_proj": 288 * 288,
    "self_attn.o_proj": 288 * 288, "mlp.gate_proj": 288 * 768, "mlp.up_proj": 288 * 768, "mlp.down_proj": 288 * 768,
}  # fmt: skip
NORMS = ("input_layernorm", "post_attention_layernorm")
EXAMPLES = [
    {"prompt": "start movie time =>", "reference": '{"do":"dim","what":"lights","where":"den"}',
     "before": '{"do":"start","what":"timer"}', "after": '{"do":"dim","what":"lights","where":"den"}'},
    {"prompt": "buy moo juice. =>", "reference": '{"do":"buy","what":"milk"}',
     "before": '{"do":"buy","what":"juice"}', "after": '{"do":"buy","what":"milk"}'},
    {"prompt": "hello house unbolt the windows in the bridge =>",
     "reference": '{"do":"unlock","what":"window","where":"office"}',
     "before": '{"do":"unlock","what":"window","where":"kitchen"}',
     "after": '{"do":"unlock","what":"window","where":"bridge"}'},
    {"prompt": "<script>alert(1)</script> & turn off the fountain =>", "reference": '{"do":"off","what":"fountain"}',
     "before": '{"do":"off","what":"fountain"}', "after": '{"do":"off","what":"fountain"}'},
]  # fmt: skip


def candidates(layers: int, chance: random.Random, wanted: float) -> list[dict[str, Any]]:
    """Llama's tensors in forward order, importances falling with the distance from the loss."""
    found = []
    for layer in range(layers):
        for kind, sizes in (("linear", MATRICES), ("vector", dict.fromkeys(NORMS, 288))):
            for name, numel in sizes.items():
                importance = chance.lognormvariate(0, 0.8) * (layer + 2) / layers * (0.05 if kind == "vector" else 1)
                deep = layer < layers * (1 - wanted)
                found.append({"name": f"model.layers.{layer}.{name}.weight", "kind": kind, "block": layer,
                              "numel": numel, "importance": importance - 0.02,
                              "selected": not deep and importance > 0.5 * (kind == "linear")})  # fmt: skip
    found.append({"name": "model.norm.weight", "kind": "vector", "block": layers, "numel": 288,
                  "importance": 0.1, "selected": True})  # fmt: skip
    found.append({"name": "lm_head.weight", "kind": "head", "block": layers, "numel": 4096 * 288,
                  "importance": 6.0, "selected": True})  # fmt: skip
    return found


def fake_table(layers: int) -> CostTable:
    """The cost table of a small Llama with the tensors of `candidates`: residual paths, stages, layers to recompute."""
    width, inner, vocabulary = 288, 768, 4096
    shapes = {"self_attn": (width, width), "mlp.gate": (inner, width), "mlp.up": (inner, width),
              "mlp.down": (width, inner)}  # fmt: skip
    weights: list[Weight] = []
    edges: list[Edge] = []
    blocks: list[Block] = []
    for found in candidates(layers, random.Random(7), 1.0):
        if found["kind"] == "linear":
            shape = next(shape for part, shape in shapes.items() if part in found["name"])
        else:
            shape = (vocabulary, width) if found["kind"] == "head" else (width,)
        bit, numel = 1 << len(weights), found["numel"]
        dw = Work(kept=2 * numel) if found["kind"] == "head" else Work(token=2 * numel * (found["kind"] == "linear"))
        weights.append(Weight(found["name"], found["kind"], found["block"], shape, len(weights), dw))
        layer = found["block"] if found["block"] < layers else -1
        kept = shape[1] if found["kind"] == "linear" else 4 * width
        edges.append(Edge(bit, Work(), Work(token=kept), layer))
    per_layer = len(MATRICES) + len(NORMS)
    linear = 2 * sum(MATRICES.values())
    for layer in range(layers):
        below = (1 << per_layer * (layer + 1)) - 1
        edges.append(Edge(below, Work(token=linear, pair=8 * width), Work(token=24 * width), layer))
        blocks.append(Block(Work(token=linear, pair=4 * width), Work(token=4 * width), below))
    head = Work(kept=2 * vocabulary * width)
    edges.append(Edge((1 << per_layer * layers) - 1, head, Work(kept=4 * width)))
    forward = Work(token=layers * linear, pair=layers * 4 * width) + head
    count = sum(weight.numel for weight in weights)
    return CostTable(
        layers, tuple(weights), tuple(edges), tuple(blocks), forward, head, count, count, 4 * count,
        Work(token=9 * inner),
    )  # fmt: skip


def fake_importance(table: CostTable) -> dict[str, float]:
    """An importance for each weight, larger towards the loss."""
    chance = random.Random(3)
    return {w.name: chance.lognormvariate(0, 0.8) * (w.block + 2) * w.numel**0.5 for w in table.weights}


def record_problem(folder: Path, layers: int) -> None:
    """Add what a report needs to plan again: costs.json, and the problem of the first round in plan-0.json."""
    table = fake_table(layers)
    shapes = [[8, 96, 24, 150], [8, 64, 16, 50]]
    full = sum(count * table.full_work().at(BatchShape(*shape)) for *shape, count in shapes)
    path = folder / "plan-0.json"
    first, run = json.loads(path.read_text()), json.loads((folder / "run.json").read_text())
    selected = [weight.name for weight in table.weights if weight.block >= layers - 1]
    for found in first["candidates"]:
        found["selected"] = found["name"] in selected
    first["selected"], first["predicted"]["flops"] = selected, full * 45 // 100
    first["predicted"]["peak_bytes"], first["memory"] = 118 * MIB, {"floor": 60 * MIB, "base": 58 * MIB}
    first["problem"] = {
        "shapes": shapes, "flops": full * 48 // 100, "memory_bytes": 130 * MIB, "batch_size": 8, "vocabulary": 4096,
        "floor_bytes": 60 * MIB, "demoted": [], "head_rows": [None, 700],
        "formats": [{"master": "float32", "states": "8-bit"}, {"master": "bfloat16", "states": "8-bit"}],
    }  # fmt: skip
    path.write_text(json.dumps(first))
    run["budget"]["flops"] = full // 2
    (folder / "run.json").write_text(json.dumps(run))
    (folder / "costs.json").write_text(json.dumps(table.to_json()))


EVENTS: list[dict[str, Any]] = [
    {"at_s": 12.0, "step": 30, "kind": "checkpoint", "text": "saved after step 30"},
    {"at_s": 21.5, "step": 62, "kind": "heat", "text": "81 °C, ceiling 80 °C: rested", "paused_s": 24.2},
    {"at_s": 58.0, "step": 101, "kind": "heat", "text": "80 °C, ceiling 80 °C: rested", "paused_s": 19.6},
    {"at_s": 60.0, "step": 104, "kind": "throttle", "text": "the processor slowed itself down, 3 events"},
    {"at_s": 77.0, "step": 128, "kind": "rollback", "text": "<b>loss</b> 91.3: back to step 120"},
    {"at_s": 84.0, "step": 150, "kind": "battery", "text": "on battery at 18 %: waited for mains", "paused_s": 723.0},
    {"at_s": 812.0, "step": 150, "kind": "resume", "text": "resumed at step 150"},
]  # fmt: skip


def record_heat(folder: Path, power: bool = True, every: int = 3) -> None:
    """Add what sensors said to every third line of metrics.jsonl, a ceiling of 80 C, and `EVENTS`."""
    chance = random.Random(11)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    hot = 46.0
    for line in lines:
        hot = 74.5 if hot >= 80 else hot + 0.9 * (84 - hot) / 20 + chance.gauss(0, 0.15)
        if line["step"] % every == 0:
            line["temperature_c"] = round(hot, 1)
            line["throttled"] = 3
            if power:
                line["power_w"] = round(13.5 + chance.gauss(0, 0.6), 2)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "profile.json").write_text(json.dumps({"name": "jetson-orin-nano-8gb", "ceiling_c": 80.0}))
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in EVENTS))


def fake_run(folder: Path, layers: int = 8, rounds: int = 3, steps: int = 200) -> Path:
    """A finished run folder such as `edgegt run` leaves, but for what `record_problem` adds."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(7)
    terms = {"floor": 431 * MIB, "libraries": 16 * MIB, "base": 14 * MIB, "logits": 0, "transient": 87 * MIB,
             "masters": 88 * MIB, "planes": 44 * MIB, "optimizer": 46 * MIB, "gradients": 9 * MIB, "demoted": 12 * MIB,
             "activations": 208 * MIB, "recomputed": 31 * MIB, "slack": 52 * MIB}  # fmt: skip
    held = {"base": 14 * MIB, "masters": 88 * MIB, "planes": 44 * MIB, "optimizer": 45 * MIB, "demoted": 12 * MIB,
            "activations": 197 * MIB}  # fmt: skip
    predicted, budget, full = sum(terms.values()), int(1.25 * GIB), 812_000_000_000_000
    for index in range(rounds):
        listed = candidates(layers, chance, 0.75 - 0.15 * (index % 3))
        first = index * steps // rounds
        plan = {"round": index, "first_step": first, "steps": (index + 1) * steps // rounds - first,
                "strategy": "greentrainer", "selected": [c["name"] for c in listed if c["selected"]], "recompute": [],
                "formats": {"master": "float32", "states": "8-bit"}, "head_rows": 700 if index else None,
                "micro_batch": 8, "accumulation": 1, "value": 3.1, "optimality_gap": 0.0004, "candidates": listed,
                "predicted": {"flops": full // 6, "flops_ratio": 0.481, "peak_bytes": predicted, "step_s": 0.31},
                "budget": {"flops": full // 2, "memory_bytes": budget}, "memory": terms, "notes": []}  # fmt: skip
        (folder / f"plan-{index}.json").write_text(json.dumps(plan))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            loss = 1.1 + 4.6 * math.exp(-step / 32) + chance.gauss(0, 0.11)
            resident = predicted - 70 * MIB + int(chance.gauss(0, 6 * MIB))
            line = {"step": step, "round": (step - 1) * rounds // steps, "epoch": step / 100, "loss": loss, "lr": 1e-3,
                    "tokens_per_s": 2400 + chance.gauss(0, 60), "bytes": resident,
                    "flops": step * full * 481 // (1000 * steps),
                    "peak_bytes": predicted - 28 * MIB - max(0, 30 - step) * MIB, "elapsed_s": step * 0.33,
                    "remaining_s": (steps - step) * 0.33}  # fmt: skip
            file.write(json.dumps(line) + "\n")
    used = full * 481 // 1000
    run = {
        "version": "0.1.0", "command": "edgegt run --device jetson --epochs 2 --rho 0.5",
        "device": {"name": "jetson-orin-nano-8gb", "title": "Jetson Orin Nano 8GB", "kind": "jetson", "on_board": False,
                   "notice": "This machine is not a Jetson: the budgets are those of the Jetson Orin Nano 8GB."},
        "model": {"name": "base-7m", "parameters": 7_340_000, "architecture": "LlamaForCausalLM",
                  "fingerprint": "a1b2c3d4"},
        "data": {"name": "household", "format": "jsonl", "rows": 1640, "kept": 1633, "cut": 4,
                 "dropped": {"empty": 5, "too long": 2}, "train_rows": 1400, "eval_rows": 233,
                 "supervised_tokens": 25_310},
        "budget": {"rho": 0.5, "flops": full // 2, "memory_bytes": budget, "lowered_to_bytes": None},
        "predicted": {"flops_ratio": 0.486, "flops": full * 486 // 1000, "peak_bytes": predicted, "step_s": 0.31,
                      "device_step_s": 0.082, "floor_bytes": terms["floor"]},
        "measured": {"flops_ratio": 0.481, "flops": used, "peak_bytes": predicted - 28 * MIB,
                     "floor_bytes": terms["floor"] + 3 * MIB, "step_s": 0.33, "tokens_per_s": 2402.5, "train_s": 66.4,
                     "elapsed_s": 92.0, "probe_flops": full * 21 // 1000, "peak_since_bytes": None,
                     "dropped_steps": 0, "paused_s": 0.0},
        "full_flops": full, "strategy": "greentrainer", "backend": "torch", "threads": 2, "memory_terms": terms,
        "measured_terms": held,
        "fallbacks": ["bitsandbytes' kernels do not run here: the torch backend is used"],
        "power": {"watts": 15.0, "source": "profile", "mode": "15W"}, "finished": True,
    }  # fmt: skip
    before = {"loss": 5.7021, "perplexity": 299.5, "tokens": 3610, "rows": 233, "exact_match": 0.034,
              "general_exact_match": 0.985}  # fmt: skip
    after = {"loss": 1.1764, "perplexity": 3.24, "tokens": 3610, "rows": 233, "exact_match": 0.914,
             "general_exact_match": 0.975}  # fmt: skip
    options = {"device": "jetson", "model": None, "data": None, "columns": None, "output": "run", "seed": 0,
               "lr": 0.001, "epochs": 2, "steps": None, "batch_size": 8, "max_length": 512, "rho": 0.5, "memory": None,
               "strategy": "greentrainer", "round_epochs": 1, "eval_fraction": 0.1, "schedule": "cosine",
               "examples": True}  # fmt: skip
    evaluation = {"before": before, "after": after, "examples": EXAMPLES}
    trees = {"run": run, "options": options, "eval": evaluation, "profile": {}}
    for name, tree in trees.items():
        (folder / f"{name}.json").write_text(json.dumps(tree))
    return folder
