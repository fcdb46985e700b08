"""The peers that edgegt is compared with, each as a good user would run it on a CPU, in a process of its own.

    full                     every weight, float32, transformers' own model and loss
    lora                     PEFT, rank 8 on all linears, over the float32 model
    lora-8bit                the same over bitsandbytes' 8-bit linears; everything else in float32
    prefix                   PEFT, 20 virtual tokens per layer, over the float32 model
    last-layers              the last third of the layers, the last norm and the head, float32
    greentrainer-published   arXiv 2309.13192 in float32: importance by one update, selection at rho 0.5 (section 3)

All of them: sdpa attention, logits of every position as Trainer computes them, torch's fused AdamW, no cache, memory
allocator and threads' waiting as they come. A tied head stays tied where it is trained with everything (full) or not at
all; where it is trained alone (last-layers) it gets weights of its own, because its gradient would otherwise run down
to the embedding. GreenTrainer takes parameters in the model's order, where a tied head is the embedding at the bottom,
which half of the FLOPs never reach: so it is not a candidate there.

Run by bench.py:  python tools/bench_peers.py METHOD MODEL ROWS OUT --steps 10 --threads 2
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench_rows import read_batches

sys.path.append(str(Path(__file__).resolve().parents[1]))  # after PYTHONPATH, which may name another copy

from edgegt.comparison.published import Chain, chain_of, chosen, select

if TYPE_CHECKING:
    import torch
    from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[1]
LR = 1e-4
LAST_SHARE = 3
PUBLISHED_RHO = 0.5
CHAIN_FILE = "chain.json"
Batches = Sequence[tuple["Tensor", "Tensor"]]


def load(folder: Path, eight_bit: bool = False) -> Any:
    """The model in float32 or, but for its norms, embedding and head, in bitsandbytes' 8 bits; in training mode."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    more: dict[str, Any] = {}
    if eight_bit:
        more = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": "cpu"}}
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, local_files_only=True, **more)
    model.config.use_cache = False
    return model.train()


def full(model: Any) -> Any:
    """Every parameter is trained."""
    return model.requires_grad_(True)


def lora(model: Any) -> Any:
    """Adapters on all linears but the head."""
    from edgegt.comparison import adapters

    return adapters.lora(model)


def lora_8bit(model: Any) -> Any:
    """Adapters over an 8-bit model; of a float model, on which costs are counted, the same without the 8 bits."""
    from peft import prepare_model_for_kbit_training

    from edgegt.comparison import adapters

    if getattr(model, "is_loaded_in_8bit", False):
        with adapters.without_old_names():
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return lora(model)


def prefix(model: Any) -> Any:
    """Keys and values of virtual tokens before every layer."""
    from edgegt.comparison import adapters

    return adapters.prefix(model)


def last_layers(model: Any) -> Any:
    """The last third of the layers, the norm above them and the head, untied where it is tied."""
    import torch

    from edgegt.architecture import layers_of

    path, count = layers_of(model)
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    first = count - max(1, count // LAST_SHARE)
    below = tuple(f"{path}.{index}." for index in range(first))
    embedding = model.get_input_embeddings().weight
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(below) and parameter is not embedding)
    return model


METHODS: dict[str, Callable[[Any], Any]] = {
    "full": full,
    "lora": lora,
    "lora-8bit": lora_8bit,
    "prefix": prefix,
    "last-layers": last_layers,
    "greentrainer-published": full,
}


def step(model: Any, optimizer: torch.optim.Optimizer, inputs: Tensor, labels: Tensor) -> float:
    """One optimizer step; the loss. labels: shifted already, so that a row of T inputs has T predictions."""
    loss = loss_of(model, inputs, labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def loss_of(model: Any, inputs: Tensor, labels: Tensor) -> Tensor:
    """The model's own loss."""
    loss: Tensor = model(input_ids=inputs, labels=labels, shift_labels=labels, use_cache=False).loss
    return loss


def published_selection_of(
    model: Any, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], chain: Chain
) -> list[str]:
    """What GreenTrainer trains for the next epochs."""

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return chosen(model, lambda: loss_of(model, *batch), update, chain)


def published_chain(config: Any, shape: tuple[int, ...]) -> Chain:
    """Its tensors from the loss downward, at half of the FLOPs of full fine-tuning."""
    from edgegt.cost import BatchShape
    from edgegt.trace import trace

    at = BatchShape(shape[0], shape[1], shape[1])
    return chain_of(trace(copy.deepcopy(config)), at, bool(config.tie_word_embeddings), PUBLISHED_RHO)


def train(method: str, folder: Path, batches: Batches, chain: Chain | None = None) -> dict[str, Any]:
    """Train on all batches; seconds of each step, losses, and the names that were selected where the method selects."""
    import torch

    model = METHODS[method](load(folder, eight_bit=method == "lora-8bit"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, fused=True)
    selected = None
    if chain is not None:
        selected = published_selection_of(model, optimizer, batches[0], chain)
        select(model, selected)
    seconds, losses = [], []
    for inputs, labels in batches:
        start = time.perf_counter()
        losses.append(step(model, optimizer, inputs, labels))
        seconds.append(time.perf_counter() - start)
    return {"steps": seconds, "losses": losses, "selected": selected}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train with one peer of edgegt; started by bench.py.")
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("model", type=Path)
    parser.add_argument("rows", type=Path, help="folder with the batches")
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    import torch

    from edgegt.watch import peak_resident_bytes

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    chain = None
    if args.method == "greentrainer-published":
        chain = Chain(*json.loads((args.rows / CHAIN_FILE).read_text(encoding="utf-8")))
    result = train(args.method, args.model, read_batches(args.rows)[: args.steps], chain)
    args.out.write_text(json.dumps(result | {"peak_bytes": peak_resident_bytes()}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
