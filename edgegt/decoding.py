"""The one loop that makes answers, token by token, whatever computes the logits.

An `Engine` reads ids and says the logits of the next token. It keeps what it has read (keys and values), so that a
prompt that begins like the one before costs its new part only. How a token is picked from the logits is transformers'
own: its logits processors, and then the likeliest token, or a draw.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from edgegt.sampling import Sampling

# A model whose positions a prompt uses up reads the prompt's end only, and answers with so many tokens.
LEAST_TOKENS = 16


class Engine(Protocol):
    """What the loop needs of a model that writes."""

    @property
    def positions(self) -> int | None:
        """How many tokens prompt and answer may have together (an encoder-decoder: each); None: no limit."""
        ...

    @property
    def eos(self) -> tuple[int, ...]:
        """The ids that end an answer."""
        ...

    @property
    def start(self) -> int | None:
        """Of an encoder-decoder, the id that its decoder begins with; None of a decoder-only model."""
        ...

    @property
    def reused(self) -> int:
        """How many ids of the last prefill were known already and not computed again."""
        ...

    def prefill(self, ids: Sequence[int]) -> torch.Tensor:
        """float32 logits [vocabulary] of the token after `ids`, which are at least one.

        What is kept of earlier ids is used again as far as they agree with these. Of an encoder-decoder the encoder
        reads `ids`, and the logits are those after `start`. Broken off (Ctrl-C), the engine stays usable.
        """
        ...

    def step(self, token: int) -> torch.Tensor:
        """float32 logits [vocabulary] after one more id, which follows what was read so far."""
        ...


def fit(engine: Engine, ids: Sequence[int], most: int) -> tuple[tuple[int, ...], int]:
    """The prompt and the number of new tokens, cut to the model's positions.

    A decoder reads the prompt's end only; an encoder its beginning and its last token, as in training (`data.pairs`).
    """
    positions, ids = engine.positions, tuple(ids)
    if positions is None:
        return ids, most
    if engine.start is not None:
        return (ids if len(ids) <= positions else (*ids[: positions - 1], ids[-1])), min(most, positions - 1)
    most = min(most, max(LEAST_TOKENS, positions - len(ids)), positions - 1)
    return ids[-(positions - most) :], most


def decode(engine: Engine, ids: Sequence[int], most: int, sampling: Sampling) -> Iterator[int]:
    """At most `most` new tokens after `ids`, each as soon as it is known; one that ends the answer is the last.

    What `most` and `ids` ask for must be within the engine's positions, see `fit`.
    """
    pick = sampling.picker()
    read = [engine.start] if engine.start is not None else list(ids)
    logits = engine.prefill(ids)
    for left in range(most - 1, -1, -1):
        token = pick(read, logits)
        yield token
        if token in engine.eos or left == 0:
            return
        read.append(token)
        logits = engine.step(token)
