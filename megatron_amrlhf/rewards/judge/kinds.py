"""What kind of thing an answer is: a number, a choice, a date, a list, a matrix, an expression."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_amrlhf.rewards.judge.brackets import (
    closes_at_end,
    split,
)
from megatron_amrlhf.rewards.judge.quantities import Number, read_number, read_unit
from megatron_amrlhf.rewards.judge.text import tidy


@dataclass(frozen=True)
class Letter:
    """One choice of several, as a capital."""

    name: str


@dataclass(frozen=True)
class Words:
    """Plain words, in small letters."""

    text: str


@dataclass(frozen=True)
class Date:
    """A day of a month, maybe with its year."""

    month: int
    day: int
    year: int | None


@dataclass(frozen=True)
class Ratio:
    """``1:2`` or ``1 to 2``: its terms as texts."""

    terms: tuple[str, ...]


@dataclass(frozen=True)
class Based:
    """Digits in a named base."""

    digits: str
    base: str


@dataclass(frozen=True)
class Group:
    """Several answers: ``kind`` is ``()``, ``[]``, ``(]``, ``[)``, ``{}`` or ``list``.

    Attributes:
        kind: its brackets.
        items: texts of its elements.
        is_unordered: said to have no order: braces, ``and``, ``or``, plus and minus.
    """

    kind: str
    items: tuple[str, ...]
    is_unordered: bool


@dataclass(frozen=True)
class Matrix:
    """Rows of entries as texts."""

    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Intervals:
    """A union of intervals: brackets, lower and upper end of each; inequalities too."""

    parts: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Equation:
    """Both sides of an equation that is no assignment to a name."""

    left: str
    right: str


@dataclass(frozen=True)
class Formula:
    """Anything else: an expression in LaTeX, and the unit behind it."""

    latex: str
    unit: str = ""


Kind = (
    Number | Letter | Words | Date | Ratio | Based | Group | Matrix | Intervals | Equation | Formula
)

_MONTHS = "january february march april may june july august september october november december"
_MONTH = {name[:3]: place for place, name in enumerate(_MONTHS.split(), 1)}
_NAMES = "|".join(f"{name[:3]}(?:{name[3:]})?" for name in _MONTHS.split())
_DATE = re.compile(
    rf"(?:(?:on )?(?:the )?(?P<month>{_NAMES}|sept)\.? (?:the )?(?P<day>\d\d?)(?:st|nd|rd|th)?"
    rf"|(?:on )?(?:the )?(?P<day2>\d\d?)(?:st|nd|rd|th)?(?: of)? (?P<month2>{_NAMES}|sept)\.?)"
    r"(?:,? (?P<year>\d{4}))?",
    re.IGNORECASE,
)
_LETTER = re.compile(
    r"(?:(?:option|choice|answer)\s+)?(?:\(\s*([A-Ja-j])\s*\)|\[\s*([A-J])\s*\]|([A-J])\)?)",
    re.IGNORECASE,
)
_LETTERED = re.compile(r"(?:\(([A-J])\)|([A-J])[).:])\s+(.*)", re.DOTALL)
_CHOICES = re.compile(r"(?<![A-Za-z])(?:\([A-J]\)|[A-J][).:](?=\s))")
_RATIO = re.compile(r"[^\s:]+(?:\s*:\s*[^\s:]+)+")
_RATIO_WORDS = re.compile(r"(\d+)\s+to\s+(\d+)")
_BASED = re.compile(r"([0-9A-Fa-f]+)\s*_\s*\{?\s*(\d{1,2}|[a-z]+)\s*\}?|(\w+) (?:in )?base (\w+)")
_MATRIX = re.compile(
    r"\\begin\s*\{(?:p|b|B|small)?matrix\}(.*)\\end\s*\{(?:p|b|B|small)?matrix\}|"
    r"[(\[]?\s*\\begin\s*\{array\}\s*\{[^{}]*\}(.*)\\end\s*\{array\}\s*[)\]]?",
    re.DOTALL,
)
# What an answer gives a value to: x, x_1, f(x), AB, \\angle ABC, area. "xy" is a product.
_NAME = (
    r"(?:\\angle [A-Z]+|\\(?!frac|sqrt|pi(?![a-z]))[A-Za-z]+|[A-Z]{2,4}|[A-Za-z]{3,}|"
    r"[A-Za-z](?:_\w|_\{\w+\}|\([A-Za-z]\))?)"
)
_ASSIGNED = re.compile(rf"({_NAME})\s*(?:=|\\in(?![A-Za-z])|\\approx)\s*(?!=)(.+)", re.DOTALL)
_BOUNDED = re.compile(
    r"(?<![A-Za-z\\])([A-Za-z])\s*(?:\\[lg]e(?![A-Za-z])|[<>])|"
    r"(?:\\[lg]e(?![A-Za-z])|[<>])=?\s*([A-Za-z])(?![A-Za-z])"
)
_RELATION = re.compile(r"\\le(?![A-Za-z])|\\ge(?![A-Za-z])|<=|>=|<|>")
_WORDY = re.compile(r"[A-Za-z][A-Za-z'.,\s-]*")
_UNIT = re.compile(
    r"(?P<value>.*?[\d)}]|.*\\pi)\s*(?P<unit>\^\s*\{?\s*\\circ\s*\}?|"
    r"(?:(?:square|cubic|sq\.?|cu\.?) )?(?:[a-z]{2,}|(?<=\s)[msgl])(?:\s*/\s*\w+)?"
    r"(?:\s*\^\s*\{?[23]\}?)?(?: [a-z]+){0,3})"
)


def read(text: str) -> Kind:
    """The kind of a tidied answer."""
    text = assigned(text)
    if text[:1] == "(" and closes_at_end(text) and len(split(text[1:-1], True)) == 1:
        inner = tidy(text[1:-1])
        return read(inner) if len(inner) > 1 or inner.isdigit() else Letter(inner.upper())
    date = _DATE.fullmatch(text)
    if date:
        month, day = date["month"] or date["month2"], date["day"] or date["day2"]
        year = int(date["year"]) if date["year"] else None
        return Date(_MONTH[month[:3].lower()], int(day), year)
    if (number := read_number(text)) is not None:
        return number
    if (letter := _LETTER.fullmatch(text)) and (text.isupper() or "(" in text or " " in text):
        return Letter((letter[1] or letter[2] or letter[3]).upper())
    if matrix := _MATRIX.fullmatch(text):
        return _matrix(matrix[1] or matrix[2])
    if based := _BASED.fullmatch(text):
        return Based((based[1] or based[3]).upper(), based[2] or based[4])
    intervals = _intervals(text)
    if intervals is not None:
        return intervals
    if _RATIO.fullmatch(text) and "\\" not in text.replace("\\frac", ""):
        return Ratio(tuple(tidy(term) for term in text.split(":")))
    if words := _RATIO_WORDS.fullmatch(text):
        return Ratio(words.groups())
    return _group(text) or _rest(text)


def read_choice(text: str) -> Letter | None:
    """The letter of ``B) 5 apples``, where it is the only one named; else None."""
    found = _LETTERED.fullmatch(text)
    if found is None or len(_CHOICES.findall(text)) != 1:
        return None
    return Letter(found[1] or found[2])


def assigned(text: str) -> str:
    """What ``x = ...`` or ``x \\in ...`` gives to a name; other texts as they are."""
    found = _assignment(text)
    return tidy(found[2]) if found else text


def name_of(text: str) -> str:
    """The name that a text gives a value or bounds to; "" where there is none."""
    found = _assignment(text)
    if found:
        return found[1]
    bounded = _BOUNDED.search(text)
    return (bounded[1] or bounded[2]) if bounded else ""


def _assignment(text: str) -> re.Match | None:
    found = _ASSIGNED.fullmatch(text)
    is_plain = found and not _RELATION.search(found[2]) and "=" not in found[2]
    return found if is_plain and len(split(text)) == 1 else None


def _rest(text: str) -> Kind:
    if (
        text.count("=") == 1
        and text.split("=")[0].count("{") == text.split("=")[0].count("}")
        and not re.search(r"[<>!]|\\[lgn]e(?![A-Za-z])", text)
    ):
        left, right = text.split("=")
        return Equation(tidy(left), tidy(right))
    found = _UNIT.fullmatch(text)
    unit = read_unit(found["unit"]) if found and not _has_words(found["value"]) else None
    if found and unit:
        return Formula(tidy(found["value"]), unit)
    if _WORDY.fullmatch(text) and len(text) > 1 or _has_words(text):
        return Words(re.sub(r"\s+", " ", text.lower()))
    return Formula(text)


def _has_words(text: str) -> bool:
    words = re.findall(r"[A-Za-z]{2,}", re.sub(r"\\[A-Za-z]+", " ", text))
    return len(words) > 1 or any(len(word) > 3 for word in words)


def _matrix(body: str) -> Matrix:
    rows = [row for row in re.split(r"\\\\", body) if row.strip()]
    return Matrix(tuple(tuple(tidy(cell) for cell in row.split("&")) for row in rows))


def _intervals(text: str) -> Intervals | None:
    """A union of at least two intervals, a half-open one, or inequalities of one letter."""
    parts = re.split(r"\s*\\cup\s*|\s+or\s+", text)
    found = [interval for part in parts if (interval := _interval(part.strip())) is not None]
    if len(found) < len(parts):
        return None
    if len(found) == 1 and found[0][0] in ("()", "[]") and not _RELATION.search(text):
        return None  # two numbers in brackets: a point as well as an interval
    return Intervals(tuple(found))


def _interval(text: str) -> tuple[str, str, str] | None:
    if text[:1] in ("(", "[") and text[-1:] in (")", "]") and closes_at_end(text):
        items = split(text[1:-1], True)
        if len(items) != 2:
            return None
        return text[0] + text[-1], tidy(items[0]), tidy(items[1])
    sides, signs = _RELATION.split(text), _RELATION.findall(text)
    signs = [sign.replace("<=", r"\le").replace(">=", r"\ge") for sign in signs]
    if len(signs) == 1:
        signs = ["<" if "\\" not in signs[0] else r"\le", *signs]
        left, right = sides
        if not re.fullmatch(r"\s*[A-Za-z]\s*", left):  # 3 < x
            if not re.fullmatch(r"\s*[A-Za-z]\s*", right):
                return None
            flipped = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}[signs[-1]]
            return _interval(f"{right} {flipped} {left}")
        low = signs[1] in ("<", r"\le")
        end, strict = tidy(right), "\\" not in signs[1]
        if low:
            return ("(" + (")" if strict else "]"), r"-\infty", end)
        return (("(" if strict else "[") + ")", end, r"\infty")
    if len(signs) != 2 or not re.fullmatch(r"\s*[A-Za-z]\s*", sides[1]):
        return None
    ups = [sign in ("<", r"\le") for sign in signs]
    if ups[0] != ups[1]:
        return None
    if not ups[0]:
        sides, signs = sides[::-1], signs[::-1]
    opening = "(" if "\\" not in signs[0] else "["
    ending = ")" if "\\" not in signs[1] else "]"
    return (opening + ending, tidy(sides[0]), tidy(sides[2]))


def _group(text: str) -> Group | None:
    brackets = {"(": ")", "[": "]", r"\{": r"\}"}
    for opening, ending in brackets.items():
        if text.startswith(opening) and text.endswith(ending) and closes_at_end(text):
            items = split(text[len(opening) : -len(ending)], True)
            kind = "{}" if opening == r"\{" else "[]" if opening == "[" else "()"
            if len(items) > 1 or kind == "{}":
                return Group(kind, tuple(map(tidy, items)), kind == "{}")
    if text.count(r"\pm") == 1:
        return Group("list", tuple(tidy(text.replace(r"\pm", sign)) for sign in "+-"), True)
    items = split(text)
    if len(items) < 2 or any(_is_sentence(item) for item in items):
        return None
    is_unordered = bool(re.search(r"\s(?:and|or)\s", text))
    return Group("list", tuple(tidy(item) for item in items), is_unordered)


def _is_sentence(item: str) -> bool:
    words = re.findall(r"(?<!\\)\b[A-Za-z]{2,}", item.lower())
    return len(words) > 2 or "not" in words
