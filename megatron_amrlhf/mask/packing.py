"""Bit-packed masks, so that sending one costs R / 8 bytes a row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pack_bits(mask: Tensor) -> Tensor:
    """Packs 8 positions a byte, position j in bit ``j % 8`` of byte ``j // 8``.

    Args:
        mask: ``[B, R]`` bool.

    Returns:
        ``[B, ceil(R / 8)]`` uint8; the unused high bits of the last byte are 0.
    """
    assert mask.dtype == torch.bool and mask.dim() == 2, (mask.dtype, mask.shape)
    num_rows, width = mask.shape
    num_bytes = (width + 7) // 8
    bits = F.pad(mask.to(torch.uint8), (0, num_bytes * 8 - width)).view(num_rows, num_bytes, 8)
    # The 8 bits of a byte are at different places, so their sum is their union: at most 255.
    return (bits << _bit_positions(mask.device)).sum(dim=2, dtype=torch.uint8)


def unpack_bits(packed: Tensor, width: int) -> Tensor:
    """The mask that ``pack_bits`` packed.

    Args:
        packed: ``[B, ceil(width / 8)]`` uint8.
        width: R of the mask.

    Returns:
        ``[B, R]`` bool.
    """
    assert packed.dtype == torch.uint8, packed.dtype
    num_rows, num_bytes = packed.shape
    assert num_bytes == (width + 7) // 8, (packed.shape, width)
    bits = (packed[:, :, None] >> _bit_positions(packed.device)) & 1
    return bits.view(num_rows, num_bytes * 8)[:, :width].bool()


def _bit_positions(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)
