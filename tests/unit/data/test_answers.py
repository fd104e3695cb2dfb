"""Given answers: their rows, and where their steps are judged."""

from __future__ import annotations

import json

import pytest

from megatron_amrlhf.config.data_section import DataSection
from megatron_amrlhf.data.answers import load_answers
from megatron_amrlhf.errors import UserError


def load(tmp_path, tokenizer, *records, **keys):
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return load_answers(path, tokenizer, DataSection(train="unused", **keys))


def pieces(tokenizer, answer) -> list[str]:
    starts = [answer.prompt_length, *(answer.prompt_length + x + 1 for x in answer.step_ends)]
    return [tokenizer.decode(answer.row[a:b]) for a, b in zip(starts, starts[1:], strict=False)]


def test_steps_are_judged_as_in_training(tmp_path, tokenizer):
    record = {"problem": "Why?", "steps": ["a", "b"], "correct": True, "problem_id": 3, "x": 1}
    (whole, cut, within), _ = load(
        tmp_path,
        tokenizer,
        record,
        {**record, "finished": False},
        {**record, "truncated": True},
    )
    assert pieces(tokenizer, whole) == ["a\n", "b"] and whole.row[-1] == tokenizer.eos_token_id
    assert pieces(tokenizer, cut) == ["a\n", "b\n"] and not cut.ended
    assert pieces(tokenizer, within) == ["a\n", "b"] and not within.ended
    assert whole.ended and whole.prompt == "Why?"
    assert whole.extra == {"correct": True, "problem_id": 3}
    assert whole.steps == cut.steps == ("a", "b")
    (other,), _ = load(tmp_path, tokenizer, record, step_marker="+", step_separator=" ")
    assert pieces(tokenizer, other) == ["a ", "b"]  # markers are the PRM's: rewards/marking.py


def test_a_plain_answer_has_no_steps(tmp_path, tokenizer):
    (first, second), _ = load(
        tmp_path,
        tokenizer,
        {"prompt": "Why?", "response": "So.\n"},
        {"prompt": "Why?", "answer": "So.\n"},
    )
    assert first.row.tolist() == second.row.tolist() and first.step_ends == first.steps == ()
    text = tokenizer.decode(first.row[first.prompt_length : -1])
    assert text == "So.\n" and first.row[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "a"}, "no key 'steps' or 'response' or 'answer' (keys here: 'prompt')"),
        ({"answer": "a"}, "no key 'prompt' or 'problem'"),
        ({"prompt": "a", "answer": " "}, "'answer' must be a string that is not blank"),
        ({"prompt": "a", "steps": []}, "'steps' must be a list with at least one step"),
        ({"prompt": "a", "answer": "b", "truncated": 1}, "'truncated' must be true or false"),
        ({"prompt": "a", "answer": "b " * 90}, "over data.max_row_tokens = 80"),
    ],
)
def test_a_wrong_row_is_named_or_skipped(tmp_path, tokenizer, record, words):
    right = {"prompt": "a", "answer": "b"}
    limits = {"max_row_tokens": 80, "max_prompt_tokens": 70}
    with pytest.raises(UserError, match=r"answers\.jsonl:2: ") as caught:
        load(tmp_path, tokenizer, right, record, **limits)
    assert words in str(caught.value)
    answers, selection = load(tmp_path, tokenizer, right, record, on_wrong_row="skip", **limits)
    assert len(answers) == 1 and selection.left_out == {"wrong": 1}
