"""The heartbeat and the watchdog around a run."""

from __future__ import annotations

from megatron_amrlhf.algorithms.context import Context
from megatron_amrlhf.report.heartbeat import Beat, Heartbeat, interval_seconds, read_beats
from megatron_amrlhf.report.postmortem import first_failure
from megatron_amrlhf.report.watchdog import Watchdog


def watch(context: Context) -> Heartbeat:
    """Writes this rank's heartbeat while the block runs, and ends the process where it stalls.

    An exception that leaves the block is noted in ``status.json``, by rank 0.
    """
    folder, mesh = context.folder, context.mesh
    limit = context.config.engine.watchdog_seconds
    dog = Watchdog(folder, mesh.world_size, limit)

    def on_error(beat: Beat) -> None:
        if not folder.watchdog.exists():
            cause = first_failure(read_beats(folder.path, mesh.world_size)) or beat.error
            folder.status("failed", max(0, beat.step - 1), cause)

    return Heartbeat(
        folder.path,
        mesh.rank,
        context.console.progress,
        interval_seconds(limit),
        on_beat=dog.check if limit else lambda beat: None,
        on_error=on_error,
    )
