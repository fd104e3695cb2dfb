"""What the doctor's ranks tell each other, and what rank 0 makes of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "error"]
LONGEST_LIST = 6  # names or ranks in a message; the JSON file has all


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        check: what was looked at, such as ``versions``.
        level: an error makes the exit code 1.
        message: what is so, and where.
        fix: what to do about it; empty where all is well.
    """

    check: str
    level: Level
    message: str
    fix: str = ""


@dataclass(frozen=True)
class Gpu:
    """A CUDA device: its number in this process, name, identity, GiB in all and free."""

    index: int
    name: str
    uuid: str
    memory_gib: float
    free_gib: float


@dataclass(frozen=True)
class Disk:
    """A folder that a run writes to.

    Attributes:
        use: what for: ``run folder``, ``temporary files``, ``model cache``.
        path: absolute.
        free_gib: free for this user on its file system.
        writable: whether this user may write there.
    """

    use: str
    path: str
    free_gib: float
    writable: bool


@dataclass(frozen=True)
class CheckpointRoom:
    """What a run's checkpoints take.

    Attributes:
        num_bytes: of one.
        count: how many more there will be at a time, the one that is being written among them.
    """

    num_bytes: int
    count: int


@dataclass(frozen=True)
class Lock:
    """A lock file of a compiler's cache: path, and how long ago it was made, seconds."""

    path: str
    age_seconds: float


@dataclass(frozen=True)
class RankFacts:
    """What one rank sees without the others.

    Attributes:
        rank, host, local_rank: where it is.
        python: version.
        versions: of each required distribution by its name; None: not installed.
        gpus: this rank's device; of a lone process all of them; empty on a CPU.
        driver, nccl: versions; empty on a CPU.
        hidden_gpu: an NVIDIA driver is there, but torch finds no device and was not told so.
        cores: numbers of the CPU cores that it may use.
        threads: CPU threads of torch's operations.
        dtype, dtype_why: what ``model.dtype: auto`` is on this rank's device, and why.
        bfloat16_factor: time of a product in bfloat16 over that in float32; of CPUs only.
        memory_gib, free_memory_gib: of the host, GiB.
        limits: soft ``ulimit`` by name (``open files``, ``locked memory`` in bytes, ``processes``,
            ``core size`` in bytes); None: unlimited.
        shm_gib: size of /dev/shm, GiB; 0: there is none.
        infiniband: whether the host has an RDMA device.
        disks: folders that a run writes to.
        locks: what compilers have left.
    """

    rank: int
    host: str
    local_rank: int
    python: str
    versions: dict[str, str | None]
    gpus: list[Gpu]
    driver: str
    nccl: str
    hidden_gpu: bool
    cores: list[int]
    threads: int
    dtype: str
    dtype_why: str
    bfloat16_factor: float | None
    memory_gib: float
    free_memory_gib: float
    limits: dict[str, int | None]
    shm_gib: float
    infiniband: bool
    disks: list[Disk]
    locks: list[Lock]


@dataclass(frozen=True)
class Sight:
    """What a rank sees of the file that rank 0 wrote.

    Attributes:
        rank, host: who looked.
        path: where it looked, absolute.
        seconds: until it saw the file; None: never.
        written: whether it could write a file beside it.
        returned: whether rank 0 saw that file.
        error: why it could not read or write, if a reason was given.
    """

    rank: int
    host: str
    path: str
    seconds: float | None
    written: bool
    returned: bool
    error: str


@dataclass(frozen=True)
class Clock:
    """A host's clock less rank 0's: ``offset_seconds`` plus or minus ``uncertainty_seconds``."""

    host: str
    offset_seconds: float
    uncertainty_seconds: float


@dataclass(frozen=True)
class Traffic:
    """What a rank measured of the network.

    Attributes:
        rank: who.
        entered: number of the last measurement that it has begun; ranks have the same numbers.
        name: of that measurement.
        done: whether it has finished all.
        error: what failed.
        all_reduce: seconds by size in bytes.
        exchanges: seconds of exchanging ``LINK_BYTES`` with a partner, by its rank.
    """

    rank: int
    entered: int
    name: str
    done: bool
    error: str
    all_reduce: dict[int, float]
    exchanges: dict[int, float]


@dataclass(frozen=True)
class Link:
    """Seconds in which two ranks exchange ``num_bytes``, both ways at once."""

    low: int
    high: int
    num_bytes: int
    seconds: float

    @property
    def gigabytes_per_second(self) -> float:
        """In each direction, 1e9 bytes."""
        return self.num_bytes / self.seconds / 1e9


def ranks_by_host(facts: Sequence[RankFacts]) -> dict[str, list[int]]:
    """Ranks of each host, in their order."""
    hosts: dict[str, list[int]] = {}
    for each in facts:
        hosts.setdefault(each.host, []).append(each.rank)
    return hosts


def listed(names: Iterable[str]) -> str:
    """Names without doubles, the last ones as a number where there are many."""
    names = list(dict.fromkeys(names))
    if len(names) <= LONGEST_LIST:
        return ", ".join(names)
    return f"{', '.join(names[: LONGEST_LIST - 1])} and {len(names) - LONGEST_LIST + 1} more"


def ranks_text(ranks: Iterable[int]) -> str:
    """``rank 3``, or ``ranks 0-3, 7``."""
    runs: list[list[int]] = []
    for rank in sorted(set(ranks)):
        if runs and runs[-1][-1] == rank - 1:
            runs[-1] = [runs[-1][0], rank]
        else:
            runs.append([rank])
    text = listed("-".join(str(rank) for rank in run) for run in runs)
    return f"rank{'s' if len(runs) > 1 or len(runs[0]) > 1 else ''} {text}"


def places_text(places: Iterable[tuple[str, int]]) -> str:
    """``node1 (ranks 0-1), node2 (rank 2)`` of pairs of a host and a rank."""
    hosts: dict[str, list[int]] = {}
    for host, rank in places:
        hosts.setdefault(host, []).append(rank)
    return listed(f"{host} ({ranks_text(ranks)})" for host, ranks in hosts.items())
