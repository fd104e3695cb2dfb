"""What a run asks of an algorithm: its data first, then roles, then step after step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from megatron_amrlhf.data.order import DataPosition
from megatron_amrlhf.experience.context import Context
from megatron_amrlhf.experience.reward_models import RewardModel


class Algorithm(Protocol):
    """An algorithm as ``commands/train.py`` and ``commands/loop.py`` see it.

    It is made of the configuration, a tokenizer and those who check its data with it, then and
    there. ``build``, ``step`` and ``evaluate`` are entered by every rank.

    Attributes:
        total_steps: steps of the whole run.
        position: which samples each step takes; it is saved with a checkpoint.
        reward_models: those that the run loads, already looked into.
        evaluates_at_start: whether ``evaluate`` says something before the first step.
    """

    total_steps: int
    position: DataPosition
    evaluates_at_start: bool

    @property
    def reward_models(self) -> Sequence[RewardModel]: ...

    def highest_rows(self) -> list[Tensor]:
        """``[n]`` int64 token ids of the rows of its data that have the largest ids."""

    def build(self, context: Context) -> None:
        """Adds the roles that its section tells to the engine."""

    def step(self, step: int) -> dict[str, float]:
        """Does step ``step``, counted from 1; its metrics, equal on all ranks."""

    def evaluate(self) -> dict[str, float]:
        """``eval/*`` metrics of the held-out data, equal on all ranks; empty where there are none.

        Nothing that a later step reads may change in it: an interrupted one is done again.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside the roles and the position; equal on all last stages."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what ``state_dict`` gave.

        Raises:
            UserError: the run's data are others than those of the checkpoint.
        """
