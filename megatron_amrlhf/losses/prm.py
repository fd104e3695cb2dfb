"""Training of the process reward model (appendix A): labels at the ends of steps."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from megatron_amrlhf.losses.reduce import LossOutput, masked, metric


def prm_loss(outputs: Tensor, targets: Tensor, mask: Tensor, kind: str) -> LossOutput:
    """Binary cross-entropy or squared error at each labelled position, mean over the attributes.

    Metrics over labelled positions and attributes: ``prm/accuracy`` (``bce``), share where
    ``output > 0`` agrees with ``target >= 0.5``; ``prm/absolute_error`` (``mse``).

    Args:
        outputs: ``[B, T, D]`` of the head, differentiable: logits for ``bce``, values for ``mse``.
        targets: ``[B, T, D]``: probabilities in [0, 1] for ``bce``; not read outside ``mask``.
        mask: ``[B, T]`` bool, labelled positions.
        kind: ``bce`` or ``mse``.

    Returns:
        Terms ``[B, T]``; the caller divides by the global number of labelled positions.

    Raises:
        ValueError: unknown kind.
    """
    mask_BTD = mask[:, :, None].expand_as(outputs)
    outputs, targets = masked(outputs, mask_BTD), masked(targets.detach(), mask_BTD)
    if kind == "bce":
        terms_BTD = F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
        agrees = ((outputs > 0) == (targets >= 0.5)).float()
        metrics = {"prm/accuracy": metric(agrees, mask_BTD)}
    elif kind == "mse":
        terms_BTD = (outputs - targets).square()
        metrics = {"prm/absolute_error": metric((outputs - targets).abs(), mask_BTD)}
    else:
        raise ValueError(f"unknown PRM loss {kind!r}")
    return LossOutput(masked(terms_BTD.mean(dim=2), mask), metrics)
