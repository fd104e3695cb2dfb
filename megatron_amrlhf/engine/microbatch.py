"""Rows of a batch cut into micro-batches of one shape for the pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_amrlhf.parallel.collectives import max_over
from megatron_amrlhf.parallel.mesh import Mesh

Outputs = Literal["before", "at", "given"]


@dataclass(frozen=True)
class OutputPlan:
    """Where the last stage computes outputs, and which ``[B, R]`` cell each output fills.

    All 1-D int64 over the outputs of the whole batch: the row, the position in the row that the
    model output is read at, and the column of the result.
    """

    rows: Tensor
    positions: Tensor
    columns: Tensor
    width: int

    def widened(self, width: int) -> OutputPlan:
        """The same outputs in a result of more columns."""
        assert width >= self.width, (width, self.width)
        return OutputPlan(self.rows, self.positions, self.columns, width)


def response_outputs(lengths: Tensor, prompt_lengths: Tensor, where: Outputs) -> OutputPlan:
    """Outputs for every response token: ``before`` it (log-prob, value) or ``at`` it (reward)."""
    counts = lengths - prompt_lengths
    width = int(counts.max()) if counts.numel() else 0
    rows, columns = (torch.arange(width)[None] < counts[:, None]).nonzero(as_tuple=True)
    shift = 1 if where == "before" else 0
    return OutputPlan(rows, prompt_lengths[rows] + columns - shift, columns, width)


@dataclass(frozen=True)
class MicroBatch:
    """A ``[b, T]`` block of rows on the compute device.

    Attributes:
        tokens: ``[b, T]`` int64 padded right with 0; missing rows are all 0.
        row_index: ``[b]`` int64 into the batch, -1 for a missing row.
        output_index: ``[N]`` int64 into the flattened block; never empty, so that a block
            without outputs is still in the graph (its one output is to be weighted 0).
        output_rows: ``[n]`` row in the *batch* of each real output (``n`` may be 0).
        output_columns: ``[n]`` column of the result.
        targets: ``[n]`` int64 token that follows each output's position.
    """

    tokens: Tensor
    row_index: Tensor
    output_index: Tensor
    output_rows: Tensor
    output_columns: Tensor
    targets: Tensor

    @property
    def num_outputs(self) -> int:
        return self.output_rows.numel()

    def rectangle(self, values: Tensor, width: int) -> Tensor:
        """Puts ``[n]`` or ``[n, D]`` values into ``[b, width(, D)]``, by row; the rest is 0."""
        local = self.output_rows - self.row_index[0]  # rows of a block are consecutive
        out = values.new_zeros(self.tokens.shape[0], width, *values.shape[1:])
        return out.index_put((local, self.output_columns), values)


def cut_micro_batches(
    rows: tuple[Tensor, ...], plan: OutputPlan, micro_batch_size: int, mesh: Mesh, equal: bool
) -> list[MicroBatch]:
    """Consecutive blocks of ``micro_batch_size`` rows, all padded to the longest row.

    Args:
        rows: 1-D int64 CPU tensors.
        plan: outputs of the batch.
        micro_batch_size: rows a block.
        mesh: the mesh.
        equal: give every DP rank the same number of blocks (ZeRO-3 gathers in each forward);
            ranks with fewer rows get blocks of missing rows. Then entered by all DP ranks.
    """
    count = -(-len(rows) // micro_batch_size)
    if equal:
        count = max_over(count, mesh.dp_group, mesh.device)
    length = max((row.numel() for row in rows), default=1)
    blocks = []
    for start in range(0, count * micro_batch_size, micro_batch_size):
        members = range(start, min(start + micro_batch_size, len(rows)))
        tokens = torch.zeros(micro_batch_size, length, dtype=torch.int64)
        for place, index in enumerate(members):
            tokens[place, : rows[index].numel()] = rows[index]
        row_index = torch.full((micro_batch_size,), -1, dtype=torch.int64)
        row_index[: len(members)] = torch.tensor(list(members), dtype=torch.int64)
        inside = (plan.rows >= start) & (plan.rows < start + micro_batch_size)
        output_rows, positions = plan.rows[inside], plan.positions[inside]
        index = (output_rows - start) * length + positions
        following = (positions + 1).clamp(max=length - 1)
        block = MicroBatch(
            tokens=tokens,
            row_index=row_index,
            output_index=index if index.numel() else torch.zeros(1, dtype=torch.int64),
            output_rows=output_rows,
            output_columns=plan.columns[inside],
            targets=tokens[output_rows - start, following],
        )
        blocks.append(
            MicroBatch(**{name: value.to(mesh.device) for name, value in vars(block).items()})
        )
    return blocks
