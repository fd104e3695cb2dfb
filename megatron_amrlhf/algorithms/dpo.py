"""ADPO, eq. 15: the best against the worst answer to each prompt, on kept tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_amrlhf.algorithms.experience import Judged
from megatron_amrlhf.algorithms.selection import SelectionAlgorithm
from megatron_amrlhf.losses.dpo import dpo_loss
from megatron_amrlhf.losses.reduce import LossOutput
from megatron_amrlhf.types import MaskedBatch, TrainBatch


class Dpo(SelectionAlgorithm):
    """Pairs lie in the batch as chosen, rejected, chosen, rejected ..."""

    rows_per_unit = 2

    def choose(self, judged: Judged) -> tuple[Tensor, Tensor]:
        rewards = judged.dense.sequence_rewards.reshape(_num_groups(judged), -1)
        first = torch.arange(rewards.shape[0], device=rewards.device) * rewards.shape[1]
        # Of equal rewards: the first is the best, the last the worst, so they always differ.
        best = first + rewards.argmax(dim=1)
        worst = first + rewards.shape[1] - 1 - rewards.flip(1).argmin(dim=1)
        labels = torch.tensor([True, False], device=rewards.device).repeat(rewards.shape[0])
        return torch.stack([best, worst], dim=1).reshape(-1), labels

    def denominator(self, batch: MaskedBatch, valid: Tensor) -> Tensor:
        return batch.chosen[:, None]  # one a pair

    def update_actor(self, part: TrainBatch, on_block):
        """One optimizer step of the policy on eq. 15."""
        algorithm = self.context.config.algorithm

        def terms(logprobs: Tensor, targets: dict[str, Tensor]) -> LossOutput:
            reference, mask = targets["reference_logprobs"], targets["mask"]
            valid, present = targets["valid"], targets["valid"][0::2].any(dim=1)
            return dpo_loss(
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

        return self.update_policy(part, terms, on_block)


def _num_groups(judged: Judged) -> int:
    return judged.rollout.group_ids.unique().numel()
