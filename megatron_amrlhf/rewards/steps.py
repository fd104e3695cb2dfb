"""Where the steps of an answer end, for ``reward.granularity: step`` and ``reward.outcome``."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_amrlhf.data.lines import line_numbers
from megatron_amrlhf.data.sentences import token_sentences
from megatron_amrlhf.types import RolloutBatch


class StepCutter:
    """Cuts answers into steps.

    Args:
        tokenizer: the policy's.
        boundary: ``newline`` (see ``data/lines.py``) or ``sentence`` (``data/sentences.py``).

    Raises:
        ValueError: unknown boundary.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, boundary: str):
        if boundary not in ("newline", "sentence"):
            raise ValueError(f"unknown step boundary {boundary!r}")
        self.tokenizer, self.boundary = tokenizer, boundary

    def __call__(self, rollout: RolloutBatch) -> Tensor:
        """``[B, R]`` int64 on the CPU: number of the step that each token is in, from 0 on."""
        return self._ids(rollout, False)

    def blanks_apart(self, rollout: RolloutBatch) -> Tensor:
        """As steps, but lines of blanks have numbers too.

        A step so ends with its newlines: a PRM has learned nothing about what blanks come behind.
        """
        return self._ids(rollout, True)

    def _ids(self, rollout: RolloutBatch, blanks_apart: bool) -> Tensor:
        ids = torch.zeros(rollout.response_mask.shape, dtype=torch.int64)
        parts = zip(
            rollout.rows, rollout.prompt_lengths.tolist(), rollout.ended.tolist(), strict=True
        )
        for row, (tokens, length, ended) in enumerate(parts):
            numbers = self._numbers(tokens[length:].tolist(), ended, blanks_apart)
            found = torch.tensor(numbers, dtype=torch.int64)
            ids[row, 1 : len(numbers)] = (found[1:] != found[:-1]).cumsum(dim=0)
        return ids

    def _numbers(self, ids: list[int], ended: bool, blanks_apart: bool) -> list[int]:
        """As the text has them, so without gaps only where each step has a token of its own."""
        if self.boundary == "sentence":
            return token_sentences(self.tokenizer, ids)[0]
        pieces = [self._texts[token] for token in ids]
        return line_numbers([*pieces[:-1], ""] if ended else pieces, blanks_apart)

    def blanks(self, rollout: RolloutBatch) -> Tensor:
        """``[B, R]`` bool on the CPU: the token is white space."""
        return torch.isin(response_tokens(rollout), self._blank_ids)

    @cached_property
    def _texts(self) -> list[str]:
        """Of each id by itself; where newlines are, the tokens beside it do not matter."""
        size = max(self.tokenizer.get_vocab().values()) + 1
        return [self.tokenizer.decode([token]) for token in range(size)]

    @cached_property
    def _blank_ids(self) -> Tensor:
        blank = [token for token, text in enumerate(self._texts) if not text.strip()]
        return torch.tensor(blank, dtype=torch.int64)


def response_tokens(rollout: RolloutBatch) -> Tensor:
    """``[B, R]`` int64 response tokens, padded with 0."""
    mask = rollout.response_mask
    tokens = torch.zeros(mask.shape, dtype=torch.int64)
    parts = zip(rollout.rows, rollout.prompt_lengths.tolist(), strict=True)
    tokens[mask] = torch.cat([row[length:] for row, length in parts])
    return tokens
