"""A rank's heartbeat file: what is in it, and reading those of a run."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from megatron_amrlhf.reading import LARGEST_COUNT, Record, Unreadable, read_record, read_text

HEARTBEAT_NAME = "heartbeat"
BEAT_NAME = re.compile(r"rank-(\d{4,6})\.json", re.ASCII)
NO_CONTENT = ("missing", "unreadable")  # states of a rank whose file says nothing
LARGEST_PID = 1 << 22
Count = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]


@dataclass(frozen=True)
class Beat:
    """The content of a heartbeat file.

    Attributes:
        rank, host, pid: the process.
        state: ``missing`` is a rank without a file, ``unreadable`` one with a damaged file.
        step, phase, phases, done: as in ``RankProgress``.
        still_seconds: since the last progress.
        waiting: whether the main thread is in a collective or waits for the device.
        beats: rewritten so many times. Two readings with the same count mean a thread that does
            not run, whatever the clocks of the nodes say.
        time: when, by this host's clock (UTC, ISO 8601).
        error: one line, where the state is ``failed``.
        stack: of the main thread, innermost last.
        started: when the process did, as ``time``.
    """

    rank: int
    host: str = ""
    pid: int = 0
    state: Literal["running", "finished", "failed", "missing", "unreadable"] = "missing"
    step: int = 0
    phase: str = "start"
    phases: int = 0
    done: int = 0
    still_seconds: float = 0.0
    waiting: bool = False
    beats: int = 0
    time: str = ""
    error: str = ""
    stack: tuple[str, ...] = ()
    started: str = ""

    @property
    def who(self) -> str:
        """``rank 3 (host node1, pid 77)``."""
        return f"rank {self.rank}" + (f" (host {self.host}, pid {self.pid})" if self.pid else "")

    @property
    def where(self) -> str:
        """``phase update of step 2``, and how far it is in it."""
        return f"phase {self.phase} of step {self.step}, {self.done} micro-batches or rounds done"


class BeatRecord(Record):
    """A `Beat` in its file, where every value is one that a rank can have written."""

    rank: Count
    host: str
    pid: Annotated[int, Field(ge=1, le=LARGEST_PID)]  # 0 and less are groups of processes
    state: Literal["running", "finished", "failed"]
    step: Count
    phase: str
    phases: Count
    done: Count
    still_seconds: Annotated[float, Field(ge=0)]
    waiting: bool
    beats: Count
    time: str
    error: str
    stack: list[str]
    started: str

    @field_validator("time")
    @classmethod
    def _is_time(cls, text: str) -> str:
        check_time(text)
        return text


def check_time(text: str) -> None:
    """Raises a ``ValueError`` unless the text is a time with its zone, of these years."""
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None or not 1970 < moment.year < 9999:
        raise ValueError("is no time with a zone")


def read_beats(folder: Path, world_size: int | None = None) -> list[Beat]:
    """The last beats of all ranks, in their order.

    Args:
        folder: the run's folder.
        world_size: number of ranks; None: up to the last one that has a file.
    """
    folder = folder / HEARTBEAT_NAME
    if world_size is not None:
        return [_read_beat(folder, rank) for rank in range(world_size)]
    found = [_read_beat(folder, rank) for rank in _ranks_in(folder)]
    # A stray file with some large number in its name makes no ranks.
    sound = {beat.rank for beat in found if beat.state not in NO_CONTENT}
    missing = set(range(max(sound, default=-1))) - {beat.rank for beat in found}
    return sorted([*found, *map(Beat, missing)], key=lambda beat: beat.rank)


def _ranks_in(folder: Path) -> list[int]:
    """The ranks that have a file, by the names that we give."""
    if not folder.is_dir():
        return []
    matches = (BEAT_NAME.fullmatch(path.name) for path in folder.iterdir())
    ranks = {int(match[1]): match[0] for match in matches if match}
    return [rank for rank, name in ranks.items() if beat_path(folder, rank).name == name]


def _read_beat(folder: Path, rank: int) -> Beat:
    try:
        record = read_record(beat_path(folder, rank), BeatRecord)
        if record.rank != rank:
            raise Unreadable(f"it is of rank {record.rank}")
        return Beat(**record.model_dump() | {"stack": tuple(record.stack)})
    except FileNotFoundError:
        return Beat(rank)
    except Unreadable:
        return Beat(rank, state="unreadable")


def seconds_since(time_text: str) -> float:
    """From a beat's time to now, by this host's clock."""
    return time.time() - datetime.fromisoformat(time_text).timestamp()


def read_dump(folder: Path, rank: int) -> str:
    """What ``faulthandler`` wrote for a rank; empty: it had no reason to."""
    try:
        return read_text(beat_path(folder / HEARTBEAT_NAME, rank).with_suffix(".stacks.txt"))
    except (FileNotFoundError, Unreadable):
        return ""


def beat_path(folder: Path, rank: int) -> Path:
    """A rank's file in the folder of heartbeats."""
    return folder / f"rank-{rank:04d}.json"
