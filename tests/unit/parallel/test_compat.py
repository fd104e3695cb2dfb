"""Every internal of the pinned libraries that is used or patched is still where it was."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from importlib.metadata import version

import torch
from deepspeed.comm.torch import build_shm_op
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.utils import is_zero_supported_optimizer
from megatron.core.pipeline_parallel import p2p_communication, schedules

from megatron_amrlhf.parallel import compat


def test_a_cpu_rank_starts_without_the_compiler():
    """It would take each rank seconds; deepspeed.initialize asks for the module of Muon."""
    assert "muon.muon_optimizer import" in inspect.getsource(is_zero_supported_optimizer)
    code = (
        "import sys; from megatron_amrlhf.parallel import compat; "
        "import deepspeed.runtime.zero.muon.muon_optimizer; "
        "print([name for name in sys.modules if name.startswith('torch._inductor')])"
    )
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=hidden)
    assert found.stdout.splitlines()[-1:] == ["[]"], found.stdout + found.stderr


def test_versions_are_the_pinned_ones():
    assert version("megatron-core") == "0.16.1"
    assert version("deepspeed") == "0.19.8"


def test_patched_megatron_modules_still_name_cuda():
    assert 'device="cuda"' in inspect.getsource(schedules)
    assert "torch.cuda.current_device()" in inspect.getsource(p2p_communication)
    for module in compat.MEGATRON_MODULES:
        assert "torch" in vars(module), module.__name__


def test_cpu_stand_in_sends_cuda_tensors_to_the_cpu():
    stand_in = compat._CpuTorch()
    assert stand_in.zeros([], dtype=torch.int, device="cuda").device.type == "cpu"
    assert stand_in.cuda.current_device() == torch.device("cpu")
    assert stand_in.float32 is torch.float32


FAULTS = """
import resource, torch
from megatron_amrlhf.parallel import compat
compat.keep_freed_memory()
def faults():
    torch.ones(16 * 2**20)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = [faults() for _ in range(5)][-1]
after = [faults() for _ in range(10)][-1]
print(after - before)
"""


def test_freed_memory_is_not_zeroed_by_the_kernel_again():
    """Each of 64 MiB would have 16,384 pages, or 32 huge ones."""

    def faults(**variables: str) -> int:
        environment = {x: y for x, y in os.environ.items() if not x.startswith("MALLOC_")}
        done = subprocess.run(
            [sys.executable, "-c", FAULTS],
            env=environment | variables,
            capture_output=True,
            text=True,
            check=True,
        )
        return int(done.stdout.splitlines()[-1])

    assert faults() < 100 < 300 < faults(MALLOC_ARENA_MAX="8")  # a variable has precedence


def test_trace_check_is_called_by_the_patched_name():
    for module in compat.TRACE_CHECKERS:
        assert "assert_ints_same_as_other_ranks(" in inspect.getsource(module), module.__name__


def test_deepspeed_asks_for_its_arguments_where_it_is_answered_briefly():
    for module in compat.ARGUMENT_PRINTERS:
        assert inspect.getsource(module).count("locals()") == 1, module.__name__
        assert module.locals() == "not shown"


def test_shared_memory_op_is_looked_up_where_it_is_switched_off():
    assert ShareMemCommBuilder.NAME == "deepspeed_shm_comm"
    assert "__compatible_ops__.get(builder.NAME" in inspect.getsource(build_shm_op)


def test_gradient_reduction_has_its_two_entry_points():
    assert callable(DeepSpeedEngine.coalesce_grad_reduction)
    assert callable(DeepSpeedZeroOptimizer_Stage3.clear_backward_seen_flag)
    source = inspect.getsource(DeepSpeedZeroOptimizer_Stage3)
    assert "self.averaged_gradients" in source and "self.fp16_groups" in source
    # What engine/partitioned.py frees or hands over.
    assert "self.__param_id_to_grad_partition" in source
    assert "self.grad_partitions_flat_buffer" in source
    assert "self.flatten(self.averaged_gradients[sub_group_id]).to(" in source
    assert callable(DeepSpeedZeroOptimizer_Stage3._unflatten_partitioned_parameters)
