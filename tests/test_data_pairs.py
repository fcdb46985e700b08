"""Rows for an encoder-decoder: both sides with the tokenizer's own ends, cut on the right, padded on the right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from edgegt.data import Row, Turn, collate, shape_of, split_micro, tokenize
from edgegt.data.examples import IGNORE, Example
from edgegt.errors import InputError
from edgegt.options import RunOptions
from edgegt.survey import survey
from tiny_models import PAIRS, save_model

START, END = 7, 0


class Ended:
    """One id per character, end-of-text behind every text, as T5's tokenizer does it."""

    bos_token_id, eos_token_id, eos_token = None, END, "</s>"
    chat_template = None

    def __call__(self, text: list[str], *, add_special_tokens: bool, verbose: bool) -> dict[str, list[list[int]]]:
        end = [END] if add_special_tokens else []
        return {"input_ids": [[ord(one) for one in words] + end for words in text]}

    def decode(self, token_ids: list[int]) -> str:
        return "".join(map(chr, token_ids))

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, chat_template: str, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        assert chat_template and not tokenize
        said = [f"{one['role'][0].upper()}: {one['content']}" for one in messages]
        ended = [text + self.eos_token * text.startswith("A") for text in said]
        return "\n".join(ended) + "\nA:" * add_generation_prompt


def ids(text: str) -> tuple[int, ...]:
    return (*map(ord, text), END)


def test_the_encoder_reads_the_prompt_and_the_decoder_learns_the_completion() -> None:
    examples, report = tokenize([Row("ask", "say", 1)], Ended(), 64, start=START)
    assert (examples[0].prompt, examples[0].completion) == (ids("ask"), ids("say"))
    assert examples[0].inputs == ids("ask")
    assert examples[0].decoder_inputs == (START, *map(ord, "say"))
    assert examples[0].targets == ids("say") and examples[0].supervised == 4
    assert (report.kept, report.cut, report.supervised_tokens, report.longest) == (1, 0, 4, 4)


def test_both_sides_lose_their_right_and_the_encoders_end_stays() -> None:
    examples, report = tokenize([Row("a" * 30, "b" * 30, 1), Row("short", "too", 2)], Ended(), 16, start=START)
    assert examples[0].prompt == (*map(ord, "a" * 15), END)
    assert examples[0].completion == tuple(map(ord, "b" * 16))
    assert report.cut == 1 and examples[1].completion[-1] == END


def test_every_answer_of_a_conversation_is_an_example_of_its_own() -> None:
    turns = (Turn("user", "hi"), Turn("assistant", "yes"), Turn("user", "and"), Turn("assistant", "no"))
    examples, _ = tokenize([Row.of_turns(turns, 1)], Ended(), 64, start=START)
    assert [one.completion for one in examples] == [ids("yes"), ids("no")]
    assert [Ended().decode(list(one.prompt[:-1])) for one in examples] == ["U: hi\nA:", "U: hi\nA: yes\nU: and\nA:"]


def test_rows_without_a_prompt_or_an_answer_are_dropped_and_nothing_else_left_is_refused() -> None:
    rows = [Row("", "text", 1), Row("ask", "", 2), Row("ask", "say", 3)]
    examples, report = tokenize(rows, Ended(), 64, start=START)
    assert [one.row.number for one in examples] == [3]
    assert report.dropped == {"no prompt for the encoder": 1, "no supervised token": 1}
    with pytest.raises(InputError, match=r"none of 1 row\(s\) has a prompt for the encoder: name both sides"):
        tokenize(rows[:1], Ended(), 64, start=START)


def test_a_batch_is_padded_on_the_right_of_both_sides() -> None:
    rows = [Example((5, 6, END), (8, END), Row("p", "c", 1), start=START),
            Example((5, END), (8, 9, 8, 9, END), Row("p", "c", 2), start=START)]  # fmt: skip
    batch = collate(rows, 3)
    assert batch.shape == shape_of(rows) and (batch.shape.tokens, batch.shape.kept, batch.shape.labelled) == (3, 5, 7)
    assert batch.input_ids.tolist() == [[5, 6, END], [5, END, 3]]
    assert batch.attention_mask.tolist()[1] == [1, 1, 0]
    assert batch.decoder_input_ids is not None
    assert batch.decoder_input_ids.tolist() == [[START, 8, 3, 3, 3], [START, 8, 9, 8, 9]]
    assert batch.labels.tolist()[0] == [8, END, *[IGNORE] * 3]
    first, second = split_micro(batch, 1)
    assert torch.equal(second.decoder_input_ids, batch.decoder_input_ids[1:]) and first.supervised == 2
    assert collate([replace(rows[0], start=None)], 3).decoder_input_ids is None


def test_a_survey_of_pairs_shows_what_the_decoder_learns(tmp_path: Path) -> None:
    from edgegt import home

    save_model(tmp_path / "model", PAIRS["flan-t5"]())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((home.MODEL / name).read_bytes())
    tree = survey(RunOptions(model=str(tmp_path / "model"), data=str(home.HELD_OUT)))
    (side,) = tree["files"]
    shown = side["shown"][0]["pieces"]
    assert [piece["learned"] for piece in shown] == [False, True]
    assert '{"do"' in shown[1]["text"] and shown[1]["text"].endswith("</s>") and "{" not in shown[0]["text"]
