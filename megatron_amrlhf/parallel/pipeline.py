"""megatron-core's pipeline schedules behind one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_with_interleaving,
    forward_backward_pipelining_without_interleaving,
)
from torch import nn

from megatron_amrlhf.config.cut import PipelineCut


def run_pipeline(
    chunks: list[nn.Module],
    cut: PipelineCut,
    forward_step: Callable,
    blocks: Callable[[], Iterator],
    *,
    num_blocks: int,
    num_positions: int,
    forward_only: bool,
) -> list:
    """Runs micro-batches of one shape through all stages.

    1F1B, interleaved where a rank has several chunks, plain accumulation at PP 1.

    Args:
        chunks: each has ``config``, ``model_type`` and ``set_input_tensor``.
        cut: the pipeline axis.
        forward_step: ``(blocks, chunk) -> (output, loss function)`` as megatron-core defines it.
        blocks: gives an iterator over the micro-batches; every chunk has its own.
        num_blocks: how many there are, the same on every stage; a multiple of PP if interleaved.
        num_positions: positions of each (they have one row).
        forward_only: no backward; loss functions are called with ``non_loss_data=True``.

    Returns:
        What the loss functions handed back, on the last stage; [] elsewhere.
    """
    interleaved = cut.virtual > 1
    if interleaved:
        schedule = forward_backward_pipelining_with_interleaving
    elif cut.stages > 1:
        schedule = forward_backward_pipelining_without_interleaving
    else:
        schedule = forward_backward_no_pipelining
    iterators = [blocks() for _ in chunks]
    return schedule(
        forward_step_func=forward_step,
        data_iterator=iterators if interleaved else iterators[0],
        model=chunks if interleaved else chunks[0],
        num_microbatches=num_blocks,
        seq_length=num_positions,  # megatron-core divides it by TP in sequence parallelism
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
