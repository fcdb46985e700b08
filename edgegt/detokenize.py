"""Ids to text while they come: only what no later id can change is shown, and in the end all of it.

What later ids can change, and is held back: half a character (a trailing U+FFFD of a byte-level tokenizer), the byte
tokens of sentencepiece, which are decoded together, the last words where the tokenizer takes spaces before punctuation
away, spaces at the end, and what may become one of the texts that end the answer. All ids are decoded each time,
because a tokenizer may treat the first of a few ids as the beginning of a text.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Sequence
from typing import Any

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# Words at the end that may still change where spaces are taken away: "do n ' t" becomes "don't" with its last letter.
_UNSURE = 3
_BROKEN = "\ufffd"


class Detokenizer:
    """The text of an answer without its special tokens, and without spaces around it unless `trimmed` is False.

    stops: texts that end the answer; they and what follows them are not shown. ended: one of them came.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), trimmed: bool = True) -> None:
        self.tokenizer = tokenizer
        self.stops = tuple(stops)
        self.trimmed = trimmed
        self.ended = False
        self._ids: list[int] = []
        self._shown = ""
        self._words = _moves_spaces(tokenizer)

    @property
    def text(self) -> str:
        """All that was shown."""
        return self._shown

    def push(self, token: int) -> str:
        """What can be shown after one more id; often nothing."""
        self._ids.append(token)
        if _BYTE.fullmatch(str(self.tokenizer.convert_ids_to_tokens(token))):
            return ""
        text, self.ended = self._decoded()
        safe = text if self.ended else text.rstrip(_BROKEN)
        if self._words and not self.ended:
            gaps = [match.start() for match in re.finditer(r"\s", safe)]
            safe = safe[: gaps[-_UNSURE]] if len(gaps) >= _UNSURE else ""
        held = 0 if self.ended else max((_overlap(safe, stop) for stop in self.stops), default=0)
        safe = self._trim(safe[: len(safe) - held])
        return self._show(safe) if safe.startswith(self._shown) else ""

    def finish(self) -> str:
        """The rest, when no id follows."""
        if self.ended:
            return ""
        text, self.ended = self._decoded()
        return self._show(self._trim(text))

    def _decoded(self) -> tuple[str, bool]:
        """All text so far, up to the first stop, and whether there was one."""
        text = str(self.tokenizer.decode(self._ids, skip_special_tokens=True))
        found = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        return text[: min(found, default=len(text))], bool(found)

    def _trim(self, text: str) -> str:
        return text.strip() if self.trimmed else text

    def _show(self, text: str) -> str:
        """What of the text was not shown yet."""
        more = text[len(os.path.commonprefix([text, self._shown])) :]  # noqa: RUF071
        self._shown = text
        return more


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text are a beginning of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)


def _moves_spaces(tokenizer: Any) -> bool:
    """Whether decoding takes spaces away before punctuation, so that a word may change until the next one begins.

    transformers does so for a tokenizer that asks for it, except of byte-pair ones.
    """
    inner = getattr(tokenizer, "backend_tokenizer", None)
    if type(getattr(inner, "decoder", None)).__name__ == "WordPiece":
        return True
    forced = getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    pairs = type(getattr(inner, "model", None)).__name__ == "BPE" and not forced
    return bool(getattr(tokenizer, "clean_up_tokenization_spaces", False)) and not pairs
