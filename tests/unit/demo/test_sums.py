"""Labels of the demonstration's sums are those that the numbers themselves give."""

import re

import pytest

from megatron_amrlhf.demo.data import COUNTS
from megatron_amrlhf.demo.sums import EXAMPLE, TERMS, generate_sums
from megatron_amrlhf.errors import UserError

STEP = re.compile(r"(\d+) \+ (\d+) = (\d+)")


def labels_of(terms: list[int], steps: list[str]) -> list[int]:
    """Judged from the text alone: each step adds the next number, the last one tells the total."""
    total, place, labels, right = terms[0], 1, [], True
    for step in steps:
        if match := STEP.fullmatch(step):
            left, term, result = map(int, match.groups())
            right &= place < len(terms) and (left, term) == (total, terms[place])
            right &= result == left + term
            total, place = result, place + 1
        else:
            right &= place == len(terms) and step == f"The answer is {sum(terms)}."
        labels.append(int(right))
    return labels


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_each_label_is_what_the_numbers_say(split):
    problems = generate_sums(COUNTS["sums"][split == "heldout"], 3, split)
    for problem in problems:
        terms = [int(term) for term in problem["prompt"].split(" + ")]
        assert problem["labels"] == labels_of(terms, problem["steps"]), problem
        assert problem["answer"] == str(sum(terms)) and len(terms) == TERMS
        ((question, answer),) = problem["history"]
        assert labels_of(list(EXAMPLE), answer.split("\n")) == [1] * TERMS
        assert question == "2 + 3 + 4" != problem["prompt"]
    share = sum(min(problem["labels"]) for problem in problems) / len(problems)
    assert 0.3 < share < 0.5
    firsts = [problem["labels"].index(0) for problem in problems if 0 in problem["labels"]]
    assert set(firsts) == set(range(TERMS))  # errors at each place


def test_the_rate_of_errors_is_kept_and_problems_do_not_depend_on_it():
    right, wrong = (generate_sums(100, 1, error_rate=rate) for rate in (0.0, 1.0))
    assert all(min(problem["labels"]) == 1 for problem in right)
    assert all(min(problem["labels"]) == 0 for problem in wrong)
    assert [x["prompt"] for x in right] == [x["prompt"] for x in wrong]
    assert len({x["prompt"] for x in right}) == 100
    assert generate_sums(50, 1, error_rate=1.0) == wrong[:50] != generate_sums(50, 2)


def test_splits_share_nothing_and_more_than_there_are_is_refused():
    train = {x["prompt"] for seed in range(3) for x in generate_sums(400, seed)}
    assert not train & {x["prompt"] for x in generate_sums(90, 9, "heldout")}
    with pytest.raises(UserError, match="only 90 of 91"):
        generate_sums(91, 0, "heldout")
