"""The losses of plain tensors, in the order of the papers' formulas: records filled in for them."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_amrlhf.losses import dpo, grpo, kl, kto, orm, ppo, prm, rejection_sampling
from megatron_amrlhf.losses.reduce import LossOutput
from megatron_amrlhf.losses.targets import KlTargets, Targets


def ones_like_rows(x: Tensor) -> Tensor:
    return torch.ones(len(x), 1)


def ppo_targets(
    valid: Tensor, *, mask: Tensor | None = None, reference: Tensor | None = None, **given: Tensor
) -> ppo.PpoTargets:
    """A record in which what is not given must not be read."""
    unread = torch.full(valid.shape, torch.nan)
    return ppo.PpoTargets(
        denominator=valid,
        mask=valid if mask is None else mask,
        valid=valid,
        reference_logprobs=unread if reference is None else reference,
        behaviour_logprobs=given.get("behaviour", unread),
        advantages=given.get("advantages", unread),
        returns=given.get("returns", unread),
        old_values=given.get("old_values", unread),
        kl_scale=ones_like_rows(valid),
    )


def ppo_actor_loss(x, behaviour, advantages, mask, clip_eps) -> LossOutput:
    targets = ppo_targets(mask, behaviour=behaviour, advantages=advantages)
    return ppo.ppo_actor_loss(x, targets, clip_eps=clip_eps)


def ppo_value_loss(values, old_values, returns, valid, clip_eps) -> LossOutput:
    targets = ppo_targets(valid, old_values=old_values, returns=returns)
    return ppo.ppo_value_loss(values, targets, clip_eps=clip_eps)


def with_kl(loss, x, reference, valid, kl_coef, estimator) -> LossOutput:
    targets = KlTargets(valid, valid, valid, reference, ones_like_rows(valid))
    return kl.with_kl(loss, x, targets, kl_coef=kl_coef, estimator=estimator)


def grpo_loss(
    x,
    behaviour,
    reference,
    advantages,
    mask,
    valid,
    clip_eps,
    clip_eps_high,
    kl_coef,
    estimator,
    weight=None,
) -> LossOutput:
    ones = ones_like_rows(valid)
    targets = grpo.GrpoTargets(
        denominator=valid,
        mask=mask,
        valid=valid,
        reference_logprobs=reference,
        behaviour_logprobs=behaviour,
        advantages=advantages,
        weight=ones if weight is None else weight,
        kl_scale=ones,
    )
    bounds = {"clip_eps": clip_eps, "clip_eps_high": clip_eps_high}
    return grpo.grpo_loss(x, targets, kl_coef=kl_coef, estimator=estimator, **bounds)


def in_turn(first: Tensor, second: Tensor) -> Tensor:
    """Rows of both in turn, padded with 0 (False) to the wider one."""
    width = max(first.shape[1], second.shape[1])
    sides = [F.pad(side, (0, width - side.shape[1])) for side in (first, second)]
    return torch.stack(sides, dim=1).flatten(0, 1)


def dpo_loss(
    chosen,
    rejected,
    ref_chosen,
    ref_rejected,
    chosen_mask,
    rejected_mask,
    beta,
    form,
    chosen_valid=None,
    rejected_valid=None,
) -> LossOutput:
    mask = in_turn(chosen_mask, rejected_mask)
    targets = dpo.PairTargets(
        denominator=(torch.arange(len(mask)) % 2 == 0)[:, None],
        mask=mask,
        valid=mask if chosen_valid is None else in_turn(chosen_valid, rejected_valid),
        reference_logprobs=in_turn(ref_chosen, ref_rejected),
    )
    return dpo.dpo_loss(in_turn(chosen, rejected), targets, beta=beta, form=form)


def kto_loss(x, reference, chosen, mask, z0, beta, desirable, undesirable, judged=None):
    every, unread = torch.ones_like(chosen), torch.full(mask.shape, torch.nan)
    targets = kto.KtoTargets(
        denominator=(every if judged is None else judged)[:, None],
        mask=mask,
        valid=mask,
        reference_logprobs=reference,
        chosen=chosen,
        mismatched_mask=mask,
        mismatched_reference=unread,
        mismatched_has_reward=every,
    )
    weights = {"desirable_weight": desirable, "undesirable_weight": undesirable}
    return kto.kto_loss(x, targets, z0, beta=beta, **weights)


def rejection_sampling_loss(x, reference, mask, valid, kl_coef, estimator) -> LossOutput:
    targets = rejection_sampling.SelectedTargets(
        denominator=valid,
        mask=mask,
        valid=valid,
        reference_logprobs=reference,
        kl_scale=ones_like_rows(valid),
    )
    loss = partial(rejection_sampling.rejection_sampling_loss, x, targets)
    return loss(kl_coef=kl_coef, estimator=estimator)


def prm_loss(outputs, labels, mask, kind) -> LossOutput:
    return prm.prm_loss(outputs, prm.StepTargets(mask, labels), kind=kind)


def orm_loss(chosen, rejected) -> LossOutput:
    rewards = in_turn(chosen[:, None], rejected[:, None])
    first = (torch.arange(len(rewards)) % 2 == 0)[:, None]
    return orm.orm_loss(rewards, Targets(first))
