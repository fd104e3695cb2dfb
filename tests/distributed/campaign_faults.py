"""Faults of the machine around a run of the campaign: disks, limits, signals, ports."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_amrlhf.checkpoint.folders import find_latest
from megatron_amrlhf.rewards import verifiable
from megatron_amrlhf.run.status_file import read_status
from tests.distributed.campaign_runs import LIMIT_SECONDS, Stage
from tests.distributed.processes import run_on
from tests.distributed.runs import PROMPT_LINES, numbers, run_config, write_lines

FAULT_RANKS = 2


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own, of so many bytes."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@dataclass(frozen=True)
class _Command:
    """A deed: a command, such as a mount."""

    words: tuple[str, ...]

    def __call__(self) -> None:
        subprocess.run(self.words, check=True)


def freeze(folder: Path) -> _Command:
    """Nothing more is opened for writing there; what is open already goes on."""
    here = str(folder)
    script = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0"'
    return _Command(("bash", "-c", script, here))


def _fail_and_go_on(stage: Stage, world: int, inside: Path, deed, cure, phase: str) -> dict:
    folder, overrides, whole = stage.new(world, inside=inside)
    before = find_latest(folder / "checkpoints").name
    codes, seconds, said = stage.disturb(world, folder, overrides, 0, phase, deed)
    cure()
    problems = ["the fault itself failed"] if "CalledProcessError" in said else []
    if 0 in codes:
        problems.append("ended as if nothing were")
    if find_latest(folder / "checkpoints").name < before:
        problems.append("the checkpoint is lost")
    problems += filter(None, [stage.goes_on(world, folder, overrides, whole)])
    what = "; ".join([*problems, f"codes {codes} within {seconds:.1f} s", said])
    return {"ok": not problems, "what": what[:900]}


def disk_full(stage: Stage, phase: str) -> dict:
    stage.base(FAULT_RANKS)
    with small_disk(stage.folder / f"full-{phase}", "64m") as disk:
        fill = _Command(("bash", "-c", f"cat /dev/zero >{disk}/filler 2>/dev/null; true"))
        cure = (disk / "filler").unlink
        return _fail_and_go_on(stage, FAULT_RANKS, disk, fill, cure, phase)


def read_only(stage: Stage) -> dict:
    inside = stage.folder / "read-only"
    inside.mkdir()
    cure = _Command(("umount", "-l", str(inside)))
    return _fail_and_go_on(stage, FAULT_RANKS, inside, freeze(inside), cure, "save")


def removed(stage: Stage) -> dict:
    """The run cannot go on from what is gone; it has to end, and a new start to begin anew."""
    folder, overrides, whole = stage.new(FAULT_RANKS)
    deed = _Command(("rm", "-rf", str(folder)))
    codes, seconds, said = stage.disturb(FAULT_RANKS, folder, overrides, 0, "update", deed)
    problems = [] if 0 not in codes or (folder / "checkpoints").is_dir() else ["nothing is saved"]
    shutil.rmtree(folder, ignore_errors=True)
    problems += filter(None, [stage.goes_on(FAULT_RANKS, folder, overrides, whole)])
    what = "; ".join([*problems, f"codes {codes} within {seconds:.1f} s", said])
    return {"ok": not problems, "what": what[:900]}


@dataclass(frozen=True)
class _Stop:
    def __call__(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)


def stopped(stage: Stage, rank: int) -> dict:
    folder, overrides, whole = stage.new(FAULT_RANKS)
    overrides = [*overrides, "engine.watchdog_seconds=20"]
    codes, seconds, _ = stage.disturb(FAULT_RANKS, folder, overrides, rank, "update", _Stop())
    message = read_status(folder)["message"]
    problems = [] if f"rank {rank} " in message else ["another rank is blamed"]
    problems += filter(None, [stage.goes_on(FAULT_RANKS, folder, overrides, whole)])
    what = "; ".join([*problems, f"codes {codes} within {seconds:.1f} s", message])
    return {"ok": not problems and 3 in codes, "what": what[:900]}


@dataclass(frozen=True)
class _Limit:
    number: int

    def __call__(self) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (self.number, self.number))


def few_files(stage: Stage, number: int) -> dict:
    """It ends with an error that names the limit, or without any harm; it never hangs."""
    folder, overrides, whole = stage.new(FAULT_RANKS)
    codes, seconds, said = stage.disturb(FAULT_RANKS, folder, overrides, 0, "start", _Limit(number))
    tells = codes == [0] * FAULT_RANKS or "Too many open files" in said or "open files" in said
    problems = [] if tells else ["the limit is not named"]
    problems += filter(None, [stage.goes_on(FAULT_RANKS, folder, overrides, whole)])
    what = "; ".join([*problems, f"codes {codes} within {seconds:.1f} s", said])
    return {"ok": not problems, "what": what[:900]}


SLEEPER = "import time; time.sleep(1e4)"


@dataclass(frozen=True)
class _HangingJudge:
    def __call__(self) -> None:
        real, command = verifiable.Verifier.__init__, [sys.executable, "-c", SLEEPER]
        verifiable.Verifier.__init__ = lambda self, seconds, _=None: real(self, 0.2, command)


def hanging_judge(stage: Stage) -> dict:
    """No answer has a verdict, so the run ends and says so; no worker of it is left."""
    folder, overrides, _ = stage.new(1)
    data = write_lines(stage.folder / "answered.jsonl", PROMPT_LINES)
    weights = ["reward.verifiable_weight=1.0", "reward.prm_weight=0.0"]
    overrides = [*overrides, *weights, f"data.train={data}", f"data.heldout={data}"]
    shutil.rmtree(folder)
    codes, seconds, said = stage.disturb(1, folder, overrides, 0, "start", _HangingJudge())
    named = "max_failed_fraction" in said and "worker that compares answers" in said
    left = subprocess.run(["pgrep", "-f", SLEEPER], capture_output=True, text=True).stdout.split()
    run_on(1, run_config, str(stage.config), overrides)
    is_whole = read_status(folder)["state"] == "finished" and numbers(folder)[-1]["step"] == 2
    return {
        "ok": codes == [1] and named and not left and is_whole,
        "what": f"codes {codes}; {said}; workers left {left}; goes on {is_whole}"[:900],
    }


def taken_port(stage: Stage) -> dict:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        environment = os.environ | {"MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            ["bash", "launch/train.sh", "--processes", "2", str(stage.config)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
        )
    said = (done.stdout + done.stderr).strip().splitlines()
    told = [line for line in said if "cannot listen at port" in line]
    return {"ok": done.returncode == 2 and len(told) == 1, "what": f"{done.returncode}: {said}"}


def small_shared_memory(stage: Stage) -> dict:
    """64 KiB of /dev/shm, in a namespace of its own."""
    name = "run.name=shm"
    words = ["bash", "launch/train.sh", "--processes", "2", str(stage.config), "--set", name]
    script = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"'
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", script, "-", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    state = json.loads((stage.folder / "runs" / "shm" / "status.json").read_text())["state"]
    what = f"{done.returncode}, {state}: {done.stderr[-300:]}"
    return {"ok": done.returncode == 0 and state == "finished", "what": what}


FAULTS = {
    "the disk is full from the first rollout on": lambda stage: disk_full(stage, "rollout"),
    "the disk is full when a checkpoint is saved": lambda stage: disk_full(stage, "save"),
    "the disk is full when the model is exported": lambda stage: disk_full(stage, "export"),
    "the run's folder becomes read-only": read_only,
    "the run's folder is removed": removed,
    "SIGSTOP of rank 0": lambda stage: stopped(stage, 0),
    "SIGSTOP of rank 1": lambda stage: stopped(stage, 1),
    "32 open files at most": lambda stage: few_files(stage, 32),
    "64 open files at most": lambda stage: few_files(stage, 64),
    "64 KiB of /dev/shm": small_shared_memory,
    "a verifier that hangs": hanging_judge,
    "a port that is taken": taken_port,
}
