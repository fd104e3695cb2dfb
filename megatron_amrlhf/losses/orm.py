"""Training of an outcome reward model: Bradley-Terry on pairs, eq. 1."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_amrlhf.losses.reduce import LossOutput, metric
from megatron_amrlhf.losses.targets import Targets
from megatron_amrlhf.mask.statistics import RELATIVE_TIE


def orm_loss(rewards: Tensor, targets: Targets) -> LossOutput:
    """``-log sigmoid(r_w - r_l)`` of each pair.

    Metrics over pairs: ``orm/margin``, r_w - r_l; ``orm/accuracy``, see ``pair_accuracy``.

    Args:
        rewards: ``[2 P, 1]`` of preferred and other answers in turn, differentiable.
        targets: of the same rows; the denominator is ``[2 P, 1]``, True for each first one. The
            pairs themselves are the label.

    Returns:
        Terms ``[P, 1]``; the caller divides by the global number of pairs.
    """
    chosen_P, rejected_P = rewards[0::2, 0], rewards[1::2, 0]
    margin_P = chosen_P - rejected_P
    every_P = torch.ones_like(margin_P, dtype=torch.bool)
    accuracy_P = pair_accuracy(margin_P, larger_size(chosen_P, rejected_P))
    metrics = {
        "orm/accuracy": metric(accuracy_P, every_P),
        "orm/margin": metric(margin_P, every_P),
    }
    return LossOutput(-F.logsigmoid(margin_P)[:, None], metrics)


def pair_accuracy(margins: Tensor, sizes: Tensor) -> Tensor:
    """1 where the preferred answer is ahead, 0 where it is behind; a tie is a coin flip, 0.5.

    Args:
        margins: ``[P]`` by how much it is ahead.
        sizes: ``[P]`` absolute sum of the terms that each margin is made of: what is less than
            ``RELATIVE_TIE`` of it is their rounding, and a tie.
    """
    margins = margins.detach()
    is_tied = margins.abs() <= RELATIVE_TIE * sizes.detach()
    return 0.5 * (1 + torch.sign(margins.masked_fill(is_tied, 0.0)))


def larger_size(x: Tensor, y: Tensor) -> Tensor:
    """The larger one of ``|x|`` and ``|y|``: the size of two rewards' difference."""
    return torch.maximum(x.abs(), y.abs())
