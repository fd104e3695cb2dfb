"""Where brackets of a text close, and splitting it at the commas outside of them."""

from __future__ import annotations

import re

from megatron_amrlhf.rewards.judge.text import closing

_SEPARATORS = re.compile(r"\s*(?:;|,)\s*(?:and\s+|or\s+)?|\s+(?:and|or)\s+")
_THOUSAND = re.compile(r"(?<!\d\d\d)\d,\d{3}(?!\d)")


def closes_at_end(text: str) -> bool:
    """Whether the bracket that a text begins with closes at its end."""
    depth = 0
    for place, char in enumerate(text.removeprefix("\\")):
        depth += (char in "([{") - (char in ")]}")
        if depth == 0:
            return place == len(text.removeprefix("\\")) - 1
    return False


def split(text: str, in_brackets: bool = False) -> list[str]:
    """A text's parts between commas, semicolons, ``and`` and ``or`` outside of brackets.

    In brackets a comma between digits separates; elsewhere it may be a thousand's.
    """
    parts, start, place = [], 0, 0
    while place < len(text):
        if text[place] == "{" and text[place - 1 : place] != "\\" or text[place] in "([":
            end = _matching(text, place)
            place = end + 1 if end > 0 else place + 1
            continue
        found = _SEPARATORS.match(text, place)
        is_thousand = not in_brackets and _THOUSAND.match(text, max(place - 1, 0))
        if found and found.end() > place and not is_thousand:
            parts.append(text[start:place])
            start = place = found.end()
            continue
        place += 1
    return [part for part in [*parts, text[start:]] if part.strip()]


def _matching(text: str, start: int) -> int:
    if text[start] == "{":
        return closing(text, start)
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] in "([") - (text[place] in ")]")
        if depth == 0:
            return place
    return -1
