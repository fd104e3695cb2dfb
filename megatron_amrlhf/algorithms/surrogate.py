"""What PPO and GRPO have in common: a clipped surrogate on every answer, several passes."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from megatron_amrlhf.algorithms.policy import PolicyAlgorithm
from megatron_amrlhf.algorithms.update import (
    LossFunction,
    UpdateFunction,
    epoch_parts,
    run_updates,
)
from megatron_amrlhf.config.algorithms import SurrogateSection
from megatron_amrlhf.losses.grpo import GrpoTargets
from megatron_amrlhf.losses.ppo import PpoTargets
from megatron_amrlhf.losses.reduce import LossOutput, Metrics
from megatron_amrlhf.types import MaskedBatch, ScoredBatch, TrainBatch

C = TypeVar("C", bound=SurrogateSection)
X = TypeVar("X", PpoTargets, GrpoTargets)


class SurrogateAlgorithm(PolicyAlgorithm[C]):
    """Learns from every answer by the ratio of the policy to the model that sampled it."""

    def logprob_temperature(self) -> float:
        """The policy that acts is the softmax at the sampling temperature."""
        # Greedy decoding (0) has no softmax of its own.
        return self.context.config.rollout.temperature or 1.0

    @abstractmethod
    def actor_step(self, part: TrainBatch):
        """One optimizer step of the policy."""

    def on_policy(self, loss: LossFunction[X]) -> LossFunction[X]:
        """``loss``, where a rollout has one optimizer step with the ratio of the policy to itself.

        The log-probs before the step are those of the step's own forward, so nobody computes them
        beforehand: the ratio is exactly 1, its gradient that of the log-prob.
        """
        if self.section.reads_policy(self.context.config):
            return loss

        def of_itself(logprobs: Tensor, targets: X) -> LossOutput:
            return loss(logprobs, replace(targets, behaviour_logprobs=logprobs.detach()))

        return of_itself

    def updates(self) -> dict[str, UpdateFunction]:
        """The optimizer step of each role that is trained, in order."""
        return {"actor": self.actor_step}

    def update(self, train: TrainBatch, step: int) -> tuple[Metrics, dict]:
        """All optimizer steps on one rollout. Entered by every rank."""
        config, mesh = self.context.config, self.context.mesh
        epochs, minibatches = self.section.epochs, self.section.minibatches
        parts = epoch_parts(
            train,
            epochs=epochs,
            minibatches=minibatches,
            seed=config.run.seed,
            step=step,
            mesh=mesh,
        )
        return run_updates(self.context, parts, self.updates())


def behaviour_logprobs(batch: MaskedBatch, scored: ScoredBatch) -> Tensor:
    """``[B, R]`` log-probs of the model that sampled each answer: policy or reference.

    NaN where nobody has computed them, so that a loss that reads them all the same is none.
    """
    if scored.logprobs is None:
        return torch.full_like(scored.reference_logprobs, torch.nan)
    by_reference = batch.rollout.from_reference.to(batch.mask.device)[:, None]
    return torch.where(by_reference, scored.reference_logprobs, scored.logprobs)
