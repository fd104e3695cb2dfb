"""Loaded by every Python with this folder in PYTHONPATH: makes rank PLANT_RANK go wrong.

PLANT is what happens in the update of step PLANT_STEP (2): kill, stop, stick or raise; or "wait":
ppo's rollout of that step goes on only once the run is asked to stop. A job that Slurm has requeued
is left alone.
"""

import builtins
import json
import os
import signal
import sys
import time
from pathlib import Path

TRAINER = "megatron_amrlhf.commands.train"
FAULT_AT_STEP = int(os.environ.get("PLANT_STEP", "2"))
LOOK = 5  # tokens of the second rollout that "wait" lets pass
real_import = builtins.__import__


def go_wrong(name: str) -> None:
    if name == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif name == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif name == "stick":
        while True:
            time.sleep(0.1)
    elif name == "raise":
        raise ArithmeticError("planted error")


def wait_for_heartbeat() -> None:
    """Until this rank's file says where it goes wrong, as it does where that takes seconds."""
    path = Path(os.environ["WATCHED_RUN"], "heartbeat", f"rank-{int(os.environ['RANK']):04d}.json")
    while True:
        beat = json.loads(path.read_text())
        if (beat["step"], beat["phase"]) == (FAULT_AT_STEP, "update"):
            return
        time.sleep(0.05)


def plant(algorithm: type) -> None:
    real_step, steps = algorithm.train_step, [0]

    def train_step(*arguments):
        steps[0] += 1
        if steps[0] == FAULT_AT_STEP:
            wait_for_heartbeat()
            go_wrong(os.environ["PLANT"])
        return real_step(*arguments)

    algorithm.train_step = train_step


def wait_in_rollout(module) -> None:
    algorithm, request = module.ALGORITHMS["ppo"], module.StopRequest
    real_step, real_seen, looks = algorithm.step, request.seen, []

    def step(self, number):
        if number == FAULT_AT_STEP:
            looks.append(0)
        return real_step(self, number)

    def seen(self, before_step=False):
        if looks and not before_step:
            looks[0] += 1
            while looks[0] == LOOK and not self._file.exists():
                time.sleep(0.1)
            self._next_poll = 0.0  # the answer is over within the second between two looks
        return real_seen(self, before_step)

    algorithm.step, request.seen = step, seen


planted = []


def import_and_plant(name, *arguments, **options):
    """Python's own import; the trainer gets its fault when it has been imported."""
    found = real_import(name, *arguments, **options)
    if name == TRAINER and not planted:
        planted.append(name)
        if os.environ["PLANT"] == "wait":
            wait_in_rollout(sys.modules[name])
        else:
            plant(sys.modules[name].ALGORITHMS["prm"])
    return found


is_mine = os.environ.get("RANK") == os.environ.get("PLANT_RANK", "nobody")
if is_mine and os.environ.get("SLURM_RESTART_COUNT", "0") == "0":
    builtins.__import__ = import_and_plant
