"""The only place that patches libraries, and that knows what differs between CPU and GPU.

megatron-core 0.16.1 names ``device="cuda"`` in places that a CPU process reaches, and DeepSpeed
0.19.8 compiles a shared-memory op at start on CPU, compares ZeRO-3 traces over the whole world and
formats all weights into lines that it does not print.
Each patch below is applied once, and ``tests/unit/parallel/test_compat.py`` fails when an upstream
release moves what it patches.
"""

from __future__ import annotations

import ctypes
import os

import torch
import torch.distributed as dist
from megatron.core import jit as megatron_jit
from megatron.core import utils as megatron_utils
from megatron.core.dist_checkpointing.strategies import filesystem_async, state_dict_saver
from megatron.core.pipeline_parallel import p2p_communication, schedules
from megatron.core.tensor_parallel import layers, mappings

from megatron_amrlhf.config.deepspeed_models import named_accelerator

with named_accelerator():
    import deepspeed
    from deepspeed.runtime.zero import (
        parameter_offload,
        partition_parameters,
        partitioned_param_coordinator,
        stage3,
    )

from megatron_amrlhf.parallel import without_compiler
from megatron_amrlhf.sizes import GIB, KIB

with without_compiler():  # deepspeed.initialize imports it for every optimizer
    import deepspeed.runtime.zero.muon.muon_optimizer

MEGATRON_MODULES = (
    schedules,
    p2p_communication,
    layers,
    mappings,
    megatron_utils,
    filesystem_async,
    state_dict_saver,
)
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
TRACE_CHECKERS = (partition_parameters, partitioned_param_coordinator, stage3)
ARGUMENT_PRINTERS = (parameter_offload, stage3)
for _module in ARGUMENT_PRINTERS:
    # Each formats the values of all parameters into a line that it does not print: milliseconds
    # a parameter and role, and twice a start failed in there, inside torch's own formatting.
    _module.locals = lambda: "not shown"


def on_gpu() -> bool:
    """Whether this process computes on a CUDA device."""
    return torch.cuda.is_available()


def backend() -> str:
    """Name of the torch.distributed backend."""
    return "nccl" if on_gpu() else "gloo"


def compute_device() -> torch.device:
    """The device of this process; on a GPU machine the local rank's."""
    if not on_gpu():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def peak_memory_gib() -> float:
    """Peak memory of this process: device memory on GPU, resident set on CPU, in GiB."""
    if on_gpu():
        return torch.cuda.max_memory_allocated() / GIB
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * KIB / GIB
    return 0.0


class _CpuCuda:
    """Stands for ``torch.cuda`` inside the patched megatron modules."""

    def __getattr__(self, name: str):
        return getattr(torch.cuda, name)

    @staticmethod
    def current_device() -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def synchronize() -> None:
        return None


class _CpuTorch:
    """Stands for ``torch`` inside the patched megatron modules: "cuda" means the CPU."""

    cuda = _CpuCuda()

    def __getattr__(self, name: str):
        return getattr(torch, name)

    @staticmethod
    def zeros(*args, **kwargs):
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return torch.zeros(*args, **kwargs)


def patch_for_cpu() -> None:
    """Lets megatron-core's schedules and layers run on CPU. Does nothing on a GPU."""
    if on_gpu():
        return
    megatron_jit.disable_jit_fuser()
    for module in MEGATRON_MODULES:
        assert hasattr(module, "torch"), f"{module.__name__} no longer imports torch by name"
        module.torch = _CpuTorch()
    # The shared-memory all-reduce would be compiled at start: needs g++, and a killed run leaves
    # a lock file on which every later run waits for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def keep_freed_memory() -> None:
    """Lets the C library keep what is freed for what is allocated next. Does nothing on a GPU.

    glibc asks the kernel for each block of more than 32 MiB, logits for instance, which zeroes it
    page by page at its first use and takes it back when it is freed. Of an update that was 8 % of
    the time (tcmalloc saves as much, jemalloc loses a third). MALLOC_* variables have precedence.
    """
    libc = ctypes.CDLL(None)
    is_set = any(name.startswith("MALLOC_") for name in os.environ)
    if on_gpu() or is_set or not hasattr(libc, "mallopt"):
        return
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def scope_trace_check(data_parallel_group: dist.ProcessGroup) -> None:
    """Compares ZeRO-3 traces over the stage's data-parallel group instead of the world.

    Stages of a pipeline have different modules, so DeepSpeed's comparison with global rank 0
    never ends (its broadcasts meet in different numbers).
    """

    def check(ints: list[int]) -> None:
        gathered: list = [None] * dist.get_world_size(data_parallel_group)
        dist.all_gather_object(gathered, list(ints), group=data_parallel_group)
        assert all(other == gathered[0] for other in gathered), "ZeRO-3 traces differ over DP"

    for module in TRACE_CHECKERS:
        assert hasattr(module, "assert_ints_same_as_other_ranks"), module.__name__
        module.assert_ints_same_as_other_ranks = check
