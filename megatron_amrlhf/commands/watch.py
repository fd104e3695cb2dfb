"""The heartbeat and the watchdog around a run."""

from __future__ import annotations

import os
import sys

from megatron_amrlhf.experience.context import Context
from megatron_amrlhf.run.beats import Beat, read_beats
from megatron_amrlhf.run.folder import RunFolder
from megatron_amrlhf.run.heartbeat import Heartbeat, interval_seconds
from megatron_amrlhf.run.postmortem import first_failure, lost_partner
from megatron_amrlhf.run.status_file import STATUS_NAME
from megatron_amrlhf.run.stop_request import why_end_now
from megatron_amrlhf.run.watchdog import EXIT_STALLED, Watchdog

EXIT_ENDED = 130  # as after Ctrl-C
# The launcher looks at its ranks each second, in any order, and gives the run the exit code of the
# first that it finds ended; of several hosts, the first to end gives the job its code. A rank that
# only lost its partner stays until the launcher, which has seen the partner, signals, or this long.
LOST_PARTNER_DELAY_SECONDS = 10.0


def watch(context: Context) -> Heartbeat:
    """Writes this rank's heartbeat while the block runs, and ends the process where it stalls.

    It also ends it, without a checkpoint, where the stop file says ``now``. An exception that
    leaves the block is noted in ``status.json``, by rank 0. One that says only that another
    rank has gone is held back until the launcher has seen that one.
    """
    folder, mesh = context.folder, context.mesh
    limit = context.config.engine.watchdog_seconds
    dog = Watchdog(folder, mesh.world_size, limit)

    def on_beat(beat: Beat) -> None:
        _leave_on_demand(folder, beat)
        if limit:
            dog.check(beat)

    def on_error(beat: Beat) -> None:
        _leave_on_demand(folder, beat)
        _leave_with_the_watchdog(folder)
        cause = first_failure(read_beats(folder.path, mesh.world_size)) or beat.error
        try:
            folder.status("failed", max(0, beat.step - 1), cause)
        except OSError as error:  # a full disk: what it made fail is the better message
            print(f"{STATUS_NAME}: {error.strerror}", file=sys.stderr, flush=True)
        if lost_partner(beat):
            context.stop.wait_for_signal(LOST_PARTNER_DELAY_SECONDS)
            _leave_on_demand(folder, beat)
            _leave_with_the_watchdog(folder)

    return Heartbeat(
        folder.path,
        mesh.rank,
        context.console.progress,
        every_seconds=interval_seconds(limit),
        on_beat=on_beat,
        on_error=on_error,
    )


def _leave_with_the_watchdog(folder: RunFolder) -> None:
    """Ends this process if a watchdog has reported: its partners go by that, not by an error."""
    if folder.watchdog.exists():
        os._exit(EXIT_STALLED)


def _leave_on_demand(folder: RunFolder, beat: Beat) -> None:
    """Ends this process if the stop file says so, also where a partner was quicker to go."""
    if why := why_end_now(folder.stop):
        line = f"ended without a checkpoint: {why}"
        try:
            print(line, file=sys.stderr, flush=True)
            folder.status("stopped", max(0, beat.step - 1), line)
        finally:  # also on a full disk
            os._exit(EXIT_ENDED)
