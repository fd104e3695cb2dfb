"""How far a run is: bars on a terminal, else at most a line a minute."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

FOLLOWS_VARIABLE = "AMRLHF_SECONDS_TO_FOLLOW"  # what a script expects of the runs after this one
SECONDS_A_LINE = 60.0


class ProgressView:
    """Shows the phase that is going on, and the whole run once its steps have been timed.

    The bar of the whole counts time: what has passed of what it is expected to take, with what
    ``AMRLHF_SECONDS_TO_FOLLOW`` names.

    Args:
        console: where it goes.
        clock: seconds, for tests.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic):
        self._console, self._clock = console, clock
        self._begin = self._told = clock()
        self._ends: float | None = None  # of the whole, by the clock
        self._steps = ""
        try:
            self._follows = float(os.environ.get(FOLLOWS_VARIABLE, "0"))
        except ValueError:
            self._follows = 0.0

    def whole(self, done: int, total: int, seconds_left: float | None) -> None:
        """The run has done ``done`` of ``total`` steps.

        Args:
            done: completed steps.
            total: steps of the run.
            seconds_left: of this run, as measured; None: not known yet.
        """
        self._steps = f"step {done} of {total}"
        if seconds_left is not None:
            self._ends = self._clock() + seconds_left + self._follows
        if not self._console.is_terminal:
            self._tell(self._whole_text())

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Callable[[int], None]]:
        """Shows a phase while its block runs; gives what counts units of its work as done."""
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description:<12}"),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(),
            )
            with Progress(*columns, console=self._console, transient=True) as bars:
                task = bars.add_task(name, total=total, text=f"0/{total}")
                whole = bars.add_task("whole", total=1.0, visible=False, text="")
                self._show_whole(bars, whole)

                def advance(n: int) -> None:
                    bars.advance(task, n)
                    bars.update(task, text=f"{bars.tasks[0].completed:.0f}/{total}")
                    self._show_whole(bars, whole)

                yield advance
        else:
            done = 0

            def count(n: int) -> None:
                nonlocal done
                done += n
                self._tell(", ".join(filter(None, (f"{name}: {done}/{total}", self._whole_text()))))

            yield count

    def _show_whole(self, bars: Progress, task: TaskID) -> None:
        if self._ends is None:
            return
        passed, expected = self._clock() - self._begin, self._ends - self._begin
        share = min(1.0, passed / expected) if expected > 0 else 1.0
        bars.update(task, completed=share, visible=True, text=self._whole_text())

    def _whole_text(self) -> str:
        """Such as ``step 3 of 50, about 4 min left``; empty before the first step."""
        if self._ends is None:
            return self._steps
        after = ", the run after this one included" if self._follows else ""
        return f"{self._steps}, about {in_minutes(self._ends - self._clock())} left{after}"

    def _tell(self, text: str) -> None:
        if text and self._clock() - self._told >= SECONDS_A_LINE:
            self._told = self._clock()
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def in_minutes(seconds: float) -> str:
    """Such as ``40 s``, ``7 min`` or ``2 h 5 min``."""
    if seconds < 90:
        return f"{max(0.0, seconds):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
