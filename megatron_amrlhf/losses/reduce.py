"""What a loss returns, and the only place that divides by counts.

Losses are pure functions that return one term a token (or a row, or a pair). The count to divide by
is global: over all micro-batches of the optimizer step and all data-parallel ranks. So a loss does
not depend on how rows are laid out over ranks and micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

Metrics = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class LossOutput:
    """A loss before any division.

    Attributes:
        terms: ``[B, R]`` a token, or ``[B, 1]`` a row or pair; differentiable, float32 or better,
            exactly 0 (with exactly zero gradient) where the loss reads nothing.
        metrics: name to (sum, count), detached 0-dim float64; a mean is made by
            ``finish_metrics``. The keys do not depend on the data: an empty batch has them too.
    """

    terms: Tensor
    metrics: Metrics


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` (at least float32) where ``mask``, else 0 with zero gradient, even if inf or nan."""
    assert x.shape == mask.shape, (x.shape, mask.shape)
    # Not x * mask: 0 times inf is nan, in the value and in the gradient.
    return torch.where(mask, x.to(torch.promote_types(x.dtype, torch.float32)), 0.0)


def metric(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(sum, count) of ``x`` where ``mask``: detached 0-dim float64."""
    # float64: micro-batches and ranks may add it up in any order.
    return masked(x.detach(), mask).double().sum(), mask.sum().double()


def denominator_mask(valid: Tensor, mask: Tensor, kind: str) -> Tensor:
    """The tokens that ``loss.denominator`` counts.

    Args:
        valid: ``[B, R]`` bool, all response tokens.
        mask: ``[B, R]`` bool, kept tokens.
        kind: ``response`` (``valid``, as the expectation of eq. 14) or ``kept`` (``mask``).

    Raises:
        ValueError: unknown kind.
    """
    if kind not in ("response", "kept"):
        raise ValueError(f"unknown denominator {kind!r}")
    return valid if kind == "response" else mask


def global_count(mask: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Number of True entries over all ranks of ``group``, at least 1; 0-dim float32.

    Args:
        mask: bool, any shape, empty too: of all rows of this rank's optimizer step. For losses of
            rows or pairs: ones.
        group: data-parallel group; None: this process only. Enters one all-reduce.
    """
    return divisor(global_sum(mask, group))


def global_sum(mask: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """As ``global_count``, but 0 where there is none, and 0-dim float64."""
    count = mask.sum().double()
    if group is not None:
        dist.all_reduce(count, group=group)
    return count


def divisor(count: Tensor) -> Tensor:
    """What a loss over so many entries is divided by: at least 1; float32."""
    return count.clamp(min=1.0).float()


def row_weights(counted: Tensor) -> Tensor:
    """``[B, 1]`` float32: 1 / number of counted tokens of each row, 1 for a row without any.

    Times a loss's terms it makes a row's sum its mean, so that a mean over rows can follow.

    Args:
        counted: ``[B, R]`` bool, of ``denominator_mask``.
    """
    return 1.0 / counted.sum(dim=1, keepdim=True).clamp(min=1)


def kl_scale(
    counted: Tensor, valid: Tensor, by_row: bool, group: ProcessGroup | None = None
) -> Tensor:
    """``[B, 1]`` float32: times a token's KL in the loss it makes the KL's mean one over ``valid``.

    What a loss divides by counts the tokens that its mask keeps, maybe none; the KL is over the
    whole answer and has to weigh the same whatever the mask keeps.

    Args:
        counted: ``[B, R]`` bool, tokens that the loss divides by: all rows of the optimizer step.
        valid: ``[B, R]`` bool, response tokens.
        by_row: the loss divides each row by its own count, as ``row_weights``; else by the global.
        group: data-parallel group; None: this process only. Enters two all-reduces unless by row.
    """
    if by_row:
        # The loss multiplies the row by row_weights(counted), which this takes back.
        return row_weights(valid) / row_weights(counted)
    # The loss divides by the first count, which this takes back.
    ratio = global_count(counted, group) / global_count(valid, group)
    return ratio.expand(len(valid), 1)


def global_mean(x: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Mean of all entries over all ranks of ``group``, in the dtype of ``x``; 0 of no entries.

    Args:
        x: detached, any shape, empty too.
        group: data-parallel group; None: this process only. Enters one all-reduce.
    """
    # Sum and count together: a mean of the ranks' means would weigh them alike.
    sums = torch.zeros(2, dtype=torch.float64, device=x.device)
    sums[0], sums[1] = x.double().sum(), x.numel()
    if group is not None:
        dist.all_reduce(sums, group=group)
    return (sums[0] / sums[1].clamp(min=1.0)).to(x.dtype)


def scale_for_engine(terms_sum: Tensor, global_count: Tensor, data_parallel_size: int) -> Tensor:
    """The scalar to call backward on: sum / global count * DP.

    ZeRO averages gradients over the data-parallel ranks, so the factor makes the gradient that of
    the global sum over the global count. Nothing else may scale the loss: not mcore's number of
    micro-batches, not DeepSpeed's accumulation steps.

    Args:
        terms_sum: 0-dim, ``LossOutput.terms`` of one micro-batch summed up.
        global_count: 0-dim, of the whole optimizer step.
        data_parallel_size: ranks that ZeRO averages over.
    """
    return terms_sum / global_count * data_parallel_size


def merge_metrics(metrics: Iterable[Metrics]) -> Metrics:
    """Adds up sums and counts of micro-batches; a key that one of them lacks counts as zero."""
    merged: Metrics = {}
    for one in metrics:
        for key, (total, count) in one.items():
            if key in merged:
                total, count = merged[key][0] + total, merged[key][1] + count
            merged[key] = (total, count)
    return merged


def finish_metrics(
    merged: Metrics,
    group: ProcessGroup | None = None,
    keys: Sequence[str] | None = None,
    device: torch.device | str | None = None,
) -> dict[str, float]:
    """Means over all ranks of ``group``: global sum / global count, by one all-reduce.

    Args:
        merged: from ``merge_metrics``. Keys must be the same on all ranks, in any order.
        group: data-parallel group; None: this process only.
        keys: all keys of the step, for ranks that ran no micro-batch: what ``merged`` lacks
            contributes zeros. None: those of ``merged``.
        device: where to reduce, that of ``group``'s backend; None: CPU.

    Returns:
        A float a key, sorted by key; nan where the global count is 0 (nothing was measured).
    """
    # Sorted: the all-reduce adds by place, and ranks may have met the keys in any order.
    names = sorted(merged if keys is None else keys)
    assert set(merged) <= set(names), (sorted(merged), names)
    sums = torch.zeros(len(names), 2, dtype=torch.float64, device=device)
    for row, name in enumerate(names):
        if name in merged:
            total, count = merged[name]  # either may be a plain number's tensor on the CPU
            sums[row, 0], sums[row, 1] = total, count
    if group is not None:
        dist.all_reduce(sums, group=group)
    return {
        name: total / count if count > 0 else math.nan
        for name, (total, count) in zip(names, sums.tolist(), strict=True)
    }
