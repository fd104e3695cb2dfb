"""ARS, eq. 16: likelihood of the kept tokens of the best answer, and KL to the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_amrlhf.algorithms.experience import Judged
from megatron_amrlhf.algorithms.selection import SelectionAlgorithm
from megatron_amrlhf.losses.reduce import LossOutput, denominator_mask
from megatron_amrlhf.losses.rejection_sampling import rejection_sampling_loss
from megatron_amrlhf.types import MaskedBatch, TrainBatch


class RejectionSampling(SelectionAlgorithm):
    """Learns from the best of each prompt's answers; all of them are chosen ones."""

    def choose(self, judged: Judged) -> tuple[Tensor, Tensor]:
        rewards = judged.dense.sequence_rewards.reshape(
            judged.rollout.group_ids.unique().numel(), -1
        )
        first = torch.arange(rewards.shape[0], device=rewards.device) * rewards.shape[1]
        best = first + rewards.argmax(dim=1)
        return best, torch.ones_like(best, dtype=torch.bool)

    def denominator(self, batch: MaskedBatch, valid: Tensor) -> Tensor:
        return denominator_mask(valid, batch.mask, self.context.config.loss.denominator)

    def update_actor(self, part: TrainBatch, on_block):
        """One optimizer step of the policy on eq. 16."""
        algorithm = self.context.config.algorithm

        def terms(logprobs: Tensor, targets: dict[str, Tensor]) -> LossOutput:
            return rejection_sampling_loss(
                logprobs,
                targets["reference_logprobs"],
                targets["mask"],
                targets["valid"],
                algorithm.kl_coef,
                algorithm.kl_estimator,
            )

        return self.update_policy(part, terms, on_block)
