"""What a person sees while a run goes on: progress with time left, a table a step, the end."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, TextIO

from rich.box import SIMPLE
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from megatron_amrlhf.errors import printable
from megatron_amrlhf.report.progress import ProgressView
from megatron_amrlhf.run.folder import RunFolder
from megatron_amrlhf.run.heartbeat import RankProgress

WIDEST = 1000  # columns of a table
PLAIN_WIDTH = 110  # columns, where the output is a file
MAX_PAIRS_A_ROW = 3
INDENT, GAP = "  ", "    "
NO_FRACTION_FROM, SCIENTIFIC_FROM = 1e4, 1e9
SHOWN = (
    "loss/",
    "reward/",
    "prm/",
    "orm/",
    "eval/",
    "mask/kept_fraction",
    "mask/num_messages",
    "mask/mean_message_tokens",
    "kl/ref_nats",
    "policy/",
    "engine/grad_norm",
    "engine/skipped_steps",
    "time/",
    "throughput/",
    "memory/peak_gib",
)
UNITS = (("_seconds", "s"), ("_tokens_per_second", "tok/s"), ("_gib", "GiB"), ("_nats", "nats"))


class RunConsole:
    """Console output of one process; says nothing unless it is rank 0's.

    Every rank's ``progress`` is kept, for its heartbeat.

    Progress goes to stderr, tables go to stdout.
    """

    def __init__(self, rank: int, out: TextIO | None = None, err: TextIO | None = None):
        """Prepares the output.

        Args:
            rank: global rank of this process.
            out: where tables go; None: stdout.
            err: where progress goes; None: stderr.
        """
        self.progress = RankProgress()
        self._enabled = rank == 0
        self._out = _console(out or sys.stdout)
        self._view = ProgressView(_console(err or sys.stderr))
        self._show: Callable[[int], None] = _nothing

    @contextmanager
    def track(self, phase: str, total: int | None) -> Iterator[None]:
        """Enters a phase, and shows it while its block runs.

        Args:
            phase: its name, such as ``rollout``.
            total: units of work that ``tick`` will count; None: it is too short to be shown.
        """
        self.progress.enter(phase)
        showing = (
            self._view.phase(phase, total)
            if self._enabled and total is not None
            else nullcontext(_nothing)
        )
        with showing as self._show:
            try:
                yield
            finally:
                self._show = _nothing

    def tick(self, n: int) -> None:
        """Counts ``n`` more units of work as done: rows, or answers; of the phase that is shown."""
        self.progress.advance()
        self._show(n)

    def whole(self, done: int, total: int, seconds_left: float | None) -> None:
        """Shows how many of the run's steps are done, and what is left of its time.

        Args:
            done: completed steps.
            total: steps of the run.
            seconds_left: as measured; None: not known yet.
        """
        if self._enabled:
            self._view.whole(done, total, seconds_left)

    def line(self, text: str) -> None:
        """Prints one line on stdout."""
        if self._enabled:
            self._out.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def step_table(self, step: int, total: int | None, metrics: Mapping[str, float | None]) -> None:
        """Prints a short table of a step's main metrics.

        Args:
            step: completed steps.
            total: steps of the run, if known.
            metrics: value of each metric.
        """
        if not self._enabled:
            return
        names = [name for prefix in SHOWN for name in metrics if name.startswith(prefix)]
        self.line(f"step {step}" + (f"/{total}" if total else ""))
        for row in _grid([(n, metrics[n]) for n in dict.fromkeys(names)], self._out.width):
            self.line(row)

    def final_summary(
        self, folder: RunFolder, before: Mapping[str, float], after: Mapping[str, float]
    ) -> None:
        """Prints what the run changed and where everything lies.

        Args:
            folder: the run's folder.
            before: metrics before the run; may be empty.
            after: the same metrics after it.
        """
        if not self._enabled:
            return
        if after:
            table = Table(box=SIMPLE, safe_box=True)
            table.add_column("metric")
            for heading in ("before", "after", "change"):
                table.add_column(heading, justify="right")
            for name, value in after.items():
                change = f"{value - before[name]:+.4g}" if name in before else "-"
                table.add_row(name, format_metric(name, before.get(name)), _text(value), change)
            self._out.print(table, highlight=False)
        for path, meaning in (
            (folder.metrics, "metrics, one line a step"),
            (folder.samples, "answers with rewards, masks and messages"),
            (folder.tensorboard, "tensorboard --logdir"),
            (folder.checkpoints, "to resume from"),
            (folder.export, "the trained model, Hugging Face format"),
            (folder.path / "curves.png", "the main curves"),
        ):
            if path.exists():
                self.line(f"{path!s:<48} {meaning}")


def _nothing(n: int) -> None:
    """Shows no progress."""


def format_metric(name: str, value: float | None) -> str:
    """A value with four significant digits and its unit, such as ``12.3 s``."""
    unit = next((unit for suffix, unit in UNITS if name.endswith(suffix)), "")
    return f"{_text(value)} {unit}".rstrip()


def _grid(metrics: list[tuple[str, float | None]], width: int) -> list[str]:
    """Lines of ``name value`` pairs side by side, as many as fit; nothing is cut off."""
    cells = [(_short(name), format_metric(name, value)) for name, value in metrics]
    name_width = max((len(name) for name, _ in cells), default=0)
    value_width = max((len(value) for _, value in cells), default=0)
    pairs = [f"{name:<{name_width}}  {value:>{value_width}}" for name, value in cells]
    fitting = (width - len(INDENT)) // (name_width + value_width + 2 + len(GAP))
    count = min(MAX_PAIRS_A_ROW, max(1, fitting))
    rows = [pairs[start : start + count] for start in range(0, len(pairs), count)]
    return [INDENT + GAP.join(row) for row in rows]


def _short(name: str) -> str:
    """The name without its unit, which stands behind the value."""
    return next((name.removesuffix(end) for end, _ in UNITS if name.endswith(end)), name)


def _text(value: float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int) or NO_FRACTION_FROM <= abs(value) < SCIENTIFIC_FROM:
        return f"{value:.0f}"
    return f"{value:.4g}"


def terminal() -> TextIO | None:
    """The terminal that the launch script was started on, where stderr is a log; else None."""
    path = os.environ.get("AMRLHF_TERMINAL", "")
    try:
        return open(path, "w", encoding="utf-8") if path else None
    except OSError:
        return None


def stdout_console(**options: Any) -> Console:
    """A console on stdout with rich's ``options``, of a fixed width where that is a file."""
    return _console(sys.stdout, **options)


def print_whole(console: Console, table: Table) -> None:
    """Prints a table with all that is in it: a narrow terminal breaks its lines, none is cut."""
    wanted = Measurement.get(console, console.options.update(max_width=WIDEST), table).maximum
    before, console.width = console.width, max(console.width, wanted)
    console.print(table)
    console.width = before


def _console(stream: TextIO, **options: Any) -> Console:
    is_terminal = stream.isatty()
    return Console(file=stream, width=None if is_terminal else PLAIN_WIDTH, **options)
