"""What every algorithm works with, made once by train.py and passed around."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.data.rows import Selection
from megatron_amrlhf.engine.role import DTYPES, RoleSpec
from megatron_amrlhf.engine.zero3 import Zero3Engine
from megatron_amrlhf.losses.reduce import Metrics, finish_metrics
from megatron_amrlhf.parallel.collectives import broadcast_object_from_last_stage, sum_over
from megatron_amrlhf.parallel.mesh import Mesh
from megatron_amrlhf.report.console import RunConsole
from megatron_amrlhf.run.folder import RunFolder
from megatron_amrlhf.run.stop_request import StopRequest


@dataclass(frozen=True)
class Context:
    """A run on this rank.

    Attributes:
        config: the run's configuration.
        mesh: where this rank stands.
        engine: holds the roles.
        tokenizer: the policy's.
        end_ids: tokens that end an answer.
        model_folder: Hugging Face folder of ``model.path``.
        console: progress and tables (speaks on rank 0).
        folder: the run's folder.
        stop: whether this rank has seen a request to stop; by default there is none.
        usable: ``[vocab_size]`` bool on this rank's device, ids that the policy may say; None: all.
        seconds: how long each phase of this step has taken, by this rank's clock.
    """

    config: Config
    mesh: Mesh
    engine: Zero3Engine
    tokenizer: PreTrainedTokenizerBase
    end_ids: tuple[int, ...]
    model_folder: Path
    console: RunConsole
    folder: RunFolder
    stop: StopRequest = field(default_factory=StopRequest)
    usable: Tensor | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[None]:
        """Enters a phase of the step, such as ``mask``, and times it.

        Args:
            name: of the phase.
            total: units of work that are shown; None: none here.
        """
        start = time.perf_counter()
        with self.console.track(name, total):
            yield
        self.seconds[name] = time.perf_counter() - start

    def timings(self, updated: int, sampled: int = 0) -> dict[str, float]:
        """The time and throughput metrics of a step: this rank's clock, all replicas' tokens.

        Entered by every rank, after the phase ``update``.

        Args:
            updated: tokens of the rows that this replica has learned from.
            sampled: tokens that it has sampled, where there was a phase ``rollout``.
        """
        named = {f"time/{name}_seconds": value for name, value in self.seconds.items()}
        for phase, tokens in (("rollout", sampled), ("update", updated)):
            if phase in self.seconds:
                rate = self.over_replicas(tokens) / max(self.seconds[phase], 1e-9)
                named[f"throughput/{phase}_tokens_per_second"] = rate
        return named

    @property
    def vocab_size(self) -> int:
        return next(iter(self.engine.roles.values())).shape.vocab_size

    def role(self, name: str, folder: Path, head: int | None = None, **training) -> None:
        """Adds a role; ``training`` makes it trainable (learning_rate, total_steps, ...)."""
        self.engine.add_role(
            RoleSpec(
                name=name,
                folder=folder,
                dtype=DTYPES[self.config.dtype_of(name)],
                head_outputs=head,
                trainable=bool(training),
                **training,
            )
        )

    def log_selections(self, selections: Iterable[Selection]) -> None:
        """Says which keys of the data files' rows are read, and which rows are not used."""
        lines = [line for each in selections for line in (each.keys(), each.summary()) if line]
        for line in dict.fromkeys(lines):  # one file can be read for two purposes
            self.console.line(line)

    def over_replicas(self, value: int) -> int:
        """The sum of all replicas' ``value``. Entered by every rank."""
        return sum_over(value, self.mesh.dp_group, self.mesh.device)

    def publish(self, metrics: Metrics) -> dict[str, float]:
        """Global means of (sum, count) metrics on every rank; ``metrics`` is read on last stages.

        Entered by every rank.
        """
        means = None
        if self.mesh.is_last_stage:
            means = finish_metrics(metrics, self.mesh.dp_group, device=self.mesh.device)
        return broadcast_object_from_last_stage(means, self.mesh)


def count_metric(total: Tensor | float, count: Tensor | float) -> tuple[Tensor, Tensor]:
    """A (sum, count) metric from plain numbers or tensors."""
    return torch.as_tensor(total).double(), torch.as_tensor(count).double()
