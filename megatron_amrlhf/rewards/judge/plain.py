"""Comparing what has no parts: numbers with units, letters of choices, dates and words."""

from __future__ import annotations

import re

from megatron_amrlhf.rewards.judge.kinds import (
    Based,
    Date,
    Formula,
    Group,
    Kind,
    Letter,
    Words,
    read,
    read_choice,
)
from megatron_amrlhf.rewards.judge.outcomes import Doubt, Outcome
from megatron_amrlhf.rewards.judge.quantities import NUMBER_WORDS, Number, is_rounding, size_of

_ARTICLE = re.compile(r"^(?:the|an|a)\s+")
_AGREEING = ({"yes", "true", "correct"}, {"no", "false", "incorrect"})


def digits_of(text: str) -> list[str]:
    """The numbers' digits in a text, thousands in one."""
    return re.findall(r"\d+", re.sub(r"(?<=\d)[, ]+(?=\d{3})", "", text))


def share_digits(one: str, other: str) -> bool:
    """Whether a number of one text is in the other."""
    return bool(set(digits_of(one)) & set(digits_of(other)))


def compare_numbers(reference: Number, answer: Number) -> Outcome:
    """Exactly, with percent signs, units, rounding and fractions as the page says."""
    is_added = answer.is_percent and not reference.is_percent
    if is_added and answer.value * 100 == reference.value != 0:
        return Doubt("unit", "a percent sign that the reference answer does not have")
    scale, other = reference.scale, answer.scale
    if scale != other and reference.value * other == answer.value * scale:
        return Doubt("unit", "a thousand or a dozen that only one of the two has")
    if reference.is_percent and not answer.is_percent:
        if answer.value == reference.value * 100 and not answer.unit:
            return True
    sizes = size_of(reference), size_of(answer)
    if reference.unit and answer.unit and not is_same_unit(reference.unit, answer.unit):
        is_equal = None not in sizes and sizes[0] == sizes[1]
        is_known = None not in sizes
        if is_equal or (reference.value == answer.value and not is_known):
            return Doubt("unit", f"{answer.unit!r} for {reference.unit!r}")
        return False
    if reference.value != answer.value:
        rounded = is_rounding(answer, reference.value) or is_rounding(reference, answer.value)
        return Doubt("form", "a rounded number") if rounded else False
    if not answer.is_reduced and reference.is_reduced:
        return Doubt("form", "a fraction that can be reduced")
    return True


def is_same_unit(one: str, other: str) -> bool:
    """Whether two units are one, maybe with words behind (eggs, eggs a day)."""
    if one == other:
        return True
    short, long = sorted((one, other), key=len)
    return long.startswith(short + " ") and not long.startswith(short + " per ")


def compare_letters(reference: Letter, answer: Kind, text: str) -> Outcome:
    """A letter of a choice, also with the choice's text behind it."""
    if isinstance(answer, Formula) and re.fullmatch(r"[a-j]", text):
        answer = Letter(text.upper())
    answer = read_choice(text) or answer
    if isinstance(answer, Letter):
        return answer.name == reference.name
    if isinstance(answer, Group) and all(isinstance(read(i), Letter) for i in answer.items):
        return False
    return Doubt("form", f"no letter of a choice: {text[:40]!r}")


def compare_dates(reference: Date, answer: Date) -> Outcome:
    """Day and month; a year that only one has is a doubt."""
    if (reference.month, reference.day) != (answer.month, answer.day):
        return False
    if reference.year == answer.year:
        return True
    has_both = reference.year is not None and answer.year is not None
    return False if has_both else Doubt("form", "a date with and without its year")


def compare_words(reference: Words, answer: Words) -> Outcome:
    """Words without articles; other words for the same, or more of them, are a doubt."""
    one, other = (_ARTICLE.sub("", kind.text).strip() for kind in (reference, answer))
    if one == other:
        return True
    if max(len(one), len(other)) <= 3 and sorted(one) == sorted(other):
        return Doubt("form", f"{other!r} for {one!r}: words or products")
    agree = any({one, other} <= words for words in _AGREEING)
    common = set(re.findall(r"[a-z\d]+", one)) & set(re.findall(r"[a-z\d]+", other))
    if agree or common - {"the", "a", "an", "of", "is", "and", "or"}:
        return Doubt("form", f"{other[:40]!r} for {one[:40]!r}")
    return False


def compare_with_words(reference: Kind, answer: Kind, ref_text: str, text: str) -> Outcome:
    """Words against anything else: nothing in common is wrong."""
    words = set(re.findall(r"[a-z]+", text.lower()))
    if isinstance(reference, Words):
        common = words & set(re.findall(r"[a-z]+", ref_text.lower()))
        return Doubt("form", f"{text[:40]!r} for words") if common else False
    if words & NUMBER_WORDS:
        return Doubt("form", f"a number in words: {text[:40]!r}")
    return Doubt("unreadable", f"{text[:40]!r}") if share_digits(ref_text, text) else False


def compare_based(reference: Based, answer: Based) -> Outcome:
    """Digits in a named base; another base is a doubt."""
    if (reference.digits, reference.base) == (answer.digits, answer.base):
        return True
    if reference.base == answer.base:
        return False
    return Doubt("form", "digits in another base")
