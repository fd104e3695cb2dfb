"""Tables of what ``tools/benchmark_engine.py`` measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from rich.table import Table

from megatron_amrlhf.sizes import in_units

SMALLEST_SHARE = 0.01  # of a phase's bytes; what moves less has no row


def engine_tables(record: Mapping) -> Iterator[Table]:
    """Time, bytes and memory of each layout in a benchmark's record."""
    layouts = record["layouts"]
    yield _times(layouts)
    yield _bytes(layouts)
    yield _memory(layouts)


def _times(layouts: Mapping) -> Table:
    phases = list(next(iter(layouts.values()))["seconds"])
    table = Table(title="time: median seconds, tokens/s of all processes")
    table.add_column("layout")
    for heading in (*phases, "bubble"):
        table.add_column(heading, justify="right")
    for name, measured in layouts.items():
        pairs = (
            f"{measured['seconds'][phase]:.3g} s, {measured['tokens_per_second'][phase]:.0f}/s"
            for phase in phases
        )
        bubble = f"{measured['bubble']:.1%} (m = {measured['micro_batches']})"
        table.add_row(name, *pairs, bubble)
    return table


def _bytes(layouts: Mapping) -> Table:
    table = Table(title="bytes: what the rank that moves most sends in a phase")
    for heading in ("layout", "phase", "operation"):
        table.add_column(heading)
    for heading in ("counted", "calculated", "off"):
        table.add_column(heading, justify="right")
    for name, measured in layouts.items():
        for phase in measured["seconds"]:
            rank = max(measured["ranks"], key=partial(_sent_in, phase))
            counted, analytic = rank["counted"][phase], rank["analytic"][phase]
            floor = SMALLEST_SHARE * max(_sent(counted), _sent(analytic))
            for key in sorted(_sending(counted) | _sending(analytic)):
                found, expected = counted.get(key, 0.0), analytic.get(key, 0.0)
                if max(found, expected) > floor:
                    off = f"{found / expected - 1:+.1%}" if expected else "-"
                    table.add_row(name, phase, key, in_units(found), in_units(expected), off)
    return table


def _memory(layouts: Mapping) -> Table:
    table = Table(title="memory: the rank with the highest peak; held: weights, gradients, Adam")
    for heading in ("layout", "phase"):
        table.add_column(heading)
    for heading in ("peak", "planned", "held"):
        table.add_column(heading, justify="right")
    for name, measured in layouts.items():
        for phase in measured["seconds"]:
            rank = max(measured["ranks"], key=partial(_peak_in, phase))
            kinds = ("peak_bytes", "planned_bytes", "analytic_bytes")
            table.add_row(name, phase, *(in_units(rank[kind][phase]) for kind in kinds))
    return table


def _sending(volumes: Mapping[str, float]) -> set[str]:
    """What is received is another rank's sending."""
    return {key for key in volumes if not key.startswith("receive")}


def _sent_in(phase: str, rank: dict) -> float:
    return _sent(rank["counted"][phase])


def _peak_in(phase: str, rank: dict) -> int:
    return rank["peak_bytes"][phase]


def _sent(volumes: Mapping[str, float]) -> float:
    return sum(volumes[key] for key in _sending(volumes))
