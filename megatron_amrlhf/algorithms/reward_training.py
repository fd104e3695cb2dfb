"""What training a PRM and an ORM have in common: one role, shuffled examples, no rollouts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar, Generic, Protocol, TypeVar, cast

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_amrlhf.algorithms.update import run_updates
from megatron_amrlhf.config.algorithm_section import AlgorithmRole, RewardModelSection
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.data.lazy_rows import Rows, highest_rows
from megatron_amrlhf.data.order import PADDING, DataPosition, shard
from megatron_amrlhf.data.readers import ALONE, Readers
from megatron_amrlhf.data.rows import Selection
from megatron_amrlhf.engine.microbatch import OutputPlaces
from megatron_amrlhf.experience.context import Context
from megatron_amrlhf.types import TrainBatch


class HasRows(Protocol):
    """What every example has."""

    @property
    def rows(self) -> Iterable[Tensor]:
        """Token ids, 1-D int64."""


Example = TypeVar("Example", bound=HasRows)
S = TypeVar("S", bound=RewardModelSection)


class RewardTraining(ABC, Generic[Example, S]):
    """A backbone with a linear head that learns from examples.

    Subclasses say how a file is read, how examples become rows, and what is learned from these.

    Attributes:
        section: the algorithm's own keys of the configuration.
    """

    reward_models: ClassVar[tuple] = ()  # it reads none
    evaluates_at_start = False  # a new head is 0 everywhere: chance

    context: Context  # set by build()

    def __init__(
        self, config: Config, tokenizer: PreTrainedTokenizerBase, readers: Readers = ALONE
    ):
        """Checks the data. Entered by all ``readers``.

        Raises:
            UserError: the data are wrong.
        """
        self.section = cast(S, config.algorithm)
        self.examples, selection = self.load(config.data.train, config, tokenizer, readers)
        self.selections: list[Selection] = [selection]
        self.heldout: Rows[Example] | tuple[()] = ()
        if config.data.heldout is not None:
            self.heldout, selection = self.load(config.data.heldout, config, tokenizer, readers)
            self.selections.append(selection)
        count, size = len(self.examples) * self.section.epochs, self.section.batch_size
        self.position = DataPosition(config.data.train, len(self.examples), config.run.seed, size)
        self.total_steps = config.run.steps or -(-count // size)

    @abstractmethod
    def load(
        self, path: str, config: Config, tokenizer: PreTrainedTokenizerBase, readers: Readers
    ) -> tuple[Rows[Example], Selection]:
        """The examples of a data file, and what became of its rows. Entered by all ``readers``.

        Raises:
            UserError: the data are wrong.
        """

    def highest_rows(self) -> list[Tensor]:
        """Rows of examples with the largest ids, see `highest_rows`."""
        return highest_rows(self.examples, self.heldout)

    @abstractmethod
    def batch(self, examples: list[Example]) -> tuple[TrainBatch, OutputPlaces]:
        """Rows of the examples, and where the head is read."""

    @abstractmethod
    def train_step(self, batch: TrainBatch, at: OutputPlaces):
        """One optimizer step. Entered by every rank."""

    @abstractmethod
    def heldout_metrics(self, examples: list[Example], outputs: Tensor | None) -> dict[str, float]:
        """Metrics of this replica's held-out examples, from ``[n, D]`` outputs at their
        places (float32 on the CPU; None but on last stages). Entered by every rank.
        """

    @property
    def _role(self) -> AlgorithmRole:
        (role,) = self.section.roles(self.context.config)
        return role

    @property
    def role(self) -> str:
        """Name of the role that is trained."""
        return self._role.name

    def build(self, context: Context) -> None:
        """Adds the one role. Entered by every rank."""
        self.context = context
        context.log_selections(self.selections)
        role, rate = self._role, context.config.optimizer.lr
        training = {"learning_rate": rate, "total_steps": self.total_steps}
        context.role(role.name, context.model_folder, role.head_outputs, **training)

    def rows_of_replica(self, examples: Sequence[Example], indices: list[int]) -> list[Example]:
        """This replica's part of the examples at ``indices``."""
        mesh = self.context.mesh
        mine = shard(indices, mesh.dp_rank, mesh.dp_size)
        return [examples[i] for i in mine if i != PADDING]

    def step(self, step: int) -> dict[str, float]:
        """One optimizer step on ``batch_size`` examples. Entered by every rank."""
        context = self.context
        with context.phase("update"):
            batch, at = self.batch(self.rows_of_replica(self.examples, self.position.indices(step)))
            metrics, engine = run_updates(
                context, [batch], {self.role: lambda part: self.train_step(part, at)}
            )
        timings = context.timings(sum(row.numel() for row in batch.rows))
        return context.publish(metrics) | engine | timings

    def evaluate(self) -> dict[str, float]:
        """Metrics on held-out examples. Entered by every rank."""
        context = self.context
        if not self.heldout:
            return {}
        examples = self.rows_of_replica(self.heldout, list(range(len(self.heldout))))
        batch, at = self.batch(examples)
        with context.console.track("evaluate", len(batch.rows)):
            outputs = context.engine.score(
                self.role,
                batch.rows,
                at,
                None,
                lambda outputs, micro_batch: micro_batch.rectangle(outputs.float(), at.width),
            )
        if outputs is not None:
            # [B, width, D] to [n, D], without the cells that hold no output.
            outputs = outputs.cpu()[at.rows, at.columns]
        return self.heldout_metrics(examples, outputs)

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        assert not state
