"""Training of the process reward model (appendix A): labels at the ends of steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from megatron_amrlhf.losses.reduce import LossOutput, masked, metric
from megatron_amrlhf.losses.targets import Targets


@dataclass(frozen=True)
class StepTargets(Targets):
    """Labels of solutions' steps. The denominator is ``[B, T]``, the labelled positions.

    Attributes:
        labels: ``[B, T, D]``: probabilities in [0, 1] for ``bce``; not read outside the
            denominator.
    """

    labels: Tensor


def prm_loss(outputs: Tensor, targets: StepTargets, *, kind: str) -> LossOutput:
    """Binary cross-entropy or squared error at each labelled position, mean over the attributes.

    Metrics over labelled positions and attributes: ``prm/accuracy`` (``bce``), share where
    ``output > 0`` agrees with ``label >= 0.5``; ``prm/absolute_error`` (``mse``).

    Args:
        outputs: ``[B, T, D]`` of the head, differentiable: logits for ``bce``, values for ``mse``.
        targets: of the same rows.
        kind: ``bce`` or ``mse``.

    Returns:
        Terms ``[B, T]``; the caller divides by the global number of labelled positions.

    Raises:
        ValueError: unknown kind.
    """
    mask = targets.denominator
    mask_BTD = mask[:, :, None].expand_as(outputs)
    outputs, labels = masked(outputs, mask_BTD), masked(targets.labels.detach(), mask_BTD)
    if kind == "bce":
        terms_BTD = F.binary_cross_entropy_with_logits(outputs, labels, reduction="none")
        agrees = ((outputs > 0) == (labels >= 0.5)).float()
        metrics = {"prm/accuracy": metric(agrees, mask_BTD)}
    elif kind == "mse":
        terms_BTD = (outputs - labels).square()
        metrics = {"prm/absolute_error": metric((outputs - labels).abs(), mask_BTD)}
    else:
        raise ValueError(f"unknown PRM loss {kind!r}")
    # Masked again: the cross-entropy of a logit that was masked to 0 is not 0.
    return LossOutput(masked(terms_BTD.mean(dim=2), mask), metrics)
