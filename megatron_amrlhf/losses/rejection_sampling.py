"""Adaptive rejection sampling, eq. 16: masked likelihood of the best of n, near the reference."""

from __future__ import annotations

from torch import Tensor

from megatron_amrlhf.losses.kl import with_kl
from megatron_amrlhf.losses.reduce import LossOutput, masked, metric


def rejection_sampling_loss(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    mask: Tensor,
    valid: Tensor,
    kl_coef: float,
    estimator: str,
    scale: Tensor | None = None,
) -> LossOutput:
    """``-log pi M + kl_coef KL(pi, pi_ref)`` of each token, eq. 16.

    The mask chooses what to imitate; the KL is over the whole answer (``kl.with_kl``).

    Metrics: ``loss/nll`` over kept tokens; ``loss/kl``, the estimator over valid tokens.

    Args:
        logprobs: ``[B, R]`` of the policy on its best answers, differentiable, nats.
        reference_logprobs: ``[B, R]`` of the reference.
        mask: ``[B, R]`` bool, kept tokens, a subset of ``valid``; ``valid`` gives plain RS.
        valid: ``[B, R]`` bool, response tokens.
        kl_coef: weight of the KL.
        estimator: ``k2`` or ``k3``, see ``kl.py``.
        scale: ``[B, 1]`` of the KL, see ``with_kl``.

    Returns:
        Terms ``[B, R]``; the caller divides.

    Raises:
        ValueError: an estimator that is not meant for a loss.
    """
    nll = -masked(logprobs, mask)
    loss = LossOutput(nll, {"loss/nll": metric(nll, mask)})
    return with_kl(loss, logprobs, reference_logprobs, valid, kl_coef, estimator, scale)
