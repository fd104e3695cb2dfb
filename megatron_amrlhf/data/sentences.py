"""Sentences of a text, and which of them each token of an answer is in.

A sentence ends at a newline; at ``. ! ?`` or an ellipsis that white space follows (so not within
3.14), with the quotes and brackets that close after it; and at the Chinese full stop, exclamation
and question mark, which no white space follows. The dot of an abbreviation (``ABBREVIATIONS``), of
an initial and of a number that opens a line (``1.``) ends none.
"""

from __future__ import annotations

import re
from bisect import bisect_right

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_amrlhf.errors import UserError

ABBREVIATIONS = frozenset("dr e.g fig i.e mr mrs ms no prof st vs".split())
_END = re.compile(
    "\\n"
    "|[.!?\u2026]+[\"'\u201d\u2019)\\]]*(?=\\s|$)"
    "|[\u3002\uff01\uff1f]+\u2026*[\"'\u201d\u2019\u300d\u300f\u300b\u3011\uff09)]*"
)
_START = re.compile(r"\S")
_WORD = re.compile(r"[A-Za-z.]*$")
LONGEST_WORD = 20  # characters that are looked at before a dot


def sentence_starts(text: str) -> list[int]:
    """Index of the first character of each sentence, white space apart; [] for a blank text."""
    starts: list[int] = []
    position: int | None = 0
    while position is not None and (found := _START.search(text, position)):
        starts.append(found.start())
        position = _next_end(text, found.start())
    return starts


def _next_end(text: str, start: int) -> int | None:
    """Index behind the first sentence end from ``start`` on."""
    for match in _END.finditer(text, start):
        if match.group() != "." or _ends_a_sentence(text, match.start()):
            return match.end()
    return None


def _ends_a_sentence(text: str, dot: int) -> bool:
    """Whether the dot at ``dot``, with white space behind it, is a full stop."""
    line = text[text.rfind("\n", 0, dot) + 1 : dot]
    word = _WORD.search(line[-LONGEST_WORD:]).group()
    is_initial = len(word) == 1 and word.isupper() and word != "I"
    return not (is_initial or word.lower() in ABBREVIATIONS or line.strip().isdecimal())


def token_starts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> tuple[str, list[int]]:
    """The text of an answer, and where in it each token's own text starts.

    Tokens are decoded one after the other, each with those before it, so that white space and
    characters of several tokens come out as in the whole. A token that only begins a character
    starts where that character will; a special token has no text and starts where the next does.

    Raises:
        UserError: the tokenizer is not a fast one.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"the tokenizer ({type(tokenizer).__name__}) cannot decode token by token: use a model "
            "folder with a tokenizer.json"
        )
    stream, text, starts = DecodeStream(ids=[], skip_special_tokens=True), "", []
    for token in ids:
        starts.append(len(text))
        text += stream.step(tokenizer.backend_tokenizer, token) or ""
    return text, starts


def token_sentences(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> tuple[list[int], int]:
    """Number of the sentence that each token of an answer is in, and the number of sentences.

    A token is in the sentence of its first character that is not white space; white space alone
    belongs to the sentence before it, and what follows the last sentence (the end token) to that.
    A sentence that lies within a token with the end of another one has no token of its own.

    Raises:
        UserError: the tokenizer is not a fast one.
    """
    text, token_start = token_starts(tokenizer, ids)
    starts = sentence_starts(text)
    numbers = []
    for start, end in zip(token_start, [*token_start, len(text)][1:], strict=True):
        own = text[start:end]
        first = start + len(own) - len(own.lstrip()) if own.strip() else max(start, end - 1)
        numbers.append(max(bisect_right(starts, first) - 1, 0))
    return numbers, len(starts)
