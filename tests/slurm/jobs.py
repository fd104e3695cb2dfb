"""Jobs of the package on the test's Slurm: submitted, watched, and what they leave."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.patience import PATIENCE_SECONDS
from tests.slurm.cluster import Cluster

ROOT = Path(__file__).parents[2]
PLANTED = ROOT / "tests" / "distributed" / "planted"
TIME_LIMIT = "--time=60"  # minutes; a busy machine's jobs must not come near it by themselves
LEAD_SECONDS = 120  # of the early signal
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


def wait_until(happened: Callable[[], bool], describe: Callable[[], str]) -> None:
    """Polls; an ``AssertionError`` with a description after ``PATIENCE_SECONDS``."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not happened():
        assert time.monotonic() < deadline, describe()
        time.sleep(0.2)


def environment(folder: Path, plant: str = "", plant_rank: int = 0) -> dict[str, str]:
    """What every process of a run in ``folder`` gets, so that it can be found again."""
    base = {"VENV": sys.prefix, "OMP_NUM_THREADS": "1", "WATCHED_RUN": str(folder)}
    path = f"{PLANTED}:{ROOT}"
    return base | {"PYTHONPATH": path, "PLANT": plant, "PLANT_RANK": str(plant_rank)}


def living(folder: Path) -> list[int]:
    """Processes of the run, whoever their parent is and on whichever node."""
    mark, found = f"WATCHED_RUN={folder}".encode(), []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


class Job:
    """A run of a configuration in ``work`` by launch/slurm/train.sbatch."""

    def __init__(
        self,
        cluster: Cluster,
        work: Path,
        config: str,
        name: str,
        processes: int,
        *keys: str,
        options: tuple[str, ...] = (TIME_LIMIT,),
        plant: str = "",
        plant_rank: int = 0,
        **variables: str,
    ):
        self.cluster, self.folder = cluster, work / "runs" / name
        self.log = work / f"{name}.out"
        answer = cluster.run(
            "sbatch",
            "--parsable",
            "--nodes=2",
            f"--output={self.log}",
            *options,
            "launch/slurm/train.sbatch",
            str(work / config),
            "--set",
            f"run.name={name}",
            *keys,
            cwd=ROOT,
            PROCESSES=str(processes),
            **environment(self.folder, plant, plant_rank),
            **variables,
        )
        assert answer.returncode == 0, answer.stderr
        self.id = answer.stdout.strip()
        self.submitted = time.time()

    @property
    def state(self) -> str:
        return self.cluster.job(self.id).get("JobState", "")

    def text(self) -> str:
        """The job's output and the ranks' logs."""
        logs = [self.log, *sorted(self.folder.glob("logs/*/*.log"))]
        return "\n".join(f"== {x.name}\n{x.read_text()}" for x in logs if x.exists())

    def status(self) -> dict:
        return json.loads((self.folder / "status.json").read_text())

    def place(self, rank: int) -> tuple[int, str]:
        """Step and phase of a rank."""
        path = self.folder / "heartbeat" / f"rank-{rank:04d}.json"
        try:
            beat = json.loads(path.read_text())
        except FileNotFoundError:
            return 0, ""
        return beat["step"], beat["phase"]

    def wait_for(self, rank: int, step: int, phase: str) -> None:
        wait_until(lambda: self.place(rank) == (step, phase), self.text)

    def shorten(self) -> None:
        """Moves the time limit so near that the early signal comes when Slurm looks next.

        It looks every 30 seconds; between 45 and 105 are left, and the lead is longer.
        """
        limit = int((time.time() - self.submitted + 45) // 60) + 1
        self.cluster.run("scontrol", "update", f"JobId={self.id}", f"TimeLimit={limit}")

    def wait(self) -> dict[str, str]:
        """What Slurm says of the job once it has ended; no process of it may be left then."""
        wait_until(lambda: self.state in ENDED, self.text)
        wait_until(lambda: not living(self.folder), lambda: f"left: {living(self.folder)}")
        return self.cluster.job(self.id)
