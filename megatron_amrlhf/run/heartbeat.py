"""What each rank is doing, in ``runs/NAME/heartbeat/rank-0003.json``, rewritten by a thread.

A blocking collective releases the interpreter lock, so the thread goes on. Where C code keeps the
lock, or the process is stopped, the file stands still; the Python stack is then in
``rank-0003.stacks.txt``, which ``faulthandler`` writes without the lock. A process that dies of a
signal leaves its stack there too, except for SIGKILL.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from megatron_amrlhf.errors import UserError, printable
from megatron_amrlhf.files import write_atomic
from megatron_amrlhf.reading import LARGEST_COUNT, Record, Unreadable, read_record, read_text
from megatron_amrlhf.run.stacks import error_stack, is_waiting, main_stack
from megatron_amrlhf.run.stop_request import process_age

HEARTBEAT_NAME = "heartbeat"
LONGEST_INTERVAL_SECONDS = 5.0
BEATS_A_LIMIT = 8  # the watchdog's limit is at least this many intervals
SOON_SECONDS = 0.5  # between a new phase and its beat, so that short ones do not keep the disk busy
DUMP_AFTER, AWAY_AFTER = 4, 8  # intervals without a turn of the thread
BEAT_NAME = re.compile(r"rank-(\d{4,6})\.json", re.ASCII)
OUR_NAMES = re.compile(r"rank-\d{4,6}\.(json|stacks\.txt)|reporter|warned", re.ASCII)
NO_CONTENT = ("missing", "unreadable")  # states of a rank whose file says nothing
LARGEST_PID = 1 << 22
Count = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]


@dataclass
class RankProgress:
    """Where the main thread is. It writes, the heartbeat's thread reads.

    Attributes:
        step: the step that runs; 0 before the first.
        phase: what it does, such as ``rollout``.
        phases: phases entered so far; all ranks enter the same ones.
        done: micro-batches and decode rounds done in this phase.
        moved_at: when one of these changed, seconds of the monotonic clock.
        entered: set when a phase begins, for who waits for that.
    """

    step: int = 0
    phase: str = "start"
    phases: int = 0
    done: int = 0
    moved_at: float = field(default_factory=time.monotonic)
    entered: threading.Event = field(default_factory=threading.Event)

    def enter(self, phase: str, step: int | None = None) -> None:
        """A phase begins, and with it a step unless None."""
        self.step = self.step if step is None else step
        self.phase, self.phases, self.done = phase, self.phases + 1, 0
        self.moved_at = time.monotonic()
        self.entered.set()

    def advance(self) -> None:
        """One more micro-batch or decode round is done."""
        self.done += 1
        self.moved_at = time.monotonic()


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
    return [rank for rank, name in ranks.items() if _path(folder, rank).name == name]


def _read_beat(folder: Path, rank: int) -> Beat:
    try:
        record = read_record(_path(folder, rank), BeatRecord)
        if record.rank != rank:
            raise Unreadable(f"it is of rank {record.rank}")
        return Beat(**record.model_dump() | {"stack": tuple(record.stack)})
    except FileNotFoundError:
        return Beat(rank)
    except Unreadable:
        return Beat(rank, state="unreadable")


def note_own_failure(folder: Path, rank: int, error: str) -> None:
    """Turns the last beat of this process, if it has one, into one of a rank that has failed."""
    beats = read_beats(folder, rank + 1)
    if beats[rank].pid == os.getpid():
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        beat = replace(beats[rank], state="failed", error=error, time=now)
        write_atomic(_path(folder / HEARTBEAT_NAME, rank), json.dumps(asdict(beat)) + "\n")


def seconds_since(time_text: str) -> float:
    """From a beat's time to now, by this host's clock."""
    return time.time() - datetime.fromisoformat(time_text).timestamp()


def read_dump(folder: Path, rank: int) -> str:
    """What ``faulthandler`` wrote for a rank; empty: it had no reason to."""
    try:
        return read_text(_path(folder / HEARTBEAT_NAME, rank).with_suffix(".stacks.txt"))
    except (FileNotFoundError, Unreadable):
        return ""


def interval_seconds(limit_seconds: float) -> float:
    """How often the file is written under a watchdog's limit (0: no watchdog)."""
    longest = LONGEST_INTERVAL_SECONDS
    return min(longest, limit_seconds / BEATS_A_LIMIT) if limit_seconds else longest


def one_line(error: BaseException) -> str:
    """An exception as one line; its kind is named unless it is a user's mistake."""
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split())


class Heartbeat:
    """Writes this rank's file while its block runs, and once more at the end.

    After an exception the file stays as it is, but the thread still looks at the watchdog: the
    way out of the process groups may block too.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        progress: RankProgress,
        *,
        every_seconds: float,
        on_beat: Callable[[Beat], None],
        on_error: Callable[[Beat], None],
    ):
        """Prepares the heartbeat.

        Args:
            folder: the run's folder, which must exist.
            rank: global rank of this process.
            progress: what the main thread says of itself.
            every_seconds: time between two writings.
            on_beat: called in the thread with each beat.
            on_error: called in the main thread with the last one, where the block raised.
        """
        self._path = _path(folder / HEARTBEAT_NAME, rank)
        self._rank, self._progress, self._every = rank, progress, every_seconds
        self._on_beat, self._on_error = on_beat, on_error
        started = datetime.now(UTC) - timedelta(seconds=process_age())
        self._started = started.isoformat(timespec="seconds")
        self._end, self._lock = threading.Event(), threading.Lock()
        self._state: Literal["running", "finished", "failed"] = "running"
        self._error, self._beats = "", 0
        self._awake_since = self._last_turn = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._path.parent.mkdir(exist_ok=True)
        dumps = self._path.with_suffix(".stacks.txt")
        write_atomic(dumps, "")  # never through a link
        self._dumps = dumps.open("w")
        self._had_faulthandler = faulthandler.is_enabled()
        faulthandler.enable(self._dumps)
        faulthandler.register(signal.SIGTERM, self._dumps, chain=True)
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, kind, error: BaseException | None, trace) -> None:
        with self._lock:
            self._state = "finished" if error is None else "failed"
            self._error = "" if error is None else one_line(error)
            beat = self._write(main_stack() if error is None else error_stack(error))
        if error is not None:
            self._progress.moved_at = time.monotonic()
            self._on_error(beat)
            return
        self._end.set()
        self._progress.entered.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(signal.SIGTERM)
        faulthandler.disable()
        if self._had_faulthandler:
            faulthandler.enable()
        self._dumps.close()

    def _run(self) -> None:
        """A beat each interval, and soon after a phase has begun: a kill may end it at any time."""
        soon = min(self._every, SOON_SECONDS)
        while not self._end.wait(soon):
            self._progress.entered.wait(self._every - soon)
            self._progress.entered.clear()
            if self._end.is_set():
                return
            self._on_beat(self._beat())

    def _beat(self) -> Beat:
        now = time.monotonic()
        if now - self._last_turn > AWAY_AFTER * self._every:
            self._awake_since = now  # the process was stopped: not the main thread's fault
        self._last_turn = now
        faulthandler.dump_traceback_later(DUMP_AFTER * self._every, file=self._dumps)
        with self._lock:
            stack = main_stack()
            return self._write(stack) if self._state == "running" else self._now(stack)

    def _write(self, stack: list[str]) -> Beat:
        self._beats += 1
        beat = self._now(stack)
        try:
            write_atomic(self._path, json.dumps(asdict(beat)) + "\n")
        except OSError as error:  # a full disk ends the run where it needs the disk, not here
            line = f"warning: {self._path}: {error.strerror}"
            print(printable(line), file=sys.stderr, flush=True)
        return beat

    def _now(self, stack: list[str]) -> Beat:
        progress = self._progress
        since = max(progress.moved_at, self._awake_since)
        return Beat(
            rank=self._rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            state=self._state,
            step=progress.step,
            phase=progress.phase,
            phases=progress.phases,
            done=progress.done,
            still_seconds=round(time.monotonic() - since, 3),
            waiting=is_waiting(stack),
            beats=self._beats,
            time=datetime.now(UTC).isoformat(timespec="milliseconds"),
            error=self._error,
            stack=tuple(stack),
            started=self._started,
        )


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:04d}.json"
