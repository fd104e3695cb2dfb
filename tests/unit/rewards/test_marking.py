"""Answers get the step markers that their PRM was trained with."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_amrlhf.data.chat import encode_prompt, encode_solution
from megatron_amrlhf.data.token_text import decode
from megatron_amrlhf.experience.translation import read_back, translate
from megatron_amrlhf.rewards.marking import AnswerSteps, StepMarker, newline_steps
from megatron_amrlhf.rewards.steps import StepCutter
from megatron_amrlhf.types import PromptBatch, RolloutBatch
from tests.helpers import make_tiny_tokenizer
from tests.helpers_models import tiny_tokenizer

MARKER, SYSTEM, QUESTION = "<|endoftext|>", "Be brief.", "How many?"
CHINESE = "\u7b54\u6848\u662f 12\u3002\n\u5bf9"
# text of the answer, whether it ended, its steps, and of each character its step
CASES = {
    "no newline": ("So 12.", True, ["So 12."], "000000"),
    "two steps": ("a\nbc", True, ["a", "bc"], "0011"),
    "newline at its end": ("ab\nc\n", True, ["ab", "c"], "00011"),
    "truncated": ("ab\nc", False, ["ab", "c"], "0001"),
    "truncated after a newline": ("ab\n", False, ["ab"], "000"),
    "only an end token": ("", True, [], ""),
    "only newlines": ("\n\n", True, [], "00"),
    "several newlines": ("a\n\n\nb", True, ["a", "b"], "00001"),
    "newlines before it": ("\n\na\nb", True, ["a", "b"], "00001"),
    "a blank line": ("a\n \nb", True, ["a", "b"], "00001"),
    "blanks at its end": ("a\nb\n  ", True, ["a", "b"], "001111"),
    "indented": ("a \n  b", True, ["a ", "  b"], "000111"),
    "Chinese": (CHINESE, True, CHINESE.split("\n"), "000000001"),
}


@pytest.fixture(scope="module")
def characters():
    """One token a character, also for the Chinese ones here."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(sorted(set(CHINESE)))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", MARKER]})
    return tokenizer


@pytest.fixture(scope="module")
def merging(tmp_path_factory):
    """Byte-level BPE: words in few tokens, a Chinese character in several."""
    return make_tiny_tokenizer(tmp_path_factory.mktemp("merging"), vocab_size=450)


def marker_of(tokenizer, separator="\n") -> StepMarker:
    (token_id,) = tokenizer.encode(MARKER, add_special_tokens=False)
    return StepMarker(MARKER, token_id, separator)


def rollout_of(tokenizer, *answers) -> tuple[RolloutBatch, PromptBatch]:
    head = encode_prompt(tokenizer, QUESTION, SYSTEM)
    rows = [
        head + tokenizer.encode(text, add_special_tokens=False) + [tokenizer.eos_token_id] * ended
        for text, ended in answers
    ]
    count = len(rows)
    rollout = RolloutBatch(
        rows=tuple(torch.tensor(row) for row in rows),
        prompt_lengths=torch.full((count,), len(head)),
        group_ids=torch.full((count,), 5),
        sample_ids=torch.arange(count),
        from_reference=torch.zeros(count, dtype=torch.bool),
        ended=torch.tensor([ended for _, ended in answers]),
    )
    prompts = PromptBatch((torch.tensor(head),), torch.tensor([5]), (QUESTION,), (None,))
    return rollout, prompts


def row_by_hand(tokenizer, steps, ended, separator="\n") -> tuple[list[int], list[int]]:
    """The answer with its markers, and where they stand."""
    marker = marker_of(tokenizer).token_id
    ids, places = [], []
    for number, step in enumerate(steps or [""]):
        ids += tokenizer.encode(separator, add_special_tokens=False) if number else []
        ids += [*tokenizer.encode(step, add_special_tokens=False), marker]
        places.append(len(ids) - 1)
    return ids + [tokenizer.eos_token_id] * ended, places


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("prm", ["characters", "merging"])
@pytest.mark.parametrize("separator", ["\n", "", " ki\n"])
def test_all_tokens_of_a_step_read_its_marker(request, characters, prm, separator, name):
    text, ended, steps, numbers = CASES[name]
    own = request.getfixturevalue(prm)
    rollout, prompts = rollout_of(characters, (text, ended))
    there = translate(
        rollout, prompts, characters, own, system_prompt=SYSTEM, marker=marker_of(own, separator)
    )
    ids, places = row_by_hand(own, steps, ended, separator)
    head = encode_prompt(own, QUESTION, SYSTEM)
    assert there.rollout.rows[0].tolist() == head + ids
    assert there.rollout.prompt_lengths.tolist() == [len(head)]
    expected = [places[int(number)] for number in numbers] + [places[-1]] * ended
    assert there.index[0].tolist() == expected
    assert all(ids[place] == marker_of(own).token_id for place in expected)


def test_scores_come_back_from_the_markers(characters, merging):
    answers = [CASES[name][:2] for name in CASES]
    rollout, prompts = rollout_of(characters, *answers)
    there = translate(
        rollout, prompts, characters, merging, system_prompt=SYSTEM, marker=marker_of(merging)
    )
    scores = torch.zeros(there.rollout.response_mask.shape)
    for row, case in enumerate(CASES.values()):
        _, places = row_by_hand(merging, *case[2:0:-1])
        scores[row, places] = 1.0 + torch.arange(len(places)) + 10 * row
    found = read_back(scores, there, rollout)
    for row, (_, ended, _, numbers) in enumerate(CASES.values()):
        steps = [*map(int, numbers)]
        steps += [max(steps, default=0)] * ended
        assert found[row, : len(steps)].tolist() == [1.0 + step + 10 * row for step in steps]
        assert (found[row, len(steps) :] == 0).all()


def test_the_prompt_of_the_same_tokenizer_stays_as_it_is(characters):
    """Offline pairs have no texts to cut anew."""
    rollout, prompts = rollout_of(characters, ("a\nb", True))
    nobody = PromptBatch(prompts.rows, prompts.group_ids, ("",), (None,))
    there = translate(
        rollout, nobody, characters, characters, system_prompt=None, marker=marker_of(characters)
    )
    length = int(rollout.prompt_lengths[0])
    assert torch.equal(there.rollout.rows[0][:length], rollout.rows[0][:length])


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab 9.\n\u7b54\U0001f600", max_size=25), st.booleans())
def test_steps_are_those_of_the_rewards_unit(merging, text, ended):
    """Its unit and the marker's step begin and end together."""
    ids = merging.encode(text, add_special_tokens=False) + [merging.eos_token_id] * ended
    steps = newline_steps(merging, ids, ended)
    assert len(steps.numbers) == len(ids) and list(steps.numbers) == sorted(steps.numbers)
    lines = [line for line in text.split("\n") if line.strip()]
    assert list(steps.texts) == lines
    if ids:
        rollout = RolloutBatch(
            rows=(torch.tensor(ids),),
            prompt_lengths=torch.tensor([0]),
            group_ids=torch.tensor([0]),
            sample_ids=torch.tensor([0]),
            from_reference=torch.tensor([False]),
            ended=torch.tensor([ended]),
        )
        assert StepCutter(merging, "newline")(rollout)[0].tolist() == list(steps.numbers)


def test_given_steps_and_their_text_are_the_same_row(merging):
    texts = ("So 3 x 4 = 12.", "\u7b54\u6848\u662f", "The answer is 12.")
    ids, ends = encode_solution(merging, [], texts)
    known = AnswerSteps.given(texts, ends, len(ids))
    plain = merging.encode("\n".join(texts), add_special_tokens=False) + [merging.eos_token_id]
    found = newline_steps(merging, plain, True)
    assert found.texts == known.texts and found.numbers[-1] == known.numbers[-1] == 2
    assert [known.numbers[end] for end in ends] == [0, 1, 2]
    assert [known.numbers[end + 1] for end in ends[:-1]] == [1, 2]
    assert decode(merging, ids) == decode(merging, plain)
