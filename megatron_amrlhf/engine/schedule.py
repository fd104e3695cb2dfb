"""Runs micro-batches through the pipeline by megatron-core's schedules."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from megatron_amrlhf.engine.microbatch import MicroBatch
from megatron_amrlhf.models.stage import StageModel
from megatron_amrlhf.parallel.pipeline import run_pipeline

# (last stage's output, micro-batch) -> (loss of the micro-batch scaled for the step, anything)
LossFunction = Callable[[Tensor, MicroBatch], tuple[Tensor, object]]
# (last stage's output, micro-batch) -> anything
CollectFunction = Callable[[Tensor, MicroBatch], object]


class StageHandle(nn.Module):
    """What megatron-core's schedules need of a model, around a DeepSpeed engine or a bare stage.

    A DeepSpeed engine has a ``config`` of its own, which the schedules would take for theirs.
    """

    def __init__(self, stage: StageModel, call: Callable):
        super().__init__()
        self.config, self.model_type = stage.config, stage.model_type
        self.set_input_tensor = stage.set_input_tensor
        self._call = [call]  # in a list, so that it is not registered as a submodule

    def forward(self, *args, **kwargs) -> Tensor:
        return self._call[0](*args, **kwargs)


def run_forward(
    stage: StageModel,
    blocks: list[MicroBatch],
    collect: CollectFunction,
    on_block: Callable[[], None],
) -> list:
    """Forward only. Returns what ``collect`` gave for each block on the last stage, else [].

    ``on_block`` is called after the forward of each block on every stage (for progress bars).
    """
    if not blocks:
        return []

    def forward_step(iterator, model):
        block = next(iterator)
        output = model(block.tokens, output_index=block.output_index)
        on_block()

        def keep(output: Tensor, non_loss_data: bool = True) -> object:
            return collect(output[: block.num_outputs], block)

        return output, keep

    return _run(StageHandle(stage, stage), blocks, forward_step, forward_only=True)


def run_forward_backward(
    stage: StageModel,
    engine: Callable,
    blocks: list[MicroBatch],
    loss: LossFunction,
    before_backward: Callable[[], None] | None,
    on_block: Callable[[], None],
) -> list:
    """1F1B (or plain accumulation at PP 1) with one backward a block.

    Args:
        stage: the stage.
        engine: the DeepSpeed engine around it, called for each forward.
        blocks: micro-batches of one shape, as many on every DP rank.
        loss: the loss of a block, called on the last stage; its gradient is used as it is.
        before_backward: called before the backward of each block on every stage.
        on_block: called after the forward of each block on every stage.

    Returns:
        The second results of ``loss`` on the last stage, else [].
    """

    def forward_step(iterator, model):
        block = next(iterator)
        output = model(block.tokens, output_index=block.output_index)
        on_block()
        if before_backward is not None and output.requires_grad:
            # A view made after the engine's output hooks: its own hook runs before theirs.
            output = output.view_as(output)
            output.register_hook(lambda grad: before_backward())

        def scaled(output: Tensor):
            value, extra = loss(output, block)
            return value, value.new_ones(()).int(), extra

        return output, scaled

    return _run(StageHandle(stage, engine), blocks, forward_step, forward_only=False)


def _run(handle: StageHandle, blocks: list[MicroBatch], forward_step, forward_only: bool) -> list:
    shape = tuple(blocks[0].tokens.shape)
    return run_pipeline(handle, forward_step, iter(blocks), len(blocks), shape, forward_only)
