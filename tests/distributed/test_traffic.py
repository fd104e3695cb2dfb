"""Collectives of known sizes, counted: from forward, backward, DeepSpeed's way and async."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)

from megatron_amrlhf.parallel.mesh import build_mesh
from megatron_amrlhf.planning.volumes import (
    ALL_GATHER,
    ALL_REDUCE,
    BROADCAST,
    RECEIVE,
    REDUCE_SCATTER,
    SEND,
)
from megatron_amrlhf.studies.traffic import TrafficCounter
from tests.distributed.processes import run_on

pytestmark = pytest.mark.distributed

FLOATS = 100  # 400 bytes


def issue(tensor: int, pipeline: int) -> tuple[dict, dict, dict]:
    """What a rank of two issues on the axis that has two ranks."""
    mesh = build_mesh(tensor, pipeline)
    x = torch.ones(FLOATS, 1, requires_grad=True)
    with TrafficCounter(mesh) as counter:
        if tensor == 2:
            reduce_from_tensor_model_parallel_region(x).sum()  # nothing in its backward
            gather_from_sequence_parallel_region(x).sum().backward()  # reduce-scatter in it
        elif pipeline == 2:
            other = 1 - mesh.pp_rank
            ops = [dist.P2POp(dist.isend, x.detach(), group=mesh.pp_group, group_peer=other)]
            ops += [
                dist.P2POp(
                    dist.irecv, torch.empty(FLOATS, 1), group=mesh.pp_group, group_peer=other
                )
            ]
            for work in dist.batch_isend_irecv(ops):
                work.wait()
            work = dist.broadcast(x.detach(), group=mesh.token_group, group_src=1, async_op=True)
            work.wait()
        else:
            parts = [torch.empty(FLOATS) for _ in range(2)]
            dist.all_gather(parts, torch.ones(FLOATS), group=mesh.dp_group)
            work = dist.all_reduce(torch.ones(FLOATS), group=mesh.dp_group, async_op=True)
            work.wait()
            dist.all_reduce(torch.ones(FLOATS, dtype=torch.bfloat16))
    after = dict(counter.counts.calls)
    dist.barrier()
    assert dict(counter.counts.calls) == after  # nothing outside
    return dict(counter.counts.calls), dict(counter.counts.payload), dict(counter.counts.sent)


def test_tensor_axis_in_forward_and_backward():
    for calls, payload, sent in run_on(2, issue, 2, 1):
        reduced, gathered = (ALL_REDUCE, "tensor"), (ALL_GATHER, "tensor")
        scattered = (REDUCE_SCATTER, "tensor")
        assert calls == {reduced: 1, gathered: 1, scattered: 1}
        assert payload == {reduced: 400, gathered: 800, scattered: 800}
        assert sent == {reduced: 400, gathered: 400, scattered: 400}


def test_pipeline_axis_both_ways():
    for calls, _, sent in run_on(2, issue, 1, 2):
        keys = (SEND, "pipeline"), (RECEIVE, "pipeline"), (BROADCAST, "pipeline")
        assert calls == dict.fromkeys(keys, 1)
        assert sent == dict(zip(keys, (400, 400, 200), strict=True))


def test_data_axis_and_the_world():
    for calls, payload, sent in run_on(2, issue, 1, 1):
        keys = (ALL_GATHER, "data"), (ALL_REDUCE, "data"), (ALL_REDUCE, "world")
        assert calls == dict.fromkeys(keys, 1)
        assert payload == dict(zip(keys, (800, 400, 200), strict=True))
        assert sent == dict(zip(keys, (400, 400, 200), strict=True))
