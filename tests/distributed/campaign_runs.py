"""Runs of the campaign that resume from step 1, one of whose ranks is made to go wrong."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_amrlhf.commands.train import run
from megatron_amrlhf.config.load import load_config
from megatron_amrlhf.run.heartbeat import SOON_SECONDS, RankProgress
from megatron_amrlhf.run.postmortem import find_cause
from megatron_amrlhf.run.status_file import read_status
from tests.distributed.processes import launch, run_on
from tests.distributed.runs import (
    PROMPT_LINES,
    make_models,
    numbers,
    run_config,
    write_config,
    write_lines,
)

RANKS = 4
PHASES = ("load", "evaluate", "rollout", "score", "mask", "update", "save", "export", "finish")
KEYS = ("parallel.tensor=1", "parallel.pipeline=2")
ALONE = ("parallel.tensor=1", "parallel.pipeline=1")
GRACE_SECONDS = 30.0  # as DeepSpeed's launcher gives after SIGTERM
LIMIT_SECONDS = 300.0
LATE_SECONDS = 2 * SOON_SECONDS  # a new phase stands in the heartbeat within SOON_SECONDS


@dataclass(frozen=True)
class Cell:
    """A rank that is killed in a phase: ``LATE_SECONDS`` in it, or ``delay`` while it goes on."""

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
            evaluation = {"prompts": 2, "every": 1}
            write_config(self.folder, "ppo", rollout=rollout, evaluation=evaluation)
            # Without an answer to check there is no verifier, whose start takes longer than a run.
            lines = [{"prompt": line["prompt"]} for line in PROMPT_LINES]
            write_lines(self.folder / "prompts.jsonl", lines)
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
            time.sleep(LATE_SECONDS)
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
