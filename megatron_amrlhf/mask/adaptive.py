"""The adaptive mask of eq. 13, and who is chosen where the data have no pairs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_amrlhf.mask.statistics import (
    at_least_float32,
    group_means,
    is_above,
    masked_moments,
)


def adaptive_mask(signs: Tensor, chosen: Tensor, valid: Tensor) -> Tensor:
    """Chosen answers keep their good tokens, rejected ones their bad tokens, eq. 13.

    Args:
        signs: ``[B, R]`` int8 of ``schmitt.signs``.
        chosen: ``[B]`` bool, True for Y_c, False for Y_r.
        valid: ``[B, R]`` bool, tokens that the policy sampled; only these can be kept.

    Returns:
        ``[B, R]`` bool.
    """
    # [B, 1]: +1 for Y_c, -1 for Y_r. A neutral token's 0 is wanted by neither.
    wanted_B1 = chosen.to(torch.int8)[:, None] * 2 - 1
    return (signs == wanted_B1) & valid


def chosen_labels(
    sequence_reward: Tensor,
    kind: str,
    group_ids: Tensor | None = None,
    *,
    values: Tensor | None = None,
    group: ProcessGroup | None = None,
    has_reward: Tensor | None = None,
) -> Tensor:
    """An answer is chosen iff its reward is above its baseline; a tie (up to rounding) is rejected.

    So an answer alone in its group, and a group of equal rewards, are rejected.

    Args:
        sequence_reward: ``[B]`` reward (or advantage) of each answer.
        kind: baseline: ``batch`` (mean over all ranks of ``group``, one all-reduce), ``group``
            (mean over the answers to one prompt, which lie on one rank) or ``value`` (``values``).
        group_ids: ``[B]`` int64, needed by ``group``.
        values: ``[B]`` critic's value of each prompt, needed by ``value``.
        group: data-parallel group; None: this process only.
        has_reward: ``[B]`` bool, answers that have a reward; the others are in no mean, and are
            rejected. None: all.

    Returns:
        ``[B]`` bool.

    Raises:
        ValueError: unknown kind.
    """
    rewards_B = at_least_float32(sequence_reward)
    has_reward_B = (
        torch.ones_like(rewards_B, dtype=torch.bool) if has_reward is None else has_reward
    )
    if kind == "batch":
        baseline = masked_moments(rewards_B, has_reward_B, group).mean
    elif kind == "group":
        assert group_ids is not None, "label 'group' needs group_ids"
        baseline = group_means(rewards_B[:, None], has_reward_B[:, None], group_ids)
    elif kind == "value":
        assert values is not None, "label 'value' needs values"
        baseline = values
    else:
        raise ValueError(f"unknown label {kind!r}")
    return is_above(rewards_B.double(), baseline.double()) & has_reward_B
