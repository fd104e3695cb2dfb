"""Lines of an answer, which are its steps, and which of them each token is in.

Blank lines are no steps. What stands between two steps, newlines and blank lines, belongs to the
one before it, an indent to its own line.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

_NOT_EMPTY = re.compile("(?<=\n)[^\n]")  # the start of a line with a character in it


def written_lines(text: str) -> list[tuple[int, int]]:
    """Start and end of each line that is not blank, without its newline."""
    spans, start = [], 0
    for line in text.split("\n"):
        if line.strip():
            spans.append((start, start + len(line)))
        start += len(line) + 1
    return spans


def line_numbers(pieces: Sequence[str], blanks_apart: bool = False) -> list[int]:
    """Number of the line that is not blank that each piece of a text is in.

    A piece (a token's text) is in the line of its first character, one without text in that of
    what follows, at the end in the last. A line within a piece that starts in another one has a
    number, but no piece. Where all is blank the number is 0.

    Args:
        pieces: of the text, in order.
        blanks_apart: blank lines that are not empty have numbers too, and so have the empty lines
            before the first one.
    """
    text = "".join(pieces)
    starts = [start for start, _ in written_lines(text)][1:]
    if blanks_apart:
        starts = [match.start() for match in _NOT_EMPTY.finditer(text)]
    begins = accumulate((len(piece) for piece in pieces), initial=0)
    return [bisect_right(starts, begin) for begin, _ in zip(begins, pieces, strict=False)]
