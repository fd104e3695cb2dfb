"""What a word problem is made of before it is told."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Earlier:
    """An operand that is the result of an earlier equation.

    Attributes:
        index: of the equation, from 0.
    """

    index: int


Operand = int | Earlier


@dataclass(frozen=True)
class Plan:
    """One equation of a solution.

    Attributes:
        text: a clause with ``{eq}`` where the equation stands, without the full stop.
        left: first operand.
        operation: one of ``+ - * /``.
        right: second operand.
    """

    text: str
    left: Operand
    operation: str
    right: Operand


@dataclass(frozen=True)
class Story:
    """A word problem and its right solution.

    Attributes:
        family: name of the family.
        numbers: what the family drew; with ``family`` it identifies the problem.
        question: the text told to the solver.
        plans: the equations in order; the last one's result is the answer.
        answer: the right answer, from a closed form.
    """

    family: str
    numbers: tuple[int, ...]
    question: str
    plans: tuple[Plan, ...]
    answer: Fraction
