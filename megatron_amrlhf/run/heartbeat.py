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
from typing import Literal

from megatron_amrlhf.errors import UserError, printable
from megatron_amrlhf.files import write_atomic
from megatron_amrlhf.run.beats import (
    HEARTBEAT_NAME,
    Beat,
    beat_path,
    read_beats,
)
from megatron_amrlhf.run.stacks import error_stack, is_waiting, main_stack
from megatron_amrlhf.run.stop_request import process_age

LONGEST_INTERVAL_SECONDS = 5.0
BEATS_A_LIMIT = 8  # the watchdog's limit is at least this many intervals
SOON_SECONDS = 0.5  # between a new phase and its beat, so that short ones do not keep the disk busy
DUMP_AFTER, AWAY_AFTER = 4, 8  # intervals without a turn of the thread
OUR_NAMES = re.compile(r"rank-\d{4,6}\.(json|stacks\.txt)|reporter|warned", re.ASCII)


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


def note_own_failure(folder: Path, rank: int, error: str) -> None:
    """Turns the last beat of this process, if it has one, into one of a rank that has failed."""
    beats = read_beats(folder, rank + 1)
    if beats[rank].pid == os.getpid():
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        beat = replace(beats[rank], state="failed", error=error, time=now)
        write_atomic(beat_path(folder / HEARTBEAT_NAME, rank), json.dumps(asdict(beat)) + "\n")


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
        self.beat_path = beat_path(folder / HEARTBEAT_NAME, rank)
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
        self.beat_path.parent.mkdir(exist_ok=True)
        dumps = self.beat_path.with_suffix(".stacks.txt")
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
            write_atomic(self.beat_path, json.dumps(asdict(beat)) + "\n")
        except OSError as error:  # a full disk ends the run where it needs the disk, not here
            line = f"warning: {self.beat_path}: {error.strerror}"
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
