"""Training of an outcome reward model: Bradley-Terry on pairs, eq. 1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_amrlhf.losses.reduce import LossOutput, metric


def orm_loss(chosen_rewards: Tensor, rejected_rewards: Tensor) -> LossOutput:
    """``-log sigmoid(r_w - r_l)`` of each pair.

    Metrics over pairs: ``orm/margin``, r_w - r_l; ``orm/accuracy``, see ``pair_accuracy``.

    Args:
        chosen_rewards: ``[P]`` reward of the preferred answers, differentiable.
        rejected_rewards: ``[P]``, of the others.

    Returns:
        Terms ``[P, 1]``; the caller divides by the global number of pairs.
    """
    margin_P = chosen_rewards - rejected_rewards
    every_P = torch.ones_like(margin_P, dtype=torch.bool)
    metrics = {
        "orm/accuracy": metric(pair_accuracy(margin_P), every_P),
        "orm/margin": metric(margin_P, every_P),
    }
    return LossOutput(-F.logsigmoid(margin_P)[:, None], metrics)


def pair_accuracy(margins: Tensor) -> Tensor:
    """1 where the preferred answer has more reward, 0 where less; a tie is a coin flip, 0.5."""
    return 0.5 * (1 + torch.sign(margins.detach()))
