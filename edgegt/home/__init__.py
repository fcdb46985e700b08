"""The embedded default: a small home assistant that turns an utterance into a JSON action, and one household's words.

The model was pretrained by tools/pretrain_home.py on text that tools/home_grammar.py writes; the household's own words
are not in that text. `GENERAL` checks that what the model could do before has not been forgotten.
"""

from __future__ import annotations

from pathlib import Path

MODEL = Path(__file__).resolve().parent
TRAIN = MODEL / "household.train.jsonl"
HELD_OUT = MODEL / "household.heldout.jsonl"
GENERAL = MODEL / "general.heldout.jsonl"
EPOCHS = 6.0
NEW_TOKENS = 48
SEPARATOR = " =>"


def as_prompt(utterance: str) -> str:
    """What the assistant reads for an utterance: it was trained with an arrow before the action."""
    return utterance if utterance.rstrip().endswith("=>") else utterance.rstrip() + SEPARATOR
