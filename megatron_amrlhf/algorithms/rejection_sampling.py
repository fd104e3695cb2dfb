"""ARS, eq. 16: likelihood of the kept tokens of the best answers, and KL to the reference."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from megatron_amrlhf.algorithms.choices import top_rows
from megatron_amrlhf.algorithms.selection import SelectionAlgorithm, rewards_by_prompt
from megatron_amrlhf.config.algorithms import RejectionSamplingAlgorithm
from megatron_amrlhf.experience.maker import Experience
from megatron_amrlhf.losses.reduce import denominator_mask
from megatron_amrlhf.losses.rejection_sampling import SelectedTargets, rejection_sampling_loss
from megatron_amrlhf.losses.targets import AnswerTargets
from megatron_amrlhf.rollout.sampling import uniforms
from megatron_amrlhf.types import MaskedBatch, TrainBatch


class RejectionSampling(SelectionAlgorithm[RejectionSamplingAlgorithm]):
    """Learns from selected answers to each prompt; all of them are chosen ones."""

    def select(self, experience: Experience, step: int) -> tuple[Tensor, Tensor]:
        algorithm, scores = self.section, rewards_by_prompt(experience)
        if algorithm.select == "threshold":
            counts = (scores >= algorithm.threshold).sum(dim=1)
        else:  # best: k is 1
            counts = torch.full_like(scores[:, 0], algorithm.k, dtype=torch.int64)
        if algorithm.control == "random":
            # The counts stay, so that the control differs in which answers, not in how many.
            chance = self.random_scores(experience, step).view_as(scores).to(scores.device)
            scores = torch.where(scores.isnan(), torch.nan, chance)
        rows = top_rows(scores, counts)
        return rows, torch.ones_like(rows, dtype=torch.bool)

    def random_scores(self, experience: Experience, step: int) -> Tensor:
        """``[B]`` float64 in [0, 1), by seed, step and sample alone, so of no layout."""
        # The negative step gives other numbers than those that the answers were sampled by.
        return uniforms(self.context.config.run.seed, -step, experience.rollout.sample_ids, 1)[:, 0]

    def denominator(self, batch: MaskedBatch, valid: Tensor) -> Tensor:
        return denominator_mask(valid, batch.mask, self.context.config.loss.denominator)

    @property
    def reads_kept_alone(self) -> bool:
        return self.section.kl_coef == 0

    def record(self, answers: AnswerTargets) -> SelectedTargets:
        # Ones until with_kl_scale sees the rows of an optimizer step.
        one_B1 = torch.ones_like(answers.reference_logprobs[:, :1])
        return SelectedTargets(**vars(answers), kl_scale=one_B1)

    def actor_step(self, part: TrainBatch[SelectedTargets]):
        """One optimizer step of the policy on eq. 16."""
        algorithm, part = self.section, self.with_kl_scale(part)
        loss = partial(
            rejection_sampling_loss, kl_coef=algorithm.kl_coef, estimator=algorithm.kl_estimator
        )
        return self.policy_step(part, loss)
