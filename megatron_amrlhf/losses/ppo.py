"""Adaptive PPO, eq. 14: the clipped surrogate on kept tokens, and the clipped value loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_amrlhf.losses.kl import with_kl
from megatron_amrlhf.losses.reduce import LossOutput, masked, metric
from megatron_amrlhf.losses.targets import KlTargets


@dataclass(frozen=True)
class PpoTargets(KlTargets):
    """What actor and critic learn from.

    Attributes:
        behaviour_logprobs: ``[B, R]`` of the policy that sampled (pi_old), nats.
        advantages: ``[B, R]``.
        returns: ``[B, R]`` targets G of the critic, value units.
        old_values: ``[B, R]`` of the critic at the rollout.
    """

    behaviour_logprobs: Tensor
    advantages: Tensor
    returns: Tensor
    old_values: Tensor


def ppo_actor_loss(
    logprobs: Tensor,
    targets: PpoTargets,
    *,
    clip_eps: float,
    kl_coef: float = 0.0,
    estimator: str = "k2",
) -> LossOutput:
    """The clipped surrogate on kept tokens, eq. 14, maybe with a KL over the whole answers.

    Metrics: those of ``clipped_surrogate`` and, with ``kl_coef`` above 0, of ``kl.with_kl``.

    Args:
        logprobs: ``[B, R]`` of the policy now, differentiable, nats.
        targets: of the same rows.
        clip_eps: epsilon of eq. 14.
        kl_coef: weight of the KL in the loss; 0 where the KL is in the reward.
        estimator: ``k2`` or ``k3``, see ``kl.py``.

    Returns:
        Terms ``[B, R]``; the caller divides (``reduce.scale_for_engine``).

    Raises:
        ValueError: an estimator that is not meant for a loss.
    """
    loss = clipped_surrogate(
        logprobs, targets.behaviour_logprobs, targets.advantages, targets.mask, clip_eps=clip_eps
    )
    if not kl_coef:
        return loss
    return with_kl(loss, logprobs, targets, kl_coef=kl_coef, estimator=estimator)


def clipped_surrogate(
    logprobs: Tensor,
    behaviour_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_eps: float,
    clip_eps_high: float | None = None,
) -> LossOutput:
    """``-min(ratio A, clip(ratio, 1 - eps, 1 + eps_high) A) M`` of each token, eq. 14.

    Metrics, all over kept tokens: ``policy/ratio``; ``policy/approx_kl``, which is
    ``(ratio - 1) - log ratio``, Schulman's k3 for KL(behaviour || policy); ``policy/clipfrac``,
    share of ratios outside the clip range.

    Args:
        logprobs: ``[B, R]`` of the policy now, differentiable, nats.
        behaviour_logprobs: ``[B, R]`` of the policy that sampled (pi_old).
        advantages: ``[B, R]``.
        mask: ``[B, R]`` bool M of eq. 13; all response tokens gives plain PPO.
        clip_eps: epsilon of eq. 14, how far below 1 the ratio may go.
        clip_eps_high: how far above 1; None: as ``clip_eps``.

    Returns:
        Terms ``[B, R]``; the caller divides.
    """
    # Masked inputs are 0, which makes masked terms and their gradients 0.
    logratio = masked(logprobs, mask) - masked(behaviour_logprobs.detach(), mask)
    ratio = logratio.exp()
    advantages = masked(advantages.detach(), mask)
    low, high = 1 - clip_eps, 1 + (clip_eps if clip_eps_high is None else clip_eps_high)
    # The min of eq. 14 as a loss; no gradient flows where the clamped side is taken.
    terms = torch.maximum(-ratio * advantages, -ratio.clamp(low, high) * advantages)
    metrics = {
        "policy/approx_kl": metric(torch.expm1(logratio) - logratio, mask),
        "policy/clipfrac": metric(((ratio < low) | (ratio > high)).float(), mask),
        "policy/ratio": metric(ratio, mask),
    }
    return LossOutput(terms, metrics)


def ppo_value_loss(values: Tensor, targets: PpoTargets, *, clip_eps: float) -> LossOutput:
    """``max((V - G)^2, (clip(V, V_old - eps, V_old + eps) - G)^2) / 2`` of each response token.

    The critic learns from all response tokens; the adaptive mask is the actor's.
    Metrics over valid tokens: ``value/error``, ``(V - G)^2``; ``value/clipfrac``, share of values
    that have left the clip range and whose clipped error is the larger one, so that no gradient
    flows. A value inside the range is its own clipped one but for rounding, which does not count.

    Args:
        values: ``[B, R]`` of the critic now, differentiable.
        targets: of the same rows.
        clip_eps: clip range, value units.

    Returns:
        Terms ``[B, R]``; the caller divides.
    """
    valid = targets.valid
    values, old_values = masked(values, valid), masked(targets.old_values.detach(), valid)
    returns = masked(targets.returns.detach(), valid)
    clipped_values = old_values + (values - old_values).clamp(-clip_eps, clip_eps)
    error, clipped_error = (values - returns).square(), (clipped_values - returns).square()
    is_outside = (values - old_values).abs() > clip_eps
    metrics = {
        "value/clipfrac": metric((is_outside & (clipped_error > error)).float(), valid),
        "value/error": metric(error, valid),
    }
    return LossOutput(0.5 * torch.maximum(error, clipped_error), metrics)
