"""ADPO, eq. 15: the best against the worst answer to each prompt, on kept tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_amrlhf.algorithms.experience import Judged
from megatron_amrlhf.algorithms.policy import PolicyAlgorithm
from megatron_amrlhf.algorithms.scoring import read_logprobs
from megatron_amrlhf.algorithms.update import response_plan, run_updates, split_rows, update
from megatron_amrlhf.losses.dpo import dpo_loss
from megatron_amrlhf.losses.reduce import LossOutput, Metrics
from megatron_amrlhf.types import MaskedBatch, TrainBatch


class Dpo(PolicyAlgorithm):
    """Pairs lie in the batch as chosen, rejected, chosen, rejected ..."""

    def num_chosen(self, judged: Judged) -> int:
        return 2 * _num_groups(judged)

    def choose(self, judged: Judged) -> tuple[Tensor, Tensor]:
        rewards = judged.dense.sequence_rewards.reshape(_num_groups(judged), -1)
        first = torch.arange(rewards.shape[0], device=rewards.device) * rewards.shape[1]
        # Of equal rewards: the first is the best, the last the worst, so they always differ.
        best = first + rewards.argmax(dim=1)
        worst = first + rewards.shape[1] - 1 - rewards.flip(1).argmin(dim=1)
        labels = torch.tensor([True, False], device=rewards.device).repeat(rewards.shape[0])
        return torch.stack([best, worst], dim=1).reshape(-1), labels

    def learn(
        self, batch: MaskedBatch, rows: Tensor, judged: Judged, step: int
    ) -> tuple[Metrics, dict]:
        targets = {}
        if judged.scored is not None:
            index = rows.to(batch.mask.device)
            valid = judged.scored.response_mask[index]
            targets = {
                "mask": batch.mask,
                "valid": valid,
                "reference_logprobs": judged.scored.reference_logprobs[index],
                "denominator": batch.chosen[:, None],  # one a pair
            }
        train = TrainBatch(batch.rollout.rows, batch.rollout.prompt_lengths, targets)
        return self.update(train)

    def update(self, train: TrainBatch) -> tuple[Metrics, dict]:
        """All optimizer steps on one rollout. Entered by every rank."""
        algorithm = self.context.config.algorithm
        parts = []
        for pairs in split_rows(len(train.rows) // 2, algorithm.minibatches, None):
            index = torch.stack([2 * pairs, 2 * pairs + 1], dim=1).reshape(-1)
            parts.append(train.select(index))
        return run_updates(self.context, parts, {"actor": self.update_actor})

    def update_actor(self, part: TrainBatch, on_block):
        """One optimizer step of the policy on eq. 15."""
        algorithm = self.context.config.algorithm

        def terms(logprobs: Tensor, targets: dict[str, Tensor]) -> LossOutput:
            reference, mask = targets["reference_logprobs"], targets["mask"]
            valid, present = targets["valid"], targets["valid"][0::2].any(dim=1)
            out = dpo_loss(
                logprobs[0::2][present],
                logprobs[1::2][present],
                reference[0::2][present],
                reference[1::2][present],
                mask[0::2][present],
                mask[1::2][present],
                algorithm.beta,
                algorithm.form,
                valid[0::2][present],
                valid[1::2][present],
            )
            return out

        read = read_logprobs(self.context, self.logprob_temperature())
        plan = response_plan(part)
        return update(
            self.context, "actor", part, plan, read, terms, "policy", on_block, together=2
        )


def _num_groups(judged: Judged) -> int:
    return judged.rollout.group_ids.unique().numel()
