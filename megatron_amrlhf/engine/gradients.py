"""Gradients between the last backward and the optimizer: tied copies, norm, clipping.

DeepSpeed's ZeRO-3 keeps, after the reduce-scatter, one flat partition of each gradient a DP rank
in ``optimizer.averaged_gradients[group]``, in the order of ``optimizer.fp16_groups[group]``.
The norm is ours because DeepSpeed's counts a tied embedding on two stages twice.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor

from megatron_amrlhf.parallel.mesh import Mesh


def gradient_partitions(
    optimizer: DeepSpeedZeroOptimizer_Stage3,
) -> Iterator[tuple[torch.nn.Parameter, Tensor]]:
    """Each trainable parameter with this DP rank's partition of its reduced gradient."""
    for index, parameters in enumerate(optimizer.fp16_groups):
        gradients = optimizer.averaged_gradients[index]
        yield from zip(parameters, gradients, strict=True)


def reduce_tied(
    optimizer: DeepSpeedZeroOptimizer_Stage3, tied: torch.nn.Parameter | None, mesh: Mesh
) -> None:
    """Sums the gradients of both copies of a tied embedding, on the first and last stage.

    Partitions of both copies have the same size, so the DP partition is reduced, not the whole.
    """
    if tied is None:
        return
    for parameter, gradient in gradient_partitions(optimizer):
        if parameter is tied:
            dist.all_reduce(gradient, group=mesh.tie_group)
            return
    raise AssertionError("the tied embedding has no gradient")


def global_norm(
    optimizer: DeepSpeedZeroOptimizer_Stage3, tied: torch.nn.Parameter | None, mesh: Mesh
) -> float:
    """L2 norm over every parameter of the model, each counted once. Entered by every rank.

    A parameter that is replicated over the tensor group counts on tensor rank 0; the last
    stage's copy of a tied embedding does not count.
    """
    total = torch.zeros(1, dtype=torch.float64, device=mesh.device)
    for parameter, gradient in gradient_partitions(optimizer):
        replicated = not getattr(parameter, "tensor_model_parallel", False)
        if replicated and mesh.tp_rank > 0:
            continue
        if parameter is tied and not mesh.is_first_stage:
            continue
        total += gradient.to(torch.float64).square().sum()
    dist.all_reduce(total)
    return float(total.sqrt())


def scale_gradients(optimizer: DeepSpeedZeroOptimizer_Stage3, factor: float) -> None:
    """Multiplies every gradient partition in place."""
    for _, gradient in gradient_partitions(optimizer):
        gradient.mul_(factor)
