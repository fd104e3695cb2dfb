"""Token ids of a text that goes on behind another one."""

from __future__ import annotations

from functools import lru_cache

from transformers import PreTrainedTokenizerBase

# Texts after which another one goes on; a step's predecessor ends with the first.
BEFORE = ("\n", ".")


def encode_continuation(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that stands after another one.

    Tokenizers of the SentencePiece kind put a space before the first word of what they are given,
    which the text does not have there. Where a tokenizer would join it with what stands before,
    the ids are those of the text alone.
    """
    for before in BEFORE:
        head = _ids_before(tokenizer, before)
        ids = tokenizer.encode(before + text, add_special_tokens=False)
        if ids[: len(head)] == head:
            return ids[len(head) :]
    return tokenizer.encode(text, add_special_tokens=False)


@lru_cache(maxsize=8)
def _ids_before(tokenizer: PreTrainedTokenizerBase, before: str) -> list[int]:
    """Kept, as data have millions of steps."""
    return tokenizer.encode(before, add_special_tokens=False)
