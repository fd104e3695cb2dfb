"""Numbers of a run: ``metrics.jsonl`` and TensorBoard."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime

from torch.utils.tensorboard import SummaryWriter

from megatron_amrlhf.report.files import append_jsonl, truncate_jsonl
from megatron_amrlhf.run.folder import RunFolder


class MetricsWriter:
    """Writes each step's metrics; silent on ranks that do not write."""

    def __init__(self, folder: RunFolder):
        """Opens nothing yet.

        Args:
            folder: the run's folder.
        """
        self._folder = folder
        self._tensorboard: SummaryWriter | None = None
        self._purge_step: int | None = None

    def truncate_after(self, step: int) -> None:
        """Forgets the metrics of steps after ``step``; call on resume, before the first write.

        Args:
            step: the step that the run goes on from; 0 forgets all steps but an evaluation at 0.
        """
        assert self._tensorboard is None, "truncate_after comes before the first write"
        if self._folder.is_writer:
            truncate_jsonl(self._folder.metrics, step)
            self._purge_step = step + 1

    def write(self, step: int, metrics: Mapping[str, float | int | None]) -> None:
        """Appends one step and flushes it.

        Args:
            step: completed steps.
            metrics: value of each metric. NaN and infinities become null in the JSON and are
                left out of TensorBoard, as is None.
        """
        if not self._folder.is_writer:
            return
        time = datetime.now(UTC).isoformat(timespec="seconds")
        values = {name: _number(value) for name, value in metrics.items()}
        append_jsonl(self._folder.metrics, [{"step": step, "time": time, **values}])
        if self._tensorboard is None:
            self._tensorboard = SummaryWriter(
                str(self._folder.tensorboard), purge_step=self._purge_step
            )
        for name, value in values.items():
            if value is not None and math.isfinite(value):
                self._tensorboard.add_scalar(name, value, step)
        self._tensorboard.flush()

    def close(self) -> None:
        """Closes TensorBoard's file."""
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None


def _number(value: float | int | None) -> float | int | None:
    """A plain Python number, also from a numpy scalar or a tensor of one element."""
    return value if value is None or isinstance(value, (int, float)) else float(value)
