"""What is wrong with each machine by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from megatron_amrlhf.doctor.records import (
    CheckpointRoom,
    Disk,
    Finding,
    Level,
    RankFacts,
    listed,
    places_text,
    ranks_by_host,
    ranks_text,
)
from megatron_amrlhf.sizes import GIB, in_units

USED_GPU_GIB = 2.0  # more, and somebody else computes there; an own CUDA context is about 0.5
FREE_GIB_A_RANK = 2.0
# A rank of gloo or NCCL has a connection or two to each other one in each of its groups.
FEW_OPEN_FILES, OPEN_FILES_A_RANK = 1024, 32
TOO_FEW_OPEN_FILES, FEWEST_OPEN_FILES_A_RANK = 256, 4
FEW_PROCESSES, FEWEST_PROCESSES_A_RANK = 4096, 64  # threads count too
# RDMA registers its buffers, NCCL's are a few MiB for each peer and channel.
LITTLE_LOCKED_BYTES = GIB
# NCCL's ranks of a host talk through /dev/shm; 64 MiB are what containers get by default.
LITTLE_SHM_GIB, TOO_LITTLE_SHM_GIB_A_RANK = 1.0, 1 / 32
LITTLE_DISK_GIB = {"run folder": 10.0, "temporary files": 1.0, "model cache": 5.0}
TOO_LITTLE_DISK_GIB = 0.1
COMPILING_SECONDS = 600.0  # an extension takes a few minutes


def judge_devices(facts: Sequence[RankFacts]) -> list[Finding]:
    """GPUs or CPU cores of each host for its ranks."""
    found = [*by_host(facts, _gpu_problems), *_shared_gpus(facts), *_mixed_devices(facts)]
    for host, ranks in ranks_by_host(facts).items():
        there = [each for each in facts if each.host == host]
        if not there[0].gpus:
            found += _core_problems(host, there)
        low = FREE_GIB_A_RANK * len(ranks)
        if there[0].free_memory_gib < low:
            found.append(
                Finding(
                    "devices",
                    "warning",
                    f"{host} has {there[0].free_memory_gib:.1f} GiB of memory available for "
                    f"{ranks_text(ranks)}",
                    "end what else runs there, or start fewer ranks",
                )
            )
    return found or [Finding("devices", "ok", _devices_text(facts))]


def _devices_text(facts: Sequence[RankFacts]) -> str:
    hosts = ranks_by_host(facts)
    text = f"{len(hosts)} host{'s' * (len(hosts) > 1)}, {len(facts)} rank{'s' * (len(facts) > 1)}"
    first = facts[0]
    if first.gpus:
        gpu = first.gpus[0]
        count = len({x.uuid for each in facts for x in each.gpus})
        return (
            f"{text}, {count} x {gpu.name} ({gpu.memory_gib:.0f} GiB), driver {first.driver}, "
            f"NCCL {first.nccl}"
        )
    cores = {each.host: len(_cores([x for x in facts if x.host == each.host])) for each in facts}
    return f"{text}, no GPU, {sum(cores.values())} CPU cores"


def _gpu_problems(each: RankFacts) -> Iterator[Finding]:
    if each.hidden_gpu:
        yield Finding(
            "devices",
            "error",
            f"the NVIDIA driver {each.driver} is there, but torch {each.versions.get('torch')} "
            "finds no GPU",
            "install a CUDA build of torch that this driver can run, or set CUDA_VISIBLE_DEVICES= "
            "to use the CPU",
        )
    for gpu in each.gpus:
        used = gpu.memory_gib - gpu.free_gib
        if used > USED_GPU_GIB:
            yield Finding(
                "devices",
                "warning",
                f"{used:.1f} of {gpu.memory_gib:.0f} GiB of GPU {gpu.index} are in use",
                "look for a left process: nvidia-smi",
            )


def _shared_gpus(facts: Sequence[RankFacts]) -> Iterator[Finding]:
    owners: dict[tuple[str, str], list[int]] = {}
    for each in facts:
        for gpu in each.gpus:
            owners.setdefault((each.host, gpu.uuid), []).append(each.rank)
    for (host, _), ranks in owners.items():
        if len(ranks) > 1:
            yield Finding(
                "devices",
                "error",
                f"{ranks_text(ranks)} of {host} have the same GPU, which NCCL refuses",
                "start one rank a GPU",
            )


def _mixed_devices(facts: Sequence[RankFacts]) -> Iterator[Finding]:
    kinds: dict[str, list] = {}
    for each in facts:
        gpu = each.gpus[0] if each.gpus else None
        kind = f"{gpu.name}, driver {each.driver}, NCCL {each.nccl}" if gpu else "no GPU"
        kinds.setdefault(kind, []).append((each.host, each.rank))
    if len(kinds) > 1:
        text = "; ".join(f"{kind} on {places_text(places)}" for kind, places in kinds.items())
        # Some with NCCL and some with gloo cannot meet; else the slowest sets the pace.
        level: Level = "error" if "no GPU" in kinds else "warning"
        yield Finding("devices", level, text, "use nodes that are alike")


def _cores(facts: Sequence[RankFacts]) -> set[int]:
    return {core for each in facts for core in each.cores}


def _core_problems(host: str, there: Sequence[RankFacts]) -> Iterator[Finding]:
    ranks, cores = len(there), len(_cores(there))
    threads = sum(each.threads for each in there)
    if ranks > cores:
        yield Finding(
            "devices",
            "warning",
            f"{ranks} ranks share {cores} CPU cores of {host}",
            "start no more ranks than cores",
        )
    elif ranks > 1 and threads > cores:
        yield Finding(
            "devices",
            "warning",
            f"{ranks} ranks of {host} have {threads} threads on {cores} CPU cores",
            f"export OMP_NUM_THREADS={cores // ranks}",
        )


def judge_limits(facts: Sequence[RankFacts]) -> list[Finding]:
    """``ulimit`` and /dev/shm of each host, for as many ranks as there are."""
    hosts = ranks_by_host(facts)

    def problems(each: RankFacts) -> Iterator[Finding]:
        yield from _limit_problems(each, len(facts), len(hosts[each.host]))

    found = list(by_host(facts, problems))
    if found:
        return found
    limits = facts[0].limits
    names = ("open files", "processes")
    text = ", ".join(f"{limit_text(name, limits[name])} {name}" for name in names)
    locked = limit_text("locked memory", limits["locked memory"])
    return [
        Finding("limits", "ok", f"{text}, {locked} locked, /dev/shm {facts[0].shm_gib:.1f} GiB")
    ]


def _limit_problems(each: RankFacts, ranks: int, local_ranks: int) -> Iterator[Finding]:
    limits = each.limits
    files, wanted = limits["open files"], max(FEW_OPEN_FILES, OPEN_FILES_A_RANK * ranks)
    if files is not None and files < wanted:
        low = files < TOO_FEW_OPEN_FILES + FEWEST_OPEN_FILES_A_RANK * ranks
        yield Finding(
            "limits",
            "error" if low else "warning",
            f"{files} open files for {ranks} rank{'s' * (ranks > 1)}",
            f"ulimit -n {max(65536, wanted)} where the ranks are started (limits.conf: nofile)",
        )
    processes, fewest = limits["processes"], FEWEST_PROCESSES_A_RANK * local_ranks
    if processes is not None and processes < max(FEW_PROCESSES, fewest):
        yield Finding(
            "limits",
            "error" if processes < fewest else "warning",
            f"{processes} processes and threads",
            f"ulimit -u {max(65536, 4 * fewest)} (limits.conf: nproc)",
        )
    locked = limits["locked memory"]
    if each.infiniband and each.gpus and locked is not None and locked < LITTLE_LOCKED_BYTES:
        yield Finding(
            "limits",
            "error",
            f"{limit_text('locked memory', locked)} of locked memory, and RDMA needs more",
            "ulimit -l unlimited (limits.conf: memlock; for Slurm LimitMEMLOCK=infinity of slurmd)",
        )
    too_little = bool(each.gpus) * local_ranks * TOO_LITTLE_SHM_GIB_A_RANK
    wanted_gib = LITTLE_SHM_GIB if each.gpus else TOO_LITTLE_SHM_GIB_A_RANK
    if each.shm_gib < max(wanted_gib, too_little):
        yield Finding(
            "limits",
            "error" if each.shm_gib < too_little else "warning",
            f"/dev/shm has {each.shm_gib * 1024:.0f} MiB",
            "docker run --shm-size=16g or --ipc=host; else mount -o remount,size=16g /dev/shm",
        )


def limit_text(name: str, value: int | None) -> str:
    """A limit as a person reads it; bytes in their unit."""
    if value is None:
        return "unlimited"
    if name in ("locked memory", "core size"):
        return in_units(value)
    return str(value)


def judge_disks(facts: Sequence[RankFacts], checkpoint: CheckpointRoom | None) -> list[Finding]:
    """Room in the folders that a run writes to.

    Args:
        facts: of all ranks.
        checkpoint: what the run's checkpoints take; None: not known.
    """

    def problems(each: RankFacts) -> Iterator[Finding]:
        for disk in each.disks:
            yield from _disk_problems(disk, checkpoint if disk.use == "run folder" else None)

    if found := list(by_host(facts, problems)):
        return found
    text = "; ".join(f"{x.use} {x.path}: {x.free_gib:.0f} GiB free" for x in facts[0].disks)
    if checkpoint is not None:
        text += f"; a checkpoint takes {checkpoint.num_bytes / GIB:.1f} GiB"
    return [Finding("disk", "ok", text)]


def _disk_problems(disk: Disk, checkpoint: CheckpointRoom | None) -> Iterator[Finding]:
    where = f"{disk.use} {disk.path}"
    if not disk.writable:
        yield Finding("disk", "error", f"{where} is not writable", "choose another folder")
        return
    free = f"{where}: {disk.free_gib:.1f} GiB free"
    if checkpoint is not None:
        one, count = checkpoint.num_bytes / GIB, checkpoint.count
        if disk.free_gib < count * one:
            yield Finding(
                "disk",
                "error" if disk.free_gib < one else "warning",
                f"{free}, a checkpoint takes {one:.1f} GiB and {count} more are to be kept or "
                "written at a time",
                "make room, lower checkpoint.keep or choose another run.folder",
            )
    elif disk.free_gib < LITTLE_DISK_GIB[disk.use]:
        low = disk.free_gib < TOO_LITTLE_DISK_GIB
        yield Finding("disk", "error" if low else "warning", free, "make room")


def judge_locks(facts: Sequence[RankFacts]) -> list[Finding]:
    """Lock files in compilers' caches. Warnings: the package itself compiles no extension."""
    oldest: dict[str, float] = {}
    hosts: dict[str, list[str]] = {}
    for each in facts:
        for lock in each.locks:
            oldest[lock.path] = max(lock.age_seconds, oldest.get(lock.path, 0.0))
            hosts.setdefault(lock.path, []).append(each.host)
    if not oldest:
        return [Finding("locks", "ok", "no compiler has left a lock file")]
    findings = []
    for path, age in oldest.items():
        where = f"{path} on {listed(hosts[path])}, {age / 60:.0f} minutes old"
        if age < COMPILING_SECONDS:
            fix = "wait for the process that compiles now; if there is none, delete the file"
        else:
            fix = f"delete it: whoever needs that extension waits for ever (rm {path})"
        findings.append(Finding("locks", "warning", where, fix))
    return findings


def by_host(
    facts: Sequence[RankFacts], problems: Callable[[RankFacts], Iterable[Finding]]
) -> Iterator[Finding]:
    """Equal findings of several ranks as one that names their hosts."""
    hosts: dict[Finding, list[str]] = {}
    for each in facts:
        for finding in problems(each):
            hosts.setdefault(finding, []).append(each.host)
    for finding, names in hosts.items():
        message = f"{listed(names)}: {finding.message}"
        yield Finding(finding.check, finding.level, message, finding.fix)
