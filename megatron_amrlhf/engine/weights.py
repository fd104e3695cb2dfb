"""How the data-parallel ranks of a stage share its weights: what every ZeRO stage has to offer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_amrlhf.config.schema import OptimizerSection
from megatron_amrlhf.engine.accumulator import GradientAccumulator
from megatron_amrlhf.engine.rates import Schedule
from megatron_amrlhf.models.stage import StageModel

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Slice:
    """This rank's part of a parameter: the same contiguous cut at every ZeRO stage.

    Attributes:
        shape: of the parameter in this tensor rank's shard (not partitioned).
        start: first element of the flattened shard that is here.
        length: number of elements here; may be 0.
    """

    shape: tuple[int, ...]
    start: int
    length: int

    @classmethod
    def of(cls, shape: torch.Size, partition: int, rank: int) -> Slice:
        """The part of ``rank`` where each rank has ``partition`` elements, the last ones fewer."""
        start = min(partition * rank, shape.numel())
        return cls(tuple(shape), start, min(partition, shape.numel() - start))


class Weights(ABC):
    """A stage's weights on this rank, with their optimizer if they are trained.

    Attributes:
        module: the stage that holds the weights.
        stage: the stage that ``training`` runs.
        gradients: the step's gradients; None for a frozen role.
        schedule: the learning rate; there if the role is trained.
    """

    module: StageModel
    stage: StageModel
    gradients: GradientAccumulator | None = None
    schedule: Schedule

    @abstractmethod
    def window(self) -> AbstractContextManager[StageModel]:
        """The whole stage for forwards without gradient, from whole weights.

        Entered by every rank of the stage's data-parallel group. Inside, ranks may run
        different numbers of forwards.
        """

    @abstractmethod
    def training(self) -> AbstractContextManager[Callable]:
        """Gives the callable that runs a chunk with gradient; at the end gradients are reduced.

        Entered by every rank of the stage's data-parallel group, with the same number of
        micro-batches inside.
        """

    @abstractmethod
    def update(self) -> None:
        """One optimizer step and one of the schedule, from ``gradients``, which it frees."""

    @property
    def trained_gradients(self) -> GradientAccumulator:
        """The step's gradients of a role that is trained."""
        assert self.gradients is not None, "the role is frozen"
        return self.gradients

    def skip(self) -> None:
        """Leaves the optimizer step out."""
        self.trained_gradients.drop()

    @abstractmethod
    def slices(self) -> dict[str, Slice]:
        """This rank's slice of each parameter of the stage, by local name."""

    @abstractmethod
    def read_states(self) -> dict[str, Tensor]:
        """1-D tensors ``NAME.master``, and after the first step ``NAME.exp_avg``, ``.exp_avg_sq``.

        On CPU they may be views of the live states: write them before the next step.
        """

    @abstractmethod
    def write_states(self, tensors: dict[str, Tensor], counters: dict) -> None:
        """Puts back what ``read_states`` and ``counters`` gave, and the weights made of it.

        The schedule is not among it, see ``Schedule.restore``.
        Entered by every rank of the stage's data-parallel group.
        """

    @abstractmethod
    def counters(self) -> dict:
        """What of a trained role is no tensor, JSON-able and equal on every rank.

        ``optimizer_step`` is Adam's step, None before the first one.
        """

    @abstractmethod
    def local_bits(self) -> dict[str, Tensor]:
        """What this rank holds of each parameter, by local name, for checksums."""

    @abstractmethod
    def close(self) -> None:
        """Frees what outlives Python's references."""


def make_optimizer(
    parameters: Iterable[nn.Parameter],
    rate: float,
    total_steps: int,
    steps_at_once: int,
    section: OptimizerSection,
) -> tuple[torch.optim.Optimizer, Schedule]:
    """AdamW and its learning-rate schedule."""
    optimizer = torch.optim.AdamW(
        parameters,
        lr=rate,
        betas=section.betas,
        eps=section.eps,
        weight_decay=section.weight_decay,
        fused=True,  # one pass over memory, on CPU too
    )
    return optimizer, Schedule(optimizer, section, total_steps, steps_at_once)


def adam_step(step: float, parameter: Tensor) -> Tensor:
    """Adam's step count as torch's fused AdamW keeps it: float32, 0-dim, beside its parameter."""
    return torch.tensor(step, dtype=torch.float32, device=parameter.device)


def release(twin: nn.Module) -> None:
    """Leaves a module without storage."""
    for parameter in twin.parameters():
        parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)


@contextmanager
def lent(sources: Iterable[nn.Parameter], twin: nn.Module):
    """Inside, the twin's parameters are the sources' whole weights, without a copy."""
    # Built alike, so the parameters pair up in order.
    for source, target in zip(sources, twin.parameters(), strict=True):
        target.data = source.data
    try:
        yield twin
    finally:
        release(twin)
