"""ADPO, eq. 15: better against worse answers to a prompt, on kept tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_amrlhf.algorithms.choices import best_and_worst, pairs_above
from megatron_amrlhf.algorithms.selection import SelectionAlgorithm, rewards_by_prompt
from megatron_amrlhf.algorithms.update import TermsFunction
from megatron_amrlhf.config.algorithms import DpoAlgorithm
from megatron_amrlhf.experience.maker import Judged
from megatron_amrlhf.losses.dpo import dpo_loss
from megatron_amrlhf.losses.reduce import LossOutput
from megatron_amrlhf.types import MaskedBatch, TrainBatch


class Dpo(SelectionAlgorithm):
    """Pairs lie in the batch as chosen, rejected, chosen, rejected ..."""

    def select(self, judged: Judged, step: int) -> tuple[Tensor, Tensor]:
        algorithm, rewards = self.context.config.algorithm, rewards_by_prompt(judged)
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
        return self.context.config.algorithm.form == "inside"

    def update_actor(self, part: TrainBatch, on_block):
        """One optimizer step of the policy on eq. 15."""
        terms = dpo_terms(self.context.config.algorithm)
        return self.update_policy(part, terms, on_block)


def dpo_terms(algorithm: DpoAlgorithm) -> TermsFunction:
    """The loss of rows chosen, rejected, chosen, rejected ... as ``update`` wants it.

    Its targets are ``[B, R]``: ``reference_logprobs``, ``mask`` and ``valid``.
    """

    def terms(logprobs: Tensor, targets: dict[str, Tensor]) -> LossOutput:
        reference, mask = targets["reference_logprobs"], targets["mask"]
        valid = targets["valid"]
        return dpo_loss(
            logprobs[0::2],
            logprobs[1::2],
            reference[0::2],
            reference[1::2],
            mask[0::2],
            mask[1::2],
            algorithm.beta,
            algorithm.form,
            valid[0::2],
            valid[1::2],
        )

    return terms
