"""Adaptive rejection sampling, eq. 16: masked likelihood of the best of n, near the reference."""

from __future__ import annotations

from torch import Tensor

from megatron_amrlhf.losses.kl import KL_ESTIMATORS
from megatron_amrlhf.losses.reduce import LossOutput, masked, metric


def rejection_sampling_loss(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    mask: Tensor,
    valid: Tensor,
    kl_coef: float,
    estimator: str,
) -> LossOutput:
    """``-log pi M + kl_coef KL(pi, pi_ref)`` of each token, eq. 16.

    The mask chooses what to imitate; the KL holds the whole answer near the reference and is not
    masked. So with ``kl_coef > 0`` tokens outside the mask have terms and gradients too (an update
    on kept tokens only may not cut them), and with ``kl_coef == 0`` they have none.

    Metrics: ``loss/nll`` over kept tokens; ``loss/kl``, the estimator over valid tokens.

    Args:
        logprobs: ``[B, R]`` of the policy on its best answers, differentiable, nats.
        reference_logprobs: ``[B, R]`` of the reference.
        mask: ``[B, R]`` bool, kept tokens, a subset of ``valid``; ``valid`` gives plain RS.
        valid: ``[B, R]`` bool, response tokens.
        kl_coef: weight of the KL.
        estimator: ``k2`` or ``k3``, see ``kl.py``.

    Returns:
        Terms ``[B, R]``; the caller divides.

    Raises:
        ValueError: an estimator that is not meant for a loss.
    """
    if estimator not in ("k2", "k3"):
        raise ValueError(f"estimator {estimator!r} is not meant for a loss: use k2 or k3")
    nll = -masked(logprobs, mask)
    reference_logprobs = masked(reference_logprobs.detach(), valid)
    kl = KL_ESTIMATORS[estimator](masked(logprobs, valid), reference_logprobs)
    metrics = {"loss/nll": metric(nll, mask), "loss/kl": metric(kl, valid)}
    return LossOutput(nll + kl_coef * kl if kl_coef else nll, metrics)
