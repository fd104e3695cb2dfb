"""Adaptive GRPO: the clipped surrogate on kept tokens with group-relative advantages, no critic.

Shao et al., "DeepSeekMath" (2024), eq. 3 and 4, with the mask M of eq. 13 on the surrogate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_amrlhf.losses.kl import with_kl
from megatron_amrlhf.losses.ppo import clipped_surrogate
from megatron_amrlhf.losses.reduce import LossOutput
from megatron_amrlhf.losses.targets import KlTargets
from megatron_amrlhf.mask.statistics import RELATIVE_TIE, group_means

STD_OFFSET = 1e-4  # added to a group's standard deviation, as TRL does


@dataclass(frozen=True)
class GrpoTargets(KlTargets):
    """What the policy learns from.

    Attributes:
        behaviour_logprobs: ``[B, R]`` of the policy that sampled, nats.
        advantages: ``[B]``, one an answer, the same for all its tokens.
        weight: ``[B, 1]`` of each answer's terms: 1, or ``reduce.row_weights`` for a mean over
            answers of their tokens' means.
    """

    behaviour_logprobs: Tensor
    advantages: Tensor
    weight: Tensor


def group_advantages(
    rewards: Tensor, group_ids: Tensor, scale_rewards: bool, has_reward: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``(r - mean) / (std + 1e-4)`` of each answer within its group.

    The standard deviation is the unbiased one (n - 1). A group without spread (all rewards equal
    up to rounding, or one answer) has advantages of exactly 0.

    Args:
        rewards: ``[B]`` reward of each answer.
        group_ids: ``[B]`` int64, which prompt it answers; a group lies on one rank.
        scale_rewards: False leaves the division out (Liu et al., "Dr. GRPO", 2025).
        has_reward: ``[B]`` bool, answers that have a reward; the others are in no mean or
            deviation, and have advantage 0. None: all.

    Returns:
        Advantages and the standard deviation of each answer's group, ``[B]``, detached, float32
        (float64 if given that); the deviation is exactly 0 where the group has no spread.
    """
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    # In float64 the mean of equal rewards is exactly that reward, so that they centre to 0.
    rewards_B1, ids_B = rewards.detach().double()[:, None], group_ids.to(rewards.device)
    has_reward_B = torch.ones_like(ids_B, dtype=torch.bool) if has_reward is None else has_reward
    has_reward_B1 = has_reward_B[:, None]
    centred_B1 = rewards_B1 - group_means(rewards_B1, has_reward_B1, ids_B)[:, None]
    _, index_B = torch.unique(ids_B, return_inverse=True)
    # [B]: how many answers of each answer's group have a reward.
    size_B = torch.zeros_like(ids_B).index_add(0, index_B, has_reward_B.to(ids_B.dtype))[index_B]
    mean_square_B = group_means(centred_B1.square(), has_reward_B1, ids_B)
    # Bessel: n / (n - 1). The clamp is for an answer alone, whose mean square is 0.
    std_B = (mean_square_B * size_B / (size_B - 1).clamp(min=1)).sqrt()
    # Root mean square of the group's rewards: rounding is relative to their size.
    scale_B = group_means(rewards_B1.square(), has_reward_B1, ids_B).sqrt()
    is_flat_B = std_B <= RELATIVE_TIE * scale_B
    std_B = torch.where(is_flat_B, 0.0, std_B)
    # Exactly 0: rounding divided by STD_OFFSET would be an advantage.
    advantages_B = torch.where(is_flat_B | ~has_reward_B, 0.0, centred_B1[:, 0])
    if scale_rewards:
        advantages_B = advantages_B / (std_B + STD_OFFSET)
    return advantages_B.to(dtype), std_B.to(dtype)


def grpo_loss(
    logprobs: Tensor,
    targets: GrpoTargets,
    *,
    clip_eps: float,
    clip_eps_high: float | None,
    kl_coef: float,
    estimator: str,
) -> LossOutput:
    """``-min(ratio A, clip(ratio, 1 - eps, 1 + eps_high) A) M + kl_coef KL`` of each token.

    Each answer's terms are multiplied by its weight.

    The mask chooses what the surrogate reads; the KL is over the whole answer (``kl.with_kl``).

    Metrics: those of ``ppo.clipped_surrogate`` and of ``with_kl``.

    Args:
        logprobs: ``[B, R]`` of the policy now, differentiable, nats.
        targets: of the same rows.
        clip_eps, clip_eps_high: how far below and above 1 the ratio may go; None: as below.
        kl_coef: weight of the KL.
        estimator: ``k2`` or ``k3`` (that of the GRPO paper), see ``kl.py``.

    Returns:
        Terms ``[B, R]``; the caller divides.

    Raises:
        ValueError: an estimator that is not meant for a loss.
    """
    loss = clipped_surrogate(
        logprobs,
        targets.behaviour_logprobs,
        targets.advantages[:, None].expand_as(targets.mask),
        targets.mask,
        clip_eps=clip_eps,
        clip_eps_high=clip_eps_high,
    )
    loss = with_kl(loss, logprobs, targets, kl_coef=kl_coef, estimator=estimator)
    return LossOutput(loss.terms * targets.weight, loss.metrics)
