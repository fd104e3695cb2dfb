"""Facts of ranks where all is well, to be made worse."""

from __future__ import annotations

from dataclasses import replace

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from megatron_amrlhf.doctor.records import Disk, Finding, Gpu, RankFacts
from megatron_amrlhf.doctor.software import Pins

PINS = Pins(
    "requirements.txt",
    SpecifierSet(">=3.11,<3.13"),
    (Requirement("torch>=2.10,<2.14"), Requirement("deepspeed==0.19.8"), Requirement("rich")),
)
VERSIONS = {"torch": "2.13.0+cpu", "deepspeed": "0.19.8", "rich": "14.0"}


def facts(rank: int = 0, host: str = "node1", **changes) -> RankFacts:
    """A healthy rank on a CPU, with some values changed."""
    healthy = RankFacts(
        rank=rank,
        host=host,
        local_rank=rank,
        python="3.11.7",
        versions=VERSIONS,
        gpus=[],
        driver="",
        nccl="",
        hidden_gpu=False,
        cores=list(range(16)),
        threads=1,
        dtype="float32",
        dtype_why="this CPU has no bfloat16 instructions (AVX512-BF16 or AMX)",
        bfloat16_factor=9.0,
        memory_gib=64.0,
        free_memory_gib=60.0,
        limits={
            "open files": 65536,
            "locked memory": None,
            "processes": None,
            "core size": 0,
        },
        shm_gib=32.0,
        infiniband=False,
        disks=[Disk("run folder", "/data/runs/x", 500.0, True)],
        locks=[],
    )
    return replace(healthy, **changes)


def gpu(uuid: str, **changes) -> Gpu:
    """An idle GPU."""
    return replace(Gpu(0, "H100", uuid, 80.0, 79.5), **changes)


def gpu_facts(rank: int = 0, host: str = "node1", **changes) -> RankFacts:
    """A healthy rank with a GPU of its own."""
    found = {"gpus": [gpu(f"uuid-{rank}")], "driver": "550.1", "nccl": "2.27.5"}
    return facts(rank, host, **found | changes)


def only(findings: list[Finding], level: str) -> Finding:
    """The one finding, which has that level and says what to do if all is not well."""
    assert len(findings) == 1, findings
    assert findings[0].level == level, findings
    assert bool(findings[0].fix) == (level != "ok"), findings
    return findings[0]
