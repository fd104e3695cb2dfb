"""Ends a rank whose launcher has been killed: nobody would end it otherwise, nor learn its end.

The ranks of a launcher that is gone go on training, or wait for each other until a watchdog ends
them, while the person who started the run takes it for dead and starts it again.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from megatron_amrlhf.run.heartbeat import note_own_failure
from megatron_amrlhf.run.status_file import note_failure, read_status

EXIT_ORPHANED = 1
LOOK_SECONDS = 1.0
PARENT = os.getppid()  # as early as can be: a process that loses it gets another one
# Set by launchers that wait for their ranks. A script may start ranks by RANK alone, and end.
MARKS = ("CROSS_RANK", "TORCHELASTIC_RUN_ID")


def has_launcher(environment: Mapping[str, str]) -> bool:
    """Whether this is a rank of a launcher (deepspeed, torchrun, srun) that waits for its ranks."""
    if "RANK" not in environment:
        return False
    if any(name in environment for name in MARKS):
        return True
    tasks, task = environment.get("SLURM_STEP_NUM_TASKS", "1"), environment.get("SLURM_PROCID")
    return tasks != "1" and task == environment["RANK"]


@contextmanager
def ends_with_launcher(
    folder: Path | None, parent: int = PARENT, end: Callable[[int], None] = os._exit
) -> Iterator[None]:
    """Ends this process, while the block runs, once its parent is another one.

    Nothing is done for a process that no launcher has started.

    Args:
        folder: the run whose status and heartbeat tell the end; None: its log alone does.
        parent: the launcher's process.
        end: ends this process with an exit code, at once.
    """
    if not has_launcher(os.environ):
        yield
        return
    over = threading.Event()

    def look() -> None:
        while not over.wait(LOOK_SECONDS):
            if os.getppid() != parent:
                _note(folder, f"its launcher (process {parent}) is gone, so it has ended")
                end(EXIT_ORPHANED)
                return

    thread = threading.Thread(target=look, name="launcher", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _note(folder: Path | None, why: str) -> None:
    """Says it in this rank's log, in its heartbeat and in the run's status.

    Whatever keeps one of these from being written does not keep the process from ending.
    """
    rank = int(os.environ.get("RANK", "0"))
    line = f"rank {rank}: {why}, without a checkpoint"
    print(f"error: {line}", file=sys.stderr, flush=True)
    if folder is None:
        return
    try:
        note_own_failure(folder, rank, why)
        record = read_status(folder)
        if record is not None and record["state"] == "running":
            note_failure(folder, line)
    except Exception as error:
        print(f"warning: {folder} does not tell it ({error})", file=sys.stderr, flush=True)
