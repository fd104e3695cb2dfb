"""The mask leaves the last stage: bit-packed, broadcast, the same bits on every rank."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_amrlhf.algorithms.context import Context
from megatron_amrlhf.mask.packing import pack_bits, unpack_bits
from megatron_amrlhf.parallel.collectives import broadcast_from_last_stage
from megatron_amrlhf.types import MaskedBatch, RolloutBatch


def share_mask(
    context: Context, rollout: RolloutBatch, mask: Tensor | None, chosen: Tensor | None
) -> MaskedBatch:
    """Broadcasts the last stage's mask and labels to the replica. Entered by every rank.

    Args:
        context: the run.
        rollout: the answers, known to every rank.
        mask: ``[B, R]`` bool on the last stage, None elsewhere.
        chosen: ``[B]`` bool on the last stage, None elsewhere.

    Returns:
        The answers with mask and labels, on the compute device.
    """
    device, (rows, width) = context.mesh.device, rollout.response_mask.shape
    packed = torch.zeros(rows, -(-width // 8) + 1, dtype=torch.uint8, device=device)
    if mask is not None and chosen is not None:
        packed[:, 0] = chosen
        packed[:, 1:] = pack_bits(mask)
    broadcast_from_last_stage(packed, context.mesh)
    return MaskedBatch(
        rollout=rollout, mask=unpack_bits(packed[:, 1:], width), chosen=packed[:, 0].bool()
    )


def share_index(context: Context, index: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """Broadcasts which answers the last stage picked; int64 on CPU. Entered by every rank."""
    buffer = torch.zeros(shape, dtype=torch.int64, device=context.mesh.device)
    if index is not None:
        buffer.copy_(index)
    return broadcast_from_last_stage(buffer, context.mesh).cpu()
