"""The generator's labels, checked by an evaluator that shares no code with it."""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction
from random import Random

import pytest

from megatron_amrlhf.demo.arithmetic import generate_problems, plant_error, solve
from megatron_amrlhf.demo.stories import FAMILIES
from megatron_amrlhf.demo.story import Earlier, Plan, Story

NUMBER = r"(\d+(?:\.\d+)?)"
EQUATION = re.compile(rf"{NUMBER} ([-+*/]) {NUMBER} = {NUMBER}")
ANSWER = re.compile(rf"The answer is {NUMBER}\.$")
CONSTANTS = {Fraction(2), Fraction(100)}  # two sides of a rectangle, percent
COUNT = 800


@pytest.fixture(scope="module", params=[("train", 0), ("heldout", 7)])
def pairs(request):
    """Each problem as generated and with its right solution."""
    split, seed = request.param
    right = generate_problems(COUNT // 2, seed, split, error_rate=0.0)
    mixed = generate_problems(COUNT // 2, seed, split)
    return list(zip(right, mixed, strict=True))


def evaluate(operation, left, right):
    if operation == "/":
        return left / right
    return {"+": left + right, "-": left - right, "*": left * right}[operation]


def parse(step):
    """(left, operation, right, result) of the one equation in a step, None without one."""
    found = EQUATION.findall(step)
    assert len(found) <= 1 and step.count("=") == len(found), step
    if not found:
        return None
    left, operation, right, result = found[0]
    return Fraction(left), operation, Fraction(right), Fraction(result)


def test_right_solutions_compute_the_answer_from_told_numbers(pairs):
    for problem, _ in pairs:
        known = {Fraction(text) for text in re.findall(NUMBER, problem["prompt"])} | CONSTANTS
        last = None
        for step in problem["steps"]:
            equation = parse(step)
            if equation is not None:
                left, operation, right, last = equation
                assert evaluate(operation, left, right) == last, step
                assert left in known and right in known, (problem["prompt"], step)
                known.add(last)
        assert Fraction(ANSWER.search(problem["steps"][-1]).group(1)) == last
        assert Fraction(problem["answer"]) == last
        assert problem["labels"] == [1] * len(problem["steps"])
        assert 2 <= len(problem["steps"]) <= 5


def test_labels_are_one_up_to_the_first_wrong_step(pairs):
    for right, mixed in pairs:
        assert mixed["prompt"] == right["prompt"] and mixed["answer"] == right["answer"]
        assert len(mixed["steps"]) == len(mixed["labels"]) <= len(right["steps"])
        same = [a == b for a, b in zip(mixed["steps"], right["steps"], strict=False)]
        first_wrong = same.index(False) if False in same else len(same)
        rest = len(mixed["steps"]) - first_wrong
        assert mixed["labels"] == [1] * first_wrong + [0] * rest


def test_the_first_wrong_step_has_a_wrong_result_and_one_kind_of_error(pairs):
    kinds = Counter()
    for right, mixed in pairs:
        if 0 not in mixed["labels"]:
            continue
        index = mixed["labels"].index(0)
        wrong, truth = parse(mixed["steps"][index]), parse(right["steps"][index])
        assert wrong[3] != truth[3]
        changed = [a != b for a, b in zip(wrong[:3], truth[:3], strict=True)]
        assert sum(changed) <= 1
        holds = evaluate(wrong[1], wrong[0], wrong[2]) == wrong[3]
        assert holds == any(changed)  # a wrong result, or a true equation that does not follow
        kinds["result" if not holds else "operation" if changed[1] else "operand"] += 1
    assert min(kinds[kind] for kind in ("result", "operation", "operand")) > COUNT * 0.05, kinds


def test_steps_after_the_error_go_on_from_the_wrong_number():
    right = generate_problems(COUNT, 3, error_rate=0.0)
    wrong = generate_problems(COUNT, 3, error_rate=1.0, after_error="continue")
    used = 0
    for truth, problem in zip(right, wrong, strict=True):
        index = problem["labels"].index(0)
        assert len(problem["steps"]) == len(truth["steps"])
        for step in problem["steps"][index + 1 :]:
            equation = parse(step)
            if equation is not None:
                left, operation, right_side, result = equation
                assert evaluate(operation, left, right_side) == result
                used += parse(problem["steps"][index])[3] in (left, right_side)
        results = [equation[3] for step in problem["steps"] if (equation := parse(step))]
        assert Fraction(ANSWER.search(problem["steps"][-1]).group(1)) == results[-1]
    assert used > COUNT / 2


def test_about_half_have_an_error_and_half_of_these_stop_at_it(pairs):
    with_error = [(right, mixed) for right, mixed in pairs if 0 in mixed["labels"]]
    assert 0.4 < len(with_error) / len(pairs) < 0.6
    early = [pair for pair in with_error if pair[1]["labels"].index(0) < len(pair[0]["steps"]) - 1]
    stopped = sum(len(mixed["steps"]) < len(right["steps"]) for right, mixed in early)
    assert 0.35 < stopped / len(early) < 0.65


@pytest.mark.parametrize(("after_error", "zeros"), [("stop", {1}), ("continue", {1, 2, 3, 4, 5})])
def test_after_error_decides_where_a_solution_ends(after_error, zeros):
    problems = generate_problems(100, 5, error_rate=1.0, after_error=after_error)
    counts = {problem["labels"].count(0) for problem in problems}
    assert counts == zeros


def test_same_seed_gives_the_same_problems_and_another_seed_others():
    assert generate_problems(50, 1) == generate_problems(50, 1)
    assert generate_problems(50, 1) != generate_problems(50, 2)
    assert generate_problems(80, 1)[:50] == generate_problems(50, 1)


def test_splits_share_no_problem_for_any_seeds():
    def numbers(problems):
        # Names left out: the same numbers told of another person are the same problem.
        return {tuple(re.findall(r"\b[a-z]+\b|\d+", problem["prompt"])) for problem in problems}

    heldout = numbers(generate_problems(300, 0, "heldout"))
    for seed in range(3):
        train = generate_problems(600, seed, "train")
        assert not numbers(train) & heldout
        assert len({problem["prompt"] for problem in train}) == len(train)


def test_every_family_is_right_and_used():
    assert len(FAMILIES) >= 12
    names = set()
    for family in FAMILIES:
        for seed in range(30):
            story = family(Random(seed))
            names.add(story.family)
            equations = solve(story)
            assert equations is None or equations[-1].result == story.answer
            told = {int(text) for text in re.findall(r"-?\d+", story.question)}
            assert set(story.numbers) <= told
    assert len(names) == len(FAMILIES)


def test_an_error_never_has_the_right_result():
    # 2 + 2 = 2 * 2: a wrong operation that happens to be right must not be planted.
    plans = (Plan("there are {eq} tiles", 2, "*", 2), Plan("then {eq} tiles", Earlier(0), "+", 3))
    story = Story("tiles", (2, 3), "How many tiles?", plans, Fraction(7))
    truth = solve(story)
    for seed in range(300):
        index, equations = plant_error(story, Random(seed))
        assert equations[index].result != truth[index].result
