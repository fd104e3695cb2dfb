"""Keys of a DeepSpeed JSON's sections, known without importing DeepSpeed."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Keys:
    """The keys of a section by what they hold; ``others`` are looked at elsewhere or not at all."""

    flags: tuple[str, ...] = ()
    counts: tuple[str, ...] = ()
    shares: tuple[str, ...] = ()
    objects: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        """Every key that DeepSpeed knows here."""
        return (*self.flags, *self.counts, *self.shares, *self.objects, *self.others)


# Those of the pinned DeepSpeed; a test compares them.
BF16 = Keys(
    flags=(
        "enabled",
        "immediate_grad_update",
        "check_grad_overflow",
        "bf16_master_weights_and_grads",
        "bf16_optimizer_states",
    )
)
OFFLOADS = {
    "offload_param": Keys(
        flags=("pin_memory",),
        counts=("buffer_count", "buffer_size", "max_in_cpu"),
        others=("device", "nvme_path"),
    ),
    "offload_optimizer": Keys(
        flags=("pin_memory", "pipeline_read", "pipeline_write", "fast_init", "super_offload"),
        counts=("buffer_count",),
        shares=("ratio", "cpuadam_cores_perc"),
        others=("device", "nvme_path"),
    ),
}
ZERO = Keys(
    flags=(
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
    ),
    counts=(
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
    ),
    objects=(*OFFLOADS, "zenflow", "leaf_module"),
    others=("stage",),
)


def zero_problems(zero: dict[str, Any]) -> Iterator[str]:
    """Unknown keys and values of another type; "auto" is for others to judge."""
    yield from _problems("zero_optimization", zero, ZERO)
    for key, known in OFFLOADS.items():
        if isinstance(section := zero.get(key), dict):
            yield from _problems(f"zero_optimization.{key}", section, known)
            yield from _device_problems(key, section.get("device", "none"))


def bf16_problems(section: Any, dtype: str) -> Iterator[str]:
    """The same of the section ``bf16``, which must not contradict the run's ``model.dtype``."""
    if not isinstance(section, dict):
        yield f"bf16 must be an object (got {section!r})"
        return
    yield from _problems("bf16", section, BF16)
    if dtype != "auto" and section.get("enabled", "auto") is (dtype != "bfloat16"):
        yield f'bf16.enabled contradicts model.dtype: {dtype}, set it to "auto"'


def _problems(name: str, section: dict[str, Any], known: Keys) -> Iterator[str]:
    for key, value in section.items():
        if key not in known.all:
            close = difflib.get_close_matches(key, known.all, n=1)
            yield f"{name}.{key}: unknown key" + (f", did you mean {close[0]}?" if close else "")
        elif value == "auto":
            continue
        elif key in known.flags and not isinstance(value, bool):
            yield f"{name}.{key} must be true or false (got {value!r})"
        elif key in known.counts and not _is_count(value, least=int(key == "reduce_bucket_size")):
            yield f"{name}.{key} must be a whole number (got {value!r})"
        elif key in known.shares and not _is_share(value):
            yield f"{name}.{key} must be a number from 0 to 1 (got {value!r})"
        elif key in known.objects and not isinstance(value, dict):
            example = ' such as {"device": "cpu"}' if key in OFFLOADS else ""
            yield f"{name}.{key} must be an object{example} (got {value!r}), or leave it out"


def _device_problems(key: str, device: Any) -> Iterator[str]:
    if device == "nvme":
        ours = {"offload_param": "offload_parameters"}.get(key, key)
        yield f"remove zero_optimization.{key}: nvme is engine.roles.ROLE.{ours}"
    elif device not in ("none", "cpu"):
        yield f'zero_optimization.{key}.device must be "none" or "cpu" (got {device!r})'


def _is_count(value: Any, least: int) -> bool:
    is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return is_whole and not isinstance(value, bool) and value >= least


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
