"""Runs micro-batches through the pipeline by megatron-core's schedules."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from megatron_amrlhf.config.cut import PipelineCut
from megatron_amrlhf.engine.microbatch import MicroBatch
from megatron_amrlhf.models.layers import LogitsFunction
from megatron_amrlhf.models.stage import StageModel
from megatron_amrlhf.parallel.pipeline import run_pipeline

# (last stage's output, micro-batch) -> (loss of the micro-batch scaled for the step, anything)
LossFunction = Callable[[Tensor, MicroBatch], tuple[Tensor, object]]
# (last stage's output, micro-batch) -> anything
CollectFunction = Callable[[Tensor, MicroBatch], object]


class ChunkHandle(nn.Module):
    """What megatron-core's schedules need of a model chunk, around whatever runs the stage.

    A DeepSpeed engine has a ``config`` of its own, which the schedules would take for theirs.
    """

    def __init__(self, stage: StageModel, index: int, call: Callable):
        super().__init__()
        chunk = stage.chunks[index]
        self.config, self.model_type = chunk.config, chunk.model_type
        self.set_input_tensor = chunk.set_input_tensor
        self.index, self.is_last = index, index == len(stage.chunks) - 1
        self._call = [call]  # in a list, so that it is not registered as a submodule

    def run(self, micro_batch: MicroBatch, function: LogitsFunction | None) -> Tensor:
        """The chunk's activations or outputs of a micro-batch."""
        return self._call[0](
            self.index,
            micro_batch.tokens,
            output_index=micro_batch.output_index,
            positions=micro_batch.positions,
            rows=micro_batch.packing,
            targets=micro_batch.targets,
            function=function,
        )


def run_forward(
    stage: StageModel,
    cut: PipelineCut,
    micro_batches: list[MicroBatch],
    function: LogitsFunction | None,
    *,
    collect: CollectFunction,
    tick: Callable[[int], None],
) -> list:
    """Forward only. Returns what ``collect`` gave for each micro-batch on the last stage, else [].

    Args:
        stage: the whole stage.
        cut: the pipeline axis.
        micro_batches: micro-batches of one length.
        function: reads the logits of a language model; None: outputs are as the head gives them.
        collect: called with the real outputs of each micro-batch on the last stage.
        tick: called with the rows of each micro-batch after its forward on every stage.
    """

    def forward_step(iterator, handle: ChunkHandle):
        micro_batch = next(iterator)
        output = handle.run(micro_batch, function)
        if handle.is_last:
            tick(micro_batch.num_rows)

        def keep(output: Tensor, non_loss_data: bool = True) -> object:
            # Behind these may be the one output that stands in where there is none.
            return collect(output[: micro_batch.num_outputs], micro_batch)

        return output, keep

    return _run(stage, stage, cut, micro_batches, forward_step=forward_step, forward_only=True)


def run_forward_backward(
    stage: StageModel,
    call: Callable,
    cut: PipelineCut,
    micro_batches: list[MicroBatch],
    *,
    function: LogitsFunction | None,
    loss: LossFunction,
    tick: Callable[[int], None],
) -> list:
    """1F1B (or plain accumulation at PP 1) with one backward a micro-batch.

    Args:
        stage: the stage.
        call: runs the stage: itself, or the DeepSpeed engine around it.
        cut: the pipeline axis.
        micro_batches: micro-batches of one length, as many on every DP rank.
        function: reads the logits of a language model; None: outputs are as the head gives them.
        loss: the loss of a micro-batch, called on the last stage; its gradient is used as it is.
        tick: called with the rows of each micro-batch after its forward on every stage.

    Returns:
        The second results of ``loss`` on the last stage, else [].
    """

    def forward_step(iterator, handle: ChunkHandle):
        micro_batch = next(iterator)
        output = handle.run(micro_batch, function)
        if handle.is_last:
            tick(micro_batch.num_rows)

        def scaled(output: Tensor):
            value, extra = loss(output, micro_batch)
            # Of two results megatron-core would divide the loss by the number of micro-batches; of
            # three it does not, and adds up the second one, an int on the device, for nobody.
            return value, value.new_ones(()).int(), extra

        return output, scaled

    return _run(stage, call, cut, micro_batches, forward_step=forward_step, forward_only=False)


def _run(
    stage: StageModel,
    call: Callable,
    cut: PipelineCut,
    micro_batches: list[MicroBatch],
    *,
    forward_step: Callable,
    forward_only: bool,
) -> list:
    count = len(stage.chunks)
    handles: list[nn.Module] = [ChunkHandle(stage, index, call) for index in range(count)]
    length = micro_batches[0].tokens.shape[1]
    return run_pipeline(
        handles,
        cut,
        forward_step,
        lambda: iter(micro_batches),
        num_blocks=len(micro_batches),
        num_positions=length,
        forward_only=forward_only,
    )
