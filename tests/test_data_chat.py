"""Of a conversation exactly the answers and their ends are learned: by hand for two real templates, and others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from edgegt.data.batches import collate, shape_of, split_micro
from edgegt.data.chat import ChatTemplate
from edgegt.data.examples import IGNORE, Example
from edgegt.data.read import read_rows, split_rows
from edgegt.data.rows import BY_TEMPLATE, Row, Turn
from edgegt.data.tokens import tokenize
from edgegt.errors import InputError

# As Qwen2.5 writes it, without its tools; and as Llama 3 does.
CHATML = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{%- if (message.role == 'user') or (message.role == 'system' and not loop.first) or "
    "(message.role == 'assistant') %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n'"
    " }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}"
    "{{ ' ' + message['content'] + eos_token}}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{% else %}"
    "{{ '<start_of_turn>' + message['role'] + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>assistant\\n' }}{% endif %}"
)
PHI3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
QWEN3 = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.role == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ message.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TURNS = (
    Turn("system", "Be brief."),
    Turn("user", "Who wrote Emma?"),
    Turn("assistant", "Jane Austen."),
    Turn("user", "When?\n"),
    Turn("assistant", "In 1815."),
)
MARKS = [
    "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<s>",
    "</s>", "<start_of_turn>", "<end_of_turn>", "<eos>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>",
    "<|endoftext|>",
]  # fmt: skip


def tokenizer_of(template: str | None, eos: str = "</s>", bos: str | None = "<s>", pad: str | None = None) -> Any:
    """A byte-level tokenizer split as Llama 3's, with two line ends as one token, and marks of several families."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: place for place, letter in enumerate([*letters, "ĊĊ"])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")]))
    parts = pre_tokenizers.Split(Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated")
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([parts, whole])
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(MARKS)
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=eos, bos_token=bos, pad_token=pad)
    made.chat_template = template
    return made


def row(turns: tuple[Turn, ...] = TURNS) -> Row:
    return Row.of_turns(turns, 7)


def one(tokenizer: Any, turns: tuple[Turn, ...] = TURNS, most: int = 4096) -> Example:
    (example,), _ = tokenize([row(turns)], tokenizer, most)
    return example


def by_hand(tokenizer: Any, marked: str) -> tuple[list[int], list[int]]:
    """Ids and labels of a text in which « and » enclose what is learned."""
    ids: list[int] = []
    labels: list[int] = []
    for place, part in enumerate(marked.replace("»", "«").split("«")):
        found = tokenizer(part, add_special_tokens=False)["input_ids"]
        ids += found
        labels += found if place % 2 else [IGNORE] * len(found)
    return ids, labels


def read_and_learned(example: Example) -> tuple[list[int], list[int]]:
    ids = [*example.prompt, *example.completion]
    return ids, [IGNORE] * (len(ids) - len(example.targets)) + list(example.targets)


def test_chatml_equals_the_reference_built_by_hand() -> None:
    tokenizer = tokenizer_of(CHATML, eos="<|im_end|>", bos=None)
    reference = (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWho wrote Emma?<|im_end|>\n"
        "<|im_start|>assistant\n«Jane Austen.<|im_end|>»\n"
        "<|im_start|>user\nWhen?\n<|im_end|>\n"
        "<|im_start|>assistant\n«In 1815.<|im_end|>»"
    )
    assert read_and_learned(one(tokenizer)) == by_hand(tokenizer, reference)
    alone = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nWho wrote Emma?<|im_end|>\n"
    assert read_and_learned(one(tokenizer, TURNS[1:3])) == by_hand(
        tokenizer, alone + "<|im_start|>assistant\n«Jane Austen.<|im_end|>»"
    )


def test_llama3_equals_the_reference_built_by_hand() -> None:
    tokenizer = tokenizer_of(LLAMA3, eos="<|eot_id|>", bos="<|begin_of_text|>")
    reference = (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWho wrote Emma?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«Jane Austen.<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nWhen?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«In 1815.<|eot_id|>»"
    )
    example = one(tokenizer)
    assert read_and_learned(example) == by_hand(tokenizer, reference)
    # at inference the template gives the very ids that were trained on
    asked = [{"role": turn.role, "content": turn.text} for turn in TURNS[:2]]
    ready = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert list(example.prompt) == ready
    asked = [{"role": turn.role, "content": turn.text} for turn in TURNS[:4]]
    ready = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
    assert list(example.inputs[: len(ready)]) == ready


@pytest.mark.parametrize(
    ("template", "eos", "turns", "reference"),
    [
        (MISTRAL, "</s>", TURNS[1:],
         "<s>[INST] Who wrote Emma? [/INST]« Jane Austen.</s>»[INST] When?\n [/INST]« In 1815.</s>»"),
        (MISTRAL, "</s>", TURNS,
         "<s>[INST] Be brief.\n\nWho wrote Emma? [/INST]« Jane Austen.</s>»[INST] When?\n [/INST]« In 1815.</s>»"),
        (PHI3, "<|endoftext|>", TURNS[1:],
         "<|user|>\nWho wrote Emma?<|end|>\n<|assistant|>\n«Jane Austen.<|end|>»\n<|user|>\nWhen?\n<|end|>\n"
         "<|assistant|>\n«In 1815.<|end|>\n<|endoftext|>»"),
        (CHATML, "<|im_end|>", TURNS[2:3],
         "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>assistant\n«Jane Austen.<|im_end|>»"),
        (LLAMA3, "<|eot_id|>", TURNS[2:],
         "<s><|start_header_id|>assistant<|end_header_id|>\n\n«Jane Austen.<|eot_id|>»<|start_header_id|>user"
         "<|end_header_id|>\n\nWhen?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n«In 1815.<|eot_id|>»"),
        (None, "</s>", TURNS,
         "<s>Be brief.\n\nUser: Who wrote Emma?\n\nAssistant:« Jane Austen.</s>»\n\nUser: When?\n\nAssistant:« In "
         "1815.</s>»"),
    ],
    ids=["mistral", "mistral with system", "phi3", "answer first", "answer first and later", "plain"],
)  # fmt: skip
def test_other_templates(template: str | None, eos: str, turns: tuple[Turn, ...], reference: str) -> None:
    tokenizer = tokenizer_of(template, eos)
    assert read_and_learned(one(tokenizer, turns)) == by_hand(tokenizer, reference)


def test_a_template_that_drops_the_system_turn_gets_its_text_elsewhere_and_says_so() -> None:
    tokenizer = tokenizer_of(GEMMA, "<eos>")
    (example,), report = tokenize([row()], tokenizer, 4096)
    assert read_and_learned(example) == by_hand(
        tokenizer,
        "<s><start_of_turn>user\nBe brief.\n\nWho wrote Emma?<end_of_turn>\n<start_of_turn>assistant\n«Jane Austen."
        "<end_of_turn>»\n<start_of_turn>user\nWhen?<end_of_turn>\n<start_of_turn>assistant\n«In 1815."
        "<end_of_turn><eos>»",
    )
    assert report.notes == (
        "system texts are put before the first user turn: the chat template drops system turns (1 of 1 rows)",
        "end of text is put after the last answer, which the chat template does not do (1 of 1 rows)",
    )
    with pytest.raises(InputError, match=r"row 7: the chat template drops system turns, and no user turn follows"):
        tokenize([row((TURNS[0], TURNS[2]))], tokenizer, 4096)


def test_a_template_without_any_end_learns_the_end_of_text_after_the_last_answer() -> None:
    """Missing EOS: without it a model never stops."""
    bare = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    bare += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    tokenizer = tokenizer_of(bare, bos=None)
    reference = "user: Who wrote Emma?\nassistant: «Jane Austen.»\nuser: When?\n\nassistant: «In 1815.</s>»"
    ids, labels = read_and_learned(one(tokenizer, TURNS[1:]))
    assert tokenizer.decode(ids) == reference.replace("«", "").replace("»", "")
    assert (ids, labels) == by_hand(tokenizer, reference)


@pytest.mark.parametrize("answer", ["s", "<", "assistant", "im"])
@pytest.mark.parametrize("asks", [True, False], ids=["with generation prompt", "without"])
def test_a_short_answer_is_not_mistaken_for_a_part_of_its_header(answer: str, asks: bool) -> None:
    template = CHATML if asks else CHATML.partition("{%- if add_generation_prompt")[0]
    tokenizer = tokenizer_of(template, eos="<|im_end|>", bos=None)
    example = one(tokenizer, (Turn("system", "Be brief."), Turn("user", "Which?"), Turn("assistant", answer)))
    reference = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhich?<|im_end|>\n<|im_start|>assistant\n"
        f"«{answer}<|im_end|>»"
    )
    assert read_and_learned(example) == by_hand(tokenizer, reference)


def test_a_template_that_writes_the_date_is_named() -> None:
    """A run that is resumed on another day would go on with other tokens."""
    dated = "{{ 'Today is ' + strftime_now('%d %b %Y') + '.\\n' }}" + LLAMA3
    tokenizer = tokenizer_of(dated, eos="<|eot_id|>", bos="<|begin_of_text|>")
    (example,), report = tokenize([row(TURNS[1:3])], tokenizer, 4096)
    assert tokenizer.decode(list(example.prompt)).startswith("Today is ")
    assert report.notes == ("the chat template may write today's date: on another day the same rows are other tokens",)


def test_a_template_that_changes_earlier_answers_gives_one_example_each() -> None:
    tokenizer = tokenizer_of(QWEN3, "<|im_end|>", bos=None)
    examples, report = tokenize([row(TURNS[1:])], tokenizer, 4096)
    first = "<|im_start|>user\nWho wrote Emma?<|im_end|>\n<|im_start|>assistant\n"
    think = "«<think>\n\n</think>\n\n"
    assert [read_and_learned(example) for example in examples] == [
        by_hand(tokenizer, f"{first}{think}Jane Austen.<|im_end|>»"),
        by_hand(tokenizer, f"{first}Jane Austen.<|im_end|>\n<|im_start|>user\nWhen?\n<|im_end|>\n"
                           f"<|im_start|>assistant\n{think}In 1815.<|im_end|>»"),
    ]  # fmt: skip
    assert (report.rows, report.kept, report.examples) == (1, 1, 2)
    assert report.notes == (
        "each answer is an example of its own: the chat template changes earlier turns (1 of 1 rows)",
    )


@pytest.mark.parametrize(
    ("template", "turns", "line"),
    [
        (MISTRAL, (TURNS[1], TURNS[1], TURNS[2]),
         "the chat template refuses the conversation (Conversation roles must alternate user/assistant/user/assistant/"
         "...): correct or delete the row"),
        (CHATML, (TURNS[1], Turn("tool", "x=1"), TURNS[2]),
         "the chat template changes or drops turn 2 (tool): leave the row out"),
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", TURNS[1:3],
         "the chat template changes or drops turn 2 (assistant): leave the row out"),
    ],
)  # fmt: skip
def test_what_the_template_cannot_say_is_refused_or_left_out(
    template: str, turns: tuple[Turn, ...], line: str
) -> None:  # fmt: skip
    """Everything masked, among others: an answer that is not in the text cannot be learned."""
    tokenizer = tokenizer_of(template)
    with pytest.raises(InputError) as caught:
        tokenize([row(turns)], tokenizer, 4096)
    assert str(caught.value) == f"row 7: {line}, or leave such rows out with --skip-bad-rows"
    with pytest.raises(InputError, match=r"chat template refuses all of 1 conversation\(s\)"):
        tokenize([row(turns)], tokenizer, 4096, skip_bad=True)
    if template != MISTRAL and "tool" not in line:
        return
    examples, report = tokenize([row(turns), row(TURNS[1:])], tokenizer, 4096, skip_bad=True)
    assert len(examples) == 1 and report.dropped == {"refused by the chat template": 1}


@pytest.mark.parametrize("pad", [None, "</s>"])
def test_the_end_is_learned_where_the_padding_is_eos(pad: str | None) -> None:
    tokenizer = tokenizer_of(None, pad=pad)
    examples, report = tokenize([row(), row(TURNS[1:3])], tokenizer, 4096)
    batch = collate(examples, tokenizer.eos_token_id)
    ends = (batch.labels == tokenizer.eos_token_id).sum(1).tolist()
    assert ends == [2, 1]
    assert batch.supervised == batch.shape.labelled == report.supervised_tokens == int((batch.labels != IGNORE).sum())
    assert [part.shape.labelled for part in split_micro(batch, 1)] == [example.supervised for example in examples]
    assert shape_of(examples).kept >= max(len(example.targets) for example in examples)


def test_labels_stand_where_their_tokens_are_predicted() -> None:
    tokenizer = tokenizer_of(CHATML, eos="<|im_end|>", bos=None)
    examples = [one(tokenizer), one(tokenizer, TURNS[1:3])]
    batch = collate(examples, 0)
    logits = torch.randn(*batch.labels.shape, len(tokenizer), generator=torch.Generator().manual_seed(0))
    total = cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE, reduction="sum")
    by_hand_total = 0.0
    for place, example in enumerate(examples):
        ids, labels = read_and_learned(example)
        for at in range(1, len(ids)):
            if labels[at] != IGNORE:
                column = batch.shape.kept - len(ids) + at
                assert batch.input_ids[place, batch.shape.tokens - len(ids) + at] == ids[at - 1]
                by_hand_total -= float(logits[place, column].log_softmax(0)[ids[at]])
    assert float(total) == pytest.approx(by_hand_total, rel=1e-5)


@pytest.mark.parametrize("most", range(8, 140, 3))
def test_a_conversation_that_is_too_long_loses_later_turns_and_ends_with_an_answer(most: int) -> None:
    tokenizer = tokenizer_of(CHATML, eos="<|im_end|>", bos=None)
    whole, (example,) = one(tokenizer), tokenize([row()], tokenizer, most)[0]
    assert len(example.inputs) <= most and example.supervised > 0
    assert example.targets[0] != IGNORE and example.targets[-1] != IGNORE
    assert example.supervised == sum(target != IGNORE for target in example.targets)
    assert example.completion == whole.completion[: len(example.completion)]
    assert example.prompt == whole.prompt[len(whole.prompt) - len(example.prompt) :]
    if most >= len(whole.prompt) + whole.gaps[0][0]:
        assert example.prompt == whole.prompt


def test_a_row_of_turns_shows_its_first_answer_and_ends_with_its_last() -> None:
    made = row((*TURNS, Turn("user", "Thanks")))
    assert made.turns == TURNS
    assert (made.prompt, made.completion, made.separator) == ("Be brief.\nWho wrote Emma?", "Jane Austen.", BY_TEMPLATE)
    assert Row.of_turns((TURNS[1],), 1).completion == ""
    rows = [row((Turn("user", "Hi"), TURNS[2], Turn("user", f"Question {n}"), TURNS[4])) for n in range(9)]
    train, held_out = split_rows(rows, 0.3, 0)
    assert train and held_out  # the same greeting does not keep conversations together


def write(folder: Path, rows: list[Any]) -> Path:
    path = folder / "d.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_roles_and_keys_of_the_usual_files(tmp_path: Path) -> None:
    said = [Turn("user", "hi"), Turn("assistant", "hello")]
    rows: list[Any] = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "model", "content": "hello"}]},
        {"messages": [{"role": "system", "content": " "}, {"role": "User", "content": [{"type": "text", "text": "hi"}]},
                      {"role": "assistant", "content": "hello"}, {"role": "user", "content": "bye"}]},
    ]  # fmt: skip
    source = read_rows(write(tmp_path, rows), None)
    assert [list(found.turns) for found in source.rows] == [said, said] and source.layout == "messages"
    rows = [{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}], "system": "Be"}]
    source = read_rows(write(tmp_path, rows), None)
    assert [list(found.turns) for found in source.rows] == [[Turn("system", "Be"), *said]]
    assert source.layout == "conversations"
    rows = [
        {"messages": [HI, HELLO], "system": [{"type": "text", "text": "Be"}]},
        {"messages": [HI, HELLO], "system": ""},
    ]
    source = read_rows(write(tmp_path, rows), None)
    assert [list(found.turns) for found in source.rows] == [[Turn("system", "Be"), *said], said]
    path = write(tmp_path, [{"messages": [HI, HELLO], "system": {"a": 1}}])
    with pytest.raises(InputError, match="row 1: field 'system' is not text: write it as a text"):
        read_rows(path, None)
    rows = [{"a": {"talk": [{"speaker": "USER", "text": "hi"}, {"speaker": "ASSISTANT", "text": "hello"}]}}]
    assert list(read_rows(write(tmp_path, rows), {"messages": "a.talk"}).rows[0].turns) == said


HI, HELLO = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([HI, {"role": "asistant", "content": "x"}],
         "turn 2 has the unknown role 'asistant' (did you mean 'assistant'?): use one of system, developer, user, "
         "human, assistant, model, gpt, tool"),
        ([HI, {"role": "assistant", "content": "\n"}], "turn 2 (assistant) is empty: fill it in or delete the row"),
        ([{"role": "user", "content": None}, HELLO], "turn 1 (user) is empty: fill it in or delete the row"),
        ([HI, {"role": "assistant"}],
         "turn 2 has no content, it has 'role': write turns such as {\"role\": \"user\", \"content\": \"...\"}"),
        ([HI, "hello"], "turn 2 is not an object: write turns such as {\"role\": \"user\", \"content\": \"...\"}"),
        ([HI, {"role": 3, "content": "x"}],
         "turn 2 has the unknown role '3': use one of system, developer, user, human, assistant, model, gpt, tool"),
        ([{"role": "user", "content": [{"type": "image"}]}, HELLO],
         "turn 1 (user) is not text: only text is learned; write it as a text"),
        ([HI, {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}],
         "turn 2 (assistant) has 'tool_calls', which is not heeded: delete it or the row"),
        ([{**HI, "weight": 1}, {**HELLO, "tool_calls": [], "weight": 0}],
         "turn 2 (assistant) has 'weight', which is not heeded: delete it or the row"),
        ([HI, {**HELLO, "train": False}],
         "turn 2 (assistant) has 'train', which is not heeded: delete it or the row"),
        ("hi", "field 'messages' is no list of turns: write a list of turns such as {\"role\": \"user\", \"content\": "
         "\"...\"}"),
    ],
)  # fmt: skip
def test_bad_turns(turns: Any, reason: str, tmp_path: Path) -> None:
    path = write(tmp_path, [{"messages": [HI, HELLO]}, {"messages": turns}])
    with pytest.raises(InputError) as caught:
        read_rows(path, None)
    assert str(caught.value) == f"'{path}' row 2: {reason}, or leave such rows out with --skip-bad-rows"
    source = read_rows(path, None, skip_bad=True)
    assert len(source.rows) == 1 and source.bad[0].number == 2 and len(source.bad[0].reason) < 80


def test_a_conversation_without_an_answer_is_dropped_and_a_file_of_them_refused(tmp_path: Path) -> None:
    source = read_rows(write(tmp_path, [{"messages": [HI]}, {"messages": [HI, HELLO]}, {"messages": []}]), None)
    assert (len(source.rows), source.dropped) == (1, {"no assistant turn": 2})
    with pytest.raises(InputError, match=r"no usable row \(1 with no assistant turn\)"):
        read_rows(write(tmp_path, [{"messages": [HI]}]), None)


def test_a_plain_template_is_stated() -> None:
    assert "plain" in next(iter(ChatTemplate(tokenizer_of(None)).notes))
    assert not ChatTemplate(tokenizer_of(CHATML, eos="<|im_end|>")).notes


def test_the_head_runs_on_the_learned_positions_alone() -> None:
    """What costs are counted with is the number of labels, gaps left out."""
    from edgegt.cost import Totals

    tokenizer = tokenizer_of(CHATML, eos="<|im_end|>", bos=None)
    shape = collate([one(tokenizer), one(tokenizer, TURNS[1:3])], 0).shape
    learned = sum(len(tokenizer(text)["input_ids"]) for text in ("Jane Austen.", "In 1815.", "Jane Austen.")) + 3
    assert shape.labelled == learned < shape.rows * shape.kept
    assert Totals.of([shape]).kept == learned
