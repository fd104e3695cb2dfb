"""What an attempt has left in its folder: its status, its ranks' logs and exit codes."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_amrlhf.errors import UserError, error_line
from megatron_amrlhf.reading import Unreadable, read_object, read_text
from megatron_amrlhf.run.postmortem import find_cause
from megatron_amrlhf.run.status_file import STATUS_NAME, note_failure

EXIT_CODE_NAME = "exit-code"  # in the logs: the first code of a task of a Slurm job that is no 0


@dataclass(frozen=True)
class Status:
    """What this start has written into ``status.json``; empty where it has written nothing."""

    state: str = ""
    message: str = ""


def unseen_error(logs: Path) -> str:
    """The first line by which a rank has told a mistake; empty where rank 0 has."""
    if any(_errors(log) for log in logs.glob("*_rank0.log")):
        return ""
    return next((line for log in sorted(logs.glob("*.log")) for line in _errors(log)), "")


def _errors(log: Path) -> list[str]:
    return [line for line in _text(log).splitlines() if line.startswith("error")]


def first_code(logs: Path) -> int | None:
    """What the first task that failed has left; None: no task has, as it was killed itself."""
    text = _text(logs / EXIT_CODE_NAME).strip()
    return int(text) if text.isdecimal() else None


def read_status_of(folder: Path, last_attempt: int) -> Status:
    """What ``status.json`` says, if it is of a later attempt; it may be damaged.

    Args:
        folder: of the run.
        last_attempt: the one before this start.
    """
    record = _record(folder)
    if record.get("attempt") == last_attempt:
        return Status()
    return Status(str(record.get("state", "")), str(record.get("message", "")))


def completed_steps(folder: Path) -> int:
    """Of the run so far."""
    step = _record(folder).get("step")
    return step if isinstance(step, int) else 0


def _record(folder: Path) -> dict:
    try:
        return read_object(folder / STATUS_NAME, strict=False)
    except (FileNotFoundError, Unreadable):
        return {}


def _text(path: Path) -> str:
    try:
        return read_text(path)
    except (FileNotFoundError, Unreadable):
        return ""


def noted_cause(folder: Path, since: float) -> str | None:
    """What ended a run, which is also put into its status; None: its ranks do not tell."""
    try:
        cause = find_cause(folder, since)
        if cause:
            note_failure(folder, cause)
    except (UserError, OSError) as error:
        print(error_line(error), file=sys.stderr, flush=True)
        return None
    return cause
