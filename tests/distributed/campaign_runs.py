"""Runs of the campaign that resume from step 1, one of whose ranks is made to go wrong."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_amrlhf.algorithms.train import run
from megatron_amrlhf.checkpoint.folders import find_latest
from megatron_amrlhf.config.load import load_config
from megatron_amrlhf.report.heartbeat import RankProgress
from megatron_amrlhf.report.postmortem import find_cause
from megatron_amrlhf.report.run_folder import read_status
from megatron_amrlhf.rewards import verifiable
from tests.distributed.processes import launch, run_on
from tests.distributed.runs import (
    PROMPT_LINES,
    make_models,
    numbers,
    run_config,
    write_config,
    write_lines,
)

RANKS, FAULT_RANKS = 4, 2
PHASES = ("load", "evaluate", "rollout", "score", "mask", "update", "save", "export", "finish")
KEYS = ("parallel.tensor=1", "parallel.pipeline=2")
ALONE = ("parallel.tensor=1", "parallel.pipeline=1")
GRACE_SECONDS = 30.0  # as DeepSpeed's launcher gives after SIGTERM
LIMIT_SECONDS = 300.0


@dataclass(frozen=True)
class Cell:
    """A rank that is killed when it enters a phase, or ``delay`` seconds later."""

    phase: str
    rank: int
    delay: float = 0.0
    asynchronous: bool = False


def run_planted(path: str, overrides: list[str], logs: str, rank: int, phase: str, deed) -> None:
    """A run on this rank; ``rank`` does the deed once it enters a phase of step 2, or ``start``."""
    own = int(os.environ["RANK"])
    log = open(Path(logs) / f"rank{own}.log", "w", buffering=1)
    for number in (1, 2):
        os.dup2(log.fileno(), number)
    enter, done = RankProgress.enter, []

    def enter_and_act(self, name: str, step: int | None = None) -> None:
        enter(self, name, step)
        if own == rank and name == phase and not done and (self.step == 2 or name == "load"):
            done.append(name)
            deed()

    if own == rank and phase == "start":
        deed()
    RankProgress.enter = enter_and_act
    run(load_config(path, overrides))


class Stage:
    """Models, data and an undisturbed run; every cell goes on from a copy of its first step."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._count, self._bases = 0, {}

    @property
    def config(self) -> Path:
        path = self.folder / "ppo.yaml"
        if not path.exists():
            make_models(self.folder)
            rollout = {"prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 6}
            write_config(self.folder, "ppo", rollout=rollout, evaluation={"prompts": 2, "every": 1})
        return path

    def base(self, world: int, asynchronous: bool = False) -> tuple[Path, list[dict]]:
        """A run of one step, and the numbers of one of two steps that nothing has disturbed."""
        key = (world, asynchronous)
        if key not in self._bases:
            name = f"base-{world}-{asynchronous}"
            keys = self.keys(world, asynchronous)
            run_on(world, run_config, str(self.config), [f"run.name={name}", "run.steps=2", *keys])
            whole = numbers(self.folder / "runs" / name)
            shutil.rmtree(self.folder / "runs" / name)
            run_on(world, run_config, str(self.config), [f"run.name={name}", "run.steps=1", *keys])
            self._bases[key] = self.folder / "runs" / name, whole
        return self._bases[key]

    @staticmethod
    def keys(world: int, asynchronous: bool = False) -> list[str]:
        layout = KEYS if world > 1 else ALONE
        flag = str(asynchronous).lower()
        return [*layout, "checkpoint.every=1", f"checkpoint.asynchronous={flag}"]

    def new(self, world: int, asynchronous: bool = False, inside: Path | None = None) -> tuple:
        """A run's folder after step 1, its overrides, and the numbers that it has to end with."""
        base, whole = self.base(world, asynchronous)
        self._count += 1
        parent = inside or self.folder / "runs"
        folder = parent / f"cell-{self._count}"
        shutil.copytree(base, folder, symlinks=True)
        place = [f"run.name={folder.name}", f"run.folder={parent}", "run.steps=2"]
        return folder, [*place, *self.keys(world, asynchronous)], whole

    def disturb(
        self, world: int, folder: Path, overrides: list[str], rank: int, phase: str, deed: Callable
    ) -> tuple[list[int], float, str]:
        """Exit codes, seconds from the first end to the last, and what rank logs say last."""
        logs = self.folder / f"logs-{folder.name}"
        logs.mkdir()
        arguments = (str(self.config), overrides, str(logs), rank, phase, deed)
        with launch(world, run_planted, *arguments) as ranks:
            codes, seconds = end_as_a_launcher(ranks)
        said = []
        for log in sorted(logs.glob("*.log")):
            lines = log.read_text(errors="replace").splitlines()
            said += [f"{log.stem}: {lines[-1]}" if lines else log.stem]
        return codes, seconds, " / ".join(said)

    def goes_on(self, world: int, folder: Path, overrides: list[str], whole: list[dict]) -> str:
        """Starts it again; empty where it ends with the undisturbed run's numbers, bit for bit."""
        run_on(world, run_config, str(self.config), overrides)
        if read_status(folder)["state"] != "finished":
            return f"started again it is {read_status(folder)}"
        left = [str(x) for x in folder.rglob("*") if x.name.endswith(".tmp") or "tmp-" in x.name]
        if left:
            return f"left behind: {left}"
        return "" if numbers(folder) == whole else "started again it has other numbers"

    def kill(self, cell: Cell) -> dict:
        """SIGKILL of one rank: the others end, the cause is named, the next start goes on."""
        folder, overrides, whole = self.new(RANKS, cell.asynchronous)
        since = time.time()
        deed = _Kill(cell.delay)
        codes, seconds, _ = self.disturb(RANKS, folder, overrides, cell.rank, cell.phase, deed)
        if codes == [0] * RANKS and cell.delay:  # the run was over before
            problem = "" if numbers(folder) == whole else "other numbers"
            return {"ok": not problem, "what": problem or "had ended before", "codes": codes}
        cause = find_cause(folder, since) or "no cause"
        problems = []
        if codes[cell.rank] != -signal.SIGKILL:
            problems.append("was not killed")
        if not cause.startswith(f"rank {cell.rank} ") or "SIGKILL" not in cause:
            problems.append("another rank is blamed")
        if not cell.delay and f"phase {cell.phase} " not in cause:
            problems.append("another phase is named")
        problems += filter(None, [self.goes_on(RANKS, folder, overrides, whole)])
        shutil.rmtree(folder)
        what = "; ".join([*problems, cause, f"others gone after {seconds:.1f} s"])
        return {"ok": not problems, "what": what, "codes": codes, "others": round(seconds, 1)}


@dataclass(frozen=True)
class _Kill:
    delay: float

    def __call__(self) -> None:
        if self.delay:
            threading.Timer(self.delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        else:
            os.kill(os.getpid(), signal.SIGKILL)


def end_as_a_launcher(ranks: list) -> tuple[list[int], float]:
    """Waits; once a rank has failed the others get SIGTERM, and SIGKILL after 30 seconds."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while all(r.exitcode in (None, 0) for r in ranks) and any(r.is_alive() for r in ranks):
        if time.monotonic() > deadline:
            raise AssertionError("the ranks hang")
        time.sleep(0.05)
    first = time.monotonic()
    for process in ranks:
        if process.is_alive():
            process.terminate()
    for process in ranks:
        process.join(max(0.0, first + GRACE_SECONDS - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in ranks], time.monotonic() - first


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


def remount(disk: Path, options: str) -> _Command:
    return _Command(("mount", "-o", f"remount,{options}", str(disk)))


def _fail_and_go_on(stage: Stage, world: int, inside: Path, deed, cure, phase: str) -> dict:
    folder, overrides, whole = stage.new(world, inside=inside)
    before = find_latest(folder / "checkpoints").name
    codes, seconds, said = stage.disturb(world, folder, overrides, 0, phase, deed)
    cure()
    problems = []
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
    stage.base(FAULT_RANKS)
    with small_disk(stage.folder / "read-only", "64m") as disk:
        cure = remount(disk, "rw")
        return _fail_and_go_on(stage, FAULT_RANKS, disk, remount(disk, "ro"), cure, "save")


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


@dataclass(frozen=True)
class _HangingJudge:
    def __call__(self) -> None:
        sleeper = [sys.executable, "-c", "import time; time.sleep(1e4)"]
        real = verifiable.Verifier.__init__
        verifiable.Verifier.__init__ = lambda self, seconds, _=None: real(self, 0.2, sleeper)


def hanging_judge(stage: Stage) -> dict:
    """Answers without a verdict are not judged; the run ends as usual, and no worker is left."""
    folder, overrides, _ = stage.new(1)
    data = write_lines(stage.folder / "answered.jsonl", PROMPT_LINES)
    weights = ["reward.verifiable_weight=1.0", "reward.prm_weight=0.0"]
    overrides = [*overrides, *weights, f"data.train={data}", f"data.heldout={data}"]
    shutil.rmtree(folder)
    codes, seconds, said = stage.disturb(1, folder, overrides, 0, "start", _HangingJudge())
    lines = numbers(folder)
    return {"ok": codes == [0] and len(lines) == 2, "what": f"codes {codes}; {said}"[:900]}


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
