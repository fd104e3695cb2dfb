"""Whether an answer's last number is the reference answer."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def last_number(text: str) -> Decimal | None:
    """The last number in ``text``, thousands separators removed; None if there is none."""
    found = NUMBER.findall(text)
    if not found:
        return None
    try:
        return Decimal(found[-1].replace(",", ""))
    except InvalidOperation:
        return None


def is_right(text: str, answer: str) -> bool:
    """Whether the last number of ``text`` equals the last number of ``answer``."""
    expected = last_number(answer)
    return expected is not None and last_number(text) == expected
