"""ADPO, eq. 15: better against worse answers to a prompt, on kept tokens."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from megatron_amrlhf.algorithms.choices import best_and_worst, pairs_above
from megatron_amrlhf.algorithms.selection import SelectionAlgorithm, rewards_by_prompt
from megatron_amrlhf.config.algorithms import DpoAlgorithm
from megatron_amrlhf.experience.maker import Experience
from megatron_amrlhf.losses.dpo import PairTargets, dpo_loss
from megatron_amrlhf.losses.targets import AnswerTargets
from megatron_amrlhf.types import MaskedBatch, TrainBatch


class Dpo(SelectionAlgorithm[DpoAlgorithm]):
    """Pairs lie in the batch as chosen, rejected, chosen, rejected ..."""

    def select(self, experience: Experience, step: int) -> tuple[Tensor, Tensor]:
        algorithm, rewards = self.section, rewards_by_prompt(experience)
        if algorithm.pairs == "best_worst":
            pairs = best_and_worst(rewards)
        else:
            pairs = pairs_above(rewards, algorithm.pair_margin)
        labels = torch.tensor([True, False], device=rewards.device).repeat(pairs.shape[0])
        return pairs.flatten(), labels

    def denominator(self, batch: MaskedBatch, valid: Tensor) -> Tensor:
        return batch.chosen[:, None]  # one a pair

    @property
    def reads_kept_alone(self) -> bool:
        return self.section.form == "inside"

    def record(self, answers: AnswerTargets) -> PairTargets:
        return PairTargets(**vars(answers))

    def actor_step(self, part: TrainBatch[PairTargets]):
        """One optimizer step of the policy on eq. 15."""
        algorithm = self.section
        loss = partial(dpo_loss, beta=algorithm.beta, form=algorithm.form)
        return self.policy_step(part, loss)
