"""Rows of an optimizer step spread over the data-parallel replicas by their tokens."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megatron_amrlhf.engine.microbatch import OutputPlaces
from megatron_amrlhf.engine.packing import spread_rows
from megatron_amrlhf.losses.targets import Targets
from megatron_amrlhf.parallel.collectives import gather_objects
from megatron_amrlhf.parallel.mesh import Mesh
from megatron_amrlhf.types import TrainBatch

TOLERATED = 1.05  # tokens of the fullest replica over their mean, below which rows stay


def balance(
    batch: TrainBatch, at: OutputPlaces, together: int, mesh: Mesh
) -> tuple[TrainBatch, OutputPlaces]:
    """Gives every replica nearly as many tokens. Entered by every rank.

    A loss is a sum of its rows' terms over a global count, so it does not matter where a row is.
    The rows travel whole, with their targets; the cut is the same on every rank.

    Args:
        batch: this replica's rows.
        at: its outputs.
        together: this many consecutive rows (a pair) stay on one replica.
        mesh: the mesh.

    Returns:
        The rows that this replica has now, and their outputs.
    """
    if mesh.dp_size == 1:
        return batch, at
    own = [row.numel() for row in batch.rows]
    everyone = gather_objects(own, mesh.dp_group)
    loads = [sum(lengths) for lengths in everyone]
    # All replicas have the same lengths before them, so all stay or all send.
    if max(loads) * mesh.dp_size <= sum(loads) * TOLERATED:
        return batch, at
    lengths = [length for part in everyone for length in part]
    members = spread_rows(lengths, together, mesh.dp_size)[mesh.dp_rank]
    # Pickled on a GPU, a tensor would come up again on its sender's device.
    targets = batch.targets.each(Tensor.cpu) if batch.targets else None
    sent = (replace(batch, targets=targets), at)
    parts = gather_objects(sent, mesh.dp_group)
    return _join(parts, members, mesh)


def _join(
    parts: list[tuple[TrainBatch, OutputPlaces]], members: list[int], mesh: Mesh
) -> tuple[TrainBatch, OutputPlaces]:
    """The rows ``members`` of all replicas' batches one after the other."""
    batches, places = zip(*parts, strict=True)
    width = max(at.width for at in places)
    targets = [batch.targets for batch in batches if batch.targets is not None]
    joined = Targets.join(targets).each(lambda x: x.to(mesh.device)) if targets else None
    everything = TrainBatch(
        rows=tuple(row for batch in batches for row in batch.rows),
        prompt_lengths=torch.cat([batch.prompt_lengths for batch in batches]),
        targets=joined,
        ids=torch.cat([batch.ids for batch in batches]),
        kept_lengths=torch.cat([batch.kept_lengths for batch in batches]),
    )
    index = torch.tensor(members, dtype=torch.int64)
    starts = torch.tensor([0, *(len(batch.rows) for batch in batches)]).cumsum(0)
    # starts has one more than there are parts: where a next one would begin.
    rows = torch.cat([at.rows + start for at, start in zip(places, starts, strict=False)])
    inside = torch.isin(rows, index)
    positions, columns = (
        torch.cat([getattr(at, name) for at in places])[inside] for name in ("positions", "columns")
    )
    # members ascend, as outputs do by row, so this is each row's place among them.
    here = OutputPlaces(torch.searchsorted(index, rows[inside]), positions, columns, width)
    return everything.select(index), here
