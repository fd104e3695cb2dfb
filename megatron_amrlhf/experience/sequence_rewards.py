"""The reward of a whole answer, by ``reward.outcome``."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_amrlhf.experience.context import Context
from megatron_amrlhf.mask.messages import unit_rewards
from megatron_amrlhf.rewards.outcome import aggregate_steps, step_ends, step_probabilities
from megatron_amrlhf.rewards.steps import StepCutter
from megatron_amrlhf.types import RolloutBatch


def sequence_rewards(
    context: Context,
    rollout: RolloutBatch,
    token_rewards: Tensor,
    valid: Tensor,
    cut_steps: StepCutter | None,
) -> Tensor:
    """``[B]`` reward of each answer; 0 for one without valid tokens. For last stages.

    Args:
        context: the run.
        rollout: the answers.
        token_rewards: ``[B, R]`` raw rewards.
        valid: ``[B, R]`` bool.
        cut_steps: not read for outcome ``tokens``.
    """
    config = context.config
    if config.reward.outcome == "tokens":
        whole = torch.zeros(valid.shape, dtype=torch.int64, device=valid.device)
        kind = config.mask.message_reward
        # One unit: each valid token has its reward, the first one too.
        return unit_rewards(token_rewards, whole, valid, kind)[:, 0]
    assert cut_steps is not None, config.reward.outcome
    parts = (cut_steps.blanks_apart(rollout), rollout.ended, cut_steps.blanks(rollout))
    steps, ended, blanks = (part.to(valid.device) for part in parts)
    ends = step_ends(steps, valid, ended, blanks) & valid
    scores = step_probabilities(token_rewards, config.reward_model.output)
    return aggregate_steps(scores, ends, config.reward.outcome).to(token_rewards.dtype)
