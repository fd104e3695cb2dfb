"""Counts what torch.distributed moves: calls and bytes by kind of operation and axis of the mesh.

All of torch's collectives and point-to-point operations are operators of its dispatcher, whoever
issues them (the backward, DeepSpeed, megatron-core) and whether they are waited for or not, so one
dispatch mode sees them all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_amrlhf.parallel.mesh import Mesh
from megatron_amrlhf.planning.volumes import (
    ALL_GATHER,
    ALL_REDUCE,
    BROADCAST,
    RECEIVE,
    REDUCE_SCATTER,
    SEND,
    Volumes,
    sent_bytes,
)

# operator -> (kind, place of the argument that holds the whole payload); None: it moves nothing
OPERATORS: dict[str, tuple[str, int] | None] = {
    "_allgather_base_": (ALL_GATHER, 0),
    "allgather_": (ALL_GATHER, 0),
    "allgather_coalesced_": (ALL_GATHER, 0),
    "allgather_into_tensor_coalesced_": (ALL_GATHER, 0),
    "_reduce_scatter_base_": (REDUCE_SCATTER, 1),
    "reduce_scatter_": (REDUCE_SCATTER, 1),
    "reduce_scatter_tensor_coalesced_": (REDUCE_SCATTER, 1),
    "allreduce_": (ALL_REDUCE, 0),
    "allreduce_coalesced_": (ALL_REDUCE, 0),
    "broadcast_": (BROADCAST, 0),
    "send": (SEND, 0),
    "recv_": (RECEIVE, 0),
    "recv_any_source_": (RECEIVE, 0),
    "barrier": None,
    "monitored_barrier_": None,
    "check_for_nan": None,
}


@dataclass
class Counts:
    """What a rank has issued, by (kind, axis).

    Attributes:
        calls: how often.
        payload: bytes of the whole tensors: what a gather gives, what a reduction is given.
        sent: bytes that this rank sends for it (``sent_bytes``); at ``receive``, gets.
    """

    calls: Counter = field(default_factory=Counter)
    payload: Counter = field(default_factory=Counter)
    sent: Volumes = field(default_factory=Volumes)


class TrafficCounter(TorchDispatchMode):
    """While it is entered, ``counts`` grow with every operation that this thread issues.

    The threads of a backward count too: autograd carries the mode to them. It slows every torch
    operation down, so what runs inside is not to be timed.

    Args:
        mesh: names the axes; a group that is none of its is called by its size.
    """

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.counts = Counts()
        self._axes = _axes(mesh)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if getattr(func, "namespace", None) == "c10d":
            self._count(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple) -> None:
        assert name in OPERATORS, f"c10d::{name} is not counted"
        counted = OPERATORS[name]
        if counted is None:
            return
        kind, place = counted
        boxed = next(x for x in args if isinstance(x, torch.ScriptObject))
        group = dist.ProcessGroup.unbox(boxed)
        num_bytes = sum(x.numel() * x.element_size() for x in _tensors(args[place]))
        ranks = tuple(dist.get_process_group_ranks(group))
        axis = self._axes.get(group.group_name, f"group of {len(ranks)}")
        # The interleaved schedule at PP 2 sends one way through the group of all processes.
        key = (kind, "pipeline" if kind in (SEND, RECEIVE) else axis)
        self.counts.calls[key] += 1
        self.counts.payload[key] += num_bytes
        share = sent_bytes(kind, num_bytes, len(ranks))
        self.counts.sent[key] += share  # type: ignore[assignment]  # a Counter of floats


def _axes(mesh: Mesh) -> dict[str, str]:
    named = {
        "tensor": (mesh.tp_group,),
        "pipeline": (mesh.pp_group, mesh.token_group, mesh.tie_group),
        "data": (mesh.dp_group,),
        "replica": (mesh.replica_group,),
        "world": (dist.group.WORLD,),
    }
    return {
        group.group_name: axis
        for axis, groups in named.items()
        for group in groups
        if group is not None
    }


def _tensors(value: object) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
