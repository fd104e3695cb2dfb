"""Collectives named by what they are for."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_amrlhf.parallel.mesh import Mesh


def broadcast_from_last_stage(tensor: Tensor, mesh: Mesh) -> Tensor:
    """Gives every rank of the replica the last stage's (TP rank 0's) ``tensor``, in place.

    Entered by every rank of the replica with a tensor of the same shape and dtype.
    """
    if mesh.pp_size > 1:
        # Each tensor rank's pipeline on its own, so first the values of its own last stage.
        source = dist.get_process_group_ranks(mesh.pp_group)[-1]
        dist.broadcast(tensor, source, group=mesh.pp_group)
    if mesh.tp_size > 1:
        # Tensor ranks may have rounded differently: after this all hold the bits of TP rank 0.
        source = dist.get_process_group_ranks(mesh.tp_group)[0]
        dist.broadcast(tensor, source, group=mesh.tp_group)
    return tensor


def broadcast_object_from_last_stage(value: object, mesh: Mesh) -> Any:
    """As ``broadcast_from_last_stage`` for a small picklable object, over the whole world.

    The source is the last stage of DP rank 0. Entered by every rank.
    """
    holder = [value]
    dist.broadcast_object_list(holder, src=_writer_rank(mesh), device=mesh.device)
    return holder[0]


def _writer_rank(mesh: Mesh) -> int:
    """Global rank of (TP 0, last stage, DP 0): mcore orders ranks tp, dp, pp (fastest first)."""
    return mesh.tp_size * mesh.dp_size * (mesh.pp_size - 1)


def max_over(value: int, group: dist.ProcessGroup | None, device: torch.device) -> int:
    """The largest ``value`` in the group, on all its ranks."""
    tensor = torch.tensor([value], dtype=torch.int64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX, group=group)
    return int(tensor)


def sum_over(value: int, group: dist.ProcessGroup | None, device: torch.device) -> int:
    """The sum of all ranks' ``value`` in the group, on all its ranks."""
    tensor = torch.tensor([value], dtype=torch.int64, device=device)
    dist.all_reduce(tensor, group=group)
    return int(tensor)


def gather_objects(value: object, group: dist.ProcessGroup | None) -> list:
    """Every rank's picklable ``value`` in group order, on all ranks; group None: of the world."""
    gathered: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered
