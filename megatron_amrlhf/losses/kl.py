"""Estimators of KL(pi || pi_ref) from tokens sampled from pi.

J. Schulman, "Approximating KL Divergence" (2020), http://joschu.net/blog/kl-approx.html. With
``x ~ pi`` and ``logratio = log pi(x) - log pi_ref(x)``. A good estimate of the value is not yet a
good loss: what the mean gradient of each one is, is said below (both are checked in the tests).

All take log-probs of any one shape, in nats, and return that shape. They do not mask.
"""

from __future__ import annotations

import torch
from torch import Tensor


def k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """``logratio``: unbiased, may be negative. For **reward** shaping (PPO's token reward).

    Useless in a loss: its mean gradient under pi is zero.
    """
    return logprobs - reference_logprobs


def k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """``logratio^2 / 2``: biased, low variance. For the **loss**.

    Its mean gradient under pi is exactly that of KL(pi || pi_ref).
    """
    return 0.5 * (logprobs - reference_logprobs).square()


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """``exp(-logratio) - 1 + logratio``: unbiased, never negative. For **monitoring**.

    In a loss its mean gradient is that of the other direction, KL(pi_ref || pi), and only if the
    tokens were sampled on-policy. Overflows where pi_ref / pi does; not clamped.
    """
    negative_logratio = reference_logprobs - logprobs
    return torch.expm1(negative_logratio) - negative_logratio


def absolute(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """``|logratio|``: a distance, not an estimate of KL. For **reward** shaping and monitoring."""
    return (logprobs - reference_logprobs).abs()


KL_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3, "abs": absolute}
