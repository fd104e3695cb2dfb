"""Whether an answer is the reference answer: True, False, or a doubt with its reason.

A policy learns whatever is called right. So True is said only of what is sure; an answer that may
be right, or repeats a question's expression, is a doubt, and nobody learns from it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from megatron_amrlhf.rewards.judge.brackets import split
from megatron_amrlhf.rewards.judge.formulas import (
    compare_formulas,
    compare_with_formula,
    is_equal_value,
)
from megatron_amrlhf.rewards.judge.kinds import (
    Based,
    Date,
    Equation,
    Formula,
    Group,
    Intervals,
    Kind,
    Letter,
    Matrix,
    Ratio,
    Words,
    assigned,
    name_of,
    read,
)
from megatron_amrlhf.rewards.judge.outcomes import Doubt, Outcome, all_of
from megatron_amrlhf.rewards.judge.plain import (
    compare_based,
    compare_dates,
    compare_letters,
    compare_numbers,
    compare_with_words,
    compare_words,
    digits_of,
    share_digits,
)
from megatron_amrlhf.rewards.judge.quantities import Number, read_number
from megatron_amrlhf.rewards.judge.text import same_spelling, tidy

MAX_ANSWER = 1000  # characters
_NOTHING = {r"\emptyset", "no solution", "no solutions", "none", "dne", "does not exist", r"\{\}"}


def compare(reference: str, answer: str) -> Outcome:
    """Whether one answer's text, as it was written, is the reference answer."""
    if len(answer) > MAX_ANSWER:
        return Doubt("unreadable", f"an answer of {len(answer)} characters")
    return _compare(tidy(reference), tidy(answer))


def _compare(reference: str, answer: str) -> Outcome:
    if not answer:
        return False
    if same_spelling(reference) == same_spelling(answer):
        return True
    if "=" in answer and "=" not in reference:
        as_chain = _chain(reference, answer)
        if as_chain is not None:
            return as_chain
    names = name_of(reference), name_of(answer)
    outcome = _by_kind(read(reference), read(answer), assigned(reference), assigned(answer))
    if outcome is True and all(names) and names[0] != names[1]:
        return Doubt("form", f"{names[1]} instead of {names[0]}")
    return outcome


def _chain(reference: str, answer: str) -> Outcome | None:
    """Of ``3 + 4 = 7`` the last side, if the others are equal to it; None if it is no chain."""
    *others, last = (tidy(side) for side in answer.split("="))
    if not last or any(mark in answer for mark in ("<", ">", r"\le", r"\ge", "!=", ",", "==")):
        return None
    if len(split(answer)) > 1 or any(side.count("{") != side.count("}") for side in others):
        return None
    values = [side for side in others if re.search(r"\d", side)]
    if name_of(answer) or not values:
        return None
    outcome = _compare(reference, last)
    if outcome is not True:
        return outcome
    if all(is_equal_value(side, last) for side in values):
        return True
    return Doubt("form", f"an equation: {answer[:40]!r}")


def _by_kind(reference: Kind, answer: Kind, ref_text: str, text: str) -> Outcome:
    if isinstance(reference, Letter):
        return compare_letters(reference, answer, text)
    if {ref_text.lower(), text.lower()} <= _NOTHING:
        return True if ref_text.lower() == text.lower() else Doubt("form", "two words for nothing")
    pair = type(reference), type(answer)
    if pair in _SAME:
        return _SAME[pair](reference, answer)
    if Words in pair:
        return compare_with_words(reference, answer, ref_text, text)
    if Formula in pair or Equation in pair:
        return compare_with_formula(reference, answer, ref_text, text)
    if share_digits(ref_text, text) and Based in pair:
        return Doubt("form", "digits with and without their base")
    # 1,200 and 1, 200; 1:2 and 1/2; a point and a list
    if digits_of(ref_text) and digits_of(ref_text) == digits_of(text):
        return Doubt("form", f"{text[:40]!r} for {ref_text[:40]!r}")
    return False


def _ratios(reference: Ratio, answer: Ratio) -> Outcome:
    if len(reference.terms) != len(answer.terms):
        return False
    terms = zip(reference.terms, answer.terms, strict=True)
    outcome = all_of(_compare(one, other) for one, other in terms)
    if outcome is not False:
        return outcome
    pairs = [
        (one, other)
        for pair in zip(reference.terms, answer.terms, strict=True)
        for one, other in [map(read_number, pair)]
        if one is not None and other is not None and one.value and other.value
    ]
    if len(pairs) < len(reference.terms):
        return False
    scales = {one.value / other.value for one, other in pairs}
    return Doubt("form", "a ratio in other terms") if len(scales) == 1 else False


def _matrices(reference: Matrix, answer: Matrix) -> Outcome:
    if [len(row) for row in reference.rows] != [len(row) for row in answer.rows]:
        return False
    return all_of(
        _compare(one, other)
        for ones, others in zip(reference.rows, answer.rows, strict=True)
        for one, other in zip(ones, others, strict=True)
    )


def _groups(reference: Group, answer: Group) -> Outcome:
    kinds = {reference.kind, answer.kind}
    if len(reference.items) != len(answer.items) or kinds == {"()", "[]"}:
        return False
    ordered = all_of(map(_compare, reference.items, answer.items))
    unordered = _matched(reference.items, answer.items)
    if kinds in ({"()"}, {"[]"}):
        return ordered
    if kinds <= {"{}", "list"}:
        if "{}" in kinds or reference.is_unordered or answer.is_unordered or ordered is True:
            return unordered
        return False if unordered is False else Doubt("form", "a list in another order")
    return False if unordered is False else Doubt("form", "a list with other brackets")


def _matched(
    ones: Sequence, others: Sequence, compare_two: Callable[..., Outcome] = _compare
) -> Outcome:
    """Whether two lists of the same length have the same elements in any order."""
    left, doubt = list(others), None
    for one in ones:
        outcomes = [compare_two(one, other) for other in left]
        if True in outcomes:
            left.pop(outcomes.index(True))
            continue
        doubts = [outcome for outcome in outcomes if isinstance(outcome, Doubt)]
        if not doubts:
            return False
        doubt = doubt or doubts[0]
        left.pop(outcomes.index(doubts[0]))
    return doubt or True


def _intervals(reference: Intervals, answer: Intervals) -> Outcome:
    if len(reference.parts) != len(answer.parts):
        return Doubt("form", "another number of intervals")
    return _matched(reference.parts, answer.parts, _interval)


def _interval(one: tuple[str, str, str], other: tuple[str, str, str]) -> Outcome:
    return one[0] == other[0] and all_of(map(_compare, one[1:], other[1:]))


def _interval_or_group(reference: Kind, answer: Kind) -> Outcome:
    """An open interval by inequality and ``(2, 3)``, or a closed one and ``[2, 3]``."""
    group, union = (reference, answer) if isinstance(reference, Group) else (answer, reference)
    assert isinstance(group, Group) and isinstance(union, Intervals)
    if len(union.parts) != 1 or group.kind != union.parts[0][0]:
        return False
    return all_of(map(_compare, union.parts[0][1:], group.items))


_SAME: dict[tuple[type, type], Callable[[Any, Any], Outcome]] = {
    (Number, Number): compare_numbers,
    (Date, Date): compare_dates,
    (Words, Words): compare_words,
    (Ratio, Ratio): _ratios,
    (Based, Based): compare_based,
    (Matrix, Matrix): _matrices,
    (Group, Group): _groups,
    (Intervals, Intervals): _intervals,
    (Intervals, Group): _interval_or_group,
    (Group, Intervals): _interval_or_group,
    (Formula, Formula): compare_formulas,
}
