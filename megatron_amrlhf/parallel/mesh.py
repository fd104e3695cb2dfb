"""The mesh: sizes, ranks and process groups, made once and passed around."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import initialize_rng_tracker

from megatron_amrlhf.config.cut import PipelineCut
from megatron_amrlhf.parallel import compat
from megatron_amrlhf.rendezvous import GLOO_INTERFACE, keep_gloo_inside, private_store

TIMEOUT_SECONDS = 1800.0
_own_variables: list[str] = []  # of the environment, set here


@dataclass(frozen=True)
class Mesh:
    """Where this process stands. All groups are torch process groups.

    Attributes:
        world_size, rank: over all processes.
        tp_size, tp_rank, tp_group: tensor axis.
        pp_size, pp_rank, pp_group: pipeline axis; the last rank holds heads and losses.
        token_group: a second group over the pipeline axis, so that sampled tokens travelling
            back never queue behind activations travelling forward.
        dp_size, dp_rank, dp_group: data axis of this stage.
        replica_group: TP x PP ranks of one model replica.
        tie_group: first and last stage of this pipeline (None on middle stages or at PP 1).
        cut: how layers lie on the pipeline axis.
        sequence_parallel: in training, norms and residuals hold 1/TP of the positions
            (https://arxiv.org/abs/2205.05198).
        device: compute device.
    """

    world_size: int
    rank: int
    tp_size: int
    tp_rank: int
    tp_group: dist.ProcessGroup
    pp_size: int
    pp_rank: int
    pp_group: dist.ProcessGroup
    token_group: dist.ProcessGroup
    dp_size: int
    dp_rank: int
    dp_group: dist.ProcessGroup
    replica_group: dist.ProcessGroup
    tie_group: dist.ProcessGroup | None
    cut: PipelineCut
    sequence_parallel: bool
    device: torch.device

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def is_main(self) -> bool:
        """The one process that prints."""
        return self.rank == 0

    @property
    def is_writer(self) -> bool:
        """The one process that holds scores of DP rank 0: last stage, TP rank 0."""
        return self.is_last_stage and self.tp_rank == 0 and self.dp_rank == 0


def start_processes(timeout_seconds: float = TIMEOUT_SECONDS) -> None:
    """Joins torch.distributed by RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; alone if unset.

    Args:
        timeout_seconds: longest wait for the other processes at the start and in collectives.

    Raises:
        UserError: on rank 0, where its port is taken.
    """
    compat.patch_for_cpu()
    compat.keep_freed_memory()
    for name, value in (
        ("RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("LOCAL_RANK", "0"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "0" if os.environ.get("WORLD_SIZE", "1") == "1" else ""),  # 0: a free one
    ):
        if name not in os.environ:
            os.environ[name] = value
            _own_variables.append(name)
    device = compat.compute_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # DeepSpeed takes it for the device's number, also where a task sees one device alone.
        os.environ["LOCAL_RANK"] = str(device.index)
    if keep_gloo_inside():
        _own_variables.append(GLOO_INTERFACE)
    if not dist.is_initialized():
        timeout = timedelta(seconds=timeout_seconds)
        rank = world_size = -1  # as the environment says
        store = private_store(timeout)
        if store is not None:
            rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group(
            compat.backend(), timeout=timeout, store=store, rank=rank, world_size=world_size
        )


def build_mesh(
    tensor: int,
    cut: PipelineCut | int,
    sequence_parallel: bool = False,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> Mesh:
    """Makes all process groups; the world size must be a multiple of tensor x stages.

    Args:
        tensor: tensor-parallel size.
        cut: the pipeline axis, or its number of even stages.
        sequence_parallel: whether training splits positions over the tensor axis.
        timeout_seconds: longest wait in a collective of these groups.
    """
    cut = PipelineCut(cut) if isinstance(cut, int) else cut
    pipeline = cut.stages
    # megatron-core's groups are globals, and setting them up a second time is an error.
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=timeout_seconds / 60,
    )
    initialize_rng_tracker(inference_rng_tracker=True)  # no dropout, so nothing to keep track of
    pp_group = parallel_state.get_pipeline_model_parallel_group()
    dp_group = parallel_state.get_data_parallel_group()
    pipelines: list = [None] * dist.get_world_size()
    # Every rank has to make all groups, in one order: so each learns of all pipelines.
    dist.all_gather_object(pipelines, dist.get_process_group_ranks(pp_group))
    token_group, _ = dist.new_subgroups_by_enumeration(
        [list(ranks) for ranks in sorted({tuple(ranks) for ranks in pipelines})],
        timeout=timedelta(seconds=timeout_seconds),
    )
    # Before DeepSpeed traces its first forward; see the function for what would hang.
    compat.scope_trace_check(dp_group)
    pp_rank, pp_size = dist.get_rank(pp_group), pipeline
    tied_stage = pp_size > 1 and pp_rank in (0, pp_size - 1)
    return Mesh(
        world_size=dist.get_world_size(),
        rank=dist.get_rank(),
        tp_size=tensor,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_size=pp_size,
        pp_rank=pp_rank,
        pp_group=pp_group,
        token_group=token_group,
        dp_size=dist.get_world_size(dp_group),
        dp_rank=dist.get_rank(dp_group),
        dp_group=dp_group,
        replica_group=parallel_state.get_model_parallel_group(),
        tie_group=parallel_state.get_embedding_group() if tied_stage else None,
        cut=cut,
        sequence_parallel=sequence_parallel and tensor > 1,
        device=compat.compute_device(),
    )


def stop_processes() -> None:
    """Leaves torch.distributed; without it a process may abort at exit.

    The environment is as before, so that a program started next does not take it for a rank's.
    """
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    while _own_variables:
        os.environ.pop(_own_variables.pop(), None)
