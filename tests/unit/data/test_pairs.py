"""Preference pairs: both shapes give the same rows, and bad lines are named."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from megatron_amrlhf.config.data_section import DataSection
from megatron_amrlhf.data.chat import encode_prompt
from megatron_amrlhf.data.pairs import load_pairs
from megatron_amrlhf.errors import UserError

SECTION = DataSection(train="unused", format="pairs")
PAIR = {"prompt": "How many?", "chosen": "Two.", "rejected": "I do not know."}


def turn(who: str, text: str) -> dict:
    return {"from": who, "value": text}


def conversation(*turns: dict) -> dict:
    return {
        "conversations": list(turns),
        "chosen": turn("gpt", PAIR["chosen"]),
        "rejected": turn("gpt", PAIR["rejected"]),
    }


TALK = conversation(turn("human", PAIR["prompt"]))


def load(tmp_path, tokenizer, content, section=SECTION):
    path = tmp_path / "pairs.json"
    if not isinstance(content, str):
        content = "".join(json.dumps(record) + "\n" for record in content)
    path.write_text(content)
    return load_pairs(path, tokenizer, section)[0]


def message_of(tmp_path, tokenizer, content, section=SECTION) -> str:
    with pytest.raises(UserError) as caught:
        load(tmp_path, tokenizer, content, section)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{tmp_path}/")


def test_a_row_is_prompt_answer_and_end_token(tmp_path, tokenizer):
    (pair,) = load(tmp_path, tokenizer, [PAIR])
    prompt = encode_prompt(tokenizer, PAIR["prompt"], None)
    assert pair.prompt_length == len(prompt)
    for row, key in ((pair.chosen, "chosen"), (pair.rejected, "rejected")):
        assert row[: len(prompt)].tolist() == prompt
        assert tokenizer.decode(row[len(prompt) : -1]) == PAIR[key]
        assert row[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("as_list", [False, True])
def test_both_shapes_and_both_files_give_the_same_rows(tmp_path, tokenizer, as_list):
    content = json.dumps([PAIR, TALK], indent=2) if as_list else [PAIR, TALK]
    first, second = load(tmp_path, tokenizer, content)
    assert first.chosen.tolist() == second.chosen.tolist()
    assert first.rejected.tolist() == second.rejected.tolist()
    assert first.prompt_length == second.prompt_length


def test_earlier_turns_and_a_system_turn_are_in_the_prompt(tmp_path, tokenizer):
    turns = [turn("system", "Be short."), turn("human", "Hi"), turn("gpt", "Hello")]
    record = conversation(*turns, turn("human", "How many?"))
    (pair,) = load(tmp_path, tokenizer, [record])
    text = tokenizer.decode(pair.chosen[: pair.prompt_length])
    places = [text.index(part) for part in ("Be short.", "Hi", "Hello", "How many?")]
    assert places == sorted(places)
    section = SECTION.model_copy(update={"system_prompt": "Be short."})
    (same,) = load(
        tmp_path, tokenizer, [conversation(*turns[1:], turn("human", "How many?"))], section
    )
    assert same.chosen.tolist() == pair.chosen.tolist()


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({**PAIR, "rejected": PAIR["chosen"]}, "'chosen' and 'rejected' are equal"),
        ({**PAIR, "chosen": " "}, "'chosen' must be a string that is not blank"),
        ({"prompt": "a", "chosen": "b"}, "key 'rejected' is missing (keys here: 'prompt', 'ch"),
        ({"chosen": "a", "rejected": "b"}, "key 'prompt' is missing"),
        ({**TALK, "chosen": turn("human", "x")}, "'chosen' must be a turn from gpt"),
        ({**TALK, "chosen": {"from": "gpt"}}, "key 'value' is missing"),
        ({**TALK, "conversations": []}, "'conversations' must be a list of turns"),
        ({**TALK, "conversations": [turn("gpt", "x")]}, "turns must go human, gpt, ..., human"),
        ({**TALK, "conversations": [turn("system", "x")]}, "turns must go human, gpt"),
        ({**TALK, "conversations": [turn("bot", "x")]}, "'from' one of system, human, gpt"),
    ],
)
def test_a_bad_line_is_named(tmp_path, tokenizer, record, expected):
    message = message_of(tmp_path, tokenizer, [PAIR, record])
    assert message.startswith("pairs.json:2: ") and expected in message


def test_a_bad_object_of_a_list_is_named_by_its_line(tmp_path, tokenizer):
    lines = ["[", json.dumps(PAIR) + ",", json.dumps({**PAIR, "chosen": 3}), "]"]
    assert message_of(tmp_path, tokenizer, "\n".join(lines)).startswith("pairs.json:3: 'chosen'")
    assert message_of(tmp_path, tokenizer, "\n".join([*lines[:2], "{"])).startswith(
        "pairs.json:3: not valid JSON"
    )
    assert message_of(tmp_path, tokenizer, "[]").startswith("pairs.json:1: the list is empty")
    assert "expected a JSON object, found an integer" in message_of(tmp_path, tokenizer, "[3]")
    assert "pairs.json:1: the file is empty" in message_of(tmp_path, tokenizer, "")


def test_limits_are_kept(tmp_path, tokenizer):
    section = SECTION.model_copy(update={"max_row_tokens": 40, "max_prompt_tokens": 30})
    long = {**PAIR, "rejected": "no " * 40}
    assert "over data.max_row_tokens = 40" in message_of(tmp_path, tokenizer, [long], section)
    question = turn("human", "why? " * 40)
    talk = conversation(turn("human", "Hi"), turn("gpt", "Hello"), question)
    message = message_of(tmp_path, tokenizer, [talk], section)
    assert "over data.max_prompt_tokens = 30" in message


def test_a_wrong_pair_can_be_skipped_and_is_counted(tmp_path, tokenizer):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in (PAIR, {**PAIR, "chosen": " "}, TALK)))
    section = SECTION.model_copy(update={"on_wrong_row": "skip"})
    pairs, selection = load_pairs(path, tokenizer, section)
    assert len(pairs) == 2 and selection.left_out == {"wrong": 1}
    assert "pairs.jsonl:2: 'chosen' must be" in selection.first_wrong


def test_several_turns_need_a_chat_template(tmp_path, tokenizer_folder):
    plain = AutoTokenizer.from_pretrained(tokenizer_folder)
    plain.chat_template = None
    assert load(tmp_path, plain, [TALK])
    talk = conversation(turn("human", "Hi"), turn("gpt", "Hello"), turn("human", "x"))
    assert "several turns need a chat template" in message_of(tmp_path, plain, [talk])
