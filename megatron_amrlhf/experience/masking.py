"""The mask leaves the last stage: bit-packed, broadcast, the same bits on every rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_amrlhf.experience.context import Context
from megatron_amrlhf.mask.packing import pack_bits, unpack_bits
from megatron_amrlhf.parallel.collectives import broadcast_from_last_stage
from megatron_amrlhf.types import MaskedBatch, RolloutBatch


@dataclass(frozen=True)
class Picked:
    """The answers that a last stage has picked to learn from, and what is read of them.

    Attributes:
        rows: ``[S]`` int64 on any device, which answers.
        mask: ``[S, R]`` bool, the tokens that the loss reads; R is that of all answers.
        chosen: ``[S]`` bool, the preferred ones.
        has_reward: ``[S]`` bool, those whose reward did not fail.
    """

    rows: Tensor
    mask: Tensor
    chosen: Tensor
    has_reward: Tensor


def broadcast_mask(context: Context, answers: RolloutBatch, picked: Picked | None) -> MaskedBatch:
    """Broadcasts the last stage's mask and labels to the replica. Entered by every rank.

    Args:
        context: the run.
        answers: the picked ones, known to every rank; they may be shorter than all answers.
        picked: on the last stage, None elsewhere.

    Returns:
        The answers with mask and labels, on the compute device.
    """
    device, (rows, width) = context.mesh.device, answers.response_mask.shape
    # A byte for each label and a bit for each token: one broadcast of R / 8 + 2 bytes a row.
    packed = torch.zeros(rows, -(-width // 8) + 2, dtype=torch.uint8, device=device)
    if picked is not None:
        packed[:, 0], packed[:, 1] = picked.chosen, picked.has_reward
        # Behind `width` there is only padding of the picked answers.
        packed[:, 2:] = pack_bits(picked.mask[:, :width])
    broadcast_from_last_stage(packed, context.mesh)
    return MaskedBatch(
        rollout=answers,
        mask=unpack_bits(packed[:, 2:], width),
        chosen=packed[:, 0].bool(),
        has_reward=packed[:, 1].bool(),
    )


def broadcast_rows(context: Context, picked: Picked | None) -> Tensor:
    """Broadcasts which answers the last stage picked; int64 on CPU. Entered by every rank.

    Replicas may pick different numbers of answers, none too.

    Args:
        context: the run.
        picked: on the last stage, None elsewhere.
    """
    device = context.mesh.device
    # First how many: who has not picked must make room for the broadcast.
    count = torch.tensor([0 if picked is None else picked.rows.numel()], device=device)
    broadcast_from_last_stage(count, context.mesh)
    rows = torch.zeros(int(count), dtype=torch.int64, device=device)
    if picked is not None:
        rows.copy_(picked.rows)
    # The count is the same on the whole replica by now, so all enter or none.
    if rows.numel():
        broadcast_from_last_stage(rows, context.mesh)
    return rows.cpu()
