"""Starts a module of the package on several processes of this machine and waits for them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCHER_SAYS = "torch/distributed/elastic/"  # what follows in the output is about the launcher
SHOWN_LINES = 20


def start_ranks(processes: int, module: str, arguments: list[str], name: str, log: Path) -> None:
    """Runs ``python -m module arguments`` on every rank, through torch's launcher.

    Args:
        processes: how many ranks.
        module: dotted name.
        arguments: of every rank.
        name: of what runs, for the error.
        log: file that gets what the ranks say.

    Raises:
        subprocess.CalledProcessError: a rank failed; its output is the last lines that were said.
    """
    threads = max((os.cpu_count() or 1) // processes, 1)
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), "-m", module, *arguments]
    with open(log, "w+", encoding="utf-8", errors="replace") as file:
        # A session of its own, so that all ranks can be ended together.
        process = subprocess.Popen(
            command, env=environment, stdout=file, stderr=file, start_new_session=True
        )
        try:
            code = process.wait()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
        if code:
            file.seek(0)
            said = file.read().split(LAUNCHER_SAYS)[0].splitlines()[-SHOWN_LINES:]
            raise subprocess.CalledProcessError(code, name, "\n".join(said))
