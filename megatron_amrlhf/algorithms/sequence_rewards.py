"""The reward of a whole answer, by ``reward.outcome``."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_amrlhf.algorithms.context import Context
from megatron_amrlhf.mask.messages import unit_rewards
from megatron_amrlhf.rewards.outcome import aggregate_steps, step_ends
from megatron_amrlhf.rewards.steps import response_tokens
from megatron_amrlhf.types import RolloutBatch


def sequence_rewards(
    context: Context,
    rollout: RolloutBatch,
    token_rewards: Tensor,
    valid: Tensor,
    newline_ids: Tensor | None,
) -> Tensor:
    """``[B]`` reward of each answer; 0 for one without valid tokens. For last stages.

    Args:
        context: the run.
        rollout: the answers.
        token_rewards: ``[B, R]`` raw rewards.
        valid: ``[B, R]`` bool.
        newline_ids: ids of tokens that end a step; None for outcome ``tokens``.
    """
    config = context.config
    if config.reward.outcome == "tokens":
        whole = torch.zeros(valid.shape, dtype=torch.int64, device=valid.device)
        kind = config.mask.message_reward
        return unit_rewards(token_rewards, whole, valid, kind)[:, 0]
    tokens, ended = response_tokens(rollout).to(valid.device), rollout.ended.to(valid.device)
    ends = step_ends(tokens, newline_ids, valid, ended) & valid
    is_logit = config.reward_model.output == "logit"
    scores = token_rewards.double().sigmoid() if is_logit else token_rewards
    return aggregate_steps(scores, ends, config.reward.outcome).to(token_rewards.dtype)
