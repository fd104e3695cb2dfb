"""The plan of a run on a layout: what each pipeline stage's ranks hold and send."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from megatron_amrlhf.config.algorithm_section import Pass
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.planning.bytes_moved import (
    BatchShape,
    batch_shape,
    bubble_fraction,
    rollout_bytes,
    score_bytes,
    update_bytes,
)
from megatron_amrlhf.planning.memory import (
    PhaseMemory,
    resting,
    rollout_memory,
    score_memory,
    update_memory,
)
from megatron_amrlhf.planning.roles import (
    PlannedRole,
    RowLengths,
    row_lengths,
)
from megatron_amrlhf.planning.volumes import RECEIVE, Volumes
from megatron_amrlhf.planning.weights import StageSpec, stage_spec

RESTING = "resting"


@dataclass(frozen=True)
class StagePlan:
    """What every rank of a pipeline stage holds and sends; they are alike.

    Attributes:
        stage: pipeline rank.
        specs: the stage of each role, in the order of the roles.
        memory: by phase (``update actor``), ``resting`` first.
        moved: by phase, bytes that a rank sends a step (``receive``: gets).
    """

    stage: int
    specs: list[StageSpec]
    memory: dict[str, PhaseMemory]
    moved: dict[str, Volumes]

    @property
    def fullest(self) -> tuple[str, PhaseMemory]:
        """The phase that takes most, and what it takes."""
        return max(self.memory.items(), key=lambda item: item[1].total)

    @property
    def peak(self) -> int:
        """Bytes."""
        return self.fullest[1].total

    @property
    def sent(self) -> dict[str, float]:
        """Bytes sent a step, by axis."""
        by_axis: dict[str, float] = defaultdict(float)
        for volumes in self.moved.values():
            for (kind, axis), value in volumes.items():
                by_axis[axis] += value * (kind != RECEIVE)
        return dict(by_axis)


@dataclass(frozen=True)
class Plan:
    """A run on a layout.

    Attributes:
        config: the run.
        data: data-parallel size.
        roles: its models.
        lengths: of every row.
        passes: of a step, on each replica.
        batches: micro-batches of each scoring and training pass, by phase.
        bubbles: share of the time of each update in which a rank waits, by phase.
        stages: by pipeline rank.
    """

    config: Config
    data: int
    roles: list[PlannedRole]
    lengths: RowLengths
    passes: list[Pass]
    batches: dict[str, BatchShape]
    bubbles: dict[str, float]
    stages: list[StagePlan]

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.data * self.config.parallel.tensor * self.config.parallel.pipeline

    @property
    def worst(self) -> StagePlan:
        """The stage whose ranks hold most."""
        return max(self.stages, key=lambda stage: stage.peak)

    def ranks(self, stage: int) -> range:
        """Global ranks of a pipeline stage: tensor ranks first, then replicas, then stages."""
        size = self.data * self.config.parallel.tensor
        return range(stage * size, (stage + 1) * size)


def make_plan(config: Config, data: int, roles: list[PlannedRole], on_gpu: bool = True) -> Plan:
    """Plans a run whose rows are all as long as they may be.

    Args:
        config: the run; it fits its models (``check_run``, ``check_model``).
        data: data-parallel size.
        roles: its models.
        on_gpu: communication by NCCL, else by gloo.
    """
    lengths, passes = row_lengths(config), list(config.algorithm.passes(config, data))
    stages = range(config.parallel.pipeline)
    specs = {stage: [_spec(config, role, stage, data) for role in roles] for stage in stages}
    by_role = {spec.name: spec for spec in specs[0]}
    batches = {
        phase_of(each): _batch(each, lengths, by_role[each.role])
        for each in passes
        if each.phase != "rollout"
    }
    virtual = config.parallel.virtual_stages
    bubbles = {
        phase_of(each): bubble_fraction(len(stages), batches[phase_of(each)].num_blocks, virtual)
        for each in passes
        if each.phase == "update"
    }
    plans = [
        _stage(
            config,
            i,
            specs=specs[i],
            passes=passes,
            batches=batches,
            lengths=lengths,
            on_gpu=on_gpu,
        )
        for i in stages
    ]
    return Plan(config, data, roles, lengths, passes, batches, bubbles, plans)


def phase_of(each: Pass) -> str:
    """The phase's name; all of a rollout is one."""
    return each.phase if each.phase == "rollout" else f"{each.phase} {each.role}"


def _spec(config: Config, role: PlannedRole, stage: int, data: int) -> StageSpec:
    return stage_spec(
        config,
        role.shape,
        stage,
        data,
        role.name,
        trainable=role.trainable,
        head_outputs=role.head_outputs,
    )


def _batch(each: Pass, lengths: RowLengths, spec: StageSpec) -> BatchShape:
    prompts, responses = [lengths.prompt] * each.rows, [lengths.response] * each.rows
    return batch_shape(prompts, responses, spec, together=each.together)


def _stage(
    config: Config,
    stage: int,
    *,
    specs: list[StageSpec],
    passes: list[Pass],
    batches: dict[str, BatchShape],
    lengths: RowLengths,
    on_gpu: bool,
) -> StagePlan:
    memory = {RESTING: resting(specs)}
    moved: defaultdict[str, Volumes] = defaultdict(Volumes)
    size, by_role = config.rollout.micro_batch_size, {spec.name: spec for spec in specs}
    decoding = {each.role: each.rows for each in passes if each.phase == "rollout"}
    if decoding:
        memory["rollout"] = rollout_memory(specs, decoding, lengths, size)
    for each in passes:
        phase, spec = phase_of(each), by_role[each.role]
        if each.phase == "rollout":
            prompts = [lengths.prompt] * each.rows
            samples = each.rows // max(config.rollout.prompts_per_step // spec.data, 1)
            moved[phase] += rollout_bytes(spec, prompts, lengths.response, size, samples)
        elif each.phase == "score":
            memory[phase] = score_memory(specs, each.role, batches[phase])
            moved[phase] += score_bytes(spec, batches[phase], each.reads)
        else:
            memory[phase] = update_memory(specs, each.role, batches[phase], on_gpu)
            one = update_bytes(spec, batches[phase])
            moved[phase] += Volumes({key: value * each.times for key, value in one.items()})
    return StagePlan(stage, specs, memory, dict(moved))
