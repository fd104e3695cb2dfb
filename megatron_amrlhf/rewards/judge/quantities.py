"""Numbers as answers write them, exact, with percent signs, money and units."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 60  # of a number; longer ones are read as text
MAX_EXPONENT = 400
ROUNDED_DIGITS = 3  # significant ones from which a decimal may be the rounding of a number

_INTEGER = r"\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+"
_DECIMAL = rf"(?:(?:{_INTEGER})(?:\.\d+)?|\.\d+)"
_TIMES_TEN = r"(?:[eE]|\s*(?:\\times|\\cdot|[xX*])\s*10\s*(?:\^|\*\*)\s*)"
_POWER = r"\{?\s*(?P<exponent>[-+]?\d+)\s*\}?"
_FRACTION = (
    r"(?P<top>\d+)\s*/\s*(?P<bottom>\d+)|\\frac\s*\{\s*(?P<ttop>-?\s*\d+)\s*\}"
    r"\s*\{\s*(?P<tbottom>\d+)\s*\}"
)
NUMBER = re.compile(
    rf"(?:(?P<sign>[-+])\s*)?(?:(?P<money>[$\u20ac\u00a3\u00a5])\s*)?(?P<inner>[-+]?)"
    rf"(?:(?P<whole>\d+)\s+(?=\d+\s*/|\\frac)(?=\S)|(?P<glued>\d+)(?=\\frac))?"
    rf"(?:{_FRACTION}|(?P<decimal>{_DECIMAL})(?:{_TIMES_TEN}{_POWER})?)"
)
_SCALES = {
    "hundred": 100,
    "thousand": 1000,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "dozen": 12,
}
# Words behind a number that make it another one, or say that it is not the answer.
CHANGING = frozenset(
    "plus minus over less fewer than or and not no squared cubed factorial choose mod modulo "
    "half halves third thirds quarter quarters out to through until but except score "
    "hundred hundreds thousands millions billions trillions thousand million billion trillion "
    "dozens dozen wrong incorrect pi is are was were isn't if nor never "
    "approximately about maybe perhaps am pm a.m p.m a.m. p.m. o'clock".split()
)
NUMBER_WORDS = frozenset(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty "
    "ninety hundred thousand million billion half third quarter dozen twice double".split()
)
_UNITS = {  # dimension, size
    "mm": ("length", Fraction(1, 1000)),
    "cm": ("length", Fraction(1, 100)),
    "m": ("length", Fraction(1)),
    "km": ("length", Fraction(1000)),
    "in": ("length", Fraction(254, 10000)),
    "ft": ("length", Fraction(3048, 10000)),
    "yd": ("length", Fraction(9144, 10000)),
    "mile": ("length", Fraction(1609344, 1000)),
    "mg": ("mass", Fraction(1, 1000)),
    "g": ("mass", Fraction(1)),
    "kg": ("mass", Fraction(1000)),
    "oz": ("mass", Fraction(45359237, 1600000)),
    "lb": ("mass", Fraction(45359237, 100000)),
    "ml": ("volume", Fraction(1, 1000)),
    "l": ("volume", Fraction(1)),
    "s": ("time", Fraction(1)),
    "min": ("time", Fraction(60)),
    "h": ("time", Fraction(3600)),
    "day": ("time", Fraction(86400)),
    "week": ("time", Fraction(604800)),
    "cent": ("dollar", Fraction(1, 100)),
    "dollar": ("dollar", Fraction(1)),
    "euro": ("euro", Fraction(1)),
    "yen": ("yen", Fraction(1)),
    "degree": ("angle", Fraction(1)),
}
_SAME_UNIT = {
    **dict.fromkeys(("millimeter", "millimetre"), "mm"),
    **dict.fromkeys(("centimeter", "centimetre"), "cm"),
    **dict.fromkeys(("meter", "metre"), "m"),
    **dict.fromkeys(("kilometer", "kilometre"), "km"),
    **dict.fromkeys(("inch", "inche"), "in"),
    **dict.fromkeys(("foot", "feet"), "ft"),
    **dict.fromkeys(("gram", "gramme"), "g"),
    **dict.fromkeys(("liter", "litre"), "l"),
    **dict.fromkeys(("sec", "second"), "s"),
    **dict.fromkeys(("hr", "hour"), "h"),
    **dict.fromkeys(("$", "usd", "buck"), "dollar"),
    **dict.fromkeys(("\u20ac", "eur"), "euro"),
    **dict.fromkeys(("deg", r"^\circ", r"^{\circ}", r"^\circc"), "degree"),
    **{"yard": "yd", "mi": "mile", "kilogram": "kg", "kilo": "kg", "milligram": "mg"},
    **{"ounce": "oz", "pound": "lb", "milliliter": "ml", "minute": "min", "\u00a5": "yen"},
    **{"penny": "cent", "pennie": "cent", "people": "person", "\u00a3": "pound sterling"},
}
_SHORT_UNITS = frozenset("m s h g l mm cm km in ft yd kg mg lb oz ml hr mi".split())
_OPERATORS = re.compile(r"\^\s*\{?\s*([23])\s*\}?")


@dataclass(frozen=True)
class Number:
    """An exact number.

    Attributes:
        value: with the percent sign's hundredth in it.
        unit: its unit's one name, "" without one.
        is_percent: written with a percent sign.
        is_reduced: no fraction that could be shortened.
        decimals: digits behind the point, 0 of integers and fractions.
        scale: of a word like million or dozen, which is in the value.
    """

    value: Fraction
    unit: str = ""
    is_percent: bool = False
    is_reduced: bool = True
    decimals: int = 0
    scale: int = 1


def read_number(text: str) -> Number | None:
    """The number that all of a tidied ``text`` is, its unit included; else None."""
    text = text.strip()
    found = NUMBER.match(text)
    number = found and number_of(found)
    if found is None or number is None:
        return None
    tail = text[found.end() :]
    # ``5m`` is a product, ``5 m`` a length; ``5cm`` has no other meaning.
    if re.match(r"[A-Za-z]", tail) and (
        unit_name(tail) not in _UNITS or re.match(r"[A-Za-z](?![A-Za-z])", tail)
    ):
        return None
    return _with_tail(number, unit_name(found["money"] or ""), tail.strip())


def number_of(found: re.Match) -> Number | None:
    """The number of a match of ``NUMBER``; None of one that is too long to be an answer."""
    groups = found.groupdict()
    texts = [t for k, t in groups.items() if t and k not in ("sign", "money", "inner")]
    if sum(map(len, texts)) > MAX_DIGITS or abs(int(groups["exponent"] or 0)) > MAX_EXPONENT:
        return None
    is_reduced, decimals = True, 0
    if groups["decimal"]:
        digits = groups["decimal"].replace(",", "").replace(" ", "")
        decimals = len(digits.partition(".")[2])
        value = Fraction(digits) * Fraction(10) ** int(groups["exponent"] or 0)
    else:
        top = int((groups["top"] or groups["ttop"]).replace(" ", ""))
        bottom = int(groups["bottom"] or groups["tbottom"])
        if bottom == 0:
            return None
        fraction = Fraction(top, bottom)
        is_reduced = fraction.denominator == bottom and bottom != 1
        whole = groups["whole"] or groups["glued"]
        if whole and not 0 < fraction < 1:
            return None
        value = fraction + int(whole or 0)
    signs = (groups["sign"] or "") + groups["inner"]
    if len(signs) > 1:
        return None
    return Number(-value if signs == "-" else value, "", False, is_reduced, decimals)


def _with_tail(number: Number, unit: str, tail: str) -> Number | None:
    value, is_percent, scale = number.value, False, 1
    word, _, rest = tail.partition(" ")
    if word.lower() in _SCALES:
        scale, tail = _SCALES[word.lower()], rest.strip()
        value = value * scale
    if re.match(r"(?:%|percent\b|per cent\b)", tail):
        value, is_percent = value / 100, True
        tail = re.sub(r"^(?:%|percent|per cent)\s*", "", tail)
    if tail:
        named = read_unit(tail)
        if named is None or (is_percent and not _is_words(tail)):
            return None
        unit = unit or ("" if is_percent else named)
    return Number(value, unit, is_percent, number.is_reduced, number.decimals, scale)


def read_unit(tail: str) -> str | None:
    """The one name of what stands behind a number, None where that is no unit or thing counted."""
    if re.fullmatch(r"\^\s*\{?\s*\\circ\s*\}?", tail):
        return "degree"
    return unit_name(tail) if _is_words(tail) else None


def _is_words(tail: str) -> bool:
    words = _OPERATORS.sub(" ", tail).replace("/", " per ").split()
    if len(words) == 1 and len(words[0]) < 3:
        return words[0].lower() in _SHORT_UNITS
    return 0 < len(words) <= 12 and all(map(_counts, words))


def _counts(word: str) -> bool:
    """Whether a word may stand behind a number without changing it."""
    word = word.strip("()").lower()
    if len(word) < 2 or (len(word) == 2 and not word.isalpha()):
        return word in _SHORT_UNITS or word == "a"
    is_word = re.fullmatch(r"[a-z][a-z'.-]*", word)
    return bool(is_word) and word not in NUMBER_WORDS and word not in CHANGING


def unit_name(unit: str) -> str:
    """One name for a unit's spellings: singular, short, powers as ``^2``."""
    unit = _OPERATORS.sub(r"^\1", unit.lower()).replace(" ^", "^").strip(" .()")
    power = re.search(r"\^(\d)$", unit) or ""
    words = unit[: -2 if power else None].replace("/", " per ").split()
    suffix = power[0] if power else ""
    named = {"square": "^2", "sq": "^2", "sq.": "^2", "cubic": "^3", "cu": "^3", "cu.": "^3"}
    if words and words[0] in named:
        suffix, words = named[words.pop(0)], words
    singular = [_SAME_UNIT.get(w, _SAME_UNIT.get(_one(w), _one(w))) for w in words]
    name = " ".join(singular)
    return "" if name == "unit" else name + suffix


def _one(word: str) -> str:
    return word[:-1] if len(word) > 2 and word.endswith("s") and not word.endswith("ss") else word


def size_of(number: Number) -> tuple[str, Fraction] | None:
    """The dimension and value in its own unit of a number whose unit is known; else None."""
    name, _, power = number.unit.partition("^")
    if name not in _UNITS:
        return None
    dimension, size = _UNITS[name]
    return dimension + power, number.value * size ** int(power or 1)


def is_rounding(short: Number, exact: Fraction) -> bool:
    """Whether ``short`` is ``exact`` rounded to the decimals that are written of it."""
    step = Fraction(1, 10**short.decimals)
    digits = len(str(abs(short.value.numerator * 10**short.decimals // short.value.denominator)))
    is_long = digits >= ROUNDED_DIGITS and short.decimals > 0
    return is_long and 0 < abs(short.value - exact) <= step / 2
