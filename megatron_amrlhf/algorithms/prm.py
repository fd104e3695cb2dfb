"""Training a process reward model on step labels (paper, app. A)."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_amrlhf.algorithms.reward_training import RewardTraining
from megatron_amrlhf.algorithms.step_metrics import step_metrics
from megatron_amrlhf.algorithms.update import optimizer_step
from megatron_amrlhf.config.algorithms import PrmAlgorithm
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.data.lazy_rows import Rows
from megatron_amrlhf.data.prm_data import PrmExample, load_prm_examples
from megatron_amrlhf.data.readers import Readers
from megatron_amrlhf.data.rows import Selection
from megatron_amrlhf.engine.microbatch import OutputPlaces
from megatron_amrlhf.experience.scoring import Reader
from megatron_amrlhf.losses.prm import StepTargets, prm_loss
from megatron_amrlhf.parallel.collectives import (
    broadcast_object_from_last_stage,
    gather_objects,
)
from megatron_amrlhf.types import TrainBatch

THRESHOLDS = {"bce": 0.0, "mse": 0.5}  # above it a step is right: of a logit, of a value in [0, 1]


class Prm(RewardTraining[PrmExample, PrmAlgorithm]):
    """A head H -> D, read at the last token of every labelled step."""

    def load(
        self, path: str, config: Config, tokenizer: PreTrainedTokenizerBase, readers: Readers
    ) -> tuple[Rows[PrmExample], Selection]:
        count = self.section.num_attributes
        return load_prm_examples(path, tokenizer, config.data, count, readers)

    def batch(self, examples: list[PrmExample]) -> tuple[TrainBatch[StepTargets], OutputPlaces]:
        """Rows with ``[B, S, D]`` labels, and outputs at the labelled positions."""
        at = label_outputs(examples)
        attributes = self.section.num_attributes
        labels = torch.zeros(len(examples), at.width, attributes)
        present = torch.zeros(len(examples), at.width, dtype=torch.bool)
        for row, example in enumerate(examples):
            steps = example.labels.shape[0]
            labels[row, :steps], present[row, :steps] = example.labels, True
        device = self.context.mesh.device
        targets = StepTargets(denominator=present.to(device), labels=labels.to(device))
        lengths = [example.prompt_length for example in examples]
        batch = TrainBatch.whole(
            rows=tuple(example.row for example in examples),
            prompt_lengths=torch.tensor(lengths, dtype=torch.int64),
            targets=targets if self.context.mesh.is_last_stage else None,
        )
        return batch, at

    def train_step(self, batch: TrainBatch[StepTargets], at: OutputPlaces):
        """One optimizer step on the step labels."""
        read = Reader(outputs=lambda outputs, micro_batch: outputs.float())
        loss = partial(prm_loss, kind=self.section.loss)
        return optimizer_step(self.context, self.role, batch, at, read, loss=loss, name="prm")

    def heldout_metrics(
        self, examples: list[PrmExample], outputs: Tensor | None
    ) -> dict[str, float]:
        """Step accuracy and AUC on held-out solutions."""
        found, mesh = None, self.context.mesh
        if outputs is not None:
            labels = [example.labels.mean(dim=-1) for example in examples]
            pair = (outputs.mean(dim=-1), torch.cat([torch.zeros(0), *labels]))
            everyone = gather_objects(tuple(x.numpy() for x in pair), mesh.dp_group)
            scores, truth = (np.concatenate(part) for part in zip(*everyone, strict=True))
            threshold = THRESHOLDS[self.section.loss]
            found = step_metrics(scores, truth, threshold) | {"eval/num_steps": float(truth.size)}
        return broadcast_object_from_last_stage(found, mesh)


def label_outputs(examples: list[PrmExample]) -> OutputPlaces:
    """An output at the last token of every labelled step; column = number of the step."""
    counts = [example.label_positions.numel() for example in examples]
    # A replica may have no examples, and torch.cat takes no empty list.
    empty = torch.zeros(0, dtype=torch.int64)
    return OutputPlaces(
        rows=torch.cat([empty, *(torch.full((n,), i) for i, n in enumerate(counts))]),
        positions=torch.cat([empty, *(example.label_positions for example in examples)]),
        columns=torch.cat([empty, *(torch.arange(n) for n in counts)]),
        width=max(counts, default=1),
    )
