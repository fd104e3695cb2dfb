"""AGRPO: the clipped surrogate on kept tokens with group-relative advantages, no critic."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_amrlhf.algorithms.context import count_metric
from megatron_amrlhf.algorithms.experience import Judged
from megatron_amrlhf.algorithms.policy import PolicyAlgorithm, all_rows
from megatron_amrlhf.algorithms.scoring import read_logprobs
from megatron_amrlhf.algorithms.update import epoch_parts, response_plan, run_updates, update
from megatron_amrlhf.losses.grpo import group_advantages, grpo_loss
from megatron_amrlhf.losses.reduce import LossOutput, Metrics, denominator_mask, row_weights
from megatron_amrlhf.types import MaskedBatch, TrainBatch


class Grpo(PolicyAlgorithm):
    """Learns from every answer; one is chosen if its advantage is above 0."""

    @property
    def updates_per_step(self) -> int:
        algorithm = self.context.config.algorithm
        return algorithm.epochs * algorithm.minibatches

    def logprob_temperature(self) -> float:
        """The policy that acts is the softmax at the sampling temperature."""
        return self.context.config.rollout.temperature or 1.0

    def num_chosen(self, judged: Judged) -> int:
        return len(judged.rollout.rows)

    def advantages(self, judged: Judged) -> tuple[Tensor, Tensor]:
        """Advantage of each answer and standard deviation of its group (last stages)."""
        return group_advantages(
            judged.dense.sequence_rewards,
            judged.rollout.group_ids,
            self.context.config.algorithm.scale_rewards,
        )

    def choose(self, judged: Judged) -> tuple[Tensor, Tensor]:
        return all_rows(judged), self.advantages(judged)[0] > 0

    def learn(
        self, batch: MaskedBatch, rows: Tensor, judged: Judged, step: int
    ) -> tuple[Metrics, dict]:
        targets, metrics = {}, {}
        if judged.scored is not None:
            targets, metrics = self.targets(batch, judged)
        train = TrainBatch(batch.rollout.rows, batch.rollout.prompt_lengths, targets)
        learned, engine = self.update(train, step)
        return metrics | learned, engine

    def targets(self, batch: MaskedBatch, judged: Judged) -> tuple[dict[str, Tensor], Metrics]:
        """What the loss reads, and how the groups are spread (last stages)."""
        scored, config = judged.scored, self.context.config
        advantages, std = self.advantages(judged)
        # The behaviour policy of an answer is the model that sampled it.
        by_reference = batch.rollout.from_reference.to(batch.mask.device)[:, None]
        behaviour = torch.where(by_reference, scored.reference_logprobs, scored.logprobs)
        counted = denominator_mask(scored.response_mask, batch.mask, config.loss.denominator)
        by_row = config.algorithm.length_normalise == "sequence"
        targets = {
            "mask": batch.mask,
            "valid": scored.response_mask,
            "advantages": advantages,
            "behaviour_logprobs": behaviour,
            "reference_logprobs": scored.reference_logprobs,
            "weight": row_weights(counted) if by_row else torch.ones_like(advantages)[:, None],
            "denominator": torch.ones_like(counted[:, :1]) if by_row else counted,
        }
        count = advantages.numel()
        return targets, {
            "grpo/advantage": count_metric(advantages.abs().sum(), count),
            "grpo/flat_groups": count_metric((std == 0).sum(), count),
            "grpo/group_std": count_metric(std.sum(), count),
        }

    def update(self, train: TrainBatch, step: int) -> tuple[Metrics, dict]:
        """All optimizer steps on one rollout. Entered by every rank."""
        config = self.context.config
        algorithm, seed = config.algorithm, config.run.seed
        parts = epoch_parts(train, algorithm.epochs, algorithm.minibatches, seed, step)
        return run_updates(self.context, parts, {"actor": self.update_actor})

    def update_actor(self, part: TrainBatch, on_block):
        """One optimizer step of the policy."""
        algorithm = self.context.config.algorithm
        clip_eps, clip_eps_high = algorithm.clip_eps, algorithm.clip_eps_high

        def terms(logprobs: Tensor, targets: dict[str, Tensor]) -> LossOutput:
            out = grpo_loss(
                logprobs,
                targets["behaviour_logprobs"],
                targets["reference_logprobs"],
                targets["advantages"],
                targets["mask"],
                targets["valid"],
                clip_eps,
                clip_eps if clip_eps_high is None else clip_eps_high,
                algorithm.kl_coef,
                algorithm.kl_estimator,
            )
            return LossOutput(out.terms * targets["weight"], out.metrics)

        read = read_logprobs(self.context, self.logprob_temperature())
        plan = response_plan(part)
        return update(self.context, "actor", part, plan, read, terms, "policy", on_block)
