"""Gradients between the last backward and the optimizer: copies, norm, clipping, what is wrong.

The norm is ours because DeepSpeed's counts a tied embedding on two stages twice.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_amrlhf.engine.accumulator import GradientAccumulator
from megatron_amrlhf.models.mapping import REPLICATED, Entry
from megatron_amrlhf.parallel.mesh import Mesh


def sum_copies(
    gradients: GradientAccumulator, entries: list[Entry], tied: str | None, mesh: Mesh
) -> None:
    """Sums what several ranks each have a part of, so that copies of a weight stay equal.

    Both copies of a tied embedding, on the first and last stage, and the weights of norms of which
    each tensor rank saw a part (``Entry.is_summed``). Partitions of copies have the same size.
    Entered by every rank.
    """
    if mesh.tp_size > 1:
        norms = [entry.local for entry in entries if entry.is_summed(mesh.sequence_parallel)]
        parts = [gradients.held(name) for name in norms]
        if parts:
            # One all-reduce for all of them; they are views of columns, not contiguous.
            joined = torch.cat(parts, dim=1)
            dist.all_reduce(joined, group=mesh.tp_group)
            for part, summed in zip(
                parts, joined.split([part.shape[1] for part in parts], dim=1), strict=True
            ):
                part.copy_(summed)
    if tied is not None:
        whole = gradients.held(tied).contiguous()
        dist.all_reduce(whole, group=mesh.tie_group)
        gradients.held(tied).copy_(whole)


def global_norm(
    gradients: GradientAccumulator,
    entries: list[Entry],
    tied: str | None,
    mesh: Mesh,
    losses_are_finite: bool = True,
) -> float:
    """L2 norm over every parameter of the model, each counted once. Entered by every rank.

    It is not finite where any gradient or, on any rank, ``losses_are_finite`` is not.

    A parameter that is replicated over the tensor group counts on tensor rank 0; the last
    stage's copy of a tied embedding does not count.
    """
    total = torch.zeros(1, dtype=torch.float64, device=mesh.device)
    for entry in entries:
        if entry.layout is REPLICATED and mesh.tp_rank > 0:
            continue
        if entry.local == tied and not mesh.is_first_stage:
            continue
        # Its partition alone, also where this rank holds the whole: the other ranks add theirs.
        own = gradients.own(entry.local)
        total += torch.linalg.vector_norm(own, dtype=torch.float64).square()
    if not losses_are_finite:
        # By the same all-reduce every rank learns of it: a loss is known on last stages only.
        total.fill_(torch.nan)
    # Over the world: partitions, tensor shards and stages add up to the model.
    dist.all_reduce(total)
    return float(total.sqrt())
