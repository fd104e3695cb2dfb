"""Best-of-n accuracy against all subsets, the scores by hand, and errors with file and line."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_amrlhf.errors import UserError
from megatron_amrlhf.studies.best_of_n import (
    CHOICES,
    ORACLE,
    RANDOM,
    ScoredSolution,
    best_of_n_accuracy,
    compare_supervision,
    outcome_scores,
    pass_at_n,
    read_solutions,
)

answers = st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=7)


@given(answers, st.data())
def test_the_closed_form_equals_the_mean_over_all_subsets(pairs, data):
    n = data.draw(st.integers(1, len(pairs)))
    scores, correct = zip(*pairs, strict=True)
    subsets = list(itertools.combinations(pairs, n))
    expected = oracle = 0.0
    for subset in subsets:
        best = max(score for score, _ in subset)
        tied = [is_correct for score, is_correct in subset if score == best]
        expected += sum(tied) / len(tied)
        oracle += any(is_correct for _, is_correct in subset)
    assert best_of_n_accuracy(scores, correct, n) == pytest.approx(expected / len(subsets))
    assert pass_at_n(correct, n) == pytest.approx(oracle / len(subsets))


@given(answers)
def test_every_choice_lies_between_never_and_the_oracle(pairs):
    scores, correct = zip(*pairs, strict=True)
    for n in range(1, len(pairs) + 1):
        assert -1e-12 <= best_of_n_accuracy(scores, correct, n) <= pass_at_n(correct, n) + 1e-12
    assert best_of_n_accuracy(scores, correct, 1) == pytest.approx(sum(correct) / len(correct))


def test_the_scores_by_hand():
    solutions = [
        ScoredSolution(True, 1.5, steps) for steps in ((0.8, 0.4, 0.9), (0.5, 0.9), (0.1, 0.9))
    ]
    values = {name: outcome_scores(solutions, kind) for name, kind in CHOICES.items()}
    expected = {
        "PRM_O last": 0.9,
        "PRM_O min": 0.4,
        "PRM_O mean": 0.7,
        "PRM_O product": 0.288,
        "PRM_P": 1 / 3,
    }
    assert {name: scores[0] for name, scores in values.items()} == pytest.approx(expected)
    assert values["PRM_P"][1:] == [1.0, 0.0]


def test_the_table_by_hand():
    problems = {
        "a": [ScoredSolution(True, 2.0, (0.9,)), ScoredSolution(False, 1.0, (0.95,))],
        "b": [ScoredSolution(False, 0.0, (0.2,)), ScoredSolution(False, 3.0, (0.3,))],
    }
    table = compare_supervision(problems, [1, 2])
    assert table[RANDOM] == [0.25, 0.25]
    assert table["ORM"] == [0.25, 0.5]
    assert table["PRM_O last"] == [0.25, 0.0]
    assert table["PRM_P"] == [0.25, 0.25]  # both answers to a are accepted whole: a tie
    assert table[ORACLE] == [0.25, 0.5]


def write(tmp_path, *records):
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


GOOD = {"problem_id": "p", "correct": True, "step_scores": [0.5, 1]}


def test_answers_are_grouped_and_logits_squashed(tmp_path):
    path = write(tmp_path, GOOD, GOOD | {"problem_id": 7, "step_scores": [0, -800.0, 800.0]})
    problems = read_solutions(path, logits=True)
    assert list(problems) == ["p", "7"]
    assert problems["7"][0].steps == (0.5, 0.0, 1.0)
    assert "ORM" not in compare_supervision(problems, [1])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"correct": 1}, "'correct' must be true or false"),
        ({"step_scores": []}, "at least one"),
        ({"step_scores": [0.5, None]}, "finite numbers"),
        ({"step_scores": [True]}, "finite numbers"),
        ({"step_scores": [1.5]}, "give --logits"),
        ({"orm": "high"}, "'orm' must be a finite number"),
        ({"orm": 1.0}, "on some lines only"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, change, expected):
    path = write(tmp_path, GOOD, GOOD | change)
    with pytest.raises(UserError, match=f"answers.jsonl:2: .*{expected}"):
        read_solutions(path, logits=False)
