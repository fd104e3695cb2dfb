"""Training steps of this package and of TRL, each run in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from megatron_amrlhf.errors import UserError
from megatron_amrlhf.studies.peer_inputs import MASKED, write_config, write_data, write_models
from megatron_amrlhf.studies.peer_tables import OURS, Found, Rounds, per_step

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = REPOSITORY / "tools" / "peers"
KINDS = ("dpo", f"dpo{MASKED}", "grpo", "ppo", "prm")
NOT_THERE = 3  # the script's exit code where its TRL has no such trainer
SHOWN_CHARACTERS = 2000
# glibc's settings that `compat.keep_freed_memory` makes, for both sides.
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}


def training_rounds(
    size: str,
    work: str,
    peers: list[Path],
    folder: Path,
    *,
    rounds: int,
    steps: int,
    dtype: str,
) -> Rounds:
    """All sides in turn in each round; a peer that has no such trainer is left out.

    Args:
        size: of ``SHAPES``.
        work: of `KINDS`.
        peers: Python interpreters of environments with TRL.
        folder: gets models, data and runs.
        rounds: how many.
        steps: of each run, the first of which does not count.
        dtype: in which both multiply.

    Raises:
        UserError: a side failed.
    """
    write_models(size, folder)
    kind = work.removesuffix(MASKED)
    masked = kind != work
    write_data(size, folder, kind)
    if masked:
        write_data(size, folder, kind, scored=True)
    config, record = write_config(folder, kind, masked, steps, dtype), folder / "record.json"
    own = [sys.executable, str(SCRIPTS / "own_steps.py"), str(config), str(record)]
    told = [str(SCRIPTS / "trl_steps.py"), kind, str(folder), str(record), str(steps), dtype]
    found: Rounds = {}
    for number in range(1, rounds + 1):
        print(f"{size}, {work}: round {number} of {rounds}", file=sys.stderr, flush=True)
        for command in (own, *([str(peer), *told] for peer in peers)):
            name, seconds = _measured(command, record)
            if seconds:
                found.setdefault(name, []).append(seconds)
    return found


def _measured(command: list[str], record: Path) -> tuple[str, Found | None]:
    paths = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
    # A peer's environment has packages of its own, and a peer may run by this very Python.
    own = {"PYTHONPATH": paths} if str(SCRIPTS / "own_steps.py") in command else {}
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= MALLOC | own | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, errors="replace"
    )
    if done.returncode == NOT_THERE:
        return "", None
    if done.returncode:
        said = (done.stdout + done.stderr)[-SHOWN_CHARACTERS:]
        raise UserError(f"exit code {done.returncode} of {' '.join(command)}:\n{said}")
    told = json.loads(record.read_text())
    return told.get("peer", OURS), per_step(told["ends"], told["peak_bytes"])
