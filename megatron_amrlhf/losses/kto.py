"""Adaptive KTO: Kahneman-Tversky optimization on kept tokens.

Ethayarajh et al., "KTO: Model Alignment as Prospect Theoretic Optimization" (2024), eq. 8, with the
log-ratios summed over the tokens that the mask of eq. 13 keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_amrlhf.losses.reduce import LossOutput, global_mean, masked, metric
from megatron_amrlhf.losses.targets import AnswerTargets


@dataclass(frozen=True)
class KtoTargets(AnswerTargets):
    """What a policy learns from answers and mismatched pairs.

    The denominator is ``[B, 1]``, True for answers whose label says something: the terms of the
    others are 0.

    Attributes:
        chosen: ``[B]`` bool, desirable answers.
        mismatched_mask: ``[B, R']`` bool, kept tokens of each mismatched pair's answer.
        mismatched_reference: ``[B, R']`` log-probs of the reference on it, nats.
        mismatched_has_reward: ``[B]`` bool, whether that answer has a reward.
    """

    chosen: Tensor
    mismatched_mask: Tensor
    mismatched_reference: Tensor
    mismatched_has_reward: Tensor


def reference_point(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    mask: Tensor,
    group: ProcessGroup | None = None,
    has_reward: Tensor | None = None,
) -> Tensor:
    """z0: the mean log-ratio of mismatched pairs (a prompt, an answer to another one), at least 0.

    It estimates KL(pi, pi_ref); answers that fit the prompt would tell of the improvement too.

    Args:
        logprobs: ``[B, R]`` of the policy on the mismatched pairs, nats.
        reference_logprobs: ``[B, R]`` of the reference.
        mask: ``[B, R]`` bool, the tokens that are kept of each answer, so that z0 and the
            log-ratios it is compared with are sums over the same tokens; all response tokens:
            plain KTO.
        group: data-parallel group; None: this process only. Enters one all-reduce.
        has_reward: ``[B]`` bool, pairs whose answer has a reward; the others do not count.
            None: all.

    Returns:
        0-dim, nats, detached; the same on all ranks of the group.
    """
    logratio_B = (masked(logprobs, mask) - masked(reference_logprobs, mask)).sum(dim=1)
    if has_reward is not None:
        # Taken out, not set to 0: zeros would count in the mean and pull z0 down.
        logratio_B = logratio_B[has_reward]
    return global_mean(logratio_B.detach(), group).clamp(min=0.0)


def kto_loss(
    logprobs: Tensor,
    targets: KtoTargets,
    z0: Tensor,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> LossOutput:
    """``w_D (1 - sigmoid(beta (r - z0)))`` if chosen, else ``w_U (1 - sigmoid(beta (z0 - r)))``.

    ``r`` is the sum of log pi / pi_ref over the answer's kept tokens. An answer without any gives a
    constant with exactly zero gradient (and it counts as an answer).

    Metrics: ``reward/implicit_chosen`` and ``reward/implicit_rejected``, beta r over the answers
    of either kind; ``kto/z0``, nats; ``kto/slope``, mean of 4 sigmoid (1 - sigmoid): 1 where the
    gradient is largest, near 0 where the sigmoid is flat and nothing is learned any more.

    Args:
        logprobs: ``[B, R]`` of the policy, differentiable, nats.
        targets: of the same rows.
        z0: 0-dim, of ``reference_point``, nats.
        beta: how fast the value saturates, 1 / nats.
        desirable_weight, undesirable_weight: lambda_D and lambda_U.

    Returns:
        Terms ``[B, 1]``; the caller divides by the global number of counted answers.
    """
    mask, chosen, every_B = targets.mask, targets.chosen, targets.denominator[:, 0]
    reference = masked(targets.reference_logprobs.detach(), mask)
    logratio_B = (masked(logprobs, mask) - reference).sum(dim=1)
    # z0 carries no gradient: it is where the sigmoid is centred, not what is learned.
    gain_B = torch.where(chosen, logratio_B - z0, z0 - logratio_B)
    loss_B = torch.sigmoid(-beta * gain_B)  # 1 - sigmoid(beta gain), exact for large gains too
    weight_B = torch.full_like(loss_B, undesirable_weight).masked_fill(chosen, desirable_weight)
    metrics = {
        "kto/slope": metric(4 * loss_B * (1 - loss_B), every_B),
        "kto/z0": metric(z0.expand_as(loss_B), every_B),
        "reward/implicit_chosen": metric(beta * logratio_B, chosen),
        "reward/implicit_rejected": metric(beta * logratio_B, every_B & ~chosen),
    }
    return LossOutput(masked(weight_B * loss_B, every_B)[:, None], metrics)
