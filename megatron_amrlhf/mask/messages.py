"""Messages: maximal runs of tokens of one sign, and the reward that a unit's tokens share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def message_ids(signs: Tensor, valid: Tensor) -> Tensor:
    """Numbers the maximal runs of equal sign in each row, neutral runs (sign 0) as well.

    So every token has a unit to share a reward with; ``message_counts`` leaves neutral runs out.

    Args:
        signs: ``[B, R]`` int8 of ``schmitt.signs``.
        valid: ``[B, R]`` bool; a gap in it ends a run.

    Returns:
        ``[B, R]`` int64, 0-based in each row, -1 outside ``valid``.
    """
    # Column 0 has nothing before it: a valid token there always starts a run.
    starts_BR = valid.clone()
    starts_BR[:, 1:] &= (signs[:, 1:] != signs[:, :-1]) | ~valid[:, :-1]
    return torch.where(valid, starts_BR.long().cumsum(dim=1) - 1, -1)


def message_counts(message_ids: Tensor, signs: Tensor) -> Tensor:
    """Number of messages, runs of good or of bad tokens, in each row.

    Args:
        message_ids: ``[B, R]`` int64 of ``message_ids``.
        signs: ``[B, R]`` int8 that it was given.

    Returns:
        ``[B]`` int64. With ``hold`` never more than with ``drop`` or with ``delta`` 0.
    """
    # -1 is no message, so that one that starts in column 0 differs from what is before it.
    before_BR = F.pad(message_ids, (1, 0), value=-1)[:, :-1]
    return ((message_ids != before_BR) & (message_ids >= 0) & (signs != 0)).sum(dim=1)


def unit_rewards(rewards: Tensor, unit_ids: Tensor, valid: Tensor, kind: str) -> Tensor:
    """Gives every token the reward r_k of the unit it is in, eq. 12.

    A unit may be a message (``message_ids``), a step, or the whole sequence (all ids 0).

    Args:
        rewards: ``[B, R]`` token rewards; not read outside ``valid``.
        unit_ids: ``[B, R]`` int64 in [0, R) where valid, numbered in each row on its own.
        valid: ``[B, R]`` bool.
        kind: ``mean`` of the unit's tokens or its ``last`` token's reward.

    Returns:
        ``[B, R]`` in the dtype of ``rewards`` (at least float32), 0 outside ``valid``.

    Raises:
        ValueError: unknown kind.
    """
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    rewards_BR = torch.where(valid, rewards.detach().to(dtype), 0.0)
    # Scattering needs ids in range: invalid tokens go to unit 0, and change nothing there.
    ids_BR = torch.where(valid, unit_ids, 0)
    if kind == "mean":
        # In float64 the mean of equal rewards is exactly that reward.
        zeros = torch.zeros_like(rewards_BR, dtype=torch.float64)
        sums = zeros.scatter_add(1, ids_BR, rewards_BR.double())
        counts = zeros.scatter_add(1, ids_BR, valid.double())
        units = (sums / counts.clamp(min=1.0)).to(dtype)
    elif kind == "last":
        positions_R = torch.arange(rewards.shape[1], device=rewards.device)
        positions_BR = torch.where(valid, positions_R, -1)
        last = torch.full_like(ids_BR, -1).scatter_reduce(1, ids_BR, positions_BR, "amax")
        # -1 is left where no unit has that number; no token gathers it below.
        units = rewards_BR.gather(1, last.clamp(min=0))
    else:
        raise ValueError(f"unknown unit reward {kind!r}")
    return torch.where(valid, units.gather(1, ids_BR), 0.0)
