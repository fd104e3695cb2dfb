"""The shared engine: every role's stage under one mesh, one configuration, one step."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from torch import Tensor

from megatron_amrlhf.config.deepspeed import resolve_deepspeed
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.engine.gradients import global_norm, reduce_tied, scale_gradients
from megatron_amrlhf.engine.microbatch import OutputPlan, cut_micro_batches
from megatron_amrlhf.engine.role import Role, RoleSpec
from megatron_amrlhf.engine.schedule import (
    CollectFunction,
    LossFunction,
    run_forward,
    run_forward_backward,
)
from megatron_amrlhf.parallel.mesh import Mesh


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did.

    Attributes:
        extras: second results of the loss, one a micro-batch, on the last stage; else [].
        grad_norm: global L2 norm before clipping.
        skipped: the step was left out because the norm is not finite.
    """

    extras: list
    grad_norm: float
    skipped: bool


def nothing() -> None:
    """The default callback."""


class NonFiniteGradients(RuntimeError):
    """Too many optimizer steps in a row had a gradient that is not finite."""


class Zero3Engine:
    """Owns the roles of a process. Roles share the mesh, its groups and one DeepSpeed config.

    Args:
        config: the run.
        mesh: the mesh.
    """

    def __init__(self, config: Config, mesh: Mesh):
        self.config, self.mesh = config, mesh
        self.roles: dict[str, Role] = {}
        self.skipped_steps = 0
        self._skipped_in_a_row = 0

    def add_role(self, spec: RoleSpec) -> Role:
        """Builds, loads and partitions a model. Entered by every rank, in the same order."""
        ds_config = resolve_deepspeed(self.config, self.mesh.dp_size, spec.trainable)
        ds_config["gradient_clipping"] = 0.0  # train_step clips, by a norm that counts right
        self.roles[spec.name] = Role(spec, ds_config, self.config.optimizer, self.mesh)
        return self.roles[spec.name]

    def score(
        self,
        name: str,
        rows: tuple[Tensor, ...],
        plan: OutputPlan,
        collect: CollectFunction,
        on_block: Callable[[], None] = nothing,
    ) -> list:
        """Forward passes of a role over ``rows`` in a gather window. Entered by every rank.

        Returns:
            ``collect(outputs [n, ...], micro_batch)`` of each block on the last stage, else [].
        """
        size = self.config.engine.micro_batch_size
        blocks = cut_micro_batches(rows, plan, size, self.mesh, equal=False)
        with self.roles[name].window() as module:
            return run_forward(module, blocks, collect, on_block)

    def train_step(
        self,
        name: str,
        rows: tuple[Tensor, ...],
        plan: OutputPlan,
        loss: LossFunction,
        on_block: Callable[[], None] = nothing,
    ) -> StepResult:
        """One optimizer step of a role: forward and backward of all blocks, clip, update.

        ``loss`` gets the outputs ``[N, ...]`` of a block (the first ``num_outputs`` are real)
        and returns the block's part of the step's loss, multiplied by the DP size (ZeRO
        averages over DP), and anything to hand back. Entered by every rank.

        Raises:
            NonFiniteGradients: ``engine.max_skipped_steps`` steps in a row were skipped.
        """
        role = self.roles[name]
        size = self.config.engine.micro_batch_size
        blocks = cut_micro_batches(rows, plan, size, self.mesh, equal=True)
        role.engine.train()
        with self._reduction(role) as before_backward:
            extras = run_forward_backward(
                role.module, role.engine, blocks, loss, before_backward, on_block
            )
        optimizer = role.engine.optimizer
        reduce_tied(optimizer, role.tied, self.mesh)
        norm = global_norm(optimizer, role.tied, self.mesh)
        skipped = not math.isfinite(norm)
        if skipped:
            self._skip(role, norm)
            return StepResult(extras, norm, True)
        limit = self.config.optimizer.max_grad_norm
        if limit and norm > limit:
            scale_gradients(optimizer, limit / (norm + 1e-6))
        role.engine.step()
        self._skipped_in_a_row = 0
        return StepResult(extras, norm, False)

    @contextmanager
    def _reduction(self, role: Role):
        """Reduces gradients once a step or a micro-batch; both are right with several in flight.

        Without either, ZeRO-3 sums gradients of interleaved micro-batches wrongly and silently.
        """
        if self.config.engine.reduce == "step":
            with role.engine.coalesce_grad_reduction():
                yield None
        else:
            with nullcontext():
                yield role.engine.optimizer.clear_backward_seen_flag

    def _skip(self, role: Role, norm: float) -> None:
        role.engine.optimizer.zero_grad()
        role.engine.optimizer.averaged_gradients = {}
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= self.config.engine.max_skipped_steps:
            raise NonFiniteGradients(
                f"{role.spec.name}: gradient norm is {norm} for {self._skipped_in_a_row} steps in "
                "a row; lower optimizer.lr, or look at the batch in samples.jsonl"
            )
