"""Adaptive DPO, eq. 15, in two forms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_amrlhf.losses.orm import pair_accuracy
from megatron_amrlhf.losses.reduce import LossOutput, masked, metric
from megatron_amrlhf.losses.targets import AnswerTargets


@dataclass(frozen=True)
class PairTargets(AnswerTargets):
    """What a policy learns from pairs; rows are chosen, rejected, chosen, rejected ...

    The denominator is ``[B, 1]``, True for the first row of each pair.
    """


def dpo_loss(logprobs: Tensor, targets: PairTargets, *, beta: float, form: str) -> LossOutput:
    """``-log sigmoid(beta (log-ratio of chosen - log-ratio of rejected))`` of each pair.

    ``inside``: the log-ratios are sums over kept tokens only. A pair whose masks are both empty
    gives the constant ln 2 with exactly zero gradient (and it counts as a pair).

    ``pair``: eq. 15 as printed. The log-ratios are sums over all response tokens and the pair's
    term is multiplied by its M(x, y_w, y_l). A token mask has no single such number; we take the
    kept share of both answers' response tokens together, in [0, 1]. No kept token: 0, no gradient.

    Metrics over pairs: ``reward/implicit_chosen`` and ``reward/implicit_rejected``, beta times the
    log-ratio sum that the form reads; ``dpo/margin``, their difference; ``dpo/accuracy``, share of
    pairs with a margin above 0, where one that is 0 up to rounding counts half.

    Args:
        logprobs: ``[2 P, R]`` of the policy on chosen and rejected answers in turn, differentiable,
            nats.
        targets: of the same rows.
        beta: temperature of eq. 6 and 15.
        form: ``inside`` or ``pair``.

    Returns:
        Terms ``[P, 1]``; the caller divides by the global number of pairs.

    Raises:
        ValueError: unknown form.
    """
    if form == "inside":
        read = targets.mask
        weight_P = torch.ones(len(read) // 2, device=read.device)
    elif form == "pair":
        read, weight_P = targets.valid, _kept_share(targets)
    else:
        raise ValueError(f"unknown DPO form {form!r}")
    reference = targets.reference_logprobs
    chosen, rejected = ([x[side::2] for x in (logprobs, reference, read)] for side in (0, 1))
    chosen_P, rejected_P = beta * _logratio_sums(*chosen), beta * _logratio_sums(*rejected)
    margin_P = chosen_P - rejected_P
    # The margin is a difference of sums of this size: less than their rounding is a tie.
    size_P = beta * (logprob_sizes(*chosen) + logprob_sizes(*rejected))
    # Masked before, not only weighted: 0 times the term of an infinite margin would be nan.
    terms_P = -F.logsigmoid(masked(margin_P, weight_P > 0)) * weight_P
    every_P = torch.ones_like(margin_P, dtype=torch.bool)
    metrics = {
        "dpo/accuracy": metric(pair_accuracy(margin_P, size_P), every_P),
        "dpo/margin": metric(margin_P, every_P),
        "reward/implicit_chosen": metric(chosen_P, every_P),
        "reward/implicit_rejected": metric(rejected_P, every_P),
    }
    return LossOutput(terms_P[:, None], metrics)


def _logratio_sums(logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor) -> Tensor:
    """``[P, R]`` to ``[P]``: sum of log pi / pi_ref where ``mask``."""
    # Each is masked before the difference: where both are -inf it would be nan.
    return (masked(logprobs, mask) - masked(reference_logprobs.detach(), mask)).sum(dim=1)


def logprob_sizes(logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor) -> Tensor:
    """``[P, R]`` to ``[P]``: sum of ``|log pi| + |log pi_ref|`` where ``mask``, of terms' sizes."""
    sizes = masked(logprobs, mask).abs() + masked(reference_logprobs, mask).abs()
    return sizes.detach().sum(dim=1)


def _kept_share(targets: PairTargets) -> Tensor:
    """``[P]``: M(x, y_w, y_l), kept tokens of both answers / response tokens of both answers."""
    num_kept_B, num_tokens_B = (targets.mask & targets.valid).sum(1), targets.valid.sum(1)
    # The sum of both sides, not the mean of two shares: a long answer counts by its tokens.
    num_kept_P = num_kept_B[0::2] + num_kept_B[1::2]
    num_tokens_P = num_tokens_B[0::2] + num_tokens_B[1::2]
    return num_kept_P / num_tokens_P.clamp(min=1)
