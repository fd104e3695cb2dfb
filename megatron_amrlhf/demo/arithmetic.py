"""The project's own step-labelled data: arithmetic word problems with planted errors.

About half of the solutions carry one planted error: a wrong result (``3 * 4 = 13``), a wrong
operation (``3 + 4 = 7`` where 3 * 4 is due) or a mis-copied number (``3 * 5 = 15``). The last two
are true equations that do not follow from the problem. A step is labelled 1 if and only if it and
all steps before it are right. Steps after the error go on from the wrong number and are labelled 0
(as Math-Shepherd does), or the solution ends with its first wrong step (as PRM800K does).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from fractions import Fraction
from random import Random
from typing import Literal

from megatron_amrlhf.demo.stories import FAMILIES
from megatron_amrlhf.demo.story import Earlier, Operand, Story
from megatron_amrlhf.errors import UserError

INSTRUCTION = (
    "Solve it step by step. Write one short step with one calculation on each line. "
    'End with "The answer is" and the number.'
)
"""Put after each question, so that a small instruct model answers line by line."""

HELDOUT_SHARE = 5
"""One problem in this many, by a hash of its numbers, belongs to the held-out split."""

_MAX_DRAWS = 2000
_ERROR_KINDS = ("result", "operation", "operand")


@dataclass(frozen=True)
class Equation:
    """``left operation right = result``, as written (it can be wrong)."""

    left: Fraction
    operation: str
    right: Fraction
    result: Fraction

    def __str__(self) -> str:
        left, right, result = map(format_number, (self.left, self.right, self.result))
        return f"{left} {self.operation} {right} = {result}"


def generate_problems(
    count: int,
    seed: int,
    split: Literal["train", "heldout"] = "train",
    after_error: Literal["mixed", "stop", "continue"] = "mixed",
    error_rate: float = 0.5,
) -> list[dict]:
    """Make ``count`` different problems with labelled solutions.

    The problems and the right solutions depend on (seed, split) only; ``after_error`` and
    ``error_rate`` change nothing but the planted errors. No problem (family and numbers) is in
    both splits, whatever the seeds and counts.

    Args:
        count: problems wanted.
        seed: of everything random.
        split: which of the two disjoint sets of problems to draw from.
        after_error: the solution ends with its first wrong step (``stop``), goes on
            (``continue``), or either with equal chance (``mixed``).
        error_rate: share of solutions with an error, in [0, 1].

    Returns:
        ``{"prompt": str, "steps": [str], "labels": [0 or 1], "answer": str}`` each; ``answer`` is
        the right one. A solution has 2 to 5 steps, fewer only where it stops at an error.

    Raises:
        UserError: there are not that many different problems.
    """
    stories_rng = Random(f"stories/{seed}/{split}")
    seen: set[tuple] = set()
    problems = []
    for number in range(count):
        story = _draw_new_story(stories_rng, split, seen)
        if story is None:
            raise UserError(f"only {number} of {count} different problems found; ask for fewer")
        style_rng = Random(f"style/{seed}/{split}/{number}")
        error_rng = Random(f"error/{seed}/{split}/{number}")
        problems.append(_write_problem(story, style_rng, error_rng, after_error, error_rate))
    return problems


def solve(story: Story, wrong: dict[int, Equation] | None = None) -> list[Equation] | None:
    """The equations of a solution; ``wrong`` replaces some, later ones go on from their results.

    Returns:
        None if a result is not positive or has more than two decimals.
    """
    equations: list[Equation] = []
    for index, plan in enumerate(story.plans):
        equation = (wrong or {}).get(index)
        if equation is None:
            left, right = (_value(side, equations) for side in (plan.left, plan.right))
            equation = Equation(left, plan.operation, right, _apply(plan.operation, left, right))
        if not _is_printable(equation.result):
            return None
        equations.append(equation)
    return equations


def plant_error(story: Story, rng: Random) -> tuple[int, list[Equation]]:
    """A solution with one wrong equation of a random kind at a random place.

    The wrong result always differs from the right one, and the later results, worked out from it,
    are positive with at most two decimals.

    Returns:
        The wrong equation's index and all equations.
    """
    truth = solve(story)
    assert truth is not None
    for _ in range(_MAX_DRAWS):
        index = rng.randrange(len(truth))
        wrong = _make_wrong(truth[index], rng.choice(_ERROR_KINDS), rng)
        if wrong is None or wrong.result == truth[index].result:
            continue
        equations = solve(story, {index: wrong})
        if equations is not None:
            return index, equations
    raise AssertionError(f"no error can be planted in {story}")


def format_number(value: Fraction) -> str:
    """A number with at most two decimals: ``12``, ``0.8``, ``2.25``."""
    assert (value * 100).denominator == 1, value
    if value.denominator == 1:
        return str(value.numerator)
    return f"{float(value):.2f}".rstrip("0")


def _draw_new_story(rng: Random, split: str, seen: set[tuple]) -> Story | None:
    for _ in range(_MAX_DRAWS):
        story = rng.choice(FAMILIES)(rng)
        key = (story.family, *story.numbers)
        digest = hashlib.sha256(repr(key).encode()).digest()
        is_heldout = int.from_bytes(digest[:8], "big") % HELDOUT_SHARE == 0
        if key in seen or is_heldout != (split == "heldout") or min(story.numbers) < 2:
            continue
        equations = solve(story)
        if equations is None:
            continue
        assert equations[-1].result == story.answer, story
        seen.add(key)
        return story
    return None


def _write_problem(
    story: Story, style_rng: Random, error_rng: Random, after_error: str, error_rate: float
) -> dict:
    equations, first_wrong = solve(story), None
    assert equations is not None, "the story has been solved before"
    if error_rng.random() < error_rate:
        first_wrong, equations = plant_error(story, error_rng)
    steps = _write_steps(story, equations, style_rng)
    labels = [1] * len(steps)
    if first_wrong is not None:
        labels[first_wrong:] = [0] * (len(steps) - first_wrong)
        stops = after_error == "stop" or (after_error == "mixed" and error_rng.random() < 0.5)
        end = first_wrong + 1 if stops else len(steps)
        steps, labels = steps[:end], labels[:end]
    return {
        "prompt": f"{story.question}\n{INSTRUCTION}",
        "steps": steps,
        "labels": labels,
        "answer": format_number(story.answer),
    }


def _write_steps(story: Story, equations: list[Equation], rng: Random) -> list[str]:
    """One line an equation; the answer ends the last line or stands on a line of its own."""
    numbering = rng.choice(("words", "words", "plain", "step", "list"))
    clauses = []
    for plan, equation in zip(story.plans, equations, strict=True):
        clauses.append(plan.text.format(eq=equation) + ".")
    answer = f"The answer is {format_number(equations[-1].result)}."
    if rng.random() < 0.5:
        lines = clauses + [answer]
    else:
        lines = clauses[:-1] + [f"{clauses[-1]} {answer}"]
    steps = []
    for index, line in enumerate(lines):
        line = line[0].upper() + line[1:]
        if numbering == "step":
            line = f"Step {index + 1}: {line}"
        elif numbering == "list":
            line = f"{index + 1}. {line}"
        elif numbering == "words" and index < len(clauses):
            word = "First" if index == 0 else "Finally" if index == len(clauses) - 1 else "Then"
            line = f"{word}, {clauses[index]}{line[len(clauses[index]) :]}"
        steps.append(line)
    return steps


def _make_wrong(truth: Equation, kind: str, rng: Random) -> Equation | None:
    """A wrong version of an equation, or None if this draw gives none."""
    if kind == "result":
        result = truth.result + _slip(truth.result, rng)
        return Equation(truth.left, truth.operation, truth.right, result)
    left, operation, right = truth.left, truth.operation, truth.right
    if kind == "operation":
        operation = rng.choice([other for other in "+-*/" if other != operation])
    elif rng.random() < 0.5:
        left = left + _slip(left, rng)
    else:
        right = right + _slip(right, rng)
    if left <= 0 or right <= 0:
        return None
    return Equation(left, operation, right, _apply(operation, left, right))


def _slip(value: Fraction, rng: Random) -> Fraction:
    """The difference a slip makes: a zero too many, off by tens, two digits swapped, any number.

    Slips are coarse on purpose: a model of 135M parameters is to see them after minutes of
    training.
    """
    kind = rng.choice(("zero", "tens", "swap", "any"))
    if kind == "swap" and value.denominator == 1 and value >= 10:
        digits = list(str(value))
        place = rng.randrange(len(digits) - 1)
        digits[place], digits[place + 1] = digits[place + 1], digits[place]
        if digits[0] != "0" and int("".join(digits)) != value:
            return int("".join(digits)) - value
    if kind == "zero":
        return 9 * value
    if kind == "tens":
        tens = rng.randrange(1, 6) * 10
        return Fraction(-tens if value > tens and rng.random() < 0.5 else tens)
    other = Fraction(rng.randrange(2, 100))
    return other - value if other != value else Fraction(10)


def _value(operand: Operand, equations: list[Equation]) -> Fraction:
    if isinstance(operand, Earlier):
        return equations[operand.index].result
    return Fraction(operand)


def _apply(operation: str, left: Fraction, right: Fraction) -> Fraction:
    if operation == "+":
        return left + right
    if operation == "-":
        return left - right
    return left * right if operation == "*" else left / right


def _is_printable(value: Fraction) -> bool:
    return value > 0 and (value * 100).denominator == 1
