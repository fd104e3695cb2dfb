"""What every ``algorithm.kind`` tells of itself, once, to all that has to know it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from megatron_amrlhf.config.section import Positive, Rows, Section

if TYPE_CHECKING:
    from megatron_amrlhf.config.schema import Config

LOGPROB, LOGPROB_AND_ENTROPY = 1, 2  # what is read of a language model's outputs


@dataclass(frozen=True)
class AlgorithmRole:
    """A model that an algorithm trains or compares with; reward models are the reward's.

    Attributes:
        name: of the role, as in checkpoints.
        trainable: whether it has an optimizer.
        head_outputs: None for a language model, else outputs of its linear head.
    """

    name: str
    trainable: bool = False
    head_outputs: int | None = None


@dataclass(frozen=True)
class Pass:
    """Passes of one kind in a step; the rows are a replica's, as long as they may be.

    Attributes:
        phase: rollout, score or update.
        role: which model.
        rows: of one pass, each a prompt and a response.
        times: passes a step.
        reads: per output of a language model, see ``planning/bytes_moved.py``.
        together: this many consecutive rows stay in one micro-batch.
    """

    phase: str
    role: str
    rows: int
    times: int = 1
    reads: int = LOGPROB
    together: int = 1


class AlgorithmSection(Section, ABC):
    """The base of every kind: its keys, and what it says of itself to everyone else.

    Attributes:
        trains_reward_model: it learns from labels; else it learns from answers, by their reward.
        data_formats: values of ``data.format`` that it can read.
        rows_together: rows that its loss reads at once.
        has_critic: it trains a critic.
        compares_answers: it needs several answers to a prompt.
        labels_answers: it learns from every answer, as a chosen or a rejected one.
        rejects_answers: some of the answers that it learns from may be rejected ones.
        loss_reads_label: also without a mask.
        counts_tokens: its loss is a mean over tokens, as ``loss.denominator`` counts them.
    """

    trains_reward_model: ClassVar[bool] = False
    data_formats: ClassVar[tuple[str, ...]] = ("prompts",)
    rows_together: ClassVar[int] = 1
    has_critic: ClassVar[bool] = False
    compares_answers: ClassVar[bool] = False
    labels_answers: ClassVar[bool] = False
    rejects_answers: ClassVar[bool] = True
    loss_reads_label: ClassVar[bool] = False
    counts_tokens: ClassVar[bool] = False

    kind: str

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps of each trained role in a step."""
        return 1

    def problems(self, config: Config) -> Iterator[str]:
        """Every broken rule between this section's keys and the run's others, with its fix."""
        yield from ()

    @abstractmethod
    def layout_problems(self, config: Config, replicas: int) -> Iterator[str]:
        """What does not divide by the data-parallel replicas, with its fix."""

    @abstractmethod
    def roles(self, config: Config) -> tuple[AlgorithmRole, ...]:
        """Its models, in the order in which a run makes them; the first is what it is for."""

    @abstractmethod
    def passes(self, config: Config, replicas: int) -> Iterator[Pass]:
        """What a step does on each replica, with the most rows that it may choose."""


class RewardModelSection(AlgorithmSection):
    """A kind that trains a reward model: one role, updates only."""

    trains_reward_model = True
    epochs: Positive = Field(1, description="passes over the data")
    batch_size: Rows = Field(16, description="rows an optimizer step, over all DP ranks")

    @property
    def num_outputs(self) -> int:
        """Outputs of the head."""
        return 1

    def layout_problems(self, config: Config, replicas: int) -> Iterator[str]:
        if self.batch_size % replicas:
            yield not_divided("algorithm.batch_size", self.batch_size, replicas)

    def roles(self, config: Config) -> tuple[AlgorithmRole, ...]:
        return (AlgorithmRole(self.kind, trainable=True, head_outputs=self.num_outputs),)

    def passes(self, config: Config, replicas: int) -> Iterator[Pass]:
        rows = max(self.batch_size // replicas, 1) * self.rows_together
        yield Pass("update", self.kind, rows, together=self.rows_together)


class PolicySection(AlgorithmSection):
    """A kind that improves a policy by answers: rollout, scores by every model, updates."""

    minibatches: Positive = Field(1, description="optimizer steps a rollout")

    @property
    def updates_per_step(self) -> int:
        return self.minibatches

    @property
    def implicit_beta(self) -> float:
        """Factor of the log-ratio in ``mask.signal: implicit``."""
        return 1.0

    def reads_policy(self, config: Config) -> bool:
        """Whether loss or mask reads the policy's log-probs at the start of a step.

        Else they are computed for metrics alone, of some answers.
        """
        return config.mask.kind == "adaptive" and config.mask.signal == "implicit"

    def fewest_units(self, samples: int) -> int:
        """Units of rows (``rows_together``) of a prompt that are learned from, at least."""
        return samples if self.labels_answers else 1

    def most_rows(self, samples: int) -> int:
        """Rows of a prompt with ``samples`` answers that are learned from, at most."""
        return samples

    def label_problems(self, config: Config) -> Iterator[str]:
        """What is wrong with ``mask.label``, where the mask or the loss reads it."""
        label = config.mask.label
        others = "batch or value" if self.has_critic else "batch"
        if label == "value" and not self.has_critic:
            yield f"mask.label: value needs a critic, which {self.kind} has not: use group or batch"
        elif label == "group" and config.rollout.samples_per_prompt < 2:
            yield (
                "mask.label: group compares answers to one prompt: use rollout.samples_per_prompt "
                f"of at least 2, or label {others}"
            )

    def layout_problems(self, config: Config, replicas: int) -> Iterator[str]:
        rollout = config.rollout
        if rollout.prompts_per_step % replicas:
            yield not_divided("rollout.prompts_per_step", rollout.prompts_per_step, replicas)
            return
        prompts = rollout.prompts_per_step // replicas
        most = prompts * self.fewest_units(rollout.samples_per_prompt)
        unit = "answers" if self.labels_answers else "prompts"
        if self.minibatches > most:
            yield (
                f"algorithm.minibatches = {self.minibatches} is more than the {most} {unit} a "
                f"step on each of the {replicas} replicas: use at most {most}"
            )

    def roles(self, config: Config) -> tuple[AlgorithmRole, ...]:
        critic = AlgorithmRole("critic", trainable=True, head_outputs=1)
        return (
            AlgorithmRole("actor", trainable=True),
            *((critic,) if self.has_critic else ()),
            AlgorithmRole("reference"),
        )

    def passes(self, config: Config, replicas: int) -> Iterator[Pass]:
        rollout, roles = config.rollout, self.roles(config)
        prompts = max(rollout.prompts_per_step // replicas, 1)
        samples = 2 if config.is_offline else rollout.samples_per_prompt
        if not config.is_offline:
            by_reference = prompts * rollout.reference_samples_per_prompt
            yield Pass("rollout", "actor", prompts * samples - by_reference)
            if by_reference:
                yield Pass("rollout", "reference", by_reference)
        answers = prompts * samples
        measured = answers if self.reads_policy(config) else measured_rows(config, answers)
        if measured:
            yield Pass("score", "actor", measured, reads=LOGPROB_AND_ENTROPY)
        for name in (*(role.name for role in roles[1:]), *config.reward_folders):
            yield Pass("score", name, answers)
        yield from self.more_passes(answers)
        together, chosen = self.rows_together, prompts * self.most_rows(samples)
        rows = max(-(-chosen // together // self.minibatches), 1) * together
        for role in roles:
            if role.trainable:
                yield Pass("update", role.name, rows, self.updates_per_step, together=together)

    def more_passes(self, answers: int) -> Iterator[Pass]:
        """What it scores beside every answer by every model."""
        yield from ()


def measured_rows(config: Config, answers: int) -> int:
    """Answers of a replica that the policy is measured on for the log, about."""
    return math.ceil(answers * config.run.policy_metrics)


def not_divided(key: str, value: int, replicas: int) -> str:
    """That the replicas cannot share ``value`` evenly, and which values they can."""
    up = -(-value // replicas) * replicas
    down = up - replicas
    choice = f"{down} or {up}" if down else str(up)
    return f"{key} = {value} does not divide by the {replicas} data-parallel replicas: use {choice}"


def unread(key: str, reader: str, found: object) -> str:
    """That only ``reader`` would read a key; ``found`` is what the run has, here or there."""
    return f"{key}: is read by {reader} only (got {found}), set that or leave it out"
