"""Clocks of the hosts against rank 0's, by round trips over the store."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from megatron_amrlhf.doctor.meeting import Absent, Meeting
from megatron_amrlhf.doctor.records import Clock

ROUND_TRIPS = 10


def compare_clocks(meeting: Meeting, hosts: Mapping[str, Sequence[int]]) -> list[Clock]:
    """Each other host's clock less rank 0's, by the fastest of ``ROUND_TRIPS``.

    Rank 0's reading lies somewhere between a question and its answer: half of the round trip is
    the uncertainty.

    Args:
        meeting: of all ranks.
        hosts: ranks of each host, the same on every rank.

    Returns:
        On rank 0, in the order of ``hosts``; an empty list elsewhere.

    Raises:
        Absent: on rank 0, where a host does not answer.
    """
    leaders = [ranks[0] for ranks in hosts.values() if 0 not in ranks]
    if not meeting.is_main:
        if meeting.rank in leaders:
            meeting.send(f"clocks/{meeting.rank}/result", asdict(_ask_time(meeting)))
        return []
    clocks, absent = [], []
    for leader in leaders:
        try:
            clocks.append(_tell_time(meeting, leader))
        except Absent:  # the others still wait for their turn
            absent.append(leader)
    if absent:
        raise Absent("clocks", absent, meeting.timeout_seconds, [])
    return clocks


def _tell_time(meeting: Meeting, leader: int) -> Clock:
    meeting.send(f"clocks/{leader}/turn", True)
    for trip in range(ROUND_TRIPS):
        meeting.receive(f"clocks/{leader}/ask{trip}", leader)
        meeting.send(f"clocks/{leader}/say{trip}", time.time())
    return Clock(**meeting.receive(f"clocks/{leader}/result", leader))


def _ask_time(meeting: Meeting) -> Clock:
    mine = f"clocks/{meeting.rank}"
    meeting.receive(f"{mine}/turn", 0)
    best = Clock(meeting.host, 0.0, float("inf"))
    for trip in range(ROUND_TRIPS):
        asked, start = time.time(), time.perf_counter()
        meeting.send(f"{mine}/ask{trip}", True)
        said = meeting.receive(f"{mine}/say{trip}", 0)
        half = (time.perf_counter() - start) / 2
        if half < best.uncertainty_seconds:
            best = Clock(meeting.host, asked + half - said, half)
    return best
