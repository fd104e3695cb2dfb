"""Pairs with scores: which reward each token gets, and what is refused with file and row."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_amrlhf.config.data_section import DataSection
from megatron_amrlhf.data.scored_pairs import load_scored_pairs
from megatron_amrlhf.errors import UserError
from tests.helpers_models import END_TOKEN_ID, tiny_tokenizer
from tests.unit.data.test_sentences import PAPER_CHOSEN, PAPER_REJECTED

SECTION = DataSection(train="unused", format="pairs", max_row_tokens=2000)
CHOSEN, REJECTED = "Go on. Yes\nok", "No."
PAIR = {"prompt": "Hm?", "chosen": CHOSEN, "rejected": REJECTED}
SCORES = {"chosen_scores": [4, 1, 2], "rejected_scores": [3]}
# sentence of each character and of the end token; white space belongs to what follows
CHOSEN_SENTENCES = [0] * 6 + [1] * 4 + [2] * 4


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def load(tmp_path, tokenizer, *records, **keys):
    return select(tmp_path, tokenizer, SECTION, *records, **keys)[0]


def select(tmp_path, tokenizer, section, *records, weights=None, needs_scores=True):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return load_scored_pairs(
        path, tokenizer, section, attribute_weights=weights, needs_scores=needs_scores
    )


def test_each_token_gets_the_score_of_its_sentence(tmp_path, tokenizer):
    (found,) = load(tmp_path, tokenizer, PAIR | SCORES)
    values = torch.tensor([1.0, 0.25, 0.5])
    assert torch.equal(found.rewards[0], values[torch.tensor(CHOSEN_SENTENCES)])
    assert torch.equal(found.rewards[1], torch.full((4,), 0.75))
    assert found.pair.chosen[-1] == END_TOKEN_ID
    assert found.rewards[0].numel() == found.pair.chosen.numel() - found.pair.prompt_length


@pytest.mark.parametrize(
    ("weights", "expected"), [(None, 0.2 * (1 + 2 + 3 + 4) / 4), ((2.0, 0, 0, 0, 1.0), 2 * 0.25)]
)
def test_five_dimensions_become_one_reward(tmp_path, tokenizer, weights, expected):
    scores = {
        "chosen_scores": [[n, n, n] for n in (1, 2, 3, 4, 0)],
        "rejected_scores": [[n] for n in (0, 1, 2, 3, 4)],
    }
    (found,) = load(tmp_path, tokenizer, PAIR | scores, weights=weights)
    torch.testing.assert_close(found.rewards[0], torch.full((14,), expected))


def test_the_papers_example(tmp_path, tokenizer):
    record = {"prompt": "Summarize", "chosen": PAPER_CHOSEN, "rejected": PAPER_REJECTED}
    last = [4, 4, 4, 3, 4, 4, 3, 3, 3, 2, 4, 2]
    record["chosen_scores"] = [[4] * 12] * 3 + [[1, 1, 1, 1, 2, 3, 3, 3, 4, 4, 4, 4], last]
    record["rejected_scores"] = [[4] * 5] * 3 + [[3, 4, 4, 4, 4], [4, 4, 4, 3, 3]]
    (found,) = load(tmp_path, tokenizer, record)
    first = (3 * 4 + 1 + 4) / 20
    torch.testing.assert_close(found.rewards[0][0].item(), first)
    torch.testing.assert_close(found.rewards[1][-1].item(), (3 * 4 + 4 + 3) / 20)


def test_pairs_without_scores_where_nothing_reads_them(tmp_path, tokenizer):
    (found,) = load(tmp_path, tokenizer, PAIR, needs_scores=False)
    assert found.rewards is None


@pytest.mark.parametrize(
    ("change", "weights", "words"),
    [
        ({"chosen_scores": [4, 1]}, None, ["'chosen_scores' has 2 scores", "has 3 sentences"]),
        ({"rejected_scores": [4, 1]}, None, ["'rejected_scores' has 2 scores", "has 1 sentence"]),
        ({"chosen_scores": [4, 1, 5]}, None, ["has 5,", "0 to 4"]),
        ({"chosen_scores": [4, 1, -1]}, None, ["has -1,"]),
        ({"chosen_scores": [4, 1, float("nan")]}, None, ["no JSON number"]),
        ({"chosen_scores": [4, 1, True]}, None, ["has True,"]),
        ({"chosen_scores": [4, 1, "4"]}, None, ["must be numbers"]),
        ({"chosen_scores": [[4, 1, 2]] * 3}, None, ["1 or 5 lists"]),
        ({"chosen_scores": [[4, 1, 2]] * 4 + [[1]]}, None, ["3, 3, 3, 3, 1"]),
        ({"chosen_scores": []}, None, ["has no scores"]),
        ({"chosen_scores": [[], []]}, None, ["must be a list of scores"]),
        ({"chosen_scores": None}, None, ["must be a list of scores"]),
        ({"chosen_scores": [4, [1], 2]}, None, ["must be numbers"]),
        ({}, (1.0, 2.0), ["has 1 dimensions", "2 weights"]),
    ],
)
def test_wrong_scores_are_refused_with_file_and_row(tmp_path, tokenizer, change, weights, words):
    with pytest.raises(UserError) as caught:
        load(tmp_path, tokenizer, PAIR | SCORES, PAIR | SCORES | change, weights=weights)
    message = str(caught.value)
    assert f"pairs.jsonl:{1 if weights else 2}: " in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("records", "needs_scores", "row", "word"),
    [
        ([PAIR], True, 1, "no 'chosen_scores'"),
        ([PAIR | SCORES, PAIR], False, 2, "lacks scores"),
        ([PAIR, PAIR | SCORES], False, 2, "has scores"),
        ([PAIR | {"chosen_scores": [1, 1, 1]}], False, 1, "'rejected_scores' must be"),
        ([PAIR | SCORES | {"chosen": REJECTED}], True, 1, "are equal"),
        ([PAIR | SCORES | {"chosen": "  "}], True, 1, "not blank"),
    ],
)
def test_missing_scores_and_answers_are_refused(
    tmp_path, tokenizer, records, needs_scores, row, word
):
    with pytest.raises(UserError, match=f"pairs.jsonl:{row}: .*{word}"):
        load(tmp_path, tokenizer, *records, needs_scores=needs_scores)


def test_wrong_pairs_are_left_out_where_asked_for(tmp_path, tokenizer):
    section = SECTION.model_copy(update={"on_wrong_row": "skip"})
    scored, plain = PAIR | SCORES, PAIR
    wrong = scored | {"chosen_scores": [1, 2]}
    records = (wrong, scored, plain, scored)
    found, selection = select(tmp_path, tokenizer, section, *records, needs_scores=False)
    assert len(found) == 2 and all(pair.rewards is not None for pair in found)
    assert selection.left_out == {"wrong": 2}
    assert "pairs.jsonl:1: 'chosen_scores' has 2 scores" in selection.first_wrong
