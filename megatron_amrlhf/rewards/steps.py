"""Where the steps of an answer end, for ``reward.granularity: step`` and ``reward.outcome``."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_amrlhf.data.sentences import token_sentences
from megatron_amrlhf.rewards.units import blank_token_ids, newline_token_ids, step_ids
from megatron_amrlhf.types import RolloutBatch


class StepCutter:
    """Cuts answers into steps.

    Args:
        tokenizer: the policy's.
        boundary: ``newline``, or ``sentence`` (see ``data/sentences.py``).

    Raises:
        ValueError: unknown boundary.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, boundary: str):
        if boundary not in ("newline", "sentence"):
            raise ValueError(f"unknown step boundary {boundary!r}")
        self.tokenizer, self.boundary = tokenizer, boundary
        self.newline_ids = newline_token_ids(tokenizer) if boundary == "newline" else None

    def __call__(self, rollout: RolloutBatch) -> Tensor:
        """``[B, R]`` int64 on the CPU: number of the step that each token is in, from 0 on."""
        if self.newline_ids is not None:
            return step_ids(response_tokens(rollout), self.newline_ids, rollout.response_mask)
        ids = torch.zeros(rollout.response_mask.shape, dtype=torch.int64)
        parts = zip(rollout.rows, rollout.prompt_lengths.tolist(), strict=True)
        for row, (tokens, length) in enumerate(parts):
            numbers, _ = token_sentences(self.tokenizer, tokens[length:].tolist())
            found = torch.tensor(numbers, dtype=torch.int64)
            ids[row, 1 : len(numbers)] = (found[1:] != found[:-1]).cumsum(dim=0)
        return ids

    def blanks(self, rollout: RolloutBatch) -> Tensor:
        """``[B, R]`` bool on the CPU: the token is white space."""
        return torch.isin(response_tokens(rollout), self._blank_ids)

    @cached_property
    def _blank_ids(self) -> Tensor:
        return blank_token_ids(self.tokenizer)


def response_tokens(rollout: RolloutBatch) -> Tensor:
    """``[B, R]`` int64 response tokens, padded with 0."""
    mask = rollout.response_mask
    tokens = torch.zeros(mask.shape, dtype=torch.int64)
    parts = zip(rollout.rows, rollout.prompt_lengths.tolist(), strict=True)
    tokens[mask] = torch.cat([row[length:] for row, length in parts])
    return tokens
