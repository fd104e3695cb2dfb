"""The tokenizer's ids against the model's: ids without an embedding, and ids without a token.

A model may have fewer rows of embedding than its tokenizer has tokens, or more: vocabularies are
rounded up to a multiple of 64 or so. An id without an embedding is an error (on one tensor rank an
IndexError, on several a vector of zeros in silence), an id without a token is no text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_amrlhf.data.chat import known_prompt
from megatron_amrlhf.data.tokenizer import PROBE
from megatron_amrlhf.errors import UserError

ADVICE = "use the model's own tokenizer files, and name its eos_token in tokenizer_config.json"


def refuse_beyond(
    largest: int,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    folder: str | Path,
    advice: str,
) -> None:
    """Refuses a token without an embedding.

    Raises:
        UserError: the id ``largest`` is not below ``vocab_size``.
    """
    if largest >= vocab_size:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise UserError(
            f"{folder}: token {token!r} has id {largest}, but the model's vocab_size is "
            f"{vocab_size}: {advice}"
        )


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int], vocab_size: int, folder: str | Path
) -> None:
    """Checks that a model has an embedding for what its tokenizer puts into rows.

    That is all of its vocabulary but added tokens that stand in no template and end no answer:
    folders in public have such (a padding token), and `check_rows` finds them in a text.

    Args:
        tokenizer: the model's.
        end_ids: from `end_token_ids`.
        vocab_size: of the model's ``config.json``.
        folder: named in the message.

    Raises:
        UserError: an id is too large.
    """
    added = set(tokenizer.get_added_vocab().values())
    used = [*end_ids, *known_prompt(tokenizer), *tokenizer.encode(PROBE)]
    used += [token for token in tokenizer.get_vocab().values() if token not in added]
    refuse_beyond(max(used), tokenizer, vocab_size, folder, ADVICE)


def check_whole_vocabulary(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, folder: str | Path
) -> None:
    """Checks that a model has an embedding for every token, where any text may come.

    Raises:
        UserError: an id is too large.
    """
    advice = "take such tokens out of its tokenizer files (added_tokens)"
    refuse_beyond(max(tokenizer.get_vocab().values()), tokenizer, vocab_size, folder, advice)


def has_more_ids(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> bool:
    """Whether a tokenizer has ids that a vocabulary of this size has not."""
    return max(tokenizer.get_vocab().values()) >= vocab_size


def check_rows(
    rows: Iterable[Tensor],
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    folder: str | Path,
) -> None:
    """Checks that a model has an embedding for every token of the data.

    Args:
        rows: 1-D int64 token ids, or of many rows those of `highest_rows`.
        tokenizer: that made them.
        vocab_size: of the model.
        folder: the model's, named in the message.

    Raises:
        UserError: an id is too large.
    """
    if not has_more_ids(tokenizer, vocab_size):
        return
    for row in rows:
        advice = f"take it out of the data's row {tokenizer.decode(row[:12])[:60]!r}..."
        refuse_beyond(int(row.max()), tokenizer, vocab_size, folder, advice)


def usable_ids(
    tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int], vocab_size: int
) -> Tensor:
    """``[vocab_size]`` bool: the model may say this id, which is a token or ends an answer."""
    usable = torch.zeros(vocab_size, dtype=torch.bool)
    ids = torch.tensor([*tokenizer.get_vocab().values(), *end_ids])
    usable[ids[ids < vocab_size]] = True
    return usable
