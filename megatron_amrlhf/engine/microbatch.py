"""Rows of a batch packed into micro-batches of one shape for the pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_amrlhf.config.layout import EngineSection
from megatron_amrlhf.engine.packing import block_positions, even_blocks, pack_rows
from megatron_amrlhf.models.attention import Packing
from megatron_amrlhf.parallel.collectives import max_over
from megatron_amrlhf.parallel.mesh import Mesh

Outputs = Literal["before", "at", "given"]


@dataclass(frozen=True)
class OutputPlaces:
    """Where the last stage computes outputs, and which ``[B, R]`` cell each output fills.

    All 1-D int64 over the outputs of the whole batch, by row: the row, the position in the row
    that the model output is read at, and the column of the result.
    """

    rows: Tensor
    positions: Tensor
    columns: Tensor
    width: int

    def widened(self, width: int) -> OutputPlaces:
        """The same outputs in a result of more columns."""
        assert width >= self.width, (width, self.width)
        return OutputPlaces(self.rows, self.positions, self.columns, width)


def response_outputs(lengths: Tensor, prompt_lengths: Tensor, where: Outputs) -> OutputPlaces:
    """Outputs for every response token: ``before`` it (log-prob, value) or ``at`` it (reward)."""
    counts = lengths - prompt_lengths
    width = int(counts.max()) if counts.numel() else 0
    # In order of rows, which searchsorted below and last_output_of_row rely on.
    rows, columns = (torch.arange(width)[None] < counts[:, None]).nonzero(as_tuple=True)
    shift = 1 if where == "before" else 0
    return OutputPlaces(rows, prompt_lengths[rows] + columns - shift, columns, width)


@dataclass(frozen=True)
class MicroBatch:
    """Some rows of a batch end to end, on the compute device.

    A micro-batch without rows is a normal case: other ranks may have more of them. It runs and is
    differentiated as the others are, with outputs that count for nothing.

    Attributes:
        tokens: ``[1, T]`` int64; 0 after the last row.
        positions: ``[1, T]`` int64, from 0 in every row.
        packing: the rows' lengths.
        row_index: ``[b]`` int64 ascending, the rows' places in the batch.
        output_index: ``[N]`` int64 into the positions, ``N`` at least 1, so that the head is in
            the graph of every micro-batch.
        targets: ``[N]`` int64 token that follows each output's position.
        output_rows: ``[n]`` row in the *batch* of each real output (``n`` may be 0); these are
            the first of the ``N``.
        output_places: ``[n]`` row in this micro-batch.
        output_columns: ``[n]`` column of the result.
    """

    tokens: Tensor
    positions: Tensor
    packing: Packing
    row_index: Tensor
    output_index: Tensor
    targets: Tensor
    output_rows: Tensor
    output_places: Tensor
    output_columns: Tensor

    @property
    def num_rows(self) -> int:
        return self.row_index.numel()

    @property
    def num_outputs(self) -> int:
        return self.output_rows.numel()

    def rectangle(self, values: Tensor, width: int) -> Tensor:
        """Puts ``[n]`` or ``[n, D]`` values into ``[b, width(, D)]``, by row; the rest is 0."""
        out = values.new_zeros(self.num_rows, width, *values.shape[1:])
        return out.index_put((self.output_places, self.output_columns), values)


def pack_micro_batches(
    rows: tuple[Tensor, ...],
    at: OutputPlaces,
    section: EngineSection,
    mesh: Mesh,
    *,
    together: int = 1,
    equal: bool = False,
) -> list[MicroBatch]:
    """Packs rows into micro-batches of one length.

    Args:
        rows: 1-D int64 CPU tensors.
        at: outputs of the batch.
        section: its limits of rows or tokens.
        mesh: the mesh.
        together: this many consecutive rows (a pair) stay in one micro-batch.
        equal: give every DP rank the same number of micro-batches (gradients are reduced over
            them, weights gathered); ranks with fewer rows get some without rows. Then entered by
            all DP ranks.
    """
    lengths = [row.numel() for row in rows]
    tokens = section.micro_batch_tokens
    packed = pack_rows(lengths, together, None if tokens else section.micro_batch_size, tokens)
    # One at least, also without rows: tensor ranks and stages meet in each forward.
    count = max(len(packed), 1)
    if equal:
        count = max_over(count, mesh.dp_group, mesh.device)
    # A multiple of PP is the interleaved schedule's demand.
    multiple = mesh.pp_size if mesh.cut.virtual > 1 else 1
    packed = even_blocks(lengths, together, packed, count, multiple)
    # Sequence parallelism cuts the positions into TP equal parts.
    unit = mesh.tp_size if mesh.sequence_parallel else 1
    num_positions = block_positions(lengths, packed, unit)
    return [_pack(rows, at, members, num_positions, mesh) for members in packed]


def _pack(
    rows: tuple[Tensor, ...], at: OutputPlaces, members: list[int], num_positions: int, mesh: Mesh
) -> MicroBatch:
    lengths = torch.tensor([rows[i].numel() for i in members], dtype=torch.int64)
    starts = lengths.cumsum(0) - lengths
    padding = torch.zeros(num_positions - int(lengths.sum()), dtype=torch.int64)
    tokens = torch.cat([*(rows[i] for i in members), padding])
    positions = torch.cat([*(torch.arange(n) for n in lengths.tolist()), padding])
    index = torch.tensor(members, dtype=torch.int64)
    inside = torch.isin(at.rows, index)
    output_rows = at.rows[inside]
    # members ascend, so this is the row's place among them.
    places = torch.searchsorted(index, output_rows)
    outputs = starts[places] + at.positions[inside]
    # Nobody reads the target behind a row's last token (rewards, values): any one will do.
    targets = tokens[(outputs + 1).clamp(max=num_positions - 1)]
    if not outputs.numel():
        outputs = targets = torch.zeros(1, dtype=torch.int64)

    def move(x: Tensor) -> Tensor:
        return x.to(mesh.device)

    return MicroBatch(
        tokens=move(tokens[None]),
        positions=move(positions[None]),
        # Rows that are cut to nothing are rows of the loss, but none of the attention.
        packing=Packing(tuple(n for n in lengths.tolist() if n)),
        row_index=move(index),
        output_index=move(outputs),
        targets=move(targets),
        output_rows=move(output_rows),
        output_places=move(places),
        output_columns=move(at.columns[inside]),
    )


def in_row_order(pieces: list[Tensor], micro_batches: list[MicroBatch]) -> Tensor:
    """Puts what was made of each micro-batch's rows, ``[b, ...]``, into the batch's order."""
    order = torch.cat([micro_batch.row_index for micro_batch in micro_batches])
    joined = torch.cat(pieces)
    return torch.empty_like(joined).index_copy(0, order, joined)
