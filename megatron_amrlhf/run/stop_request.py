"""Requests to end an attempt early, as one rank sees them: a stop file, a signal, or the clock.

Ranks see a request at different times; ``experience/preemption.py`` makes them agree.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path

EXIT_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: started again, the run goes on
STOP_NAME = "stop"
STOP_NOW = "now"  # first word of a stop file that does not wait for a checkpoint
# Its second word, from launch/train.sh and what watches over that; without it somebody asked.
KILLED = {"script": "launch/train.sh was killed", "launcher": "its launcher was killed"}
READ_CHARACTERS = 64  # more of a stop file is never looked at
POLL_SECONDS = 1.0  # a stop file is looked for this often; it may lie on a network file system
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Reason(IntEnum):
    """Why an attempt ends early; the largest one that any rank saw counts."""

    NONE = 0
    CLOCK = 1
    FILE = 2
    SCRIPT_INT = 3
    SCRIPT_TERM = 4
    SCRIPT_HUP = 5
    SLURM = 6
    SIGNAL = 7

    @property
    def text(self) -> str:
        """What a person reads behind ``stopped by``."""
        return TEXTS[self]


TEXTS = {
    Reason.NONE: "",
    Reason.CLOCK: "run.max_minutes",
    Reason.FILE: f"the file {STOP_NAME!r}",
    Reason.SCRIPT_INT: "Ctrl-C (SIGINT to train.sh)",
    Reason.SCRIPT_TERM: "SIGTERM to train.sh",
    Reason.SCRIPT_HUP: "SIGHUP to train.sh (its terminal was closed)",
    Reason.SLURM: "Slurm's early signal",
    Reason.SIGNAL: "a signal",
}
# What the launch scripts write into the stop file; whatever else is in it is somebody's own.
WRITERS = {
    "SIGINT": Reason.SCRIPT_INT,
    "SIGTERM": Reason.SCRIPT_TERM,
    "SIGHUP": Reason.SCRIPT_HUP,
    "slurm": Reason.SLURM,
}


class StopRequest:
    """What this rank has seen. Without file and limit nothing but a caught signal is."""

    def __init__(self, file: Path | None = None, limit_seconds: float | None = None):
        """Prepares the request.

        Args:
            file: its existence is a request.
            limit_seconds: longest time from the start of this process to its end.
        """
        self._file, self._limit = file, limit_seconds
        self._seen = Reason.NONE
        self._next_poll = 0.0
        self._longest_step = self._all_steps = 0.0
        self._num_steps = 0
        self._longest_save: float | None = None

    def seen(self, before_step: bool = False) -> Reason:
        """The request, cheap enough for every decoded token.

        Args:
            before_step: a whole step would have to fit before the limit; else only the saving
                of a checkpoint.
        """
        now = time.monotonic()
        if not self._seen and self._file is not None and now >= self._next_poll:
            self._next_poll = now + POLL_SECONDS
            self._seen = _asked_by(self._file)
        if self._seen or self._limit is None:
            return self._seen
        needed = self._save_seconds() + (self._longest_step if before_step else 0.0)
        return Reason.CLOCK if process_age() + needed > self._limit else Reason.NONE

    def wait_for_signal(self, seconds: float) -> None:
        """Returns once a signal has been caught, after so long at the latest."""
        end = time.monotonic() + seconds
        while self._seen is not Reason.SIGNAL and time.monotonic() < end:
            time.sleep(0.1)

    def note_step(self, seconds: float) -> None:
        """A step has taken so long."""
        self._longest_step = max(self._longest_step, seconds)
        self._all_steps += seconds
        self._num_steps += 1

    @property
    def mean_step_seconds(self) -> float | None:
        """None before the first step."""
        return self._all_steps / self._num_steps if self._num_steps else None

    def note_save(self, seconds: float) -> None:
        """Saving a checkpoint has taken so long."""
        self._longest_save = max(self._longest_save or 0.0, seconds)

    @contextmanager
    def catch_signals(self) -> Iterator[None]:
        """Makes the first SIGINT or SIGTERM a request; a second one acts as if never caught."""
        before = {number: signal.getsignal(number) for number in SIGNALS}

        def note(number: int, frame: object) -> None:
            self._seen = Reason.SIGNAL
            for other, handler in before.items():
                signal.signal(other, handler)

        for number in SIGNALS:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _save_seconds(self) -> float:
        """Before a save has been measured, as long as a step."""
        return self._longest_step if self._longest_save is None else self._longest_save


def process_age() -> float:
    """Seconds since this process was started, imports included."""
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22 of proc(5), since boot
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


def why_end_now(file: Path) -> str:
    """Why the run has to end without a checkpoint, by its stop file; empty: it need not."""
    words = (_read(file) or "").split()
    if words[:1] != [STOP_NOW]:
        return ""
    return KILLED.get(" ".join(words[1:]), "on demand")


def _asked_by(file: Path) -> Reason:
    text = _read(file)
    return Reason.NONE if text is None else WRITERS.get(text.strip(), Reason.FILE)


def _read(file: Path) -> str | None:
    """The beginning of a stop file; None: there is none."""
    try:
        with file.open(encoding="utf-8", errors="replace") as opened:
            return opened.read(READ_CHARACTERS)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        return ""  # there, whatever it is
