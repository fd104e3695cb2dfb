"""What DPO and rejection sampling have in common: they learn from some of the answers."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from megatron_amrlhf.algorithms.choices import is_flat
from megatron_amrlhf.algorithms.policy import PolicyAlgorithm, S
from megatron_amrlhf.algorithms.update import run_updates, split_units
from megatron_amrlhf.experience.context import count_metric
from megatron_amrlhf.experience.maker import Experience
from megatron_amrlhf.losses.reduce import Metrics
from megatron_amrlhf.losses.targets import AnswerTargets
from megatron_amrlhf.types import MaskedBatch, TrainBatch


class SelectionAlgorithm(PolicyAlgorithm[S]):
    """Learns from selected answers, in units of rows that its loss reads together."""

    @property
    def rows_per_unit(self) -> int:
        """Rows that stay together."""
        return self.section.rows_together

    @abstractmethod
    def select(self, experience: Experience, step: int) -> tuple[Tensor, Tensor]:
        """Indices of the answers to learn from and their labels, on a last stage."""

    @abstractmethod
    def denominator(self, batch: MaskedBatch, valid: Tensor) -> Tensor:
        """What the loss's mean counts, bool, on a last stage; ``valid`` is ``[B, R]`` bool."""

    @abstractmethod
    def record(self, answers: AnswerTargets) -> AnswerTargets:
        """The record that the loss reads, on a last stage."""

    @abstractmethod
    def actor_step(self, part: TrainBatch):
        """One optimizer step of the policy."""

    def choose(self, experience: Experience, step: int) -> tuple[Tensor, Tensor]:
        """The selected answers; offline both answers of each pair, or its chosen one alone.

        Answers whose reward failed are not among them, nor are the other answers of their pairs.
        """
        if self.is_offline:
            # Chosen and rejected lie in turn: all rows for pairs, every other one for answers.
            rows = torch.arange(0, len(experience.rollout.rows), 2 // self.rows_per_unit)
            labels = (rows % 2 == 0).to(self.context.mesh.device)
        else:
            rows, labels = self.select(experience, step)
        return without_failed(rows, labels, experience.scored.has_reward, self.rows_per_unit)

    def targets(
        self, batch: MaskedBatch, rows: Tensor, experience: Experience
    ) -> tuple[AnswerTargets, Metrics]:
        """What the loss reads of the selected answers, and of what they were selected from."""
        metrics = {}
        if not self.is_offline:
            metrics = self.selection_metrics(experience, len(rows) // self.rows_per_unit)
        index = rows.to(batch.mask.device)
        width = batch.mask.shape[1]  # the longest of all answers may be not among them
        valid = experience.scored.response_mask[index, :width]
        answers = AnswerTargets(
            denominator=self.denominator(batch, valid),
            mask=batch.mask,
            valid=valid,
            reference_logprobs=experience.scored.reference_logprobs[index, :width],
        )
        return self.record(answers), metrics

    def selection_metrics(self, experience: Experience, units: int) -> Metrics:
        """How many answers or pairs were selected, and where there was nothing to choose from."""
        rewards = rewards_by_prompt(experience)
        prompts = rewards.shape[0]
        return {
            "selection/per_prompt": count_metric(units, prompts),
            "selection/flat_groups": count_metric(is_flat(rewards).sum(), prompts),
        }

    def update(self, train: TrainBatch, step: int) -> tuple[Metrics, dict]:
        """All optimizer steps on one rollout, none on nothing. Entered by every rank."""
        size, mesh = self.rows_per_unit, self.context.mesh
        minibatches = self.section.minibatches
        parts = []
        for units in split_units(len(train.rows) // size, minibatches, None, mesh):
            rows = units[:, None] * size + torch.arange(size)
            parts.append(train.select(rows.flatten()))
        return run_updates(self.context, parts, {"actor": self.actor_step})


def without_failed(
    rows: Tensor, labels: Tensor, has_reward: Tensor, rows_per_unit: int
) -> tuple[Tensor, Tensor]:
    """Rows and labels of the units all of whose answers have a reward.

    Args:
        rows: ``[U * rows_per_unit]`` int64 indices of answers, units one after the other.
        labels: of each row.
        has_reward: ``[B]`` bool, answers that have a reward.
        rows_per_unit: rows that stay together.
    """
    keep = (
        has_reward.to(rows.device)[rows]
        .reshape(-1, rows_per_unit)
        .all(dim=1)
        .repeat_interleave(rows_per_unit)
    )
    return rows[keep], labels[keep.to(labels.device)]


def rewards_by_prompt(experience: Experience) -> Tensor:
    """``[G, N]`` rewards of the N answers to each of this replica's G prompts, NaN where the reward
    failed (last stages).
    """
    prompts = experience.rollout.group_ids.unique().numel()
    return experience.dense.sequence_rewards.reshape(prompts, -1)
