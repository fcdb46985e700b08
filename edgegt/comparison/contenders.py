"""What can be compared: edgegt, its simpler strategies, full fine-tuning, and PEFT's adapters over the float model."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from edgegt.errors import InputError, nearest
from edgegt.units import format_text

EQUAL = ("flops", "seconds", "steps")
# Options of a run that a comparison passes on to all that it compares.
PASSED = (
    "model", "data", "columns", "format", "eval_data", "eval_fraction", "eval_rows", "batch_size", "max_length",
    "device", "memory", "threads", "schedule", "warmup", "weight_decay", "max_grad_norm", "skip_bad_rows", "epochs",
    "steps", "cache",
)  # fmt: skip


@dataclass(frozen=True)
class Contender:
    """One way to fine-tune. strategy: of `edgegt run`; for a peer (a float model trained otherwise) of its data.

    adapter: PEFT makes it. budgeted: it keeps to a share rho of full fine-tuning's FLOPs per step.
    """

    name: str
    strategy: str
    peer: bool = False
    adapter: bool = False
    budgeted: bool = False


def _of_run(name: str, strategy: str = "") -> Contender:
    return Contender(name, strategy or name, budgeted=True)


CONTENDERS = {
    one.name: one
    for one in (
        Contender("full", "full"),
        _of_run("last-layers"),
        Contender("lora", "full", peer=True, adapter=True),
        Contender("lora-head", "full", peer=True, adapter=True),
        Contender("prefix", "full", peer=True, adapter=True),
        _of_run("bias"),
        _of_run("random"),
        _of_run("lisa"),
        _of_run("greentrainer-dp"),
        Contender("published", "full", peer=True, budgeted=True),
        _of_run("edgegt", "greentrainer"),
    )
}
FULL = CONTENDERS["full"]


def parse_contenders(text: str) -> tuple[str, ...]:
    """The contenders that 'full,lora,edgegt' names, each once and in this order.

    Raises: InputError for a name that is none, and for a peer without PEFT.
    """
    names = tuple(dict.fromkeys(one.strip() for one in text.split(",") if one.strip()))
    if not names:
        raise InputError(f"--strategies names none: give some of {', '.join(CONTENDERS)}, divided by commas")
    for name in names:
        if name not in CONTENDERS:
            raise InputError(
                f"--strategies '{format_text(name)}' is unknown{nearest(name, CONTENDERS)}: give some of "
                f"{', '.join(CONTENDERS)}"
            )
    peers = [name for name in names if CONTENDERS[name].adapter]
    if peers and find_spec("peft") is None:
        raise InputError(f"{', '.join(peers)} need PEFT: pip install edgegt[compare], or leave them out")
    return names
