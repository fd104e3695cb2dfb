"""What tools/benchmark_peers.py measured, as a table of ratios."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from rich.table import Table

OURS = "ours"
GIB = 2**30


@dataclass(frozen=True)
class Found:
    """Of one rollout, or of a training step of one run (medians of its steps but the first).

    Attributes:
        wall: seconds by the clock.
        cpu: seconds of all cores.
        peak_bytes: most resident memory of the run's process; None where both sides share one.
    """

    wall: float
    cpu: float
    peak_bytes: int | None


Rounds = dict[str, list[Found]]
"""By side, `OURS` and the peers, what each round found."""


def per_step(ends: list[tuple[float, float]], peak_bytes: int) -> Found:
    """Of the ends of a run's steps (by the clock and in seconds of all cores), three at least."""
    pairs = list(zip(ends, ends[1:], strict=False))
    walls, cpus = ([after[i] - before[i] for before, after in pairs] for i in (0, 1))
    return Found(statistics.median(walls), statistics.median(cpus), peak_bytes)


def table_of(record: dict[str, dict[str, Rounds]]) -> Table:
    """A row a model, kind of work and peer.

    Args:
        record: by size and work.
    """
    columns = ("model", "work", "peer", "ours, s (CPU)", "peer, s (CPU)", "ratio", "CPU ratio")
    table = Table(*columns, "memory, GiB")
    for size, works in record.items():
        for work, sides in works.items():
            own = sides[OURS]
            for peer, theirs in sides.items():
                if peer != OURS:
                    table.add_row(size, work, peer, *_compared(own, theirs))
    return table


def _compared(own: list[Found], theirs: list[Found]) -> list[str]:
    shown = [f"{_middle(x, 'wall'):.2f} ({_middle(x, 'cpu'):.2f})" for x in (own, theirs)]
    for key in ("wall", "cpu"):
        pairs = zip(own, theirs, strict=True)
        ratios = [getattr(peer, key) / getattr(mine, key) for mine, peer in pairs]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        shown.append(spread)
    has_memory = own[0].peak_bytes is not None
    peaks = [_middle(x, "peak_bytes") / GIB for x in (own, theirs)] if has_memory else []
    return [*shown, " / ".join(f"{peak:.2f}" for peak in peaks)]


def _middle(found: list[Found], key: str) -> float:
    return statistics.median(getattr(x, key) for x in found)
