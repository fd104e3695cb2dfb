"""What to say of an optimizer step whose loss or gradient is not finite."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_amrlhf.engine.accumulator import GradientAccumulator
from megatron_amrlhf.engine.microbatch import MicroBatch
from megatron_amrlhf.engine.schedule import LossFunction
from megatron_amrlhf.parallel.collectives import gather_objects

MAX_NAMES, MAX_RANKS = 3, 4


@dataclass(frozen=True)
class LossLog:
    """The loss of each micro-batch of a step on a last stage.

    Attributes:
        values: 0-dim tensors.
        rows: places of each micro-batch's rows in the step's batch.
    """

    values: list[Tensor]
    rows: list[Tensor]

    def following(self, loss: LossFunction) -> LossFunction:
        """``loss``, of whose every call the value is kept."""

        def logged(outputs: Tensor, micro_batch: MicroBatch) -> tuple[Tensor, object]:
            value, extra = loss(outputs, micro_batch)
            self.values.append(value.detach())
            self.rows.append(micro_batch.row_index)
            return value, extra

        return logged

    @property
    def is_finite(self) -> bool:
        # Stacked: the device is waited for once, not for each micro-batch.
        return not self.values or bool(torch.stack(self.values).isfinite().all())

    def wrong_rows(self) -> list[int]:
        """Places of the rows in micro-batches whose loss is not finite."""
        pairs = zip(self.values, self.rows, strict=True)
        return [row for value, rows in pairs if not value.isfinite() for row in rows.tolist()]


def describe(losses: LossLog, ids: Tensor, gradients: GradientAccumulator) -> str:
    """One line: which ranks, which samples, which parameters. Entered by every rank.

    Args:
        losses: this rank's.
        ids: names of the batch's rows.
        gradients: the step's sum.
    """
    samples = [int(ids[row]) for row in losses.wrong_rows()]
    names = [name for name in gradients.spans if not gradients.own(name).isfinite().all()]
    everyone = gather_objects((samples, names), dist.group.WORLD)
    parts = [
        f"rank {rank}: {_what(samples, names)}"
        for rank, (samples, names) in enumerate(everyone)
        if samples or names
    ]
    # A loss points at its cause; gradients that only followed from it are left out then.
    causes = [part for part in parts if "loss of samples" in part] or parts
    more = f" and {len(causes) - MAX_RANKS} more ranks" if len(causes) > MAX_RANKS else ""
    return "; ".join(causes[:MAX_RANKS]) + more


def _what(samples: list[int], names: list[str]) -> str:
    found = []
    if samples:
        found.append(f"loss of samples {', '.join(map(str, samples))}")
    if names:
        more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
        found.append(f"gradient of {', '.join(names[:MAX_NAMES])}{more}")
    return ", ".join(found)
