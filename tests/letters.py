"""The smallest tokenizer that data can be read with."""

from __future__ import annotations


class Letters:
    """A tokenizer of one id per character."""

    bos_token_id, eos_token_id = None, 0

    def __call__(self, text: list[str], *, add_special_tokens: bool, verbose: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [[ord(one) for one in words] for words in text]}

    def decode(self, token_ids: list[int]) -> str:
        return "".join(map(chr, token_ids))
