"""The shared engine: every role's stage under one mesh, one configuration, one step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.engine.gradients import global_norm, sum_copies
from megatron_amrlhf.engine.integrity import check_loaded
from megatron_amrlhf.engine.microbatch import (
    OutputPlaces,
    in_row_order,
    pack_micro_batches,
)
from megatron_amrlhf.engine.nonfinite import LossLog, describe
from megatron_amrlhf.engine.role import Role, RoleSpec
from megatron_amrlhf.engine.schedule import (
    CollectFunction,
    LossFunction,
    run_forward,
    run_forward_backward,
)
from megatron_amrlhf.models.layers import LogitsFunction
from megatron_amrlhf.parallel.mesh import Mesh


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did.

    Attributes:
        extras: second results of the loss, one a micro-batch, on the last stage; else [].
        grad_norm: global L2 norm before clipping.
        rate: the learning rate that it was taken at.
        skipped: why the step was left out: one line that names the ranks, samples and parameters
            whose loss or gradient is not finite; None if it was not.
    """

    extras: list
    grad_norm: float
    rate: float
    skipped: str | None


# Called with the number of rows after the forward of each micro-batch, for progress bars.
Tick = Callable[[int], None]


def nothing(num_rows: int) -> None:
    """The default callback."""


class NonFiniteGradients(RuntimeError):
    """Too many optimizer steps in a row had a gradient that is not finite."""


class Zero3Engine:
    """Owns the roles of a process. Roles share the mesh, its groups and one DeepSpeed config.

    Args:
        config: the run.
        mesh: the mesh.
        tick: called with the number of rows after the forward of each micro-batch, and with that
            of the answers that have just ended in decoding.
    """

    def __init__(self, config: Config, mesh: Mesh, tick: Tick = nothing):
        self.config, self.mesh, self.tick = config, mesh, tick
        self.roles: dict[str, Role] = {}
        self.skipped_steps = 0
        self._skipped_in_a_row: Counter[str] = Counter()  # by role

    def add_role(self, spec: RoleSpec) -> Role:
        """Builds, loads and shares a model. Entered by every rank, in the same order.

        Raises:
            UserError: its weights are not finite (on every rank), or do not fit.
        """
        self.roles[spec.name] = Role(spec, self.config, self.mesh)
        check_loaded(self.roles[spec.name])
        return self.roles[spec.name]

    def score(
        self,
        name: str,
        rows: tuple[Tensor, ...],
        at: OutputPlaces,
        function: LogitsFunction | None,
        collect: CollectFunction,
    ) -> Tensor | None:
        """Forward passes of a role over ``rows`` in a gather window. Entered by every rank.

        Args:
            name: the role.
            rows: 1-D int64 CPU tensors.
            at: where outputs are computed.
            function: reads the logits of a language model; None for a linear head.
            collect: makes ``[b, ...]`` of a micro-batch's outputs ``[n, ...]``.

        Returns:
            ``[B, ...]`` in the order of ``rows`` on the last stage, else None.
        """
        mesh = self.mesh
        self._assert_embedded(name, rows)
        # Replicas may have different numbers of them: in the window weights are whole.
        micro_batches = pack_micro_batches(rows, at, self.config.engine, mesh)
        with self.roles[name].window() as stage:
            pieces = run_forward(
                stage, mesh.cut, micro_batches, function, collect=collect, tick=self.tick
            )
        return in_row_order(pieces, micro_batches) if mesh.is_last_stage else None

    def _assert_embedded(self, name: str, rows: tuple[Tensor, ...]) -> None:
        """An id beyond the embedding would be zeros in silence on several tensor ranks."""
        size = self.roles[name].shape.vocab_size
        largest = max((int(row.max()) for row in rows if row.numel()), default=0)
        assert largest < size, f"{name}: token id {largest} of a row, vocab_size is {size}"

    def train_step(
        self,
        name: str,
        rows: tuple[Tensor, ...],
        ids: Tensor,
        at: OutputPlaces,
        function: LogitsFunction | None,
        *,
        loss: LossFunction,
        together: int = 1,
    ) -> StepResult:
        """One optimizer step of a role: forward and backward of all micro-batches, clip, update.

        Args:
            name: the role.
            rows: 1-D int64 CPU tensors.
            ids: ``[B]`` int64 that name the rows in messages.
            at: where outputs are computed.
            function: reads the logits of a language model; None for a linear head.
            loss: gets the outputs ``[N, ...]`` of a micro-batch (the first ``num_outputs`` are
                real) and returns its part of the step's loss, multiplied by the DP size (the
                gradient is the mean over DP), and anything to hand back.
            together: this many consecutive rows (a pair) stay in one micro-batch.

        Entered by every rank.

        Raises:
            NonFiniteGradients: ``engine.max_skipped_steps`` of the role's steps in a row skipped.
        """
        role, mesh = self.roles[name], self.mesh
        weights, gradients = role.weights, role.weights.trained_gradients
        self._assert_embedded(name, rows)
        micro_batches = pack_micro_batches(
            rows, at, self.config.engine, mesh, together=together, equal=True
        )
        losses = LossLog([], [])

        with weights.training() as call:
            extras = run_forward_backward(
                weights.stage,
                call,
                mesh.cut,
                micro_batches,
                function=function,
                loss=losses.following(loss),
                tick=self.tick,
            )
        sum_copies(gradients, role.entries, role.tied, mesh)  # first: the norm is of the sums
        norm = global_norm(gradients, role.entries, role.tied, mesh, losses.is_finite)
        rate = weights.schedule.rate  # before the update moves it on
        if not math.isfinite(norm):  # on every rank or on none, as the norm is the model's
            why = describe(losses, ids, gradients)
            self._skip(role, why)
            return StepResult(extras, norm, rate, f"{name}: {why}")
        limit = self.config.optimizer.max_grad_norm
        if limit and norm > limit:
            gradients.scale(limit / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_
        weights.update()
        self._skipped_in_a_row[name] = 0
        return StepResult(extras, norm, rate, None)

    def trainable(self) -> dict[str, Role]:
        """The roles that are trained, by name."""
        return {name: role for name, role in self.roles.items() if role.spec.trainable}

    def end_step(self, step: int) -> None:
        """All optimizer steps of a step of the run are over, with those that were left out."""
        for role in self.trainable().values():
            role.weights.schedule.reach(step)

    def counters(self) -> dict[str, int | dict[str, int]]:
        """Counters of skipped steps, JSON-able and equal on every rank."""
        return {"skipped_steps": self.skipped_steps, "in_a_row": dict(self._skipped_in_a_row)}

    def set_counters(self, counters: dict[str, Any]) -> None:
        """Puts back what ``counters`` gave."""
        self.skipped_steps = counters["skipped_steps"]
        self._skipped_in_a_row = Counter(counters.get("in_a_row", {}))

    def _skip(self, role: Role, why: str) -> None:
        role.weights.skip()
        self.skipped_steps += 1
        name = role.spec.name
        self._skipped_in_a_row[name] += 1
        if self._skipped_in_a_row[name] >= self.config.engine.max_skipped_steps:
            raise NonFiniteGradients(
                f"{name}: loss or gradient is not finite in {self._skipped_in_a_row[name]} "
                f"optimizer steps in a row (engine.max_skipped_steps); the last one: {why}; "
                "look at these samples, or lower optimizer.lr"
            )
