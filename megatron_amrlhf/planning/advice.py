"""What is poor about a plan, and which layouts would fit, the quickest first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from megatron_amrlhf.config.checks import check_model, check_run
from megatron_amrlhf.config.layout import ParallelSection
from megatron_amrlhf.config.schema import Config
from megatron_amrlhf.errors import UserError
from megatron_amrlhf.models.shape import ModelShape
from megatron_amrlhf.planning.plan import Plan, StagePlan, make_plan, phase_of
from megatron_amrlhf.planning.roles import PlannedRole
from megatron_amrlhf.sizes import in_units

POOR_BUBBLE = 0.25
POOR_BALANCE = 1.5
POOR_SHARE = 0.4
TENSOR_SIZES = (1, 2, 4, 8, 16)
MOST_STAGES = 64


@dataclass(frozen=True)
class Machine:
    """What ranking assumes of a GPU and its links; ratios matter, not the numbers.

    Figures of an H100 node: dense bfloat16 at the share that training reaches, HBM3, NVLink one
    way, and a 400 Gbit/s port a GPU, the last two at what rings reach
    (https://resources.nvidia.com/en-us-hopper-architecture/nvidia-tensor-core-gpu-datasheet).

    Attributes:
        memory: bytes of a GPU.
        gpus_a_node: joined by the fast link.
        flops: operations a second.
        reads: bytes a second out of its memory.
        inside, outside: bytes a second that a rank sends within a node and to another one.
    """

    memory: int
    gpus_a_node: int = 8
    flops: float = 400e12
    reads: float = 2.5e12
    inside: float = 300e9
    outside: float = 40e9


def warnings(plan: Plan, machine: Machine) -> Iterator[str]:
    """Lines about what a user would want to change, with what to change."""
    parallel, worst = plan.config.parallel, plan.worst
    phase, memory = worst.fullest
    if memory.total > machine.memory:
        yield (
            f"does not fit: '{phase}' on stage {worst.stage} takes {in_units(memory.total)} of "
            f"{in_units(machine.memory)}, most of it {_largest(worst)}; see the layouts below"
        )
    bubble = max(plan.bubbles.values(), default=0.0)
    if bubble > POOR_BUBBLE:
        name = max(plan.bubbles, key=plan.bubbles.__getitem__)
        blocks = plan.batches[name].num_blocks
        yield (
            f"'{name}' waits {bubble:.0%} of its time: {blocks} micro-batch{'es' * (blocks > 1)} "
            f"on {parallel.pipeline} stages; smaller micro-batches, fewer minibatches or "
            "parallel.virtual_stages shorten that"
        )
    if parallel.tensor > machine.gpus_a_node:
        yield (
            f"parallel.tensor = {parallel.tensor} crosses nodes of {machine.gpus_a_node} GPUs: "
            "every layer's sums go over the network; use more pipeline stages instead"
        )
    if parallel.tensor > 1 and not parallel.sequence:
        yield "parallel.sequence: true would save activations at the same bytes moved"
    peaks = [stage.peak for stage in plan.stages]
    if max(peaks) > max(POOR_BALANCE * min(peaks), POOR_SHARE * machine.memory):
        low = peaks.index(min(peaks))
        yield (
            f"stage {worst.stage} takes {max(peaks) / min(peaks):.1f} times what stage {low} does: "
            "set parallel.first_stage_layers and .last_stage_layers"
        )
    rollout = worst.memory.get("rollout")
    if rollout and rollout.cache > POOR_SHARE * machine.memory:
        yield (
            f"keys and values take {in_units(rollout.cache)}, for all answers of a replica are "
            "decoded together: lower rollout.prompts_per_step, or more replicas"
        )
    if plan.data > 1 and memory.gathered + memory.gradients > POOR_SHARE * machine.memory:
        yield (
            "whole weights and gradients of a stage take "
            f"{in_units(memory.gathered + memory.gradients)}: engine.gather and engine.reduce: "
            "microbatch hold less and move more"
        )


def _largest(stage: StagePlan) -> str:
    parts = {key: value for key, value in vars(stage.fullest[1]).items() if key != "host"}
    name = max(parts, key=parts.__getitem__)
    return f"{name} ({in_units(parts[name])})"


def step_seconds(plan: Plan, machine: Machine) -> float:
    """A rough time of a step, good for comparing layouts of one run.

    The slowest stage's operations (2 a multiplied element and token forward, 4 backward), with the
    pipeline's bubble; what it sends, by the link of each axis; and decoding, which reads a stage's
    weights and half of its full cache for every token.
    """
    return max(
        _compute_seconds(plan, stage, machine)
        + sum(sent / _link(axis, plan, machine) for axis, sent in stage.sent.items())
        + _decoding_seconds(plan, stage, machine)
        for stage in plan.stages
    )


def _compute_seconds(plan: Plan, stage: StagePlan, machine: Machine) -> float:
    prompt, row = plan.lengths.prompt, plan.lengths.prompt + plan.lengths.response
    again = 2 if plan.config.engine.recompute == "full" else 0
    a_token = {"rollout": 2 * prompt / row, "score": 2, "update": 6 + again}
    multiplied = {spec.name: spec.num_multiplied for spec in stage.specs}
    seconds = 0.0
    for each in plan.passes:
        operations = a_token[each.phase] * each.rows * each.times * row * multiplied[each.role]
        seconds += operations / machine.flops / (1 - plan.bubbles.get(phase_of(each), 0.0))
    return seconds


def _decoding_seconds(plan: Plan, stage: StagePlan, machine: Machine) -> float:
    if "rollout" not in stage.memory:
        return 0.0
    read = stage.memory["rollout"].cache / 2
    specs = {spec.name: spec for spec in stage.specs}
    for each in plan.passes:
        if each.phase == "rollout":
            # A block of rows takes its turn on each stage; with fewer blocks stages wait.
            blocks = -(-each.rows // plan.config.rollout.micro_batch_size)
            turns = max(blocks, plan.config.parallel.pipeline)
            spec = specs[each.role]
            read += turns * spec.num_multiplied * spec.weight_bytes
    return plan.lengths.response * read / machine.reads


def _link(axis: str, plan: Plan, machine: Machine) -> float:
    """Bytes a second of an axis; neighbours on it are so many ranks apart."""
    tensor = plan.config.parallel.tensor
    reach = {"tensor": tensor, "data": tensor * plan.data, "pipeline": plan.world_size}
    return machine.inside if reach[axis] <= machine.gpus_a_node else machine.outside


@dataclass(frozen=True)
class Suggestion:
    """A layout that fits.

    Attributes:
        plan: on it.
        seconds: of a step, roughly.
        changes: what to set, beside the run's configuration.
    """

    plan: Plan
    seconds: float
    changes: dict[str, object]


def suggest(
    config: Config,
    roles: list[PlannedRole],
    hf_configs: list[dict],
    *,
    world_size: int,
    machine: Machine,
    share: float,
) -> list[Suggestion]:
    """Layouts of ``world_size`` ranks whose peak is within a share of the memory, quickest first.

    Args:
        config: the run; its engine's choices are kept but for what is tried: tensor, pipeline,
            recompute, gather and reduce.
        roles: its models.
        hf_configs: their parsed config.json, which sizes must divide.
        world_size: ranks.
        machine: the GPU.
        share: of its memory that may be used.
    """
    found: dict[tuple[int, int], Suggestion] = {}
    for parallel in _axes(roles[0].shape, world_size):
        data = world_size // (parallel.tensor * parallel.pipeline)
        for recompute, gather, reduce in product(
            ("none", "selective", "full"), ("step", "microbatch"), ("step", "microbatch")
        ):
            if data == 1 and (gather, reduce) != ("step", "step"):
                continue
            engine = config.engine.model_copy(
                update={"recompute": recompute, "gather": gather, "reduce": reduce}
            )
            tried = config.model_copy(update={"parallel": parallel, "engine": engine})
            if not _allowed(tried, hf_configs, world_size):
                continue
            plan = make_plan(tried, data, roles)
            if plan.worst.peak > share * machine.memory:
                continue
            seconds = step_seconds(plan, machine)
            place = (parallel.tensor, parallel.pipeline)
            if place not in found or seconds < found[place].seconds:
                found[place] = Suggestion(plan, seconds, _changes(config, tried))
    return sorted(found.values(), key=lambda suggestion: suggestion.seconds)


def _axes(shape: ModelShape, world_size: int) -> Iterator[ParallelSection]:
    for tensor, stages in product(TENSOR_SIZES, range(1, MOST_STAGES + 1)):
        if world_size % (tensor * stages) or stages > shape.num_layers:
            continue
        ends = _ends(shape.num_layers, stages)
        if ends is not None:
            yield ParallelSection(
                tensor=tensor,
                sequence=tensor > 1,
                pipeline=stages,
                first_stage_layers=ends[0],
                last_stage_layers=ends[1],
            )


def _ends(num_layers: int, stages: int) -> tuple[int | None, int | None] | None:
    """Layers of the first and last stage where the others are even and these have fewer."""
    if num_layers % stages == 0:
        return None, None
    each = -(-num_layers // stages)
    missing = each * stages - num_layers
    if stages < 3 or missing > each:
        return None
    first = each - missing // 2
    return first, each - (missing - missing // 2)


def _allowed(config: Config, hf_configs: list[dict], world_size: int) -> bool:
    try:
        check_run(config, world_size)
        for hf_config in hf_configs:
            check_model(config, hf_config)
    except UserError:
        return False
    return True


def _changes(config: Config, tried: Config) -> dict[str, object]:
    changes = {}
    for section in ("parallel", "engine"):
        before, after = getattr(config, section), getattr(tried, section)
        for key in type(after).model_fields:
            if getattr(before, key) != getattr(after, key):
                changes[f"{section}.{key}"] = getattr(after, key)
    return changes
