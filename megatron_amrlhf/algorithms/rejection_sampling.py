"""ARS, eq. 16: likelihood of the kept tokens of the best answer, and KL to the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_amrlhf.algorithms.experience import Judged
from megatron_amrlhf.algorithms.policy import PolicyAlgorithm
from megatron_amrlhf.algorithms.scoring import read_logprobs
from megatron_amrlhf.algorithms.update import response_plan, run_updates, split_rows, update
from megatron_amrlhf.losses.reduce import LossOutput, Metrics, denominator_mask
from megatron_amrlhf.losses.rejection_sampling import rejection_sampling_loss
from megatron_amrlhf.types import MaskedBatch, TrainBatch


class RejectionSampling(PolicyAlgorithm):
    """Learns from the best of each prompt's answers; all of them are chosen ones."""

    def num_chosen(self, judged: Judged) -> int:
        return judged.rollout.group_ids.unique().numel()

    def choose(self, judged: Judged) -> tuple[Tensor, Tensor]:
        rewards = judged.dense.sequence_rewards.reshape(self.num_chosen(judged), -1)
        first = torch.arange(rewards.shape[0], device=rewards.device) * rewards.shape[1]
        best = first + rewards.argmax(dim=1)
        return best, torch.ones_like(best, dtype=torch.bool)

    def learn(
        self, batch: MaskedBatch, rows: Tensor, judged: Judged, step: int
    ) -> tuple[Metrics, dict]:
        targets = {}
        if judged.scored is not None:
            index = rows.to(batch.mask.device)
            valid = judged.scored.response_mask[index]
            kind = self.context.config.loss.denominator
            targets = {
                "mask": batch.mask,
                "valid": valid,
                "reference_logprobs": judged.scored.reference_logprobs[index],
                "denominator": denominator_mask(valid, batch.mask, kind),
            }
        train = TrainBatch(batch.rollout.rows, batch.rollout.prompt_lengths, targets)
        return self.update(train)

    def update(self, train: TrainBatch) -> tuple[Metrics, dict]:
        """All optimizer steps on one rollout. Entered by every rank."""
        minibatches = self.context.config.algorithm.minibatches
        parts = [train.select(i) for i in split_rows(len(train.rows), minibatches, None)]
        return run_updates(self.context, parts, {"actor": self.update_actor})

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

        read = read_logprobs(self.context, self.logprob_temperature())
        plan = response_plan(part)
        return update(self.context, "actor", part, plan, read, terms, "policy", on_block)
