"""Comparing expressions: equal in value and in form, or not judged."""

from __future__ import annotations

import re
from fractions import Fraction

from megatron_amrlhf.rewards.judge.kinds import Equation, Formula, Kind
from megatron_amrlhf.rewards.judge.outcomes import Doubt, Outcome
from megatron_amrlhf.rewards.judge.plain import is_same_unit, share_digits
from megatron_amrlhf.rewards.judge.quantities import Number, is_rounding
from megatron_amrlhf.rewards.judge.symbolic import UnreadError, read_expression, same_value
from megatron_amrlhf.rewards.judge.text import same_spelling

_INFINITE = re.compile(r"\s*[-+]?\s*\\infty\s*")
_WORKED = re.compile(r"[\\^*+/!(]")  # in what has to be worked out


def compare_formulas(reference: Formula, answer: Formula) -> Outcome:
    """Two expressions with their units; a unit that only one has is no fault."""
    if reference.unit and answer.unit and not is_same_unit(reference.unit, answer.unit):
        return Doubt("unit", f"{answer.unit!r} for {reference.unit!r}")
    if same_spelling(reference.latex) == same_spelling(answer.latex):
        return True
    return compare_expressions(reference.latex, answer.latex)


def compare_expressions(reference: str, answer: str) -> Outcome:
    """Two expressions in LaTeX: equal in value, and written in the same form."""
    if _INFINITE.fullmatch(reference) or _INFINITE.fullmatch(answer):
        return same_spelling(reference).lstrip("+") == same_spelling(answer).lstrip("+")
    try:
        one = read_expression(reference)
    except UnreadError as error:
        return Doubt("bad_reference", str(error))
    try:
        other = read_expression(answer)
        is_same = same_value(one, other)
    except UnreadError as error:
        return Doubt("unreadable", str(error))
    if is_same is None:
        return Doubt("undecided", f"{answer[:40]!r} for {reference[:40]!r}")
    if is_same and (one.form() != other.form() or other.leaves() != one.leaves()):
        return Doubt("form", f"equal, but written otherwise: {answer[:40]!r}")
    return is_same


def _is_unread(outcome: Outcome) -> bool:
    return isinstance(outcome, Doubt) and outcome.reason == "unreadable"


def _bare(kind: Kind, text: str) -> str:
    """LaTeX of an expression or number without its unit."""
    if isinstance(kind, Formula):
        return kind.latex
    assert isinstance(kind, Number), "neither a number nor a formula"
    value = kind.value
    return str(value) if value.denominator == 1 else rf"({value.numerator})/{value.denominator}"


def _is_rounded(latex: str, number: Number) -> bool:
    try:
        expression = read_expression(latex)
        if expression.symbols:
            return False
        value = expression.value()
    except UnreadError:
        return False
    if not value.is_real:
        return False
    return is_rounding(number, Fraction(str(value)))


def _is_rounded_by(reference: Kind, latex: str) -> bool:
    return isinstance(reference, Number) and _is_rounded(latex, reference)


def compare_with_formula(reference: Kind, answer: Kind, ref_text: str, text: str) -> Outcome:
    """An expression against a number, an equation or a list."""
    if isinstance(reference, Equation) and isinstance(answer, Equation):
        one, other = f"{reference.left}-({reference.right})", f"{answer.left}-({answer.right})"
        outcome = compare_expressions(one, other)
        return Doubt("form", "another equation") if outcome is False else outcome
    if "degree" in (getattr(reference, "unit", ""), getattr(answer, "unit", "")) and (
        r"\pi" in ref_text + text
    ):
        return Doubt("unit", "degrees and radians")
    if isinstance(reference, Formula | Number) and isinstance(answer, Formula | Number):
        one, other = _bare(reference, ref_text), _bare(answer, text)
        outcome = compare_expressions(one, other)
        is_text = _is_unread(outcome) and not _WORKED.search(text)
        if is_text and isinstance(reference, Number) and not share_digits(ref_text, text):
            return False
        if outcome is False and isinstance(answer, Number) and _is_rounded(one, answer):
            return Doubt("form", "a rounded number")
        if outcome is False and _is_rounded_by(reference, other):
            return Doubt("form", "a rounded number")
        return Doubt("form", "a value that is not worked out") if outcome is True else outcome
    if Equation in (type(reference), type(answer)) or "\\" in ref_text + text:
        is_near = share_digits(ref_text, text)
        return Doubt("form", f"{text[:40]!r} for {ref_text[:40]!r}") if is_near else False
    return False


def is_equal_value(one: str, other: str) -> bool:
    """Whether two texts are expressions of the same value."""
    try:
        return same_value(read_expression(one), read_expression(other)) is True
    except UnreadError:
        return False
