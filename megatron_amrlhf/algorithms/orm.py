"""Training an outcome reward model on preference pairs, eq. 1: Bradley-Terry at the last token."""

from __future__ import annotations

import time

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_amrlhf.algorithms.context import Context, count_metric
from megatron_amrlhf.algorithms.scoring import read_value
from megatron_amrlhf.algorithms.update import run_updates, update
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.data.order import PADDING, shard, take
from megatron_amrlhf.data.pairs import EncodedPair, load_pairs
from megatron_amrlhf.engine.microbatch import OutputPlan
from megatron_amrlhf.losses.orm import orm_loss, pair_accuracy
from megatron_amrlhf.losses.reduce import LossOutput
from megatron_amrlhf.types import TrainBatch


class Orm:
    """A backbone with a head of one output, read at the end-of-turn token.

    Rows lie in a batch as chosen, rejected, chosen, rejected ...
    """

    trained_role = "orm"
    evaluates_at_start = False  # a new head is 0 for every answer: chance

    context: Context  # set by build()

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase):
        """Reads and checks the pairs; no process group is needed.

        Raises:
            UserError: the data are wrong.
        """
        self.pairs = load_pairs(config.data.train, tokenizer, config.data)
        self.heldout: list[EncodedPair] = []
        if config.data.heldout is not None:
            self.heldout = load_pairs(config.data.heldout, tokenizer, config.data)
        pairs, size = len(self.pairs) * config.algorithm.epochs, config.algorithm.batch_size
        self.total_steps = config.run.steps or -(-pairs // size)

    def build(self, context: Context) -> None:
        """Adds the one role. Entered by every rank."""
        self.context, rate = context, context.config.optimizer.lr
        folder, steps = context.model_folder, self.total_steps
        context.role("orm", folder, 1, learning_rate=rate, total_steps=steps)

    def step(self, step: int) -> dict[str, float]:
        """One optimizer step on ``batch_size`` pairs. Entered by every rank."""
        context, config = self.context, self.context.config
        size, start = config.algorithm.batch_size, time.perf_counter()
        indices = take(len(self.pairs), config.run.seed, (step - 1) * size, size)
        mine = shard(indices, context.mesh.dp_rank, context.mesh.dp_size)
        batch = self.batch([self.pairs[i] for i in mine if i != PADDING])
        metrics, engine = run_updates(context, [batch], {"orm": self.update})
        seconds = time.perf_counter() - start
        tokens = sum(row.numel() for row in batch.rows) * context.mesh.dp_size
        timings = {
            "time/update_seconds": seconds,
            "throughput/update_tokens_per_second": tokens / seconds,
        }
        return context.publish(metrics) | engine | timings

    def batch(self, pairs: list[EncodedPair]) -> TrainBatch:
        """Two rows a pair; the loss counts the first of them."""
        is_chosen = torch.tensor([True, False], device=self.context.mesh.device)
        counted = is_chosen.repeat(len(pairs))[:, None]
        lengths = [pair.prompt_length for pair in pairs for _ in range(2)]
        return TrainBatch(
            rows=pair_rows(pairs),
            prompt_lengths=torch.tensor(lengths, dtype=torch.int64),
            targets={"denominator": counted} if self.context.mesh.is_last_stage else {},
        )

    def update(self, batch: TrainBatch, on_block):
        """One optimizer step on eq. 1."""

        def terms(rewards: Tensor, targets: dict[str, Tensor]) -> LossOutput:
            present = targets["denominator"][0::2, 0]
            return orm_loss(rewards[0::2, 0][present], rewards[1::2, 0][present])

        plan = last_outputs(batch.rows)
        read = read_value()
        return update(self.context, "orm", batch, plan, read, terms, "orm", on_block, together=2)

    def evaluate(self) -> dict[str, float]:
        """Accuracy and margin on held-out pairs. Entered by every rank."""
        context, mesh = self.context, self.context.mesh
        if not self.heldout:
            return {}
        mine = shard(list(range(len(self.heldout))), mesh.dp_rank, mesh.dp_size)
        rows = pair_rows([self.heldout[i] for i in mine if i != PADDING])
        with context.console.track("evaluate", len(rows)) as bar:
            rewards = context.engine.score(
                "orm",
                rows,
                last_outputs(rows),
                None,
                lambda outputs, block: block.rectangle(outputs[:, 0].float(), 1)[:, 0],
                bar.advance,
            )
        metrics = {}
        if mesh.is_last_stage:
            margins = rewards[0::2] - rewards[1::2]
            metrics = {
                "eval/pair_accuracy": count_metric(pair_accuracy(margins).sum(), margins.numel()),
                "eval/pair_margin": count_metric(margins.sum(), margins.numel()),
            }
        return context.publish(metrics)

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        assert not state


def pair_rows(pairs: list[EncodedPair]) -> tuple[Tensor, ...]:
    """Chosen, rejected, chosen, rejected ..."""
    return tuple(row for pair in pairs for row in (pair.chosen, pair.rejected))


def last_outputs(rows: tuple[Tensor, ...]) -> OutputPlan:
    """One output a row, at its last token."""
    return OutputPlan(
        rows=torch.arange(len(rows)),
        positions=torch.tensor([row.numel() - 1 for row in rows], dtype=torch.int64),
        columns=torch.zeros(len(rows), dtype=torch.int64),
        width=1,
    )
