"""What DPO and rejection sampling have in common: they learn from some of the answers."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from megatron_amrlhf.algorithms.choices import is_flat
from megatron_amrlhf.algorithms.policy import PolicyAlgorithm
from megatron_amrlhf.algorithms.update import run_updates, split_units
from megatron_amrlhf.experience.context import count_metric
from megatron_amrlhf.experience.maker import Judged
from megatron_amrlhf.losses.reduce import Metrics
from megatron_amrlhf.losses.targets import AnswerTargets
from megatron_amrlhf.types import MaskedBatch, TrainBatch


class SelectionAlgorithm(PolicyAlgorithm):
    """Learns from selected answers, in units of rows that its loss reads together."""

    @property
    def rows_per_unit(self) -> int:
        """Rows that stay together."""
        return self.context.config.algorithm.rows_together

    @abstractmethod
    def select(self, judged: Judged, step: int) -> tuple[Tensor, Tensor]:
        """Indices of the answers to learn from and their labels, on a last stage."""

    @abstractmethod
    def denominator(self, batch: MaskedBatch, valid: Tensor) -> Tensor:
        """What the loss's mean counts, bool, on a last stage; ``valid`` is ``[B, R]`` bool."""

    @abstractmethod
    def targets(self, answers: AnswerTargets) -> AnswerTargets:
        """The record that the loss reads, on a last stage."""

    @abstractmethod
    def update_actor(self, part: TrainBatch):
        """One optimizer step of the policy."""

    def choose(self, judged: Judged, step: int) -> tuple[Tensor, Tensor]:
        """The selected answers; offline both answers of each pair, or its chosen one alone.

        Answers whose reward failed are not among them, nor are the other answers of their pairs.
        """
        if self.is_offline:
            rows = torch.arange(0, len(judged.rollout.rows), 2 // self.rows_per_unit)
            labels = (rows % 2 == 0).to(self.context.mesh.device)
        else:
            rows, labels = self.select(judged, step)
        return without_failed(rows, labels, judged.scored.judged, self.rows_per_unit)

    def learn(
        self, batch: MaskedBatch, rows: Tensor, judged: Judged, step: int
    ) -> tuple[Metrics, dict]:
        targets, metrics = None, {}
        if judged.scored is not None:
            if not self.is_offline:
                metrics = self.selection_metrics(judged, len(rows) // self.rows_per_unit)
            index = rows.to(batch.mask.device)
            width = batch.mask.shape[1]  # the longest of all answers may be not among them
            valid = judged.scored.response_mask[index, :width]
            answers = AnswerTargets(
                denominator=self.denominator(batch, valid),
                mask=batch.mask,
                valid=valid,
                reference_logprobs=judged.scored.reference_logprobs[index, :width],
            )
            targets = self.targets(answers)
        train = TrainBatch.of(batch, targets)
        learned, engine = self.update(train)
        return metrics | learned, engine

    def selection_metrics(self, judged: Judged, units: int) -> Metrics:
        """How many answers or pairs were selected, and where there was nothing to choose from."""
        rewards = rewards_by_prompt(judged)
        prompts = rewards.shape[0]
        return {
            "selection/per_prompt": count_metric(units, prompts),
            "selection/flat_groups": count_metric(is_flat(rewards).sum(), prompts),
        }

    def update(self, train: TrainBatch) -> tuple[Metrics, dict]:
        """All optimizer steps on one rollout, none on nothing. Entered by every rank."""
        size, mesh = self.rows_per_unit, self.context.mesh
        minibatches = self.context.config.algorithm.minibatches
        parts = []
        for units in split_units(len(train.rows) // size, minibatches, None, mesh):
            rows = units[:, None] * size + torch.arange(size)
            parts.append(train.select(rows.flatten()))
        return run_updates(self.context, parts, {"actor": self.update_actor})


def without_failed(
    rows: Tensor, labels: Tensor, judged: Tensor, rows_per_unit: int
) -> tuple[Tensor, Tensor]:
    """Rows and labels of the units all of whose answers have a reward.

    Args:
        rows: ``[U * rows_per_unit]`` int64 indices of answers, units one after the other.
        labels: of each row.
        judged: ``[B]`` bool, answers that have a reward.
        rows_per_unit: rows that stay together.
    """
    keep = (
        judged.to(rows.device)[rows]
        .reshape(-1, rows_per_unit)
        .all(dim=1)
        .repeat_interleave(rows_per_unit)
    )
    return rows[keep], labels[keep.to(labels.device)]


def rewards_by_prompt(judged: Judged) -> Tensor:
    """``[G, N]`` rewards of the N answers to each of this replica's G prompts, NaN where the reward
    failed (last stages).
    """
    return judged.dense.sequence_rewards.reshape(judged.rollout.group_ids.unique().numel(), -1)
