"""Moments and whitening over valid tokens, global over a data-parallel group (eq. 11).

All sums are float64: a mean rounded to float32 at the end does then not depend on how the rows
lie on the ranks, and the mean of equal numbers is exactly that number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# A variance below this share of the mean square is the rounding noise of constant data.
RELATIVE_ZERO_VARIANCE = 1e-13
# Rewards of answers that differ by less than this share of their size are equal up to rounding.
RELATIVE_TIE = 1e-6


@dataclass(frozen=True)
class Moments:
    """Moments of a masked tensor, 0-dim float64 tensors on its device; all 0 if nothing is valid.

    Attributes:
        mean: arithmetic mean.
        std: population standard deviation (divided by the count); exactly 0 for constant data.
        count: number of valid entries.
    """

    mean: Tensor
    std: Tensor
    count: Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is where it already has that precision or more."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def masked_moments(x: Tensor, valid: Tensor, group: ProcessGroup | None = None) -> Moments:
    """Mean and standard deviation of ``x`` where ``valid``, over all ranks of ``group``.

    One all-reduce of (sum, sum of squares, count). A rank without valid entries contributes zeros
    and must still call.

    Args:
        x: any shape, floating; what stands outside ``valid`` is never read.
        valid: bool, the shape of ``x``.
        group: data-parallel group; None: this process only.

    Returns:
        The moments, equal on all ranks of the group.
    """
    assert x.shape == valid.shape, (x.shape, valid.shape)
    # A failed reward is NaN outside `valid`: chosen away, since NaN times 0 is NaN.
    entries = torch.where(valid, x.detach().double(), 0.0)
    sums = torch.stack([entries.sum(), entries.square().sum(), valid.sum().double()])
    if group is not None:
        dist.all_reduce(sums, group=group)
    total, total_square, count = sums.unbind()
    denominator = count.clamp(min=1.0)
    mean, mean_square = total / denominator, total_square / denominator
    # From sums, so that one all-reduce will do; what cancels here is cut off below.
    variance = mean_square - mean.square()
    # A NaN compares False here and so stays visible in the result.
    is_constant = variance <= RELATIVE_ZERO_VARIANCE * mean_square
    return Moments(mean, torch.where(is_constant, 0.0, variance).sqrt(), count)


def whiten(
    x: Tensor, valid: Tensor, group: ProcessGroup | None = None, shift_mean: bool = True
) -> Tensor:
    """Zero mean and unit variance over the valid entries of all ranks of ``group`` (eq. 11).

    Args:
        x: any shape, floating.
        valid: bool, the shape of ``x``.
        group: data-parallel group; None: this process only. Enters one all-reduce.
        shift_mean: False scales the deviations but keeps the mean where it was.

    Returns:
        The shape of ``x``, float32 or better, detached; 0 outside ``valid``. Data without variance
        (one token, all equal) give 0, or the mean with ``shift_mean=False``.
    """
    moments = masked_moments(x, valid, group)
    scale = torch.where(moments.std == 0, 0.0, 1.0 / moments.std)
    whitened = (x.detach().double() - moments.mean) * scale
    if not shift_mean:
        whitened = whitened + moments.mean
    whitened = torch.where(moments.std == 0, 0.0 if shift_mean else moments.mean, whitened)
    return torch.where(valid, whitened, 0.0).to(at_least_float32(x).dtype)


def is_above(x: Tensor, y: Tensor) -> Tensor:
    """``x > y`` for rewards of answers (broadcast), where rounding makes no difference."""
    return x - y > RELATIVE_TIE * torch.maximum(x.abs(), y.abs())


def row_means(x: Tensor, valid: Tensor) -> Tensor:
    """Mean of each row's valid entries, ``[B, R]`` to ``[B]`` float64; 0 for an empty row."""
    sums_B = torch.where(valid, x.detach().double(), 0.0).sum(dim=1)
    return sums_B / valid.sum(dim=1).clamp(min=1)


def group_means(x: Tensor, valid: Tensor, group_ids: Tensor) -> Tensor:
    """Mean over the valid entries of all rows with the same group id, given to each of the rows.

    The rows of a group must lie on one rank: nothing is reduced over ranks.

    Args:
        x: ``[B, R]``, floating.
        valid: ``[B, R]`` bool.
        group_ids: ``[B]`` int64, any values.

    Returns:
        ``[B]`` float64; 0 where a whole group is empty.
    """
    # Ids are global and start anywhere: places among the groups of this rank instead.
    _, index_B = torch.unique(group_ids.to(x.device), return_inverse=True)
    entries = torch.where(valid, x.detach().double(), 0.0)
    zeros = torch.zeros(group_ids.shape[0], dtype=torch.float64, device=x.device)
    sums = zeros.index_add(0, index_B, entries.sum(dim=1))
    counts = zeros.index_add(0, index_B, valid.sum(dim=1).double())
    return (sums / counts.clamp(min=1.0))[index_B]
