"""The plan's memory beside the measured one, for a run's log."""

from __future__ import annotations

from megatron_amrlhf.experience.context import Context
from megatron_amrlhf.parallel import compat
from megatron_amrlhf.planning.plan import Plan, make_plan
from megatron_amrlhf.planning.roles import PlannedRole
from megatron_amrlhf.sizes import GIB, in_units


def plan_of_run(context: Context) -> Plan:
    """The plan of a run whose roles are built."""
    roles = [
        PlannedRole(name, role.shape, role.spec.head_outputs, role.spec.trainable)
        for name, role in context.engine.roles.items()
    ]
    return make_plan(context.config, context.mesh.dp_size, roles, compat.on_gpu())


def memory_line(context: Context, peak_gib: float) -> str:
    """Such as ``memory: planned 51 GiB at most (rollout, stage 0), measured peak 49 GiB``.

    A plan that cannot be made is told in the line: no log line ends a run.
    """
    try:
        plan = plan_of_run(context)
    except Exception as error:  # whatever an algorithm says of its passes
        why = f"{type(error).__name__}: {error}"
        return f"memory: measured peak {in_units(peak_gib * GIB)}, not planned ({why})"
    phase, planned = plan.worst.fullest
    line = (
        f"memory: planned {in_units(planned.total)} at most ({phase}, stage {plan.worst.stage}), "
        f"measured peak {in_units(peak_gib * GIB)}"
    )
    return line if compat.on_gpu() else f"{line} of a process, libraries and freed memory included"
