"""A row's system message and history are read in every format; no key is passed over in silence."""

from __future__ import annotations

import json

import pytest

from megatron_amrlhf.config.data_section import DataSection
from megatron_amrlhf.data.answers import load_answers
from megatron_amrlhf.data.chat import encode_prompt, encode_turns
from megatron_amrlhf.data.pairs import load_pairs
from megatron_amrlhf.data.prm_data import load_prm_examples
from megatron_amrlhf.data.prompts import load_prompts
from megatron_amrlhf.data.scored_pairs import load_scored_pairs
from megatron_amrlhf.errors import UserError

QUESTION = "How many?"
FIVE = dict.fromkeys(("helpfulness", "correctness", "coherence", "complexity", "verbosity"), 4)
COMPLETION = {"text": "Two.", "rating": 1, "flagged": False}
STEPS = {"steps": [{"completions": [COMPLETION], "chosen_completion": 0}], "total_time": 3}
TALK = [{"from": "human", "value": QUESTION}]
PAIR = {"chosen": "Two.", "rejected": "No."}
ROWS = {
    "prompts": {"prompt": QUESTION},
    "pairs": {"prompt": QUESTION, **PAIR},
    "conversations": {"conversations": TALK, **PAIR},
    "scored": {"prompt": QUESTION, **PAIR, "chosen_scores": [4], "rejected_scores": [1]},
    "answers": {"prompt": QUESTION, "response": "Two."},
    "steps": {"prompt": QUESTION, "steps": ["Two."], "labels": [1]},
    "prm800k": {"question": {"problem": QUESTION}, "label": STEPS},
    "math_shepherd": {"input": f"{QUESTION} Step 1: Two. @", "label": f"{QUESTION} Step 1: Two. +"},
    "helpsteer": {"prompt": QUESTION, "response": "Two.", **FIVE},
    "helpsteer_text": {
        "text": f"<extra_id_1>User\n{QUESTION}\n<extra_id_1>Assistant\nTwo.\n<extra_id_2>",
        "label": [4] * 5,
    },
    "helpsteer_sentences": {
        "prompt": QUESTION,
        **PAIR,
        "chosen_scores": [[4]] * 5,
        "rejected_scores": [[1]] * 5,
    },
}


def load(tmp_path, tokenizer, kind, *rows, **keys):
    """Token ids of each row's prompt, and what became of the file."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = DataSection(train="unused", input_mark="@", **keys)
    if kind == "prompts":
        found, selection = load_prompts(path, tokenizer, section)
        return [prompt.row.tolist() for prompt in found], selection
    if kind in ("pairs", "conversations"):
        found, selection = load_pairs(path, tokenizer, section)
        return [pair.chosen[: pair.prompt_length].tolist() for pair in found], selection
    if kind == "scored":
        found, selection = load_scored_pairs(
            path, tokenizer, section, attribute_weights=None, needs_scores=False
        )
        return [x.pair.chosen[: x.pair.prompt_length].tolist() for x in found], selection
    if kind == "answers":
        found, selection = load_answers(path, tokenizer, section)
    else:
        section = section.model_copy(update={"format": "auto"})
        count = 5 if kind.startswith("helpsteer") else 1
        found, selection = load_prm_examples(path, tokenizer, section, count)
    return [x.row[: x.prompt_length].tolist() for x in found], selection


def message_of(tmp_path, tokenizer, kind, *rows, **keys) -> str:
    with pytest.raises(UserError) as caught:
        load(tmp_path, tokenizer, kind, *rows, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{tmp_path}/")


@pytest.mark.parametrize("key", ["system", "system_prompt", "system_message"])
@pytest.mark.parametrize("kind", ROWS)
def test_a_rows_system_message_stands_above_the_runs(tmp_path, tokenizer, kind, key):
    rows = [ROWS[kind] | {key: "Be brief."}, ROWS[kind], ROWS[kind] | {key: " "}]
    found, selection = load(tmp_path, tokenizer, kind, *rows, system_prompt="Be kind.")
    own, other = (encode_prompt(tokenizer, QUESTION, text) for text in ("Be brief.", "Be kind."))
    per_row = len(found) // 3
    assert found == [own] * per_row + [other] * 2 * per_row and own != other
    assert selection.read[key] == 2


@pytest.mark.parametrize(
    "history",
    [
        [["Hi", "Hello"]],
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
        [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
    ],
)
@pytest.mark.parametrize("kind", ROWS)
def test_a_rows_history_stands_before_its_question(tmp_path, tokenizer, kind, history):
    row = ROWS[kind] | {"history": history, "system": "Be brief."}
    found, _ = load(tmp_path, tokenizer, kind, row)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    turns.append({"role": "user", "content": QUESTION})
    assert found[0] == encode_turns(tokenizer, turns, "Be brief.")


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"system": 3}, "'system' must be a string"),
        ({"system": "a", "system_prompt": "b"}, "two system messages"),
        ({"history": "Hi"}, "'history' must be a list"),
        ({"history": [["Hi"]]}, "'history' must be a list"),
        ({"history": [{"role": "tool", "content": "3"}]}, "'role' one of system, user, assistant"),
        ({"history": [{"from": "human", "value": "Hi"}]}, "turns must go human, gpt"),
        ({"history": [["a", "b"], {"role": "system", "content": "c"}]}, "turns must go human, gpt"),
        ({"tools": [{"name": "sum"}]}, "'tools' is not read"),
        ({"images": ["a.png"]}, "'images' is not read"),
        ({"context": "Anna has two apples."}, "'context' is not read"),
        ({"instruction": "In French."}, "'instruction' is not read"),
        ({"messages": [{"role": "user", "content": "x"}]}, "'messages' is not read"),
        ({"weight": 0.0}, "'weight' is not read"),
        ({"truncated": True}, "'truncated' is not read"),
        ({"finished": False}, "'finished' is not read"),
    ],
)
@pytest.mark.parametrize("kind", ["prompts", "conversations", "prm800k", "helpsteer"])
def test_what_could_change_the_meaning_is_refused_by_name(tmp_path, tokenizer, kind, extra, words):
    message = message_of(tmp_path, tokenizer, kind, ROWS[kind], ROWS[kind] | extra)
    assert message.startswith("rows.jsonl:2: ") and words in message
    keys = [*extra, "prompt"]
    found, _ = load(tmp_path, tokenizer, kind, ROWS[kind] | extra, ignored_keys=keys)
    assert found[0] == encode_prompt(tokenizer, QUESTION, None)
    _, selection = load(
        tmp_path, tokenizer, kind, ROWS[kind], ROWS[kind] | extra, on_wrong_row="skip"
    )
    assert selection.left_out == {"wrong": 1} and words in selection.first_wrong


def test_what_stands_within_turns_is_looked_at_too(tmp_path, tokenizer):
    row = {**PAIR, "conversations": [TALK[0] | {"weight": 0}]}
    message = message_of(tmp_path, tokenizer, "conversations", row)
    assert "'conversations[].weight' is not read" in message
    row = {**PAIR, "conversations": TALK, "prompt": "Another one?"}
    assert "'prompt' is not read" in message_of(tmp_path, tokenizer, "conversations", row)
    row = ROWS["helpsteer_text"] | {
        "text": "<extra_id_0>System\nA.\n" + ROWS["helpsteer_text"]["text"]
    }
    assert "two system messages" in message_of(
        tmp_path, tokenizer, "helpsteer_text", row | {"system": "B."}
    )


@pytest.mark.parametrize("value", [True, False])
def test_a_switch_of_the_template_is_refused_on_and_off(tmp_path, tokenizer, value):
    row = ROWS["prompts"] | {"enable_thinking": value}
    assert "'enable_thinking' is not read" in message_of(tmp_path, tokenizer, "prompts", row)


def test_keys_without_a_value_change_nothing(tmp_path, tokenizer):
    empty = {"tools": [], "images": None, "context": "", "weight": 1.0, "finished": True}
    found, selection = load(tmp_path, tokenizer, "prompts", ROWS["prompts"] | empty)
    assert found == [encode_prompt(tokenizer, QUESTION, None)]
    assert selection.unread == dict.fromkeys(empty, 1)


def test_all_keys_are_told_with_their_counts(tmp_path, tokenizer):
    rows = [ROWS["prompts"] | {"answer": 2, "language": "en"}, ROWS["prompts"] | {"id": 7}]
    _, selection = load(tmp_path, tokenizer, "prompts", *rows, rows[1])
    assert selection.keys() == (
        f"{tmp_path}/rows.jsonl: keys of 3 rows: read prompt (3), answer (1); "
        "not read id (2), language (1)"
    )
    _, selection = load(tmp_path, tokenizer, "prompts", ROWS["prompts"])
    assert selection.keys().endswith("1 rows: read prompt (1); nothing is left unread")
    _, selection = load(tmp_path, tokenizer, "prm800k", ROWS["prm800k"] | {"labeler": "x"})
    assert "question.problem (1)" in selection.keys()
    assert selection.unread == {"labeler": 1, "label.total_time": 1}
    row = ROWS["prompts"] | {f"k{number:02d}": 0 for number in range(30)}
    _, selection = load(tmp_path, tokenizer, "prompts", row)
    assert selection.keys().endswith("k19 (1), 10 more")
