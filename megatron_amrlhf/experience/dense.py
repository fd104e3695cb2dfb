"""From token rewards to signs, messages and unit rewards: sections 3.1, 3.2.1 and appendix E."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_amrlhf.config.algorithm_section import PolicySection
from megatron_amrlhf.config.algorithms import CriticSection
from megatron_amrlhf.experience.context import Context
from megatron_amrlhf.losses.gae import gae, td_errors
from megatron_amrlhf.mask.messages import message_ids, unit_rewards
from megatron_amrlhf.mask.schmitt import signs
from megatron_amrlhf.mask.statistics import whiten
from megatron_amrlhf.mask.threshold import (
    RunningBaseline,
    baseline_and_std,
    delta_in_signal_units,
)
from megatron_amrlhf.rewards.offline import OfflineScores
from megatron_amrlhf.rewards.steps import StepCutter
from megatron_amrlhf.rewards.units import place_on_last
from megatron_amrlhf.types import RolloutBatch, ScoredBatch


@dataclass(frozen=True)
class DenseRewards:
    """What the dense reward says. On last stages only.

    Attributes:
        signal: ``[B, R]`` what the threshold cut.
        baseline: ``[B, 1]`` threshold b, signal units.
        delta: 0-dim, Schmitt offset, signal units.
        signs: ``[B, R]`` int8 of eq. 17/18.
        messages: ``[B, R]`` int64 message ids, -1 outside responses.
        message_rewards: ``[B, R]`` raw reward of the message that each token is in, eq. 12.
        shaped: ``[B, R]`` normalised reward by ``reward.granularity`` and ``placement``.
        sequence_rewards: ``[B]`` reward of each answer by ``reward.outcome``, not normalised.
    """

    signal: Tensor
    baseline: Tensor
    delta: Tensor
    signs: Tensor
    messages: Tensor
    message_rewards: Tensor
    shaped: Tensor
    sequence_rewards: Tensor


def make_dense(
    context: Context,
    scored: ScoredBatch,
    rollout: RolloutBatch,
    *,
    running: RunningBaseline,
    cut_steps: StepCutter | None,
    offline: OfflineScores | None,
) -> DenseRewards:
    """Cuts the answers into messages. Entered by every last-stage rank (global statistics).

    ``cut_steps`` is needed by ``reward.granularity: step``, ``offline`` by threshold and
    normalisation of that name.
    """
    config, group, valid = context.config, context.mesh.dp_group, scored.response_mask
    rewards = scored.token_rewards
    if config.reward.normalise == "batch":
        rewards = whiten(rewards, valid, group)
    elif config.reward.normalise == "offline":
        assert offline is not None, "read at the start"
        rewards, offline = _whiten_offline(rewards, valid, offline)  # the baseline moves along
    kind, units, shaped = config.mask.message_reward, None, rewards
    if config.reward.granularity != "message":
        units = _units(context, rollout, valid, cut_steps)
        shared = unit_rewards(rewards, units, valid, kind)
        shaped = _placed(context, shared, units, valid)
        rewards = shared
    signal = _signal(context, scored, rewards, shaped)
    fixed = config.mask.fixed_value
    if config.mask.threshold == "offline":
        assert offline is not None, "read at the start"
        fixed = offline.baseline
    baseline, std = baseline_and_std(
        signal,
        valid,
        config.mask.threshold,
        fixed_value=fixed,
        running=running,
        group_ids=rollout.group_ids.to(valid.device),
        group=group,
    )
    if config.mask.threshold == "offline" and offline is not None:
        # delta counts deviations of the same scores that the baseline is of.
        std = torch.full_like(std, offline.std)
    delta = delta_in_signal_units(config.mask.delta, config.mask.delta_unit, std)
    sign = signs(signal, valid, baseline, delta, config.mask.neutral)
    messages = message_ids(sign, valid)
    if units is None:  # messages are known after the cut only
        units = messages.clamp(min=0)
        shaped = _placed(context, unit_rewards(rewards, units, valid, kind), units, valid)
    return DenseRewards(
        signal=signal,
        baseline=baseline,
        delta=delta,
        signs=sign,
        messages=messages,
        message_rewards=unit_rewards(scored.token_rewards, messages.clamp(min=0), valid, kind),
        shaped=shaped,
        sequence_rewards=scored.sequence_rewards,
    )


def _whiten_offline(
    rewards: Tensor, valid: Tensor, offline: OfflineScores
) -> tuple[Tensor, OfflineScores]:
    """Eq. 11 by the moments of a scored data set: rewards and that data set's scores whitened."""
    # 0 for scores without variance, as `whiten` has it.
    scale = 1 / offline.std if offline.std > 0 else 0.0
    whitened = torch.where(valid, (rewards - offline.mean) * scale, 0.0)
    baseline = (offline.baseline - offline.mean) * scale
    # Whitened scores deviate by 1, or by 0 where all are equal.
    return whitened, OfflineScores(baseline=baseline, mean=0.0, std=float(scale > 0))


def _signal(context: Context, scored: ScoredBatch, rewards: Tensor, shaped: Tensor) -> Tensor:
    """``[B, R]`` the dense signal R(x, y_t) that is cut.

    Args:
        context: the run.
        scored: log-probs and values.
        rewards: ``[B, R]`` reward of the unit that each token is in; messages do not exist yet,
            their tokens have their own.
        shaped: ``[B, R]`` these where they are placed: what the critic's values are of.
    """
    kind, algorithm, valid = (
        context.config.mask.signal,
        context.config.algorithm,
        scored.response_mask,
    )
    if kind == "reward":
        return rewards
    if kind == "implicit":
        assert isinstance(algorithm, PolicySection), kind
        # Eq. 3 with the reference as the zero: beta log pi / pi_ref.
        return algorithm.implicit_beta * (scored.policy_logprobs - scored.reference_logprobs)
    assert isinstance(algorithm, CriticSection), kind
    after = scored.bootstrap_values
    if kind == "td_error":
        return td_errors(shaped, scored.values, valid, algorithm.gamma, after)
    return gae(
        shaped, scored.values, valid, algorithm.gamma, algorithm.gae_lambda, bootstrap_values=after
    )[0]


def _units(
    context: Context, rollout: RolloutBatch, valid: Tensor, cut_steps: StepCutter | None
) -> Tensor:
    """``[B, R]`` number of the sequence, step or token that each token is in."""
    granularity = context.config.reward.granularity
    # Numbers only tell units of a row apart; those behind the answer are not read.
    if granularity == "sequence":
        return torch.zeros_like(valid, dtype=torch.int64)
    if granularity == "token":
        return torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
    assert granularity == "step" and cut_steps is not None, granularity
    return cut_steps(rollout).to(valid.device)


def _placed(context: Context, rewards: Tensor, units: Tensor, valid: Tensor) -> Tensor:
    """Units' rewards by ``reward.placement``."""
    if context.config.reward.placement == "spread":
        return rewards
    return place_on_last(rewards, units, valid)
