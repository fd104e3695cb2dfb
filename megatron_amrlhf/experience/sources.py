"""Where the answers of a step come from: sampled here and now, or by another road."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from megatron_amrlhf.data.order import DataPosition, shard
from megatron_amrlhf.data.prompts import EncodedPrompt
from megatron_amrlhf.experience.context import Context
from megatron_amrlhf.experience.preemption import until_stopped
from megatron_amrlhf.parallel.mesh import Mesh
from megatron_amrlhf.rollout.generator import EngineGenerator, Generator
from megatron_amrlhf.rollout.sampling import SamplingSettings
from megatron_amrlhf.types import PromptBatch, RolloutBatch


class AnswerSource(Protocol):
    """Gives each step its prompts and answers. What it gives depends on the step alone.

    Attributes:
        unknown_metrics: how the names of metrics begin that say nothing about its answers.
    """

    unknown_metrics: tuple[str, ...]

    def prompts(self, step: int) -> PromptBatch:
        """This replica's prompts of a step, equal on all its ranks."""

    def answers(self, prompts: PromptBatch, step: int) -> RolloutBatch:
        """The answers to these, equal on all ranks of the replica. Entered by every rank.

        Raises:
            StepAbandoned: a rank has seen a request to stop, on every rank.
        """

    def rewards(self, answers: RolloutBatch) -> Tensor | None:
        """``[B, R]`` raw rewards that stand for a PRM's, on the CPU; None where there are none."""


class RolloutSource:
    """Samples answers of the policy and the reference to the prompts of a data set.

    Args:
        context: the run.
        data: the training prompts.
        position: which of them a step takes.
        generator: samples the answers.
    """

    unknown_metrics: tuple[str, ...] = ()

    def __init__(
        self,
        context: Context,
        data: Sequence[EncodedPrompt],
        position: DataPosition,
        generator: Generator,
    ):
        self.context, self.data, self.position = context, data, position
        self.generator = generator

    def prompts(self, step: int) -> PromptBatch:
        """This replica's prompts of a step."""
        places, indices = places_of(self.position, step, self.context.mesh)
        return prompt_batch([self.data[i] for i in indices], places)

    def answers(self, prompts: PromptBatch, step: int) -> RolloutBatch:
        """Answers of policy and reference: the phase ``rollout``. Entered by every rank."""
        context, section = self.context, self.context.config.rollout
        samples, by_reference = section.samples_per_prompt, section.reference_samples_per_prompt
        with context.phase("rollout", len(prompts.rows) * samples):
            return until_stopped(
                context, lambda: self.generator.generate(prompts, step, samples, by_reference)
            )

    def rewards(self, answers: RolloutBatch) -> Tensor | None:
        """None: a policy gives no rewards."""
        return None


def places_of(position: DataPosition, step: int, mesh: Mesh) -> tuple[Tensor, list[int]]:
    """This replica's places in a step's data, and their indices; of seed and step alone."""
    first = mesh.dp_rank * (position.per_step // mesh.dp_size)
    mine = shard(position.indices(step), mesh.dp_rank, mesh.dp_size)
    return torch.arange(first, first + len(mine)), mine


def prompt_batch(prompts: Sequence[EncodedPrompt], group_ids: Tensor) -> PromptBatch:
    """Prompts of a data set with their numbers in the step, ``[P]`` int64."""
    return PromptBatch(
        rows=tuple(prompt.row for prompt in prompts),
        group_ids=group_ids,
        texts=tuple(prompt.text for prompt in prompts),
        answers=tuple(prompt.answer for prompt in prompts),
        earlier=tuple(prompt.turns[:-1] for prompt in prompts),
    )


def make_generator(context: Context) -> Generator:
    """The run's generator, sampling as the configuration says."""
    rollout = context.config.rollout
    settings = SamplingSettings(
        max_new_tokens=rollout.max_new_tokens,
        max_row_tokens=context.config.data.max_row_tokens,
        temperature=rollout.temperature,
        top_k=rollout.top_k,
        top_p=rollout.top_p,
        end_ids=context.end_ids,
        usable=context.usable,
    )
    return EngineGenerator(
        context.engine,
        settings,
        seed=context.config.run.seed,
        micro_batch_size=rollout.micro_batch_size,
        wants_stop=context.stop.seen,
    )
