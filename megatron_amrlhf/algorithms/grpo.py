"""AGRPO: the clipped surrogate on kept tokens with group-relative advantages, no critic."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from megatron_amrlhf.algorithms.policy import all_rows
from megatron_amrlhf.algorithms.surrogate import SurrogateAlgorithm, behaviour_logprobs
from megatron_amrlhf.config.algorithms import GrpoAlgorithm
from megatron_amrlhf.experience.context import count_metric
from megatron_amrlhf.experience.maker import Experience
from megatron_amrlhf.losses.grpo import GrpoTargets, group_advantages, grpo_loss
from megatron_amrlhf.losses.reduce import Metrics, denominator_mask, row_weights
from megatron_amrlhf.mask.adaptive import chosen_labels
from megatron_amrlhf.types import MaskedBatch, TrainBatch


class Grpo(SurrogateAlgorithm[GrpoAlgorithm]):
    """Learns from every answer; one is chosen if its advantage is above 0, and not by rounding."""

    def advantages(self, experience: Experience) -> tuple[Tensor, Tensor]:
        """Advantage of each answer and standard deviation of its group (last stages)."""
        return group_advantages(
            experience.dense.sequence_rewards,
            experience.rollout.group_ids,
            self.section.scale_rewards,
            experience.scored.has_reward,
        )

    def choose(self, experience: Experience, step: int) -> tuple[Tensor, Tensor]:
        advantages, ids = self.advantages(experience)[0], experience.rollout.group_ids
        # Of an answer that is its group's mean but for rounding the sign says nothing.
        rewards, has_reward = experience.dense.sequence_rewards, experience.scored.has_reward
        is_above_mean = chosen_labels(
            rewards, "group", ids.to(rewards.device), has_reward=has_reward
        )
        return all_rows(experience), (advantages > 0) & is_above_mean

    def targets(
        self, batch: MaskedBatch, rows: Tensor, experience: Experience
    ) -> tuple[GrpoTargets, Metrics]:
        """What the loss reads, and how the groups are spread (last stages)."""
        scored, config = experience.scored, self.context.config
        advantages, std = self.advantages(experience)
        counted = denominator_mask(scored.response_mask, batch.mask, config.loss.denominator)
        by_row = self.section.length_normalise == "sequence"
        # As kl_scale only until with_kl_scale sees the rows of an optimizer step.
        one_B1 = torch.ones_like(advantages)[:, None]
        targets = GrpoTargets(
            # A mean over answers of their tokens' means counts answers.
            denominator=scored.has_reward[:, None] if by_row else counted,
            mask=batch.mask,
            valid=scored.response_mask,
            reference_logprobs=scored.reference_logprobs,
            behaviour_logprobs=behaviour_logprobs(batch, scored),
            advantages=advantages,
            weight=row_weights(counted) if by_row else one_B1,
            kl_scale=one_B1,
        )
        std_G = one_a_group(std, experience.rollout.group_ids, scored.has_reward)
        return targets, {
            "grpo/advantage": count_metric(advantages.abs().sum(), scored.has_reward.sum()),
            "grpo/flat_groups": count_metric((std_G == 0).sum(), std_G.numel()),
            "grpo/group_std": count_metric(std_G.sum(), std_G.numel()),
        }

    @property
    def reads_kept_alone(self) -> bool:
        return self.section.kl_coef == 0

    def actor_step(self, part: TrainBatch[GrpoTargets]):
        """One optimizer step of the policy."""
        algorithm = self.section
        part = self.with_kl_scale(part, algorithm.length_normalise == "sequence")
        loss = partial(
            grpo_loss,
            clip_eps=algorithm.clip_eps,
            clip_eps_high=algorithm.clip_eps_high,
            kl_coef=algorithm.kl_coef,
            estimator=algorithm.kl_estimator,
        )
        return self.policy_step(part, self.on_policy(loss))


def one_a_group(x: Tensor, group_ids: Tensor, has_reward: Tensor) -> Tensor:
    """``[G]`` the entry of each group that has an answer with a reward; in it all are equal."""
    groups_B, x_B = group_ids.to(x.device)[has_reward], x[has_reward]
    groups_G, index_B = groups_B.unique(return_inverse=True)
    return x.new_zeros(groups_G.shape).scatter(0, index_B, x_B)
