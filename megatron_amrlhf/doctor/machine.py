"""Devices, memory, limits and left locks of the machine that this process runs on."""

from __future__ import annotations

import os
import re
import resource
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_amrlhf.doctor.records import Disk, Gpu, Lock
from megatron_amrlhf.files import expanded
from megatron_amrlhf.sizes import GIB, KIB

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
INFINIBAND = Path("/sys/class/infiniband")
SHARED_MEMORY = Path("/dev/shm")
LIMITS = {
    "open files": resource.RLIMIT_NOFILE,
    "locked memory": resource.RLIMIT_MEMLOCK,
    "processes": resource.RLIMIT_NPROC,
    "core size": resource.RLIMIT_CORE,
}


def own_device() -> torch.device:
    """The device that a rank of a run here would have."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % count)


def find_gpus(alone: bool) -> list[Gpu]:
    """This rank's device, or all that a lone process sees."""
    if not torch.cuda.is_available():
        return []
    indices = range(torch.cuda.device_count()) if alone else [own_device().index]
    gpus = []
    for index in indices:
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        uuid = str(properties.uuid)
        gpus.append(Gpu(index, properties.name, uuid, total / GIB, free / GIB))
    return gpus


def driver_version() -> str:
    """NVIDIA's kernel driver; empty where there is none."""
    if not NVIDIA_DRIVER.is_file():
        return ""
    match = re.search(r"\s(\d+\.\d+(\.\d+)?)\s", NVIDIA_DRIVER.read_text(encoding="utf-8"))
    return match[1] if match else "unknown"


def nccl_version() -> str:
    """Of the NCCL in torch; empty without CUDA."""
    if not torch.cuda.is_available():
        return ""
    return ".".join(str(part) for part in torch.cuda.nccl.version())


def has_hidden_gpu(environment: Mapping[str, str]) -> bool:
    """Whether a driver is there, torch finds no device, and nobody has asked for that."""
    asked = environment.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    return NVIDIA_DRIVER.is_file() and not torch.cuda.is_available() and not asked


def memory_gib() -> tuple[float, float]:
    """The host's memory and what of it is available, GiB."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    values = {line.split(":")[0]: int(line.split()[1]) for line in lines}  # KiB
    return values["MemTotal"] * KIB / GIB, values["MemAvailable"] * KIB / GIB


def soft_limits() -> dict[str, int | None]:
    """``ulimit`` of this process by name; None: unlimited."""
    values = {name: resource.getrlimit(key)[0] for name, key in LIMITS.items()}
    return {name: None if x == resource.RLIM_INFINITY else x for name, x in values.items()}


def shared_memory_gib() -> float:
    """Size of /dev/shm, GiB; 0 where there is none."""
    return shutil.disk_usage(SHARED_MEMORY).total / GIB if SHARED_MEMORY.is_dir() else 0.0


def has_infiniband() -> bool:
    """Whether there is an RDMA device."""
    return INFINIBAND.is_dir() and any(INFINIBAND.iterdir())


def find_disks(run_folder: Path, model_cache: str | None) -> list[Disk]:
    """Room where a run writes; a folder that is not there yet counts as its nearest parent."""
    uses = {"run folder": run_folder, "temporary files": Path(tempfile.gettempdir())}
    if model_cache is not None:
        uses["model cache"] = expanded(model_cache)
    disks = []
    for use, path in uses.items():
        path = path.absolute()
        there = next(each for each in (path, *path.parents) if each.exists())
        free = shutil.disk_usage(there).free / GIB
        disks.append(Disk(use, str(path), free, os.access(there, os.W_OK)))
    return disks


def find_locks(environment: Mapping[str, str]) -> list[Lock]:
    """Files named ``lock`` in the caches of torch's C++ extensions and of Triton.

    Their owner deletes them when it is done; one that was killed leaves them for ever, and whoever
    wants the same extension then waits without a word.
    """
    home = Path(environment.get("HOME", "/"))
    cache = Path(environment.get("XDG_CACHE_HOME") or home / ".cache")
    extensions = Path(environment.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")
    triton = Path(environment.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")
    found = []
    for folder, patterns in ((extensions, ("*/lock", "*/*/lock")), (triton, ("*/lock",))):
        for path in sorted(each for pattern in patterns for each in folder.glob(pattern)):
            try:
                age = time.time() - path.stat().st_mtime
            except FileNotFoundError:  # deleted by its owner just now
                continue
            found.append(Lock(str(path.absolute()), max(0.0, age)))
    return found
