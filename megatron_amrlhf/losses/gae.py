"""Temporal-difference errors and generalised advantage estimation (Schulman et al., 2015).

Index j of a row is its j-th response token (legend in types.py): ``values[:, j]`` is the value of
the state before it, ``rewards[:, j]`` comes after it. So ``values[:, j + 1]`` is the next state's.
"""

from __future__ import annotations

import torch
from torch import Tensor


def td_errors(
    rewards: Tensor,
    values: Tensor,
    valid: Tensor,
    gamma: float,
    bootstrap_values: Tensor | None = None,
) -> Tensor:
    """``r_t + gamma V_{t+1} - V_t``, the signal ``td_error``.

    Args:
        rewards: ``[B, R]`` reward units; not read outside ``valid``, as ``values``.
        values: ``[B, R]`` critic's values, reward units.
        valid: ``[B, R]`` bool, responses left-aligned without gaps.
        gamma: discount in [0, 1].
        bootstrap_values: ``[B]`` value of the state after the last token, for answers that were
            truncated; None or 0: the answer ended there.

    Returns:
        ``[B, R]`` float32 (float64 if given that), detached, 0 outside ``valid``.
    """
    assert rewards.shape == values.shape == valid.shape, (rewards.shape, values.shape, valid.shape)
    # In a row with a gap the next column would not be the next state.
    assert bool((valid[:, 1:] <= valid[:, :-1]).all()), "responses must be left-aligned"
    # In bfloat16 the difference of two neighbouring values would be mostly rounding.
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    rewards_BR = torch.where(valid, rewards.detach().to(dtype), 0.0)
    values_BR = torch.where(valid, values.detach().to(dtype), 0.0)
    after_B1 = values_BR.new_zeros(values_BR.shape[0], 1)
    next_values_BR = torch.cat([values_BR, after_B1], dim=1)[:, 1:]
    if bootstrap_values is not None:
        # Of an answer's last token: its next state is the only one that no column holds.
        is_last_BR = valid & ~torch.cat([valid, torch.zeros_like(valid[:, :1])], dim=1)[:, 1:]
        after_B1 = bootstrap_values.detach().to(dtype)[:, None]
        next_values_BR = torch.where(is_last_BR, after_B1, next_values_BR)
    return torch.where(valid, rewards_BR + gamma * next_values_BR - values_BR, 0.0)


def gae(
    rewards: Tensor,
    values: Tensor,
    valid: Tensor,
    gamma: float,
    lam: float,
    *,
    bootstrap_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages ``A_t = sum_k (gamma lam)^k delta_{t+k}`` and returns ``A_t + V_t``.

    Args:
        rewards: ``[B, R]``, as the others, see ``td_errors``.
        values: ``[B, R]``.
        valid: ``[B, R]`` bool, responses left-aligned without gaps.
        gamma: discount in [0, 1].
        lam: lambda in [0, 1].
        bootstrap_values: ``[B]``, see ``td_errors``.

    Returns:
        Advantages and returns, ``[B, R]`` float32 (float64 if given that), detached, not whitened,
        0 outside ``valid``.
    """
    errors_BR = td_errors(rewards, values, valid, gamma, bootstrap_values)
    advantages_BR = discounted_suffix_sums(errors_BR, gamma * lam)
    # A + V is in reward units, as the critic is, only as long as A is not whitened.
    returns_BR = torch.where(valid, advantages_BR + values.detach().to(errors_BR.dtype), 0.0)
    return torch.where(valid, advantages_BR, 0.0), returns_BR


def discounted_suffix_sums(x: Tensor, decay: float) -> Tensor:
    """``y_j = sum_{k >= 0} decay^k x_{j+k}`` along the last axis, in log2(R) vectorised passes.

    After a pass each entry covers twice as many terms: those from j and those from j + span.

    Args:
        x: ``[B, R]``, 0 behind the end of each row.
        decay: in [0, 1].
    """
    # At the head of the loop x_j holds the terms j to j + span - 1, and decay is per span.
    span = 1
    while span < x.shape[1]:
        # The last span entries have no terms behind what they hold: they are complete.
        x = torch.cat([x[:, :-span] + decay * x[:, span:], x[:, -span:]], dim=1)
        decay, span = decay * decay, span * 2
    return x
