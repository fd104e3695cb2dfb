"""Loaded by every Python with this folder in PYTHONPATH: makes rank PLANT_RANK go wrong.

PLANT is what happens in the second update: kill, stop, stick or raise.
"""

import importlib
import json
import os
import signal
import time
from pathlib import Path

TRAINER = "megatron_amrlhf.algorithms.train"
FAULT_AT_STEP = 2
real_import = importlib.import_module


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
    real_update, steps = algorithm.update, [0]

    def update(*arguments):
        steps[0] += 1
        if steps[0] == FAULT_AT_STEP:
            wait_for_heartbeat()
            go_wrong(os.environ["PLANT"])
        return real_update(*arguments)

    algorithm.update = update


def import_module(name: str, package: str | None = None):
    module = real_import(name, package)
    if name == TRAINER:
        plant(module.ALGORITHMS["prm"])
    return module


if os.environ.get("RANK") == os.environ.get("PLANT_RANK", "nobody"):
    importlib.import_module = import_module
