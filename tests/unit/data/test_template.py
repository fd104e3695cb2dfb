"""A chat template is looked at before it is used: header, question, end of turn, what else."""

from __future__ import annotations

import json
import os

import pytest

from megatron_amrlhf.data.chat import (
    chat_notes,
    check_system_prompt,
    encode_prompt,
    encode_solution,
    encode_turns,
    end_token_ids,
    turn_end_id,
)
from megatron_amrlhf.data.known_chat import ANSWER, QUESTION, SECOND, SYSTEM
from megatron_amrlhf.data.template import read_template
from megatron_amrlhf.data.token_text import answer_text
from megatron_amrlhf.errors import UserError
from tests.unit.data.chat_templates import SHAPES, UNUSABLE, chat_tokenizer

CHATML = SHAPES["chatml"].template


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def shape(request):
    return request.param


def tokenizer_of(shape):
    return chat_tokenizer(shape.template, shape.eos, shape.bos)


def test_a_prompt_ends_where_the_answer_starts(shape):
    tokenizer = tokenizer_of(shape)
    assert tokenizer.decode(encode_prompt(tokenizer, "Q?", None)) == shape.prompt


def test_a_system_message_stands_in_the_prompt_or_is_refused(shape):
    tokenizer = tokenizer_of(shape)
    check_system_prompt(tokenizer, None, "here")
    if shape.system is None:
        with pytest.raises(UserError, match="^here: .* a system message.*data.system_prompt to"):
            check_system_prompt(tokenizer, "S", "here")
    else:
        check_system_prompt(tokenizer, "S", "here")
        assert tokenizer.decode(encode_prompt(tokenizer, "Q?", "S")) == shape.system


def test_answers_end_with_what_the_template_ends_turns_with(shape, tmp_path):
    tokenizer = tokenizer_of(shape)
    token = tokenizer.convert_tokens_to_ids
    assert tokenizer.decode(turn_end_id(tokenizer)) == shape.end
    ids, _ = encode_solution(tokenizer, encode_prompt(tokenizer, "Q?", None), ["Three.", "Four."])
    assert tokenizer.decode(ids) == f"{shape.prompt}Three.\nFour.{shape.end}"
    both = list(dict.fromkeys([token(shape.end), token(shape.eos)]))
    assert end_token_ids(tokenizer, tmp_path) == both
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, both[0]]}))
    assert end_token_ids(tokenizer, tmp_path) == [*both, 7]


def test_what_a_user_should_know_is_said_once(shape, tmp_path):
    notes = chat_notes(tokenizer_of(shape), tmp_path, None)
    assert len(notes) == len(shape.notes), notes
    for note, expected in zip(notes, shape.notes, strict=True):
        assert expected in note and "\n" not in note


def test_ids_are_those_of_transformers(shape):
    """But for the header that the template itself leaves out."""
    tokenizer = tokenizer_of(shape)
    template = read_template(tokenizer)
    message = {"role": "user", "content": "Q?"}
    if template.as_parts:
        message["content"] = [{"type": "text", "text": "Q?"}]
    expected = tokenizer.apply_chat_template(
        [message], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    header = tokenizer.encode(template.header, add_special_tokens=False)
    assert encode_prompt(tokenizer, "Q?", None) == [*expected, *header]


@pytest.mark.parametrize(("template", "reason"), UNUSABLE.values(), ids=UNUSABLE)
def test_a_template_that_makes_no_prompt_is_a_user_error(template, reason, tmp_path):
    with pytest.raises(UserError) as info:
        end_token_ids(chat_tokenizer(template), tmp_path)
    assert str(info.value).startswith(f"{tmp_path}: ") and reason in str(info.value)


def test_one_of_several_templates_is_the_default():
    tokenizer = chat_tokenizer({"tool_use": "{{ 1 }}", "default": CHATML}, "<|im_end|>")
    assert tokenizer.decode(encode_prompt(tokenizer, "Q?", None)) == SHAPES["chatml"].prompt


@pytest.mark.parametrize(
    "clock",
    [
        "{{ strftime_now('%d %b %Y') }}\n",
        "{% if strftime_now is defined %}{{ strftime_now('%H:%M') }}{% endif %}",
        "{% if strftime_now %}{% set day = strftime_now('%A') %}{{ day }}{% endif %}",
    ],
)
def test_a_date_in_prompts_is_told(clock, tmp_path):
    text = "<|im_start|>system\n" + clock + "<|im_end|>\n"
    note, own = chat_notes(chat_tokenizer(text + CHATML, "<|im_end|>"), tmp_path, None)
    assert "a text of its own" in own
    assert "writes the present date or time into prompts" in note
    text = text.replace(clock, "26 Jul 2024")
    fixed = chat_notes(chat_tokenizer(text + CHATML, "<|im_end|>"), tmp_path, None)
    assert len(fixed) == 1 and "26 Jul 2024" in fixed[0]
    assert chat_notes(chat_tokenizer(text + CHATML, "<|im_end|>"), tmp_path, "S") == []


def test_a_template_may_want_a_system_message():
    want = "{% if messages[0].role != 'system' %}{{ raise_exception('a system first') }}{% endif %}"
    tokenizer = chat_tokenizer(want + CHATML, "<|im_end|>")
    check_system_prompt(tokenizer, "S", "here")
    assert tokenizer.decode(encode_prompt(tokenizer, "Q?", "S")) == SHAPES["chatml"].system
    with pytest.raises(UserError, match="a system first.*set data.system_prompt$"):
        encode_prompt(tokenizer, "Q?", None)


@pytest.mark.parametrize(
    "turns",
    [
        "messages[-1:]",
        "messages | reverse",
        "messages | rejectattr('role', 'eq', 'assistant')",
    ],
)
def test_turns_that_would_not_stand_in_the_prompt_are_refused(turns):
    tokenizer = chat_tokenizer(CHATML.replace("in messages", f"in {turns}"), "<|im_end|>")
    assert tokenizer.decode(encode_prompt(tokenizer, "Q?", None)) == SHAPES["chatml"].prompt
    with pytest.raises(UserError, match="leaves out earlier turns, or changes their order"):
        encode_turns(tokenizer, [QUESTION, ANSWER, SECOND], None)


def test_several_turns_stand_in_the_prompt():
    tokenizer = chat_tokenizer(CHATML, "<|im_end|>")
    text = tokenizer.decode(encode_turns(tokenizer, [QUESTION, ANSWER, SECOND], "S"))
    contents = [x["content"] for x in ({"content": "S"}, QUESTION, ANSWER, SECOND)]
    assert text.split("<|im_end|>\n")[:4] == [
        f"<|im_start|>{role}\n{content}"
        for role, content in zip(("system", "user", "assistant", "user"), contents, strict=True)
    ]


def test_a_row_that_the_template_fails_at_is_a_user_error():
    fails = "{% if 'bad' in messages[0].content %}{{ 1 + messages[0].content }}{% endif %}"
    tokenizer = chat_tokenizer(fails + CHATML)
    with pytest.raises(UserError, match="the chat template refuses the prompt .unsupported"):
        encode_prompt(tokenizer, "bad", None)
    assert encode_prompt(tokenizer, "good", None)


def test_a_model_needs_a_token_to_end_answers_with(tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    for template in (None, SHAPES["no end"].template):
        with pytest.raises(UserError, match="no end token; set eos_token"):
            end_token_ids(chat_tokenizer(template, None), tmp_path)
    tokenizer = chat_tokenizer(CHATML, None)
    im_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_token_ids(tokenizer, tmp_path) == [im_end, 2]
    (note,) = chat_notes(tokenizer, tmp_path, None)
    assert "ends turns with '<|im_end|>', the tokenizer's EOS is None" in note


def test_a_model_without_a_template_is_told(tmp_path):
    (note,) = chat_notes(chat_tokenizer(None), tmp_path, None)
    assert note == (
        "the model has no chat template: a prompt is its text and a newline, an answer ends with "
        "'</s>'"
    )


def test_an_end_token_that_is_not_special_is_no_part_of_an_answers_text():
    tokenizer = chat_tokenizer(SHAPES["chatml of a base folder"].template)
    tokenizer.add_tokens("[done]")
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "[done]")
    end = turn_end_id(tokenizer)
    assert tokenizer.decode(end) == "[done]"
    ids = [*tokenizer.encode("It is 12.", add_special_tokens=False), end]
    assert answer_text(tokenizer, ids, ended=True) == "It is 12."
    assert answer_text(tokenizer, ids, ended=False) == "It is 12.[done]"


def test_the_probes_are_what_they_test():
    texts = [message["content"] for message in (SYSTEM, QUESTION, ANSWER, SECOND)]
    assert all(text == text.strip() for text in texts)  # templates may trim
    assert not os.path.commonprefix(texts)
