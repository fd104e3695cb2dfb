"""Adaptive rejection sampling, eq. 16: masked likelihood of the best of n, near the reference."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_amrlhf.losses.kl import with_kl
from megatron_amrlhf.losses.reduce import LossOutput, masked, metric
from megatron_amrlhf.losses.targets import KlTargets


@dataclass(frozen=True)
class SelectedTargets(KlTargets):
    """What a policy learns from answers that are worth imitating."""


def rejection_sampling_loss(
    logprobs: Tensor, targets: SelectedTargets, *, kl_coef: float, estimator: str
) -> LossOutput:
    """``-log pi M + kl_coef KL(pi, pi_ref)`` of each token, eq. 16.

    The mask chooses what to imitate; the KL is over the whole answer (``kl.with_kl``).

    Metrics: ``loss/nll`` over kept tokens; ``loss/kl``, the estimator over valid tokens.

    Args:
        logprobs: ``[B, R]`` of the policy on its best answers, differentiable, nats.
        targets: of the same rows.
        kl_coef: weight of the KL.
        estimator: ``k2`` or ``k3``, see ``kl.py``.

    Returns:
        Terms ``[B, R]``; the caller divides.

    Raises:
        ValueError: an estimator that is not meant for a loss.
    """
    nll = -masked(logprobs, targets.mask)
    loss = LossOutput(nll, {"loss/nll": metric(nll, targets.mask)})
    return with_kl(loss, logprobs, targets, kl_coef=kl_coef, estimator=estimator)
