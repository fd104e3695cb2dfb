"""megatron-core's pipeline schedules behind one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import nn


def run_pipeline(
    model: nn.Module,
    forward_step: Callable,
    blocks: Iterator,
    num_blocks: int,
    block_shape: tuple[int, int],
    forward_only: bool,
) -> list:
    """Runs micro-batches of one shape through all stages: 1F1B, or plain accumulation at PP 1.

    Args:
        model: has ``config``, ``model_type`` and ``set_input_tensor`` of its stage.
        forward_step: ``(blocks, model) -> (output, loss function)`` as megatron-core defines it.
        blocks: the micro-batches; every stage iterates over its own.
        num_blocks: how many there are, the same on every stage.
        block_shape: rows and positions of each.
        forward_only: no backward; loss functions are called with ``non_loss_data=True``.

    Returns:
        What the loss functions handed back, on the last stage; [] elsewhere.
    """
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=blocks,
        model=model,
        num_microbatches=num_blocks,
        seq_length=block_shape[1],
        micro_batch_size=block_shape[0],
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
