"""The mask leaves the last stage: bit-packed, broadcast, the same bits on every rank."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_amrlhf.experience.context import Context
from megatron_amrlhf.mask.packing import pack_bits, unpack_bits
from megatron_amrlhf.parallel.collectives import broadcast_from_last_stage
from megatron_amrlhf.types import MaskedBatch, RolloutBatch


def share_mask(
    context: Context,
    rollout: RolloutBatch,
    mask: Tensor | None,
    chosen: Tensor | None,
    judged: Tensor | None,
) -> MaskedBatch:
    """Broadcasts the last stage's mask and labels to the replica. Entered by every rank.

    Args:
        context: the run.
        rollout: the answers, known to every rank.
        mask: ``[B, R']`` bool on the last stage, None elsewhere; R' is R or more, for answers
            that were selected from longer ones.
        chosen: ``[B]`` bool on the last stage, None elsewhere.
        judged: ``[B]`` bool on the last stage, None elsewhere: not the failed ones.

    Returns:
        The answers with mask and labels, on the compute device.
    """
    device, (rows, width) = context.mesh.device, rollout.response_mask.shape
    packed = torch.zeros(rows, -(-width // 8) + 2, dtype=torch.uint8, device=device)
    if mask is not None and chosen is not None and judged is not None:
        packed[:, 0], packed[:, 1] = chosen, judged
        packed[:, 2:] = pack_bits(mask[:, :width])
    broadcast_from_last_stage(packed, context.mesh)
    return MaskedBatch(
        rollout=rollout,
        mask=unpack_bits(packed[:, 2:], width),
        chosen=packed[:, 0].bool(),
        judged=packed[:, 1].bool(),
    )


def share_index(context: Context, index: Tensor | None) -> Tensor:
    """Broadcasts which answers the last stage picked; int64 on CPU. Entered by every rank.

    Replicas may pick different numbers of answers, none too.

    Args:
        context: the run.
        index: 1-D on the last stage, None elsewhere.
    """
    device = context.mesh.device
    count = torch.tensor([0 if index is None else index.numel()], device=device)
    broadcast_from_last_stage(count, context.mesh)
    picked = torch.zeros(int(count), dtype=torch.int64, device=device)
    if index is not None:
        picked.copy_(index)
    if picked.numel():
        broadcast_from_last_stage(picked, context.mesh)
    return picked.cpu()
