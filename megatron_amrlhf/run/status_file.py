"""``status.json``: what a run does, or why it ended."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator

from megatron_amrlhf.errors import UserError
from megatron_amrlhf.files import write_atomic
from megatron_amrlhf.reading import LARGEST_COUNT, Record, Unreadable, read_record
from megatron_amrlhf.run.beats import check_time

State = Literal["running", "finished", "failed", "stopped", "preempted"]
STATUS_NAME = "status.json"
Count = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]


class StatusRecord(Record):
    """The content of ``status.json``."""

    model_config = ConfigDict(extra="allow")

    state: State
    step: Count
    message: str
    time: str
    attempt: Count
    total: Count | None = None
    step_seconds: Annotated[float, Field(ge=0)] | None = None

    @field_validator("time")
    @classmethod
    def _is_time(cls, text: str) -> str:
        check_time(text)
        return text


def last_attempt(path: Path) -> int:
    """Starts of the run in this folder so far.

    Raises:
        UserError: as `read_status`.
    """
    record = read_status(path)
    return 0 if record is None else record["attempt"]


def read_status(path: Path) -> dict[str, Any] | None:
    """What ``status.json`` of a run's folder says; None where there is none.

    Raises:
        UserError: it is damaged or cannot be read.
    """
    try:
        return read_record(path / STATUS_NAME, StatusRecord).model_dump()
    except FileNotFoundError:
        return None
    except Unreadable as error:
        raise UserError(
            f"{path / STATUS_NAME} is damaged ({error}): delete it to go on with this run"
        ) from None


def note_failure(path: Path, message: str) -> None:
    """Turns ``status.json``, if any, into ``failed``; any process may, also one that is no writer.

    Args:
        path: the run's folder.
        message: one line: why.
    """
    record = read_status(path)
    if record is None:
        return
    now = datetime.now(UTC).isoformat(timespec="seconds")
    record |= {"state": "failed", "message": message, "time": now}
    write_atomic(path / STATUS_NAME, json.dumps(record, indent=2) + "\n")
