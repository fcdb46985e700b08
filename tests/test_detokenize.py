"""Text that is shown while ids come is never half a character, and in the end it is what decoding all ids gives."""

from __future__ import annotations

from typing import Any

import pytest

from edgegt.detokenize import Detokenizer
from test_data_chat import tokenizer_of

TEXTS = [
    "Plain words, and more.",
    "Ein Übermaß an Größe, naïve façade",
    "猫がいるよ。我喜欢小猫",
    "👩‍👩‍👧 went 🏠 in 🇩🇪 …",
    "  two  spaces\n\nand lines \n",
]


def bytes_of_sentencepiece() -> Any:
    """A tokenizer with the decoder of Llama 2: pieces with a mark for spaces, and bytes for what it does not know."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    known = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{value:02X}>" for value in range(256)),
        "▁",
        *"abcdefghijklmnopqrstuvwxyz.,",
    ]
    inner = Tokenizer(models.BPE(vocab={word: n for n, word in enumerate(known)}, merges=[], byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def wordpiece() -> Any:
    """A tokenizer that takes the space before punctuation away, as BERT's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = ["[UNK]", "do", "n", "'", "t", "##t", "worry", "be", ",", ".", "##ing", "it", "s"]
    inner = Tokenizer(models.WordPiece({word: n for n, word in enumerate(known)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece(cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", eos_token="[UNK]", clean_up_tokenization_spaces=True
    )


def shown(tokenizer: Any, ids: list[int], **options: Any) -> list[str]:
    words = Detokenizer(tokenizer, **options)
    parts = [words.push(token) for token in ids] + [words.finish()]
    assert "".join(parts) == words.text
    return parts


@pytest.mark.parametrize("make", [lambda: tokenizer_of(None), bytes_of_sentencepiece], ids=["bytes", "sentencepiece"])
@pytest.mark.parametrize("text", TEXTS)
def test_parts_are_whole_characters_and_all_of_the_text(make: Any, text: str) -> None:
    tokenizer = make()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole = tokenizer.decode(ids)
    assert whole.strip() == text.strip()
    parts = shown(tokenizer, ids, trimmed=False)
    assert "".join(parts) == whole
    assert not [part for part in parts if "\ufffd" in part]
    assert "".join(shown(tokenizer, ids)) == whole.strip()


def test_text_comes_as_soon_as_it_is_certain() -> None:
    tokenizer = tokenizer_of(None)
    ids = tokenizer("a é", add_special_tokens=False)["input_ids"]
    assert shown(tokenizer, ids, trimmed=False) == ["a", " ", "", "é", ""]
    assert shown(tokenizer, ids) == ["a", "", "", " é", ""]


@pytest.mark.parametrize("make", [lambda: tokenizer_of(None), bytes_of_sentencepiece], ids=["bytes", "sentencepiece"])
def test_bytes_that_are_no_text_are_shown_as_decoding_shows_them(make: Any) -> None:
    tokenizer = make()
    whole = tokenizer("é猫", add_special_tokens=False)["input_ids"]
    whole = whole[1:] if make is bytes_of_sentencepiece else whole
    letter = tokenizer("ab", add_special_tokens=False)["input_ids"][-1:]
    for ids in (whole[:-1], [*whole[:-1], *letter], [*whole[:1], *whole], [*whole[:-2], *whole], whole[1:2]):
        assert "".join(shown(tokenizer, ids, trimmed=False)) == tokenizer.decode(ids)


def test_words_wait_where_spaces_are_taken_away() -> None:
    tokenizer = wordpiece()
    for words in (
        ["do", "n", "'", "t", "worry", ",", "be", "##ing", ".", "it", "worry"],
        ["it", "'", "s", "do", ".", ".", "be", "worry", "it"],
    ):
        ids = tokenizer.convert_tokens_to_ids(words)
        assert 0 not in ids
        parts = shown(tokenizer, ids)
        assert "".join(parts) == tokenizer.decode(ids)
        assert len([part for part in parts if part]) > 1


def test_a_stop_is_not_shown_even_in_part() -> None:
    tokenizer = tokenizer_of(None)
    ids = tokenizer("one\nUse it\nUser: two", add_special_tokens=False)["input_ids"]
    words, parts = Detokenizer(tokenizer, ["\nUser:", "zzz"]), []
    for token in ids:
        parts.append(words.push(token))
        if words.ended:
            break
    assert words.ended and words.finish() == ""
    assert "".join(parts) == words.text == "one\nUse it"
    assert len(parts) < len(ids)
    # a beginning of a stop that goes on otherwise, or not at all, is text
    assert "".join(shown(tokenizer, ids[:14], stops=("\nUser:",))) == "one\nUse it\nUse"


def test_special_tokens_are_no_text() -> None:
    tokenizer = tokenizer_of(None)
    ids = tokenizer("hi<|im_end|>", add_special_tokens=False)["input_ids"]
    assert "".join(shown(tokenizer, [*ids, tokenizer.eos_token_id])) == "hi"
