"""The model card of an exported model: what it was made of and what was measured, with nothing of the user's text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edgegt.errors import InputError
from edgegt.folder import RunFolder
from edgegt.patch import Patch
from edgegt.units import format_flops, format_text
from edgegt.version import __version__


@dataclass
class Exported:
    """What became of a model folder. tensors: the trained ones; left_out: files of the base that were not copied.

    library: what reads it.
    """

    tensors: list[str]
    dtype: str
    total_bytes: int
    files: list[str]
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    library: str = "transformers"


def model_card(name: str, patch: Patch, run: RunFolder | None, done: Exported) -> str:
    """README.md of the folder, in Markdown. run: where training's numbers are; None for a patch without its run."""
    facts = [
        f"- base: {format_text(name)}, fingerprint `{patch.fingerprint[:32]}`",
        f"- weights: {done.dtype}; {len(done.tensors)} tensors are trained, all others are the base's",
        *(f"- {note}" for note in done.notes),
        *(_facts_of_run(run) if run is not None else ()),
    ]
    return "\n".join([
        "---", f"library_name: {done.library}", "tags:", "- edgegt", "---", "",
        f"# {format_text(name)}, fine-tuned", "",
        f"Made by `edgegt export` (edgegt {__version__}) from a pretrained model and the tensors that were trained "
        "over it.", "",
        *facts, "",
        "The licence of the base holds for its weights. Files beside the weights are those of the base; its own card, "
        "if it had one, is `BASE_README.md`.", "",
        "## Trained tensors", "",
        *(f"- `{tensor}`" for tensor in done.tensors), "",
    ])  # fmt: skip


def _facts_of_run(run: RunFolder) -> list[str]:
    """Rows, steps, FLOPs and losses of a run, as far as it got."""
    about, facts = run.read("run.json"), []
    data, measured = _part(about, "data"), _part(about, "measured")
    if "train_rows" in data:
        facts.append(f"- data: {data['train_rows']} rows trained on, {data.get('eval_rows', 0)} held out")
    if "steps" in measured:
        facts.append(f"- training: {measured['steps']} steps, strategy {about.get('strategy', '?')}")
    if "flops" in measured and "flops_ratio" in measured:
        facts.append(f"- FLOPs: {format_flops(measured['flops'])}, {measured['flops_ratio']:.1%} of full fine-tuning")
    if about.get("finished") is not True:
        facts.append("- the run was broken off before its end")
    try:
        result = run.read("eval.json")
    except InputError:  # a run that was broken off has none
        return facts
    before, after = _part(result, "before"), _part(result, "after")
    if "loss" in before and "loss" in after:
        facts.append(
            f"- held-out loss: {before['loss']:.4f} before and {after['loss']:.4f} after, over the base in 8 bits "
            f"({after.get('rows', '?')} rows)"
        )
    if "exact_match" in before and "exact_match" in after:
        facts.append(f"- exact match: {before['exact_match']:.1%} before, {after['exact_match']:.1%} after")
    return facts


def _part(tree: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = tree.get(name)
    return found if isinstance(found, dict) else {}
