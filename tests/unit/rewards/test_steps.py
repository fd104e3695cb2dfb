"""Steps by newline and by sentence: the tokens of each, numbered without gaps."""

from __future__ import annotations

import pytest
import torch

from megatron_amrlhf.rewards.steps import StepCutter
from megatron_amrlhf.types import RolloutBatch
from tests.helpers_models import END_TOKEN_ID, tiny_tokenizer

PROMPT = "Say. it\nnow"
# One token a character; the end token closes each answer.
ANSWERS = ["Go on. 3.5 is\nit", "a\n\nb", "no end", "x!? y. "]
BY_NEWLINE = [[0] * 14 + [1, 1, 1], [0, 0, 0, 1, 1], [0] * 7, [0] * 8]
# White space belongs to the sentence after it.
BY_SENTENCE = [[0] * 6 + [1] * 7 + [2] * 4, [0] + [1] * 4, [0] * 7, [0] * 3 + [1] * 5]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def rollout_of(tokenizer, answers: list[str]) -> RolloutBatch:
    prompt = tokenizer.encode(PROMPT, add_special_tokens=False)
    rows = [
        [*prompt, *tokenizer.encode(text, add_special_tokens=False), END_TOKEN_ID]
        for text in answers
    ]
    flags = torch.zeros(len(rows), dtype=torch.bool)
    return RolloutBatch(
        rows=tuple(torch.tensor(row) for row in rows),
        prompt_lengths=torch.full((len(rows),), len(prompt)),
        group_ids=torch.arange(len(rows)),
        sample_ids=torch.arange(len(rows)),
        from_reference=flags,
        ended=~flags,
    )


@pytest.mark.parametrize(
    ("boundary", "expected"), [("newline", BY_NEWLINE), ("sentence", BY_SENTENCE)]
)
def test_steps_by_hand(tokenizer, boundary, expected):
    rollout = rollout_of(tokenizer, ANSWERS)
    found = StepCutter(tokenizer, boundary)(rollout)
    assert found.shape == rollout.response_mask.shape and found.dtype == torch.int64
    for row, steps in zip(found.tolist(), expected, strict=True):
        assert row[: len(steps)] == steps


CODE = [";\n", "}\n", "\n}\n", "};\n\n"]
LINES = {
    "a token with its newline is a line": (["a", ";\n", "}\n", "b"], "0012"),
    "twice": (["a", ";\n", "}\n", "}\n", "}\n"], "00123"),
    "newlines of its own": (["a", "};\n\n", "\n", "}\n", "b"], "00012"),
    "blank lines are no steps": (["a", "\n", " ", " ", "\n", "\n", "b"], "0000001"),
    "an indent is its line's": (["a", ";\n", " ", " ", "}\n", "b"], "001112"),
    "blank lines before it": (["\n", " ", "\n", "a", "\n", "b"], "000001"),
    "blank lines behind it": (["a", "\n", "b", "\n", " ", "\n"], "001111"),
    "nothing but blank lines": (["\n", " ", "\n"], "000"),
    "a line within a token": (["a", "\n}\n", "b"], "001"),
    "a line within a token, then a blank one": (["a", "\n}\n", "\n"], "001"),
}


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("ended", [True, False])
def test_every_line_is_a_step(name, ended):
    tokens, expected = LINES[name]
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(CODE)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in tokens] + [END_TOKEN_ID] * ended
    rollout = RolloutBatch(
        rows=(torch.tensor(ids),),
        prompt_lengths=torch.tensor([0]),
        group_ids=torch.tensor([0]),
        sample_ids=torch.tensor([0]),
        from_reference=torch.tensor([False]),
        ended=torch.tensor([ended]),
    )
    found = StepCutter(tokenizer, "newline")(rollout)[0].tolist()
    assert "".join(map(str, found)) == expected + expected[-1] * ended


def test_numbers_have_no_gaps_where_a_sentence_has_no_token_of_its_own():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["a. b. c"])
    rollout = rollout_of(tokenizer, ["a. b. c. d"])
    assert StepCutter(tokenizer, "sentence")(rollout).tolist() == [[0, 1, 2, 2, 2]]


def test_white_space_is_known_by_its_text(tokenizer):
    rollout = rollout_of(tokenizer, ["a \n b."])
    assert StepCutter(tokenizer, "newline").blanks(rollout).tolist() == [
        [False, True, True, True, False, False, False]
    ]


def test_an_unknown_boundary_is_refused(tokenizer):
    with pytest.raises(ValueError, match="paragraph"):
        StepCutter(tokenizer, "paragraph")
