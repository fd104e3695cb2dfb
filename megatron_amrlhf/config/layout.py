"""Where a run computes: the sections of the parallel axes and of the engine."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_amrlhf.config.section import (
    Name,
    NonNegativeFloat,
    Positive,
    Section,
)


class ParallelSection(Section):
    tensor: Positive = Field(1, description="tensor-parallel size (TP), divides heads and KV heads")
    sequence: bool = Field(
        False,
        description="sequence parallelism: norms and residuals hold 1/TP of the positions",
    )
    pipeline: Positive = Field(1, description="pipeline-parallel size (PP), divides the layers")
    virtual_stages: Positive = Field(
        1, description="model chunks a pipeline rank (interleaved 1F1B); 1: plain 1F1B"
    )
    first_stage_layers: Positive | None = Field(
        None, description="layers of the first pipeline stage; null: as many as the others"
    )
    last_stage_layers: Positive | None = Field(
        None, description="layers of the last pipeline stage; null: as many as the others"
    )
    context: Positive = Field(1, description="context-parallel size; only 1 is supported")


Offload = Literal["none", "cpu", "nvme"]


class RoleSection(Section):
    """How the data-parallel ranks share one role; null: as the engine section says."""

    zero_stage: Literal[0, 1, 3] | None = Field(
        None, description="ZeRO stage of this role; null: engine.zero_stage"
    )
    offload_parameters: Offload = Field(
        "none",
        description="where this role's weights rest between phases (stage 3): none (the device), "
        "cpu (the host's memory), nvme (files in engine.nvme_folder); a frozen role that is "
        "offloaded is on the device only while it scores",
    )
    offload_optimizer: Offload = Field(
        "none",
        description="where this role's masters and moments live (stage 3): none, cpu or nvme",
    )

    @property
    def stage(self) -> int:
        """The ZeRO stage of a section that ``EngineSection.of_role`` gave."""
        assert self.zero_stage is not None, "not filled in: see of_role"
        return self.zero_stage


class RolesSection(Section):
    actor: RoleSection = RoleSection()
    critic: RoleSection = RoleSection()
    reference: RoleSection = RoleSection()
    prm: RoleSection = RoleSection()
    orm: RoleSection = RoleSection()


class EngineSection(Section):
    zero_stage: Literal[0, 1, 3] = Field(
        3,
        description="what data-parallel ranks partition: 0 nothing, 1 masters and moments, "
        "3 weights too",
    )
    gather: Literal["step", "microbatch"] = Field(
        "step",
        description="ZeRO-3 gathers a stage's weights once an optimizer step (held whole) or each "
        "layer in every micro-batch",
    )
    reduce: Literal["step", "microbatch"] = Field(
        "step",
        description="gradient reduce-scatter once a step (float32 stage gradients held) or a "
        "micro-batch",
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="activations computed again in the backward: none, attention's (selective) "
        "or whole layers (full)",
    )
    micro_batch_size: Positive = Field(
        4, description="rows a micro-batch in scoring and updates, without micro_batch_tokens"
    )
    micro_batch_tokens: Positive | None = Field(
        None, description="tokens a micro-batch in scoring and updates; null: by micro_batch_size"
    )
    logit_positions: Positive = Field(
        2048, description="positions whose vocabulary logits exist at a time"
    )
    deepspeed: Name = Field(
        "configs/deepspeed/zero3.json",
        description="DeepSpeed JSON; 'auto' values are derived from this file",
    )
    nvme_folder: Name | None = Field(
        None,
        description="folder on each machine's own disk for what roles offload to nvme; made if "
        "missing; nothing is left in it when the run ends, however it ends",
    )
    max_skipped_steps: Positive = Field(
        3, description="stop after this many non-finite optimizer steps of a role in a row"
    )
    watchdog_seconds: NonNegativeFloat = Field(
        1200.0,
        description="end the run, naming the rank that holds it up, after so long without a "
        "micro-batch, decode round or phase; 0: never; collectives time out 600 s later",
    )
    roles: RolesSection = RolesSection()

    def of_role(self, name: str) -> RoleSection:
        """The settings of a role, its ZeRO stage filled in."""
        own: RoleSection = getattr(self.roles, name)
        stage = self.zero_stage if own.zero_stage is None else own.zero_stage
        return own.model_copy(update={"zero_stage": stage})
