"""APPO, eq. 14: the clipped surrogate on kept tokens, GAE on dense rewards, a critic."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from megatron_amrlhf.algorithms.policy import all_rows
from megatron_amrlhf.algorithms.surrogate import SurrogateAlgorithm, behaviour_logprobs
from megatron_amrlhf.algorithms.update import UpdateFunction, optimizer_step, response_places
from megatron_amrlhf.config.algorithms import PpoAlgorithm
from megatron_amrlhf.experience.context import count_metric
from megatron_amrlhf.experience.maker import Experience
from megatron_amrlhf.experience.scoring import read_value
from megatron_amrlhf.losses.gae import gae
from megatron_amrlhf.losses.kl import reward_penalty
from megatron_amrlhf.losses.ppo import PpoTargets, ppo_actor_loss, ppo_value_loss
from megatron_amrlhf.losses.reduce import Metrics, denominator_mask
from megatron_amrlhf.mask.adaptive import chosen_labels
from megatron_amrlhf.mask.statistics import whiten
from megatron_amrlhf.types import MaskedBatch, TrainBatch


class Ppo(SurrogateAlgorithm[PpoAlgorithm]):
    """Actor and critic learn from every answer; the mask is the actor's alone."""

    def choose(self, experience: Experience, step: int) -> tuple[Tensor, Tensor]:
        scored, rollout = experience.scored, experience.rollout
        kind, rewards = self.context.config.mask.label, experience.dense.sequence_rewards
        if kind == "value":  # in the critic's units: those of the shaped rewards
            rewards = self.advantages(experience)[1][:, 0]
        labels = chosen_labels(
            rewards,
            kind,
            rollout.group_ids.to(scored.values.device),
            values=scored.values[:, 0],  # of the prompt, before any token
            group=self.context.mesh.dp_group,
            has_reward=scored.has_reward,
        )
        return all_rows(experience), labels

    def advantages(self, experience: Experience) -> tuple[Tensor, Tensor]:
        """Advantages and returns of dense rewards, maybe with the KL in them (last stages)."""
        algorithm, scored = self.section, experience.scored
        rewards = experience.dense.shaped
        if algorithm.kl_in == "reward" and algorithm.kl_coef > 0:
            both = (scored.policy_logprobs, scored.reference_logprobs)
            rewards = rewards - algorithm.kl_coef * reward_penalty(*both, algorithm.kl_estimator)
        return gae(
            torch.where(scored.response_mask, rewards, 0.0),
            scored.values,
            scored.response_mask,
            algorithm.gamma,
            algorithm.gae_lambda,
            bootstrap_values=scored.bootstrap_values,
        )

    def targets(
        self, batch: MaskedBatch, rows: Tensor, experience: Experience
    ) -> tuple[PpoTargets, Metrics]:
        """What actor and critic learn from (last stages)."""
        scored, algorithm = experience.scored, self.section
        valid = scored.response_mask
        advantages, returns = self.advantages(experience)
        if algorithm.whiten_advantages:
            # Over all response tokens: eq. 14 masks the terms, not what A is made of.
            advantages = whiten(advantages, valid, self.context.mesh.dp_group)
        targets = PpoTargets(
            denominator=valid,  # the critic's; actor_step takes that of loss.denominator
            mask=batch.mask,
            valid=valid,
            reference_logprobs=scored.reference_logprobs,
            behaviour_logprobs=behaviour_logprobs(batch, scored),
            advantages=advantages,
            returns=returns,
            old_values=scored.values,
            kl_scale=torch.ones_like(returns[:, :1]),  # until with_kl_scale sees the optimizer step
        )
        return targets, {"ppo/returns": count_metric(returns.sum(), valid.sum())}

    def updates(self) -> dict[str, UpdateFunction]:
        return super().updates() | {"critic": self.critic_step}

    @property
    def reads_kept_alone(self) -> bool:
        algorithm = self.section
        return algorithm.kl_in == "reward" or algorithm.kl_coef == 0

    def actor_step(self, part: TrainBatch[PpoTargets]):
        """One optimizer step of the policy on eq. 14."""
        algorithm, kind = self.section, self.context.config.loss.denominator
        if part.targets is not None:
            counted = denominator_mask(part.targets.valid, part.targets.mask, kind)
            part = replace(part, targets=replace(part.targets, denominator=counted))
        loss = partial(ppo_actor_loss, clip_eps=algorithm.clip_eps)
        if algorithm.kl_in == "loss":
            part = self.with_kl_scale(part)
            loss = partial(loss, kl_coef=algorithm.kl_coef, estimator=algorithm.kl_estimator)
        return self.policy_step(part, self.on_policy(loss))

    def critic_step(self, part: TrainBatch[PpoTargets]):
        """One optimizer step of the critic, on all response tokens."""
        loss = partial(ppo_value_loss, clip_eps=self.section.value_clip_eps)
        # Whole rows, unlike the policy's: the value loss reads tokens that the mask drops.
        at, read = response_places(part), read_value()
        return optimizer_step(self.context, "critic", part, at, read, loss=loss, name="value")
