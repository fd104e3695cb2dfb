"""Training a process reward model on step labels (paper, app. A)."""

from __future__ import annotations

import time

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_amrlhf.algorithms.context import Context
from megatron_amrlhf.algorithms.scoring import Reader
from megatron_amrlhf.algorithms.update import run_updates, update
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.data.order import PADDING, shard, take
from megatron_amrlhf.data.prm_data import PrmExample, load_prm_examples
from megatron_amrlhf.engine.microbatch import OutputPlan
from megatron_amrlhf.evaluation.steps import step_metrics
from megatron_amrlhf.losses.prm import prm_loss
from megatron_amrlhf.losses.reduce import LossOutput
from megatron_amrlhf.parallel.collectives import (
    broadcast_object_from_last_stage,
    gather_objects,
)
from megatron_amrlhf.types import TrainBatch

THRESHOLDS = {"bce": 0.0, "mse": 0.5}


class Prm:
    """A backbone with a head H -> D, read at the last token of every labelled step."""

    trained_role = "prm"
    evaluates_at_start = False  # a new head is 0 for every step: chance

    context: Context  # set by build()

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase):
        """Reads and checks the step-labelled data; no process group is needed.

        Raises:
            UserError: the data are wrong.
        """
        attributes = config.algorithm.num_attributes
        self.examples = load_prm_examples(config.data.train, tokenizer, config.data, attributes)
        self.heldout: list[PrmExample] = []
        if config.data.heldout is not None:
            self.heldout = load_prm_examples(
                config.data.heldout, tokenizer, config.data, attributes
            )
        rows, size = len(self.examples) * config.algorithm.epochs, config.algorithm.batch_size
        self.total_steps = config.run.steps or -(-rows // size)

    def build(self, context: Context) -> None:
        """Adds the one role. Entered by every rank."""
        self.context, config = context, context.config
        context.role(
            "prm",
            context.model_folder,
            config.algorithm.num_attributes,
            learning_rate=config.optimizer.lr,
            total_steps=self.total_steps,
        )

    def step(self, step: int) -> dict[str, float]:
        """One optimizer step on ``batch_size`` solutions. Entered by every rank."""
        context, config = self.context, self.context.config
        size, start = config.algorithm.batch_size, time.perf_counter()
        indices = take(len(self.examples), config.run.seed, (step - 1) * size, size)
        mine = shard(indices, context.mesh.dp_rank, context.mesh.dp_size)
        examples = [self.examples[i] for i in mine if i != PADDING]
        batch, plan = self.batch(examples)
        metrics, engine = run_updates(
            context, [batch], {"prm": lambda part, tick: self.update(part, plan, tick)}
        )
        seconds = time.perf_counter() - start
        tokens = sum(example.row.numel() for example in examples) * context.mesh.dp_size
        return (
            context.publish(metrics)
            | engine
            | {
                "time/update_seconds": seconds,
                "throughput/update_tokens_per_second": tokens / seconds,
            }
        )

    def batch(self, examples: list[PrmExample]) -> tuple[TrainBatch, OutputPlan]:
        """Rows with ``[B, S, D]`` labels, and outputs at the labelled positions."""
        plan = label_outputs(examples)
        attributes = self.context.config.algorithm.num_attributes
        labels = torch.zeros(len(examples), plan.width, attributes)
        present = torch.zeros(len(examples), plan.width, dtype=torch.bool)
        for row, example in enumerate(examples):
            steps = example.labels.shape[0]
            labels[row, :steps], present[row, :steps] = example.labels, True
        device = self.context.mesh.device
        targets = {"labels": labels.to(device), "denominator": present.to(device)}
        return (
            TrainBatch(
                rows=tuple(example.row for example in examples),
                prompt_lengths=torch.tensor([example.prompt_length for example in examples]),
                targets=targets if self.context.mesh.is_last_stage else {},
            ),
            plan,
        )

    def update(self, batch: TrainBatch, plan: OutputPlan, on_block):
        """One optimizer step on the step labels."""
        kind = self.context.config.algorithm.loss

        read = Reader(outputs=lambda outputs, block: outputs.float())

        def terms(outputs: Tensor, targets: dict[str, Tensor]) -> LossOutput:
            return prm_loss(outputs, targets["labels"], targets["denominator"], kind)

        return update(self.context, "prm", batch, plan, read, terms, "prm", on_block)

    def evaluate(self) -> dict[str, float]:
        """Step accuracy and AUC on held-out solutions. Entered by every rank."""
        context, mesh = self.context, self.context.mesh
        if not self.heldout:
            return {}
        mine = shard(list(range(len(self.heldout))), mesh.dp_rank, mesh.dp_size)
        examples = [self.heldout[i] for i in mine if i != PADDING]
        plan = label_outputs(examples)
        with context.console.track("evaluate", len(examples)) as bar:
            rewards = context.engine.score(
                "prm",
                tuple(example.row for example in examples),
                plan,
                None,
                lambda outputs, block: block.rectangle(outputs.float().mean(-1), plan.width),
                bar.advance,
            )
        found = None
        if mesh.is_last_stage:
            labels = [example.labels.mean(dim=-1) for example in examples]
            scores = rewards.cpu()[plan.rows, plan.columns]
            pair = (scores, torch.cat([torch.zeros(0), *labels]))
            everyone = gather_objects(tuple(x.numpy() for x in pair), mesh.dp_group)
            scores, truth = (np.concatenate(part) for part in zip(*everyone, strict=True))
            threshold = THRESHOLDS[context.config.algorithm.loss]
            found = step_metrics(scores, truth, threshold) | {"prm/num_steps": float(truth.size)}
        return broadcast_object_from_last_stage(found, mesh)

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        assert not state


def label_outputs(examples: list[PrmExample]) -> OutputPlan:
    """An output at the last token of every labelled step; column = number of the step."""
    counts = [example.label_positions.numel() for example in examples]
    empty = torch.zeros(0, dtype=torch.int64)
    return OutputPlan(
        rows=torch.cat([empty, *(torch.full((n,), i) for i, n in enumerate(counts))]),
        positions=torch.cat([empty, *(example.label_positions for example in examples)]),
        columns=torch.cat([empty, *(torch.arange(n) for n in counts)]),
        width=max(counts, default=1),
    )
