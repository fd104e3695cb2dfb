"""Keys of ``zero_optimization`` in a DeepSpeed JSON, known without importing DeepSpeed."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

# Those of the pinned DeepSpeed; a test compares them.
FLAGS = (
    "contiguous_gradients",
    "reduce_scatter",
    "use_multi_rank_bucket_allreduce",
    "allgather_partitions",
    "overlap_comm",
    "compute_grad_norm",
    "load_from_fp32_weights",
    "elastic_checkpoint",
    "cpu_offload",
    "cpu_offload_param",
    "cpu_offload_use_pin_memory",
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save",
    "stage3_use_all_reduce_for_fetch_params",
    "stage3_allgather_sequential",
    "ignore_unused_parameters",
    "legacy_stage1",
    "round_robin_gradients",
    "parameter_alignment",
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients",
    "memory_efficient_linear",
    "pipeline_loading_checkpoint",
    "override_module_apply",
    "log_trace_cache_warnings",
    "enable_sanity_checks",
    "save_muon_momentum_buffer_in_memory",
)
NUMBERS = (
    "reduce_bucket_size",
    "allgather_bucket_size",
    "sub_group_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_module_granularity_threshold",
    "zero_hpz_partition_size",
)
OFFLOADS = ("offload_param", "offload_optimizer")
OBJECTS = (*OFFLOADS, "zenflow", "leaf_module")
KEYS = ("stage", *FLAGS, *NUMBERS, *OBJECTS)


def zero_problems(zero: dict[str, Any]) -> Iterator[str]:
    """Unknown keys and values of another type; "auto" is for others to judge."""
    for key, value in zero.items():
        name = f"zero_optimization.{key}"
        if key not in KEYS:
            close = difflib.get_close_matches(key, KEYS, n=1)
            yield f"{name}: unknown key" + (f", did you mean {close[0]}?" if close else "")
        elif value == "auto":
            continue
        elif key in FLAGS and not isinstance(value, bool):
            yield f"{name} must be true or false (got {value!r})"
        elif key in NUMBERS and not _is_count(value, least=int(key == "reduce_bucket_size")):
            yield f"{name} must be a whole number (got {value!r})"
        elif key in OBJECTS and not isinstance(value, dict):
            example = ' such as {"device": "cpu"}' if key in OFFLOADS else ""
            yield f"{name} must be an object{example} (got {value!r}), or leave it out"
        elif key in OFFLOADS:
            yield from _device_problems(key, value.get("device", "none"))


def _device_problems(key: str, device: Any) -> Iterator[str]:
    if device == "nvme":
        ours = {"offload_param": "offload_parameters"}.get(key, key)
        yield f"remove zero_optimization.{key}: nvme is engine.roles.ROLE.{ours}"
    elif device not in ("none", "cpu"):
        yield f'zero_optimization.{key}.device must be "none" or "cpu" (got {device!r})'


def _is_count(value: Any, least: int) -> bool:
    is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return is_whole and not isinstance(value, bool) and value >= least
