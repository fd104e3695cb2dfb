"""Bytes that a rank holds in each phase of a step, at the phase's fullest moment."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_amrlhf.planning.activations import (
    Transient,
    rollout_transient,
    score_transient,
    update_transient,
)
from megatron_amrlhf.planning.bytes_moved import BatchShape
from megatron_amrlhf.planning.roles import RowLengths
from megatron_amrlhf.planning.weights import StageSpec, held_bytes


@dataclass(frozen=True)
class PhaseMemory:
    """Bytes on a device by what they are for.

    Attributes:
        weights: of all roles, as they rest.
        optimizer: float32 masters and Adam's moments of all roles.
        gathered: whole weights of the roles at work, beside their partitions.
        gradients: the sum of the role that is trained, and single ones.
        cache: keys and values.
        activations: of layers.
        logits: and copies of them.
        host: in the host's memory instead, offloaded.
        disk: in files, offloaded.
    """

    weights: int
    optimizer: int
    gathered: int = 0
    gradients: int = 0
    cache: int = 0
    activations: int = 0
    logits: int = 0
    host: int = 0
    disk: int = 0

    @property
    def total(self) -> int:
        """On the device."""
        parts = (self.weights, self.optimizer, self.gathered, self.gradients)
        return sum(parts) + self.cache + self.activations + self.logits

    def with_moment(self, moment: Transient) -> PhaseMemory:
        """This, and what a moment takes."""
        return replace(
            self,
            cache=self.cache + moment.cache,
            activations=self.activations + moment.activations,
            logits=self.logits + moment.logits,
            gradients=self.gradients + moment.gradients,
        )


def resting(specs: list[StageSpec]) -> PhaseMemory:
    """Between phases.

    Args:
        specs: the stage of every role of the run on this rank.
    """
    weights = optimizer = 0
    elsewhere = {"cpu": 0, "nvme": 0}
    for spec in specs:
        held, role = held_bytes(spec), spec.role
        partitions, states = held.weights, held.masters + held.moments
        if role.offload_parameters != "none":
            elsewhere[role.offload_parameters] += partitions
            partitions = 0
        if role.offload_optimizer != "none":
            elsewhere[role.offload_optimizer] += states
            states = 0
        weights, optimizer = weights + partitions, optimizer + states
    return PhaseMemory(weights, optimizer, host=elsewhere["cpu"], disk=elsewhere["nvme"])


def rollout_memory(
    specs: list[StageSpec], rows: dict[str, int], lengths: RowLengths, micro_batch_size: int
) -> PhaseMemory:
    """While answers are decoded.

    Args:
        specs: all roles' stages on this rank, by no order.
        rows: answers of this replica by the role that samples them.
        lengths: of each.
        micro_batch_size: rows a decoding micro-batch.
    """
    memory = resting(specs)
    moments = []
    for spec in specs:
        if count := rows.get(spec.name):
            memory = replace(memory, gathered=memory.gathered + _window(spec))
            prompts = [lengths.prompt] * count
            moments.append(rollout_transient(spec, prompts, lengths.response, micro_batch_size))
    cache = sum(moment.cache for moment in moments)
    fullest = max(moments, key=lambda moment: moment.total - moment.cache)
    return memory.with_moment(replace(fullest, cache=cache))


def score_memory(specs: list[StageSpec], role: str, batch: BatchShape) -> PhaseMemory:
    """While a role scores."""
    spec = _of(specs, role)
    memory = replace(resting(specs), gathered=_window(spec))
    return memory.with_moment(score_transient(spec, batch))


def update_memory(
    specs: list[StageSpec], role: str, batch: BatchShape, on_gpu: bool
) -> PhaseMemory:
    """While a role is trained: micro-batches run, or their gradients go over the ranks.

    Args:
        specs: all roles' stages on this rank.
        role: which is trained.
        batch: its micro-batches.
        on_gpu: NCCL reduces in place; gloo copies what it is given.
    """
    spec, base = _of(specs, role), resting(specs)
    held, offloaded = held_bytes(spec), spec.role.offload_parameters != "none"
    gathered = _window(spec) if offloaded and spec.gathers_once else held.gathered
    running = replace(base, gathered=gathered, gradients=held.gradients)
    running = running.with_moment(update_transient(spec, batch))
    if spec.data == 1:
        return running
    own = held.gradients // spec.data if spec.role.zero_stage else 0
    copies = own if on_gpu else own + held.gradients
    summing = replace(base, gathered=gathered, gradients=held.gradients + copies)
    if not spec.holds_whole_gradients:
        return running
    return max(running, summing, key=lambda memory: memory.total)


def _window(spec: StageSpec) -> int:
    """Whole weights beside what rests on the device."""
    if spec.role.offload_parameters != "none":
        return spec.num_parameters * spec.weight_bytes
    return spec.window_bytes


def _of(specs: list[StageSpec], role: str) -> StageSpec:
    return next(spec for spec in specs if spec.name == role)
