"""Estimators of KL(pi || pi_ref) from tokens sampled from pi.

J. Schulman, "Approximating KL Divergence" (2020), http://joschu.net/blog/kl-approx.html. With
``x ~ pi`` and ``logratio = log pi(x) - log pi_ref(x)``. A good estimate of the value is not yet a
good loss: what the mean gradient of each one is, is said below (both are checked in the tests).

All take log-probs of any one shape, in nats, and return that shape. They do not mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_amrlhf.losses.reduce import LossOutput, masked, metric
from megatron_amrlhf.losses.targets import KlTargets


def k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """``logratio``: unbiased, may be negative. For **reward** shaping (PPO's token reward).

    As a penalty in the reward its policy gradient is exactly that of KL(pi || pi_ref). Useless in a
    loss: its mean gradient under pi is zero.
    """
    return logprobs - reference_logprobs


def k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """``logratio^2 / 2``: biased, low variance. For the **loss**.

    Its mean gradient under pi is exactly that of KL(pi || pi_ref). As a reward it pulls elsewhere.
    """
    return 0.5 * (logprobs - reference_logprobs).square()


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """``exp(-logratio) - 1 + logratio``: unbiased, never negative. For the **loss** and to watch.

    In a loss its mean gradient is that of the other direction, KL(pi_ref || pi), and only if the
    tokens were sampled on-policy. In the reward its policy gradient is that of KL(pi || pi_ref)
    minus KL(pi_ref || pi). Overflows where pi_ref / pi does; not clamped.
    """
    negative_logratio = reference_logprobs - logprobs
    # expm1: near 0, where most tokens are, exp(x) - 1 - x would cancel to rounding.
    return torch.expm1(negative_logratio) - negative_logratio


def absolute(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """``|logratio|``: a distance, not an estimate of KL. For **reward** shaping and monitoring."""
    return (logprobs - reference_logprobs).abs()


KL_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3, "abs": absolute}

# Where an estimator may stand; elsewhere its gradient is zero or points somewhere else.
REWARD_ESTIMATORS = ("k1", "abs")
LOSS_ESTIMATORS = ("k2", "k3")


def reward_penalty(logprobs: Tensor, reference_logprobs: Tensor, estimator: str) -> Tensor:
    """The estimator of each token, to subtract from its reward.

    Raises:
        ValueError: an estimator that is not meant for a reward.
    """
    if estimator not in REWARD_ESTIMATORS:
        raise ValueError(f"estimator {estimator!r} is not meant for a reward: use k1 or abs")
    return KL_ESTIMATORS[estimator](logprobs, reference_logprobs)


def with_kl(
    loss: LossOutput,
    logprobs: Tensor,
    targets: KlTargets,
    *,
    kl_coef: float,
    estimator: str,
) -> LossOutput:
    """Adds ``kl_coef KL(pi, pi_ref)`` of each token to a loss.

    The mask chooses what a loss reads; the KL holds the whole answer near the reference and is not
    masked. So with ``kl_coef > 0`` tokens outside the mask have terms and gradients too (an update
    on kept tokens only may not cut them), and with ``kl_coef == 0`` the terms stay as they are.

    Metric: ``loss/kl``, the estimator's mean over valid tokens, with ``kl_coef > 0`` only (rows may
    be cut otherwise, and have no log-probs there).

    Args:
        loss: with terms ``[B, R]``.
        logprobs: ``[B, R]`` of the policy, differentiable, nats.
        targets: of the same rows.
        kl_coef: weight of the KL.
        estimator: ``k2`` or ``k3``.

    Raises:
        ValueError: an estimator that is not meant for a loss.
    """
    if estimator not in LOSS_ESTIMATORS:
        raise ValueError(f"estimator {estimator!r} is not meant for a loss: use k2 or k3")
    if not kl_coef:
        return loss
    valid = targets.valid
    # Masked before the estimator: between two zeros each one is 0, and so is its gradient.
    reference_logprobs = masked(targets.reference_logprobs.detach(), valid)
    kl = KL_ESTIMATORS[estimator](masked(logprobs, valid), reference_logprobs)
    terms = loss.terms + kl_coef * (kl * targets.kl_scale)
    return LossOutput(terms, loss.metrics | {"loss/kl": metric(kl, valid)})
