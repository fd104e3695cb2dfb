"""The heartbeat and the watchdog around a run."""

from __future__ import annotations

import os

from megatron_amrlhf.algorithms.context import Context
from megatron_amrlhf.report.heartbeat import Beat, Heartbeat, interval_seconds, read_beats
from megatron_amrlhf.report.postmortem import first_failure
from megatron_amrlhf.report.stop_request import must_end_now
from megatron_amrlhf.report.watchdog import Watchdog

EXIT_ENDED = 130  # as after Ctrl-C


def watch(context: Context) -> Heartbeat:
    """Writes this rank's heartbeat while the block runs, and ends the process where it stalls.

    It also ends it, without a checkpoint, where the stop file says ``now``. An exception that
    leaves the block is noted in ``status.json``, by rank 0.
    """
    folder, mesh = context.folder, context.mesh
    limit = context.config.engine.watchdog_seconds
    dog = Watchdog(folder, mesh.world_size, limit)

    def on_beat(beat: Beat) -> None:
        if must_end_now(folder.stop):
            folder.status("stopped", max(0, beat.step - 1), "ended without a checkpoint, on demand")
            os._exit(EXIT_ENDED)
        if limit:
            dog.check(beat)

    def on_error(beat: Beat) -> None:
        if not folder.watchdog.exists():
            cause = first_failure(read_beats(folder.path, mesh.world_size)) or beat.error
            folder.status("failed", max(0, beat.step - 1), cause)

    return Heartbeat(
        folder.path,
        mesh.rank,
        context.console.progress,
        interval_seconds(limit),
        on_beat=on_beat,
        on_error=on_error,
    )
