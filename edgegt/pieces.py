"""Which stored tensors make up each tensor of a model: one of another name, or, of stacked experts, one per expert.

transformers renames and merges what it loads. The renamings are applied here as they are. Of the mergers one form is
known: a tensor per expert, perhaps in parts, whose rows are put one after another. So a stacked weight is read piece by
piece, and its float form never exists as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Pieces:
    """Stored names by the model's names: in the order of their rows, or (`unknown`) merged in a way not known here."""

    found: dict[str, tuple[str, ...]] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)


def pieces_of(model: Any, stored: Iterable[str]) -> Pieces:
    """What the stored tensors are in this version of transformers (GPT-NeoX: embed_out -> lm_head)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    steps = get_model_conversion_mapping(model)
    renamings = [step for step in steps if isinstance(step, WeightRenaming)]
    mergers = [step for step in steps if isinstance(step, WeightConverter)]
    pieces, experts = Pieces(), dict[str, dict[tuple[int, int], str]]()
    for name in stored:
        renamed = name
        for renaming in renamings:
            renamed = renaming.rename_source_key(renamed)[0]
        target, pattern, merger = renamed, None, None
        for merger in mergers:
            target, pattern = merger.rename_source_key(renamed)
            if pattern is not None:
                break
        if merger is None or pattern is None:
            pieces.found.setdefault(renamed, (name,))
        elif (place := _place(merger, pattern, renamed)) is not None:
            experts.setdefault(target, {})[place] = name
        else:
            pieces.unknown[target] = name
    for target, places in experts.items():
        pieces.found.setdefault(target, tuple(name for _, name in sorted(places.items())))
    return pieces


def _place(merger: Any, pattern: str, name: str) -> tuple[int, int] | None:
    """(expert, part of its weight) of a stored tensor whose rows are put after those of the ones before it."""
    operations = [(type(operation).__name__, getattr(operation, "dim", None)) for operation in merger.operations]
    stacked = [("MergeModulelist", 0)]
    known = stacked if len(merger.source_patterns) == 1 else [*stacked, ("Concatenate", 1)]
    number = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), name)
    if number is None or not number.groups() or operations != known:
        return None
    return int(number[1]), merger.source_patterns.index(pattern)
