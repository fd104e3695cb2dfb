"""Which ranks of a run still live, as far as their heartbeats tell."""

from __future__ import annotations

import socket
import time
from pathlib import Path

from megatron_amrlhf.errors import UserError
from megatron_amrlhf.run.beats import Beat, read_beats, seconds_since
from megatron_amrlhf.run.heartbeat import LONGEST_INTERVAL_SECONDS
from megatron_amrlhf.run.stop_request import STOP_NAME

RECENT_SECONDS = 30.0  # far more than an interval: the clocks of two hosts differ
WATCH_SECONDS = 2 * LONGEST_INTERVAL_SECONDS  # a busy rank may be late


def living(folder: Path) -> list[Beat]:
    """The ranks whose heartbeat goes on.

    Waits for another beat only where a rank may live: its last one is recent, and its process is
    there or on another host.
    """
    before = {beat.rank: beat.beats for beat in read_beats(folder) if _may_live(beat)}
    if not before:
        return []
    time.sleep(WATCH_SECONDS)
    return [
        beat
        for beat in read_beats(folder)
        if beat.state == "running" and beat.beats > before.get(beat.rank, beat.beats)
    ]


def refuse_living_run(folder: Path) -> None:
    """Two runs in one folder would delete each other's checkpoints.

    Raises:
        UserError: a rank of a run in this folder lives.
    """
    for beat in living(folder)[:1]:
        raise UserError(
            f"{folder} holds a run that is going on: {beat.who}, started {beat.started}, is in "
            f"step {beat.step}; stop it (touch {folder / STOP_NAME}) or choose another run.name"
        )


def _may_live(beat: Beat) -> bool:
    is_here = beat.host == socket.gethostname()
    if beat.state != "running" or is_here and not Path(f"/proc/{beat.pid}").exists():
        return False
    return abs(seconds_since(beat.time)) < RECENT_SECONDS
