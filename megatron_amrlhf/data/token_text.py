"""Which part of an answer's text each token stands for.

A token alone cannot say it: SentencePiece's lose the space before a word, byte-level ones hold
parts of characters. So tokens are decoded with those before them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_amrlhf.errors import UserError

REPLACEMENT = "\ufffd"  # what a decoder gives for a part of a character


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of tokens, special tokens and white space as they are."""
    return tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


def answer_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], ended: bool) -> str:
    """What an answer says, without special tokens and its end token, which need not be one."""
    return tokenizer.decode(list(ids[:-1] if ended else ids), skip_special_tokens=True)


def token_ends(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    """Where the text of each token ends, in characters of ``decode(ids)``; never decreasing.

    A token that ends inside a character (byte-level and byte-fallback tokens) ends after it, so
    all tokens of one character have the same end.
    """
    ends: list[int] = []
    first = read = done = 0  # decoded again from `first`, so that what depends on context is right
    before = ""
    for place in range(len(ids)):
        new = decode(tokenizer, ids[first : place + 1])[len(before) :]
        whole = new.rstrip(REPLACEMENT)
        ends.append(done + len(whole) + (whole != new))
        if new and whole == new:
            done += len(new)
            first, read = read, place + 1
            before = decode(tokenizer, ids[first:read])
    length = len(decode(tokenizer, ids))
    ends = [min(end, length) for end in ends]
    for place in range(1, len(ends)):
        ends[place] = max(ends[place], ends[place - 1])
    if ends:
        ends[-1] = length  # also of a character that was cut off
    return ends


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Text of each token; together they are ``decode(ids)``.

    The first of the tokens that a character is made of has the whole character, the others none.
    """
    text = decode(tokenizer, ids)
    return [text[start:end] for start, end in pairwise([0, *token_ends(tokenizer, ids)])]


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
