"""Ends a run that stands still, and says which rank holds the others up.

Nothing here compares the clocks of two nodes. Time without progress is each rank's own, on its
monotonic clock; whether another process still runs is seen from two readings of its heartbeat,
half a limit apart. Assumed is only that what one node writes into the run's folder can be read by
another within half the limit.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from megatron_amrlhf.files import write_atomic
from megatron_amrlhf.run.beats import HEARTBEAT_NAME, Beat, read_beats, read_dump
from megatron_amrlhf.run.folder import RunFolder
from megatron_amrlhf.run.status_file import note_failure

EXIT_STALLED = 3
# After the limit, another rank's report is awaited for this share of it.
GRACE = 0.25


class Watchdog:
    """Looks at each beat of this rank; called in the heartbeat's thread."""

    def __init__(
        self,
        folder: RunFolder,
        world_size: int,
        limit_seconds: float,
        end: Callable[[int], None] = os._exit,
    ):
        """Prepares the watchdog.

        Args:
            folder: the run's folder.
            world_size: number of ranks.
            limit_seconds: longest time without progress; a warning comes at half of it.
            end: ends this process with an exit code, at once.
        """
        self._folder, self._world_size = folder, world_size
        self._limit, self._end = limit_seconds, end
        self._claim = folder.path / HEARTBEAT_NAME / "reporter"
        self._warned = folder.path / HEARTBEAT_NAME / "warned"
        self._first: list[Beat] | None = None
        self._warning_is_mine = False

    def check(self, beat: Beat) -> None:
        """Warns at half the limit; at the limit reports (one rank) and ends this process."""
        if self._folder.watchdog.exists():
            self._end(EXIT_STALLED)
        elif beat.still_seconds < self._limit / 2:
            if self._warning_is_mine:
                self._warned.unlink(missing_ok=True)
            self._first, self._warning_is_mine = None, False
        elif self._first is None:
            self._first = read_beats(self._folder.path, self._world_size)
            self._warning_is_mine = _create(self._warned)
            if self._warning_is_mine:
                self._say(f"warning: {self._headline(beat, self._first, set())}")
        elif beat.still_seconds >= self._limit:
            if _create(self._claim):
                try:
                    self._report(beat, self._first)
                finally:
                    self._end(EXIT_STALLED)
            elif beat.still_seconds >= self._limit * (1 + GRACE):
                self._end(EXIT_STALLED)

    def _report(self, own: Beat, before: list[Beat]) -> None:
        """Says it on stderr, in status.json and in watchdog.txt, whose presence ends the others."""
        path = self._folder.path
        now = read_beats(path, self._world_size)
        silent = {
            beat.rank
            for beat, earlier in zip(now, before, strict=True)
            if beat.rank != own.rank and beat.beats == earlier.beats
        }
        headline = self._headline(own, now, silent)
        slowest = find_laggard(now, silent)
        self._say(
            f"error: {headline}\n{_stack(path, slowest)}\nall stacks: {self._folder.watchdog}"
        )
        note_failure(path, headline)
        parts = [_describe(path, beat, beat.rank in silent) for beat in now]
        write_atomic(self._folder.watchdog, "\n\n".join([headline, *parts]) + "\n")
        for beat in now:
            if beat.rank in silent and beat.host == socket.gethostname():
                _wake(beat.pid)

    def _headline(self, own: Beat, beats: list[Beat], silent: set[int]) -> str:
        """One line: who has waited how long, and for whom."""
        slowest = find_laggard(beats, silent)
        if slowest.state == "failed":
            why = f"failed ({slowest.error})"
        elif slowest.state == "missing":
            why = "has written no heartbeat"
        elif slowest.rank in silent:
            why = "does not run any more (dead, stopped, or in C code that keeps the GIL)"
        elif not slowest.waiting:
            why = "is not in a collective"
        else:
            why = "waits in a collective like all others and is the one furthest behind"
        return (
            f"no progress for {own.still_seconds:.0f} s on rank {own.rank} (limit "
            f"engine.watchdog_seconds = {self._limit:g}): {slowest.who} {why}, {slowest.where}"
        )

    @staticmethod
    def _say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def find_laggard(beats: list[Beat], silent: set[int]) -> Beat:
    """The rank that the others wait for.

    One that has failed, else one that does not run, else one outside of any collective, else any;
    among several the one that is furthest behind. Where collectives are queued on a GPU, the main
    thread of a rank that waits may be anywhere, and how far it is decides.

    Args:
        beats: of all ranks.
        silent: ranks whose heartbeat stands still.
    """

    def key(beat: Beat) -> tuple:
        if beat.state in ("failed", "finished"):
            kind = 0 if beat.state == "failed" else 4
        elif beat.rank in silent or beat.state != "running":
            kind = 1
        else:
            kind = 3 if beat.waiting else 2
        return kind, beat.step, beat.phases, beat.done, beat.rank

    return min(beats, key=key)


def _describe(path: Path, beat: Beat, is_silent: bool) -> str:
    waits = "in a collective" if beat.waiting else "not in a collective"
    seen = ", heartbeat stands still" if is_silent else ""
    head = f"{beat.who}: {beat.state}, {beat.where}, {waits}, no progress for "
    head += f"{beat.still_seconds:.0f} s at {beat.time}{seen}"
    return "\n".join([head + (f"\n  {beat.error}" if beat.error else ""), _stack(path, beat)])


def _stack(path: Path, beat: Beat) -> str:
    """The stack in the heartbeat and, where there is one, the dump made without the thread."""
    lines = [f"  {line}" for line in beat.stack] or ["  (no stack)"]
    return "\n".join([*lines, *(f"  {line}" for line in read_dump(path, beat.rank).splitlines())])


def _wake(pid: int) -> None:
    """Continues a stopped process, so that it can end; others do not notice."""
    try:
        os.kill(pid, signal.SIGCONT)
    except (ProcessLookupError, PermissionError):
        pass


def _create(path: Path) -> bool:
    """Whether this process is the one that made the file."""
    try:
        path.open("x").close()
    except FileExistsError:
        return False
    except OSError:
        pass  # no room for a claim: rather said by every rank than by none
    return True
