"""Training an outcome reward model on preference pairs, eq. 1: Bradley-Terry at the last token."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_amrlhf.algorithms.reward_training import RewardTraining
from megatron_amrlhf.algorithms.update import optimizer_step
from megatron_amrlhf.config.algorithms import OrmAlgorithm
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.data.lazy_rows import Rows
from megatron_amrlhf.data.pairs import EncodedPair, load_pairs
from megatron_amrlhf.data.readers import Readers
from megatron_amrlhf.data.rows import Selection
from megatron_amrlhf.engine.microbatch import OutputPlaces
from megatron_amrlhf.experience.context import count_metric
from megatron_amrlhf.experience.scoring import read_value
from megatron_amrlhf.losses.orm import larger_size, orm_loss, pair_accuracy
from megatron_amrlhf.losses.targets import Targets
from megatron_amrlhf.types import TrainBatch


class Orm(RewardTraining[EncodedPair, OrmAlgorithm]):
    """A head of one output, read at the end-of-turn token.

    Rows lie in a batch as chosen, rejected, chosen, rejected ...
    """

    def load(
        self, path: str, config: Config, tokenizer: PreTrainedTokenizerBase, readers: Readers
    ) -> tuple[Rows[EncodedPair], Selection]:
        return load_pairs(path, tokenizer, config.data, readers)

    def batch(self, examples: list[EncodedPair]) -> tuple[TrainBatch, OutputPlaces]:
        """Two rows a pair, of which the loss counts the first; an output at each last token."""
        is_chosen = torch.tensor([True, False], device=self.context.mesh.device)
        counted = is_chosen.repeat(len(examples))[:, None]
        lengths = [pair.prompt_length for pair in examples for _ in range(2)]
        batch = TrainBatch.whole(
            rows=tuple(row for pair in examples for row in (pair.chosen, pair.rejected)),
            prompt_lengths=torch.tensor(lengths, dtype=torch.int64),
            targets=Targets(counted) if self.context.mesh.is_last_stage else None,
        )
        return batch, last_outputs(batch.rows)

    def train_step(self, batch: TrainBatch, at: OutputPlaces):
        """One optimizer step on eq. 1."""
        return optimizer_step(
            self.context,
            self.role,
            batch,
            at,
            read_value(),
            loss=orm_loss,
            name="orm",
            together=self.section.rows_together,
        )

    def heldout_metrics(
        self, examples: list[EncodedPair], outputs: Tensor | None
    ) -> dict[str, float]:
        """Accuracy and margin on held-out pairs."""
        metrics = {}
        if outputs is not None:
            # [2 P], in turn, to [P, 2], to a row of each kind.
            chosen, rejected = outputs.to(self.context.mesh.device)[:, 0].unflatten(0, (-1, 2)).T
            margins = chosen - rejected
            accuracy = pair_accuracy(margins, larger_size(chosen, rejected)).sum()
            metrics = {
                "eval/pair_accuracy": count_metric(accuracy, margins.numel()),
                "eval/pair_margin": count_metric(margins.sum(), margins.numel()),
            }
        return self.context.publish(metrics)


def last_outputs(rows: tuple[Tensor, ...]) -> OutputPlaces:
    """One output a row, at its last token."""
    return OutputPlaces(
        rows=torch.arange(len(rows)),
        positions=torch.tensor([row.numel() - 1 for row in rows], dtype=torch.int64),
        columns=torch.zeros(len(rows), dtype=torch.int64),
        width=1,
    )
