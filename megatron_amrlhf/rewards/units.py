"""The units of figure 1: which response tokens share one reward, and where it stands."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


def newline_token_ids(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Sorted 1-D int64 ids of all tokens whose text has a newline: they end a step."""
    return _token_ids(tokenizer, lambda text: "\n" in text)


def blank_token_ids(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Sorted 1-D int64 ids of all tokens that are white space, or no text at all."""
    return _token_ids(tokenizer, lambda text: not text.strip())


def _token_ids(tokenizer: PreTrainedTokenizerBase, is_such: Callable[[str], bool]) -> Tensor:
    ids = [i for i in range(len(tokenizer)) if is_such(tokenizer.decode([i]))]
    return torch.tensor(ids, dtype=torch.int64)


def step_ids(tokens_BR: Tensor, newline_ids: Tensor, valid_BR: Tensor) -> Tensor:
    """``[B, R]`` int64 step that each token is in; it ends with the last newline of a run.

    Args:
        tokens_BR: ``[B, R]`` int64 response tokens.
        newline_ids: sorted ids of tokens with a newline.
        valid_BR: ``[B, R]`` bool.
    """
    is_newline = torch.isin(tokens_BR, newline_ids.to(tokens_BR.device)) & valid_BR
    is_end = is_newline.clone()
    is_end[:, :-1] &= ~is_newline[:, 1:]
    return is_end.long().cumsum(dim=1) - is_end.long()


def place_on_last(rewards_BR: Tensor, unit_ids_BR: Tensor, valid_BR: Tensor) -> Tensor:
    """Keeps the reward of each unit on its last valid token; 0 elsewhere. Shapes ``[B, R]``."""
    is_last = valid_BR.clone()
    is_last[:, :-1] &= (unit_ids_BR[:, :-1] != unit_ids_BR[:, 1:]) | ~valid_BR[:, 1:]
    return torch.where(is_last, rewards_BR, 0.0)
