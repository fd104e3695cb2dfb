"""All ranks leave a step at the same place, whichever of them saw the request to stop.

A step can be abandoned until its first update: nothing that a checkpoint holds has changed by
then, and the random numbers of a step depend on nothing but seed, step and sample. Resuming
replays the step from its start.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

from megatron_amrlhf.experience.context import Context
from megatron_amrlhf.parallel.collectives import max_over
from megatron_amrlhf.rollout.generator import DecodingStopped
from megatron_amrlhf.run.stop_request import Reason
from megatron_amrlhf.types import RolloutBatch


class StepAbandoned(Exception):
    """Raised on every rank at the same place: go back to the last completed update and leave."""

    def __init__(self, reason: Reason):
        super().__init__(reason.text)
        self.reason = reason


def check_stop(context: Context, before_step: bool = False) -> None:
    """Entered by every rank, whatever it has seen.

    Args:
        context: the run.
        before_step: a step begins here.

    Raises:
        StepAbandoned: any rank has seen a request, on every rank.
    """
    _agree(context, context.stop.seen(before_step))


def until_stopped(context: Context, decode: Callable[[], RolloutBatch]) -> RolloutBatch:
    """``decode()``, which one replica may have left in the middle. Entered by every rank.

    Raises:
        StepAbandoned: a replica has, or a rank has seen a request, on every rank.
    """
    answers = None
    try:
        answers = decode()
        why = context.stop.seen()
    except DecodingStopped as stopped:
        why = Reason(stopped.why)
    _agree(context, why)
    assert answers is not None
    return answers


def _agree(context: Context, seen: Reason) -> None:
    reason = Reason(max_over(int(seen), dist.group.WORLD, context.mesh.device))
    if reason:
        raise StepAbandoned(reason)
