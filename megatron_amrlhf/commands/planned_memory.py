"""The plan's memory beside the measured one, for a run's log."""

from __future__ import annotations

from megatron_amrlhf.experience.context import Context
from megatron_amrlhf.parallel import compat
from megatron_amrlhf.planning.passes import PlannedRole
from megatron_amrlhf.planning.plan import Plan, make_plan
from megatron_amrlhf.sizes import GIB, in_units


def plan_of_run(context: Context) -> Plan:
    """The plan of a run whose roles are built."""
    roles = [
        PlannedRole(name, role.shape, role.spec.head_outputs, role.spec.trainable)
        for name, role in context.engine.roles.items()
    ]
    return make_plan(context.config, context.mesh.dp_size, roles, compat.on_gpu())


def memory_line(plan: Plan, peak_gib: float) -> str:
    """Such as ``memory: planned 51 GiB at most (rollout, stage 0), measured peak 49 GiB``."""
    phase, planned = plan.worst.fullest
    line = (
        f"memory: planned {in_units(planned.total)} at most ({phase}, stage {plan.worst.stage}), "
        f"measured peak {in_units(peak_gib * GIB)}"
    )
    return line if compat.on_gpu() else f"{line} of a process, libraries and freed memory included"
