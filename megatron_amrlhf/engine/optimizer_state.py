"""What ZeRO-3 keeps of a trainable role on this rank: fp32 masters, Adam's moments, counters.

A rank holds one contiguous slice of each parameter of its stage, flattened, in its tensor shard;
DeepSpeed pads the last slices. The slices here are without the padding, so that those of all
data-parallel ranks laid end to end give each element once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from megatron_amrlhf.engine.role import Role
from megatron_amrlhf.engine.zero3 import Zero3Engine
from megatron_amrlhf.errors import UserError

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
DEEPSPEED_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")


@dataclass(frozen=True)
class Slice:
    """This rank's part of a parameter.

    Attributes:
        shape: of the parameter in this tensor rank's shard (not partitioned).
        start: first element of the flattened shard that is here.
        length: number of elements here; may be 0.
    """

    shape: tuple[int, ...]
    start: int
    length: int


def refuse_nvme(role: Role) -> None:
    """Raises ``UserError`` where states lie on NVMe, out of reach here."""
    optimizer = role.engine.optimizer
    if optimizer.swap_optimizer or optimizer.params_in_nvme_and_cpu:
        raise UserError(
            "checkpoints cannot be taken with offload to nvme: use device cpu in engine.deepspeed"
        )


def local_slices(role: Role) -> dict[str, Slice]:
    """This rank's slice of each parameter of a trainable role's stage, by local name."""
    slices = {}
    for name, parameter in role.module.named_parameters():
        partition = parameter.partition_numel()
        start = min(partition * role.mesh.dp_rank, parameter.ds_numel)
        length = min(partition, parameter.ds_numel - start)
        slices[name] = Slice(tuple(parameter.ds_shape), start, length)
    return slices


def role_counters(role: Role) -> dict:
    """What of a trainable role is no tensor, JSON-able and equal on every rank.

    ``optimizer_step`` is Adam's step, None before the first one.
    """
    states = [role.engine.optimizer.state.get(flat, {}) for flat in _flat_masters(role)]
    steps = {float(state["step"]) if state else None for state in states}
    assert len(steps) == 1, f"sub-groups are at different steps: {steps}"
    scheduler = role.engine.lr_scheduler
    return {
        "dtype": str(role.spec.dtype).removeprefix("torch."),
        "optimizer_step": steps.pop(),
        "schedule": {
            "last_epoch": scheduler.last_epoch,
            "step_count": scheduler._step_count,
            "lr": scheduler.get_last_lr(),
        },
        "deepspeed": {name: getattr(role.engine, name) for name in DEEPSPEED_COUNTERS},
    }


def read_states(role: Role) -> dict[str, Tensor]:
    """1-D tensors ``NAME.master``, and after the first step ``NAME.exp_avg``, ``.exp_avg_sq``.

    On CPU they are views of the live states: write them before the next step.
    """
    kinds = (MASTER, *(MOMENTS if _has_moments(role) else ()))
    tensors = {}
    for name, place in local_slices(role).items():
        parameter = role.module.get_parameter(name)
        for kind in kinds:
            tensors[f"{name}.{kind}"] = _get(parameter, kind)[: place.length].detach().cpu()
    return tensors


@torch.no_grad()
def write_states(role: Role, tensors: dict[str, Tensor], counters: dict) -> None:
    """Puts back what ``read_states`` and ``role_counters`` gave, and the weights made of it.

    The learning rate follows the schedule of this run's configuration at the saved step. Entered
    by every rank of the stage's data-parallel group.
    """
    _make_moments(role, counters["optimizer_step"])
    for name, place in local_slices(role).items():
        parameter = role.module.get_parameter(name)
        for kind in (MASTER, *(MOMENTS if _has_moments(role) else ())):
            partition = _get(parameter, kind).clone()
            partition[: place.length] = tensors[f"{name}.{kind}"].to(partition.device)
            _set(parameter, partition, kind)
    _refresh_weights(role)
    _set_schedule(role, counters["schedule"])
    for name, value in counters["deepspeed"].items():
        setattr(role.engine, name, value)


def engine_counters(engine: Zero3Engine) -> dict[str, int]:
    """Counters of skipped steps, JSON-able and equal on every rank."""
    return {
        "skipped_steps": engine.skipped_steps,
        "skipped_in_a_row": engine._skipped_in_a_row,
    }


def set_engine_counters(engine: Zero3Engine, counters: dict[str, int]) -> None:
    """Puts back what ``engine_counters`` gave."""
    engine.skipped_steps = counters["skipped_steps"]
    engine._skipped_in_a_row = counters["skipped_in_a_row"]


def _flat_masters(role: Role) -> list[Tensor]:
    """One flat fp32 tensor a sub-group of parameters; keys of the torch optimizer's state."""
    return role.engine.optimizer.fp32_partitioned_groups_flat


def _has_moments(role: Role) -> bool:
    return all(role.engine.optimizer.state.get(flat) for flat in _flat_masters(role))


def _get(parameter: nn.Parameter, kind: str) -> Tensor:
    if kind == MASTER:
        return safe_get_local_fp32_param(parameter)
    return safe_get_local_optimizer_state(parameter, kind)


def _set(parameter: nn.Parameter, value: Tensor, kind: str) -> None:
    if kind == MASTER:
        safe_set_local_fp32_param(parameter, value)
    else:
        safe_set_local_optimizer_state(parameter, value, kind)


def _make_moments(role: Role, step: float | None) -> None:
    """Adam's state as its first step would make it, but at ``step``; none if that is None."""
    state = role.engine.optimizer.state
    state.clear()
    if step is None:
        return
    for flat in _flat_masters(role):
        state[flat] = {"step": torch.tensor(step, dtype=torch.float32)}
        state[flat] |= {moment: torch.zeros_like(flat) for moment in MOMENTS}


def _refresh_weights(role: Role) -> None:
    """Makes the weights anew from the masters, as DeepSpeed's optimizer step does."""
    optimizer = role.engine.optimizer
    if optimizer.persistent_parameters:
        optimizer._partition_all_parameters()
    for index in range(len(optimizer.fp16_groups)):
        optimizer._reassign_or_swap_out_partitioned_parameters(index)
    if optimizer.persistent_parameters:
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    optimizer.invalidate_secondary_tensor()


def _set_schedule(role: Role, schedule: dict) -> None:
    scheduler = role.engine.lr_scheduler
    scheduler.last_epoch = schedule["last_epoch"]
    scheduler._step_count = schedule["step_count"]
    pairs = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    rates = [base * factor(scheduler.last_epoch) for base, factor in pairs]
    for group, rate in zip(role.engine.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
