"""Labels land on the last token of their step, in every format; bad lines are refused."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_amrlhf.config.data_section import DataSection
from megatron_amrlhf.data.jsonl import write_jsonl
from megatron_amrlhf.data.prm_data import load_prm_examples
from megatron_amrlhf.data.prompts import load_prompts
from megatron_amrlhf.demo.arithmetic import generate_problems
from megatron_amrlhf.errors import UserError

SECTION = DataSection(train="unused", format="steps")
STEPS = ["3 x 4 = 12.", "12 - 5 = 8.", "The answer is 8."]


def load(tmp_path, tokenizer, records, num_attributes=1, section=SECTION):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return load_prm_examples(path, tokenizer, section, num_attributes)[0]


def problem(label_key="labels", labels=(1, 0, 0), prompt_key="prompt", **more):
    return {prompt_key: "How many?", "steps": STEPS, label_key: list(labels), **more}


def test_generated_problems_have_one_label_at_the_end_of_each_step(tmp_path, tokenizer):
    problems = generate_problems(40, 0)
    write_jsonl(tmp_path / "x.jsonl", problems)
    examples, _ = load_prm_examples(tmp_path / "x.jsonl", tokenizer, SECTION, 1)
    for source, example in zip(problems, examples, strict=True):
        assert example.labels.flatten().tolist() == source["labels"]
        assert example.row.dtype == example.label_positions.dtype == torch.int64
        assert example.labels.dtype == torch.float32
        start = example.prompt_length
        for step, position in zip(source["steps"], example.label_positions, strict=True):
            assert tokenizer.decode(example.row[start : position + 1]).strip("\n") == step
            start = int(position) + 1
        assert example.row[start:].tolist() == [tokenizer.eos_token_id]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (problem(labels=[1, 0, 0]), [1.0, 0.0, 0.0]),
        (problem(labels=[True, False, False]), [1.0, 0.0, 0.0]),
        (problem(labels=[0.75, 0.5, 0]), [0.75, 0.5, 0.0]),
        (problem("ratings", [1, 0, -1], "problem", finished=True), [1.0, 0.5, 0.0]),
    ],
)
def test_formats_of_step_correctness_map_to_0_1(tmp_path, tokenizer, record, expected):
    (example,) = load(tmp_path, tokenizer, [record])
    assert example.labels.tolist() == [[value] for value in expected]


def test_scores_by_dimension_equal_labels_by_step(tmp_path, tokenizer):
    by_step = [[4, 3, 2, 1, 0], [0, 1, 2, 3, 4], [4, 4, 1.5, 0, 2]]
    by_dimension = [list(column) for column in zip(*by_step, strict=True)]
    (first,) = load(tmp_path, tokenizer, [problem("labels", by_step)], 5)
    (second,) = load(tmp_path, tokenizer, [problem("scores", by_dimension)], 5)
    assert first.labels.tolist() == [[score / 4 for score in step] for step in by_step]
    assert torch.equal(first.labels, second.labels)


@pytest.mark.parametrize(
    ("record", "num_attributes", "words"),
    [
        (problem(labels=[1, 0]), 1, "3 steps but 2 in 'labels'"),
        (problem(labels=[1, 0, 2]), 1, "'labels' has 2, must be numbers from 0 to 1"),
        (problem(labels=[1, 0, "0"]), 1, "'labels' has '0'"),
        ({**problem(), "truncated": True}, 1, "truncated, so its last step is not whole"),
        ({**problem(), "truncated": 1}, 1, "'truncated' must be true or false"),
        (problem(labels=[1, 0, [0]]), 1, r"'labels' has \[0\]"),
        (problem("ratings", [1, 0, 0]), 1, "key 'labels' is missing"),
        (problem(prompt_key="problem"), 1, "key 'prompt' is missing"),
        ({**problem(), "steps": ["a", " ", "b"]}, 1, "'steps' must be a list of strings"),
        ({**problem(), "steps": []}, 1, "'steps' must be a list with at least one step"),
        ({**problem(), "prompt": ""}, 1, "'prompt' must be a string that is not blank"),
        (problem(labels=[1, 0, 0]), 5, "'labels' must be lists of scores"),
        (problem(labels=[[1, 2, 3]] * 3), 5, "'labels' must have 5 scores a step"),
        (problem(labels=[[1, 2, 3, 4, 5]] * 3), 5, "'labels' has 5, must be numbers from 0 to 4"),
        (problem(labels=[[1, 2, 3, 4, True]] * 3), 5, "'labels' has True"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, tokenizer, record, num_attributes, words):
    right = problem(labels=[1, 0, 0] if num_attributes == 1 else [[4] * 5] * 3)
    with pytest.raises(UserError, match=rf"data\.jsonl:2: .*{words}") as info:
        load(tmp_path, tokenizer, [right, record], num_attributes)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("record", "num_attributes", "words"),
    [
        (problem("ratings", [1, 0, 0.5]), 1, "'ratings' must be -1, 0 or 1"),
        (problem("ratings", [1, 0, True]), 1, "'ratings' has True"),
        (problem("scores", [[4, 4, 4]] * 4), 5, "'scores' must be 5 lists"),
        (problem("scores", [[4, 4, 4]] * 4 + [[4, 4]]), 5, "'scores' must be 5 lists"),
        (problem("scores", [[4, 4]] * 5), 5, "3 steps but 2 in 'scores'"),
        (problem("marks"), 1, "no known format; num_attributes = 1 needs"),
        (problem("scores", [[4, 4, 4]] * 5), 1, "no known format"),
    ],
)
def test_a_wrong_format_is_named(tmp_path, tokenizer, record, num_attributes, words):
    with pytest.raises(UserError, match=rf"data\.jsonl:1: .*{words}"):
        load(tmp_path, tokenizer, [record], num_attributes)


def test_rows_and_prompts_over_the_limits_are_refused(tmp_path, tokenizer):
    (example,) = load(tmp_path, tokenizer, [problem()])
    limits = {"max_prompt_tokens": example.prompt_length, "max_row_tokens": example.row.numel()}
    exact = DataSection(train="unused", format="steps", **limits)
    assert len(load(tmp_path, tokenizer, [problem()], section=exact)) == 1
    for name, limit in limits.items():
        tight = DataSection(train="unused", format="steps", **{**limits, name: limit - 1})
        with pytest.raises(UserError, match=rf"data\.jsonl:1: .*data\.{name} = {limit - 1}"):
            load(tmp_path, tokenizer, [problem()], section=tight)


def test_prompts_are_encoded_with_their_answers(tmp_path, tokenizer):
    path = tmp_path / "p.jsonl"
    write_jsonl(path, [{"prompt": "3 x 4?", "answer": 12}, {"prompt": "Why?"}])
    (first, second), _ = load_prompts(path, tokenizer, SECTION)
    assert (first.text, first.answer, second.answer) == ("3 x 4?", "12", None)
    assert tokenizer.decode(first.row).endswith("3 x 4?<|im_end|>\n<|im_start|>assistant\n")
    section = DataSection(train="unused", system_prompt="Be brief.")
    assert "Be brief." in tokenizer.decode(load_prompts(path, tokenizer, section)[0][0].row)


@pytest.mark.parametrize("name", ["max_prompt_tokens", "max_row_tokens"])
def test_a_prompt_over_a_limit_names_line_and_limit(tmp_path, tokenizer, name):
    path = tmp_path / "p.jsonl"
    write_jsonl(path, [{"prompt": "Why?"}, {"prompt": "Why? " * 50}])
    longest = load_prompts(path, tokenizer, SECTION)[0][1].row.numel()
    limit = longest - 1 if name == "max_prompt_tokens" else longest
    section = DataSection(train="unused", **{name: limit})
    with pytest.raises(UserError, match=rf"p\.jsonl:2: .*{longest} tokens.*data\.{name} = {limit}"):
        load_prompts(path, tokenizer, section)


def test_an_answer_of_a_wrong_type_is_refused(tmp_path, tokenizer):
    write_jsonl(tmp_path / "p.jsonl", [{"prompt": "Why?", "answer": [1]}])
    with pytest.raises(UserError, match=r"p\.jsonl:1: 'answer' must be a string or a number"):
        load_prompts(tmp_path / "p.jsonl", tokenizer, SECTION)


def test_wrong_prompts_are_left_out_where_asked_for(tmp_path, tokenizer):
    path = tmp_path / "p.jsonl"
    write_jsonl(path, [{"prompt": "Why?"}, {"prompt": " "}, {"text": "?"}, {"prompt": "?" * 600}])
    section = DataSection(train="unused", on_wrong_row="skip", max_prompt_tokens=64)
    (prompt,), selection = load_prompts(path, tokenizer, section)
    assert prompt.where == f"{path}:1"
    assert selection.left_out == {"wrong": 3}
    assert selection.first_wrong == f"{path}:2: 'prompt' must be a string that is not blank; " + (
        "correct this line"
    )
