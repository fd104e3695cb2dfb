"""Sentences of a text, English or Chinese, and which of them each token of an answer is in.

A sentence ends before a newline; after ``. ! ?`` or an ellipsis that white space follows (so not
within 3.14), with the quotes and brackets that close there; and after the Chinese full stop,
exclamation and question mark, which no white space follows. The dot of an abbreviation
(``ABBREVIATIONS``), of initials (``U.S.``) or of ``No. 5`` ends none, and the sign or number of a
list item is none.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from itertools import accumulate

from transformers import PreTrainedTokenizerBase

from megatron_amrlhf.data.token_text import token_starts

ABBREVIATIONS = frozenset("dr e.g fig i.e mr mrs ms prof st vs".split())
_END = re.compile(
    "(?=\\n)"
    "|[.!?\u2026]+[\"'\u201d\u2019)\\]]*(?=\\s)"
    "|[\u3002\uff01\uff1f]+\u2026*[\"'\u201d\u2019\u300d\u300f\u300b\u3011\uff09)]*"
)
_BARE = re.compile(r"\s*(?:[-*\u2022]|\(?\d{1,3}[.)])?\s*")
_WORD = re.compile(r"[A-Za-z.]*$")
_INITIALS = re.compile(r"(?:[A-Z]\.)*[A-Z]")  # J, J.R.R, U.S
_NUMBER = re.compile(r"\s\d")  # of "No. 5"
LONGEST_WORD = 20  # characters that are looked at before a dot


def split_sentences(text: str) -> list[str]:
    """Cuts a text into sentences.

    White space between two sentences belongs to the one after it, as tokenizers have it; what
    stands after the last sentence belongs to that one.

    Returns:
        Pieces whose concatenation is ``text``; each but maybe the only one has a letter, digit or
        sign of its own.
    """
    pieces, start = [], 0
    for match in _END.finditer(text):
        piece = text[start : match.end()]
        if _BARE.fullmatch(piece) or (match.group() == "." and _is_no_stop(text, match.start())):
            continue
        pieces.append(piece)
        start = match.end()
    rest = text[start:]
    if rest.strip() or not pieces:
        pieces.append(rest)
    else:
        pieces[-1] += rest
    return pieces


def _is_no_stop(text: str, dot: int) -> bool:
    """Whether the dot at ``dot`` belongs to an abbreviation or an initial."""
    found = _WORD.search(text[max(dot - LONGEST_WORD, 0) : dot])
    assert found is not None, "it matches nothing as well"
    word = found.group()
    is_initial = _INITIALS.fullmatch(word) and word != "I"
    is_numbered = word == "No" and _NUMBER.match(text, dot + 1)
    return bool(is_initial or is_numbered) or word.lower() in ABBREVIATIONS


def token_sentences(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> tuple[list[int], int]:
    """Number of the sentence that each token of an answer is in, and the number of sentences.

    A token is in the sentence of its first character that is not white space; white space alone in
    the one that it leads to, an end token in the last. A sentence within a token that starts in
    another one has no token of its own. A blank answer has no sentence; its tokens have number 0.

    Raises:
        UserError: the tokenizer is not a fast one.
    """
    text, token_start = token_starts(tokenizer, ids)
    pieces = split_sentences(text)
    starts = [0, *accumulate(len(piece) for piece in pieces)][:-1]
    numbers = []
    for start, end in zip(token_start, [*token_start, len(text)][1:], strict=True):
        own = text[start:end]
        first = start + (len(own) - len(own.lstrip()) if own.strip() else 0)
        numbers.append(bisect_right(starts, first) - 1)
    return numbers, len(pieces) if text.strip() else 0
