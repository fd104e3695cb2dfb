"""Public formats of step labels: what is learned from, what is left out, what is wrong."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from megatron_amrlhf.config.data_section import DataSection
from megatron_amrlhf.data.chat import encode_prompt, encode_solution
from megatron_amrlhf.data.prm_data import load_prm_examples
from megatron_amrlhf.data.sentences import split_sentences
from megatron_amrlhf.errors import UserError

ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


def completion(text, rating, flagged=False):
    return {"text": text, "rating": rating, "flagged": flagged}


def step(*completions, chosen=0, human=None):
    return {
        "completions": list(completions),
        "chosen_completion": chosen,
        "human_completion": human,
    }


def prm800k(*steps, finish="solution", **flags):
    flags = {"is_quality_control_question": False, "is_initial_screening_question": False} | flags
    label = {"steps": list(steps), "finish_reason": finish}
    return {**flags, "question": {"problem": "What is 2 + 3?"}, "label": label}


OFFICIAL = prm800k(
    step(completion("Add 2 and 3.", 1), completion("Subtract.", -1), completion("Hm.", 0)),
    step(completion("It is 6.", -1), chosen=None, human=completion("It is 5.", None)),
    step(completion("So 5.", 1), completion("So 7.", -1, flagged=True), completion("So?", None)),
)
MARK = "\u043a\u0438"
SHEPHERD = {
    "input": f"What is 2 + 3? Step 1: Add. {MARK}\nStep 2: It is 6. The answer is: 6 {MARK}",
    "label": "What is 2 + 3? Step 1: Add. +\nStep 2: It is 6. The answer is: 6 -",
}
WHOLE = {"prompt": "Who?", "response": "Ann. She is."} | dict(
    zip(ATTRIBUTES, (4, 3, 2, 1, 0), strict=True)
)
MARKED = {
    "text": "<extra_id_0>System\nBe kind.\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\nHello\n"
    "<extra_id_1>User\nWho?\n<extra_id_1>Assistant\nAnn. She is.\n<extra_id_2>",
    "label": [-100.0] * 4 + [4.0, 3.0, 2.0, 1.0, 0.0],
}
SENTENCES = {
    "prompt": "Who?",
    "chosen": "Ann. She is kind!",
    "rejected": ["Ben."],
    "chosen_scores": [[4, 0]] * 4 + [[1, 2]],
    "rejected_scores": [[3]] * 5,
}
EVERY = {
    "prm800k": (OFFICIAL, 1),
    "math_shepherd": (SHEPHERD, 1),
    "helpsteer": (WHOLE, 5),
    "helpsteer_sentences": (SENTENCES, 5),
}


def load(tmp_path, tokenizer, records, num_attributes=1, **keys):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    section = DataSection(train="unused", **({"format": "auto"} | keys))
    examples, selection = load_prm_examples(path, tokenizer, section, num_attributes)
    return list(examples), selection  # before another file takes this one's place


def texts(tokenizer, example) -> list[str]:
    """The answer up to each judged position, from the one before."""
    starts = [example.prompt_length, *(int(x) + 1 for x in example.label_positions)]
    return [tokenizer.decode(example.row[a:b]) for a, b in zip(starts, starts[1:], strict=False)]


def labels(example) -> list:
    return example.labels.flatten().tolist()


def test_prm800k_gives_the_chosen_path_and_each_alternative(tmp_path, tokenizer):
    examples, selection = load(tmp_path, tokenizer, [OFFICIAL])
    assert selection.summary() is None
    chosen, *others = examples
    # The human's step has no label, so the second judged piece holds two steps.
    assert texts(tokenizer, chosen) == ["Add 2 and 3.\n", "It is 5.\nSo 5.\n"]
    assert labels(chosen) == [1.0, 1.0]
    found = [(texts(tokenizer, example), labels(example)) for example in others]
    assert found == [
        (["Subtract.\n"], [0.0]),
        (["Hm.\n"], [0.5]),
        (["Add 2 and 3.\nIt is 6.\n"], [0.0]),
    ]
    only, _ = load(tmp_path, tokenizer, [OFFICIAL], alternatives=False)
    assert len(only) == 1 and torch.equal(only[0].row, chosen.row)


def test_prm800k_path_without_a_choice_ends_with_the_sampled_step(tmp_path, tokenizer):
    last = step(completion("It is 6.", -1), completion("It is 5.", 1), chosen=None)
    record = prm800k(step(completion("Add.", 1)), last, finish="found_error")
    (path, other), _ = load(tmp_path, tokenizer, [record])
    assert texts(tokenizer, path) == ["Add.\n", "It is 6.\n"] and labels(path) == [1.0, 0.0]
    assert texts(tokenizer, other) == ["Add.\nIt is 5.\n"] and labels(other) == [1.0]
    (only,), _ = load(tmp_path, tokenizer, [record], alternatives=False)
    assert labels(only) == [1.0, 0.0]


def test_prm800k_screening_rows_are_left_out_and_counted(tmp_path, tokenizer):
    control = prm800k(step(completion("Add.", 1)), is_quality_control_question=True)
    screening = prm800k(step(completion("Add.", 1)), is_initial_screening_question=True)
    bad = prm800k(step(completion("Add.", 1)), finish="bad_problem")
    blank = prm800k(step(completion("Add.", None)))
    rows = [control, OFFICIAL, screening, screening, bad, blank]
    examples, selection = load(tmp_path, tokenizer, rows)
    assert len(examples) == 4 and selection.num_rows == 6
    assert selection.left_out == {
        "quality-control rows": 1,
        "initial-screening rows": 2,
        "bad problems": 1,
        "rows without a label": 1,
    }
    assert "5 of 6 rows left out" in selection.summary()
    examples, selection = load(tmp_path, tokenizer, rows, screening_rows="keep")
    assert len(examples) == 7 and sum(selection.left_out.values()) == 2
    with pytest.raises(UserError, match="no row is left to use"):
        load(tmp_path, tokenizer, [control])


def test_math_shepherd_steps_have_their_signs(tmp_path, tokenizer):
    (example,), _ = load(tmp_path, tokenizer, [SHEPHERD])
    pieces = ["Step 1: Add.\n", "Step 2: It is 6. The answer is: 6"]
    assert texts(tokenizer, example) == pieces and labels(example) == [1.0, 0.0]
    prompt = encode_prompt(tokenizer, "What is 2 + 3?", None)
    assert example.row[: example.prompt_length].tolist() == prompt
    other = {key: text.replace("\u043a\u0438", "<s>") for key, text in SHEPHERD.items()}
    (same,), _ = load(tmp_path, tokenizer, [other], input_mark="<s>")
    assert torch.equal(same.row, example.row)


def test_both_whole_answer_formats_judge_the_last_token_of_the_answer(tmp_path, tokenizer):
    (plain,), _ = load(tmp_path, tokenizer, [WHOLE], 5)
    (marked,), _ = load(tmp_path, tokenizer, [MARKED], 5)
    for example in (plain, marked):
        assert texts(tokenizer, example) == ["Ann. She is."]
        assert example.labels.tolist() == [[1.0, 0.75, 0.5, 0.25, 0.0]]
        assert example.row[-1] == tokenizer.eos_token_id
    talk = tokenizer.decode(marked.row[: marked.prompt_length])
    places = [talk.index(part) for part in ("Be kind.", "Hi", "Hello", "Who?")]
    assert places == sorted(places) and "extra_id" not in talk


def test_sentences_of_both_sides_keep_the_answers_text(tmp_path, tokenizer):
    (chosen, rejected), _ = load(tmp_path, tokenizer, [SENTENCES], 5)
    assert texts(tokenizer, chosen) == ["Ann.", " She is kind!"]
    assert chosen.labels.tolist() == [[1.0] * 4 + [0.25], [0.0] * 4 + [0.5]]
    assert texts(tokenizer, rejected) == ["Ben."] and rejected.labels.tolist() == [[0.75] * 5]
    as_list = {**SENTENCES, "chosen": ["Ann.", "She is kind!"]}
    (same, _), _ = load(tmp_path, tokenizer, [as_list], 5)
    assert torch.equal(same.row, chosen.row)


@pytest.mark.parametrize("kind", EVERY)
def test_auto_finds_the_format(tmp_path, tokenizer, kind):
    record, size = EVERY[kind]
    auto, _ = load(tmp_path, tokenizer, [record], size)
    named, _ = load(tmp_path, tokenizer, [record], size, format=kind)
    assert len(auto) == len(named)
    for a, b in zip(auto, named, strict=True):
        assert torch.equal(a.row, b.row) and torch.equal(a.labels, b.labels)
    with pytest.raises(UserError, match=f"set algorithm.num_attributes to {size}"):
        load(tmp_path, tokenizer, [record], 6 - size)


def changed(record, *path, value):
    record = copy.deepcopy(record)
    place = record
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return record


WRONG = [
    (changed(OFFICIAL, "label", "steps", 0, "completions", 0, "rating", value=2), "from -1 to 1"),
    (changed(OFFICIAL, "label", "steps", 0, "completions", 1, "text", value=" "), "not blank"),
    (changed(OFFICIAL, "label", "steps", 0, "chosen_completion", value=3), "there are 3 compl"),
    (changed(OFFICIAL, "label", "steps", 1, value=[]), "step 2 must be an object"),
    (changed(OFFICIAL, "question", value="x"), "'question' and 'label' must be objects"),
    (changed(SHEPHERD, "label", value=SHEPHERD["label"][:-1]), "at step 2 of 2"),
    (changed(SHEPHERD, "label", value=SHEPHERD["label"].replace("-", "?")), "at step 2 of 2"),
    (changed(SHEPHERD, "label", value=SHEPHERD["label"] + " x"), "goes on after the last step"),
    (changed(SHEPHERD, "input", value=SHEPHERD["input"] + "\nStep 3: cut"), "is the answer trunc"),
    (changed(SHEPHERD, "input", value="What? Step 1: x"), "no step mark '\u043a\u0438'"),
    (changed(WHOLE, "response", value="  "), "'response' must be a string that is not blank"),
    (changed(WHOLE, "verbosity", value=5), "'verbosity' has 5, must be numbers from 0 to 4"),
    (changed(MARKED, "label", value=[4.0] * 4), "'label' must have 5 scores"),
    (changed(MARKED, "text", value=MARKED["text"][:-12]), "labelled answer is truncated"),
    (
        changed(MARKED, "text", value=MARKED["text"].replace("Ann. She is.\n", "")),
        "an empty answer",
    ),
    (
        changed(SENTENCES, "chosen_scores", value=[[1, 2, 3]] * 5),
        "2 sentences but 3 in 'chosen_scores'; is the answer cut off",
    ),
    (changed(SENTENCES, "rejected_scores", value=[[1, 2]] * 5), "1 sentences but 2 in"),
    (changed(SENTENCES, "rejected_scores", value=[[5]] * 5), "'rejected_scores' has 5"),
    (changed(SENTENCES, "chosen_scores", value=[[1, 2]] * 4), "must be 5 lists"),
    (changed(SENTENCES, "chosen", value=""), "'chosen' must be a string that is not blank"),
]


@pytest.mark.parametrize(("record", "words"), WRONG, ids=[words for _, words in WRONG])
def test_a_wrong_row_is_named_or_skipped_and_counted(tmp_path, tokenizer, record, words):
    kind = (
        next(k for k, (row, _) in EVERY.items() if row.keys() & record.keys() == row.keys())
        if record.keys() != MARKED.keys()
        else "helpsteer"
    )
    right, size = EVERY[kind]
    with pytest.raises(UserError, match=r"data\.jsonl:2: ") as caught:
        load(tmp_path, tokenizer, [right, record], size, format=kind)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    examples, selection = load(
        tmp_path, tokenizer, [right, record], size, format=kind, on_wrong_row="skip"
    )
    assert selection.left_out == {"wrong": 1} and words in selection.first_wrong
    assert len(examples) == len(load(tmp_path, tokenizer, [right], size, format=kind)[0])


def test_not_a_number_is_refused(tmp_path, tokenizer):
    record = {"prompt": "a", "steps": ["b"], "labels": [float("nan")]}
    with pytest.raises(UserError, match=r"data\.jsonl:1: .*NaN"):
        load(tmp_path, tokenizer, [record])


def test_a_row_over_the_limit_can_be_skipped(tmp_path, tokenizer):
    long = {"prompt": "a", "steps": ["word " * 200], "labels": [1]}
    short = {"prompt": "a", "steps": ["b"], "labels": [1]}
    keys = {"format": "steps", "max_row_tokens": 60, "max_prompt_tokens": 50}
    with pytest.raises(UserError, match=r"data\.jsonl:1: the row has"):
        load(tmp_path, tokenizer, [long, short], **keys)
    examples, selection = load(tmp_path, tokenizer, [long, short], on_wrong_row="skip", **keys)
    assert len(examples) == 1 and "1 of 2 rows left out (1 wrong)" in selection.summary()


def test_unlabelled_and_truncated_steps_are_read_but_not_judged(tmp_path, tokenizer):
    record = {"prompt": "a", "steps": ["b", "c", "d"], "labels": [None, 1, None], "truncated": True}
    (example,), _ = load(tmp_path, tokenizer, [record])
    assert texts(tokenizer, example) == ["b\nc\n"] and labels(example) == [1.0]
    assert tokenizer.decode(example.row[example.prompt_length :]) == "b\nc\nd"  # no end token


def test_separator_and_marker_of_public_prms(tmp_path, tokenizer):
    record = {"prompt": "a", "steps": ["b", "c"], "labels": [1, 0]}
    (wide,), _ = load(tmp_path, tokenizer, [record], step_separator="\n\n")
    assert texts(tokenizer, wide) == ["b\n\n", "c"]
    (marked,), _ = load(tmp_path, tokenizer, [record], step_marker="+", step_separator="\n")
    (mark,) = tokenizer.encode("+", add_special_tokens=False)
    assert marked.row[marked.label_positions].tolist() == [mark, mark]
    assert tokenizer.decode(marked.row[marked.prompt_length : -1]) == "b+\nc+"
    (bare,), _ = load(tmp_path, tokenizer, [record], step_marker="+", step_separator="")
    assert tokenizer.decode(bare.row[bare.prompt_length : -1]) == "b+c+"
    with pytest.raises(UserError, match=r"data.step_marker: '\?!x' is 3 tokens"):
        load(tmp_path, tokenizer, [record], step_marker="?!x")


def test_an_ended_row_and_a_cut_row_differ_by_the_end_token(tokenizer):
    prompt = encode_prompt(tokenizer, "a", None)
    whole, positions = encode_solution(tokenizer, prompt, ["b", "c"])
    cut, same = encode_solution(tokenizer, prompt, ["b", "c"], end="within step")
    assert whole == [*cut, tokenizer.eos_token_id] and positions == same


def test_the_last_step_before_a_cut_looks_like_every_other_step(tmp_path, tokenizer):
    """Else a PRM could tell the step at which annotators stopped by its missing newline."""
    record = {"problem": "a", "steps": ["b", "b"], "ratings": [1, -1], "finished": False}
    (example,), _ = load(tmp_path, tokenizer, [record])
    first, second = example.label_positions.tolist()
    assert example.row[first] == example.row[second] and second == example.row.numel() - 1
    (whole,), _ = load(tmp_path, tokenizer, [{**record, "finished": True}])
    assert texts(tokenizer, whole) == ["b\n", "b"] and whole.row[-1] == tokenizer.eos_token_id
    last = step(completion("Add.\n\n# Answer\n\n5", 1))
    (path,), _ = load(tmp_path, tokenizer, [prm800k(last)])
    assert path.row[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two!  Three? \n", ["One.", " Two!", "  Three? \n"]),
        ("It costs 3.50 dollars. Cheap.", ["It costs 3.50 dollars.", " Cheap."]),
        ("Steps:\n1. Add.\n2. Stop", ["Steps:", "\n1. Add.", "\n2. Stop"]),
        ('He said "no." Then left.', ['He said "no."', " Then left."]),
        (
            "\u4f60\u597d\u3002\u518d\u89c1\uff01\n\u597d",
            ["\u4f60\u597d\u3002", "\u518d\u89c1\uff01", "\n\u597d"],
        ),
        (
            "\u4ed6\u8bf4\u201c\u597d\u3002\u201d\u8d70\u4e86\uff1f",
            ["\u4ed6\u8bf4\u201c\u597d\u3002\u201d", "\u8d70\u4e86\uff1f"],
        ),
        ("no end", ["no end"]),
    ],
)
def test_sentences_are_cut_and_together_are_the_text(text, expected):
    assert split_sentences(text) == expected
    assert "".join(expected) == text
