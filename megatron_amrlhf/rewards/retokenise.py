"""A reward model with another tokenizer: its scores at the tokens of the policy, by text spans.

The answer's text is cut anew by the reward model's tokenizer; the score of a policy token is that
of the reward model's token which holds its last character.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from megatron_amrlhf.data.token_text import decode, token_ends


def encode_with_ends(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """Tokens of a text without special tokens at its ends, and where each ends in it."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast)
    ids = list(encoded["input_ids"])
    if decode(tokenizer, ids) == text or not tokenizer.is_fast:
        return ids, [min(end, len(text)) for end in token_ends(tokenizer, ids)]
    ends, last = [], 0  # a tokenizer that changes the text it reads, such as white space
    for _, end in encoded["offset_mapping"]:
        last = max(last, end)
        ends.append(last)
    return ids, ends


def align(ends: Sequence[int], other_ends: Sequence[int]) -> list[int]:
    """For each token the index of the other tokenizer's token that is read for it.

    That is the token which holds the last character: the first one that ends there or later.
    Several tokens of one character are taken in turn, so that equal tokens meet each other.

    Args:
        ends: where each token ends, not decreasing.
        other_ends: the same of the other tokens of the same text; at least one.
    """
    assert other_ends, "a text of no tokens"
    index = []
    for place, end in enumerate(ends):
        first = min(bisect_left(other_ends, end), len(other_ends) - 1)
        if other_ends[first] != end:
            index.append(first)
            continue
        last = bisect_right(other_ends, end) - 1
        mine_first, mine_last = bisect_left(ends, end), bisect_right(ends, end) - 1
        mine, others = mine_last - mine_first + 1, last - first + 1
        turn = place - mine_first + 1
        index.append(first - 1 + -(-turn * others // mine))
    return index
