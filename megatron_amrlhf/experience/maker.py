"""The front half of every step on answers: score, cut, mask. Shared by all algorithms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_amrlhf.config.algorithm_section import PolicySection
from megatron_amrlhf.config.algorithms import CriticSection
from megatron_amrlhf.config.schema import RolloutSection
from megatron_amrlhf.experience.context import Context, count_metric
from megatron_amrlhf.experience.dense import DenseRewards, make_dense
from megatron_amrlhf.experience.failures import stop_on_failures
from megatron_amrlhf.experience.masking import Picked
from megatron_amrlhf.experience.preemption import check_stop
from megatron_amrlhf.experience.rewarding import Rewarder
from megatron_amrlhf.experience.rewards import Rewards
from megatron_amrlhf.experience.scoring import (
    read_logprobs,
    read_logprobs_and_entropy,
    read_value,
    score_states,
    score_tokens,
)
from megatron_amrlhf.losses.reduce import Metrics
from megatron_amrlhf.mask.adaptive import adaptive_mask
from megatron_amrlhf.mask.messages import message_counts
from megatron_amrlhf.mask.threshold import RunningBaseline
from megatron_amrlhf.rewards.offline import OfflineScores
from megatron_amrlhf.types import PromptBatch, RolloutBatch, ScoredBatch

GOLDEN_RATIO = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Experience:
    """Answers, what the models say about them, and how this cuts them. On last stages only.

    Attributes:
        rollout: the answers.
        scored: rewards, log-probs and values of their tokens.
        dense: their signs, messages and unit rewards.
    """

    rollout: RolloutBatch
    scored: ScoredBatch
    dense: DenseRewards


class ExperienceMaker:
    """Scores answers, cuts them into messages and masks them.

    Args:
        context: the run; its engine has the roles actor, reference and maybe critic.
        temperature: softmax temperature that log-probs are taken at.
        rewarder: gives the rewards.
        offline: for threshold or normalisation by a scored data set, else None.
    """

    def __init__(
        self,
        context: Context,
        *,
        temperature: float,
        rewarder: Rewarder,
        offline: OfflineScores | None,
    ):
        self.context, self.temperature = context, temperature
        self.rewarder, self.offline = rewarder, offline
        section = context.config.algorithm
        assert isinstance(section, PolicySection), "it learns from answers"
        self.reads_policy = section.reads_policy(context.config)
        self.running = RunningBaseline(decay=context.config.mask.running_decay)

    def score(
        self, rollout: RolloutBatch, prompts: PromptBatch, step: int, given: Tensor | None = None
    ) -> tuple[ScoredBatch | None, Metrics]:
        """Log-probs, values and token rewards, on last stages. Entered by every rank.

        Args:
            rollout: the answers.
            prompts: their prompts.
            step: for messages.
            given: ``[B, R]`` raw rewards that stand for a PRM's; None: there are none.
        """
        context, roles = self.context, self.context.engine.roles
        rows = self.measured(rollout, step)
        total = len(rollout.rows) * (len(roles) - 1) + len(rows)
        # Between passes, which may take minutes: before its updates a step can be left.
        with context.phase("score", total):
            check_stop(context)
            policy = self.score_policy(rollout.select(rows))
            check_stop(context)
            read = read_logprobs(context, self.temperature)
            reference = score_tokens(context, "reference", rollout, "before", read)
            check_stop(context)
            rewards = self.rewarder.score(rollout, prompts, given)
            states = None
            if "critic" in roles:
                check_stop(context)
                states = self.critic_states(rollout)
        # Before failures are counted: log-probs and values that are not finite are failures too.
        if rewards is not None:
            actor = _scattered(policy, rows, len(rollout.rows))
            rewards = rewards.where_finite(actor=actor, reference=reference, critic=states)
        stop_on_failures(context, rewards, step)
        # Other stages leave here, after the last collective.
        if rewards is None or reference is None:
            return None, {}
        metrics = _sampled_metrics(rollout, rewards)
        if policy is not None:
            here = rows.to(policy.device)
            by_policy = rewards.valid & ~rollout.from_reference.to(policy.device)[:, None]
            metrics |= policy_metrics(policy, reference[here], by_policy[here])
        if context.config.reward.verifiable_weight:
            metrics |= rewards.reasons()
        rewards = treat_truncated(context.config.rollout, rewards, rollout)
        valid = rewards.valid
        if states is None:
            states = F.pad(torch.zeros_like(rewards.tokens), (0, 1))  # [B, R + 1], as of a critic
        # Column n of an answer of n tokens: the state after its last one.
        after = states.gather(1, valid.sum(dim=1, keepdim=True))[:, 0]
        scored = ScoredBatch(
            token_rewards=rewards.tokens,
            sequence_rewards=rewards.sequences,
            logprobs=policy[..., 0] if policy is not None and self.reads_policy else None,
            reference_logprobs=reference,
            values=torch.where(valid, states[:, :-1], 0.0),
            # An answer that ended by itself has no next state.
            bootstrap_values=torch.where(rollout.ended.to(valid.device), 0.0, after),
            response_mask=valid,
        )
        return scored, metrics

    def measured(self, rollout: RolloutBatch, step: int) -> Tensor:
        """Indices of the answers whose log-probs by the policy are computed: all that are read.

        Else ``run.policy_metrics`` of those that it sampled, in every layout the same:
        multiples of the golden ratio lie evenly in [0, 1), so each sample has its turn.
        """
        if self.reads_policy:
            return torch.arange(len(rollout.rows))
        place = ((rollout.sample_ids.double() + 1) * GOLDEN_RATIO + step * GOLDEN_RATIO**0.5) % 1
        is_measured = (place < self.context.config.run.policy_metrics) & ~rollout.from_reference
        return is_measured.nonzero()[:, 0]

    def score_policy(self, measured: RolloutBatch) -> Tensor | None:
        """``[M, R', 2]`` log-probs and entropies on last stages, None where there is no such pass.

        The pass is entered by every rank, also where a replica has no answer in it.
        """
        if not self.reads_policy and not self.context.config.run.policy_metrics:
            return None
        read = read_logprobs_and_entropy(self.context, self.temperature)
        return score_tokens(self.context, "actor", measured, "before", read)

    def critic_states(self, rollout: RolloutBatch) -> Tensor | None:
        """``[B, R + 1]`` values on last stages, as ``score_states`` gives them.

        Without bootstrapping values are 0 behind the last token, and are read at the places where
        the update reads them, so that old and new values agree to the last bit.
        """
        context, algorithm = self.context, self.context.config.algorithm
        assert isinstance(algorithm, CriticSection), "it has a critic"
        if algorithm.bootstrap_truncated:
            return score_states(context, rollout)
        values = score_tokens(context, "critic", rollout, "before", read_value())
        return None if values is None else F.pad(values, (0, 1))

    def cut(self, rollout: RolloutBatch, scored: ScoredBatch) -> Experience:
        """Cuts the answers into messages. Entered by every last-stage rank."""
        dense = make_dense(
            self.context,
            scored,
            rollout,
            running=self.running,
            cut_steps=self.rewarder.cut_steps,
            offline=self.offline,
        )
        return Experience(rollout, scored, dense)

    def mask(self, experience: Experience, rows: Tensor, chosen: Tensor) -> tuple[Picked, Metrics]:
        """Eq. 13 for the answers at ``rows`` with their labels, on a last stage.

        ``mask.kind: none`` keeps every response token of every answer.
        """
        scored, dense = experience.scored, experience.dense
        valid, signs = scored.response_mask[rows], dense.signs[rows]
        mask = valid
        if self.context.config.mask.kind == "adaptive":
            mask = adaptive_mask(signs, chosen, valid)
        rewards, has_reward = dense.sequence_rewards[rows], scored.has_reward[rows]
        messages = message_counts(dense.messages[rows], signs).sum()
        metrics = {
            "mask/num_messages": count_metric(messages, has_reward.sum()),
            "mask/mean_message_tokens": count_metric((signs != 0).sum(), messages),
            "mask/kept_fraction": count_metric(mask.sum(), valid.sum()),
            "mask/empty_answers": count_metric(
                (has_reward & ~mask.any(dim=1)).sum(), has_reward.sum()
            ),
            "reward/chosen": count_metric(rewards[chosen].sum(), chosen.sum()),
        }
        if self.context.config.algorithm.rejects_answers:
            rejected = has_reward & ~chosen
            metrics["reward/rejected"] = count_metric(rewards[rejected].sum(), rejected.sum())
        return Picked(rows, mask, chosen, has_reward), metrics


def treat_truncated(section: RolloutSection, rewards: Rewards, rollout: RolloutBatch) -> Rewards:
    """What ``rollout.truncated`` makes of the answers that did not end by themselves."""
    truncated = ~rollout.ended.to(rewards.valid.device)
    if section.truncated == "mask":
        return rewards.without(truncated)
    if section.truncated == "penalise":
        return rewards.less(section.truncated_penalty, truncated)
    return rewards


def policy_metrics(policy: Tensor, reference: Tensor, by_policy: Tensor) -> Metrics:
    """What the measured answers say of the policy (last stages).

    Args:
        policy: ``[M, R', 2]`` log-probs and entropies; R' is the longest of these answers.
        reference: ``[M, R]`` log-probs.
        by_policy: ``[M, R]`` bool, tokens that the policy sampled and whose reward did not fail.
    """
    width = policy.shape[1]
    by_policy = by_policy[:, :width]
    logratio = torch.where(by_policy, policy[..., 0] - reference[:, :width], 0.0)
    count = by_policy.sum()
    return {
        "kl/ref_nats": count_metric(logratio.sum(), count),
        "policy/entropy_nats": count_metric(policy[..., 1][by_policy].sum(), count),
    }


def _scattered(values: Tensor | None, rows: Tensor, count: int) -> Tensor | None:
    """``[count, ...]`` with ``values`` at ``rows`` and 0 elsewhere."""
    if values is None:
        return None
    out = values.new_zeros(count, *values.shape[1:])
    return out.index_copy(0, rows.to(values.device), values)


def _sampled_metrics(rollout: RolloutBatch, rewards: Rewards) -> Metrics:
    """Of the sampled answers, those that are not learned from too (last stages).

    Args:
        rollout: the answers.
        rewards: before the truncated ones are treated apart.
    """
    failed, rows = rewards.failed, len(rollout.rows)
    return {
        "reward/failed_fraction": count_metric(failed.sum(), rows),
        "reward/mean": count_metric(rewards.sequences[~failed].sum(), (~failed).sum()),
        "rollout/response_tokens": count_metric(rollout.response_lengths.sum(), rows),
        "rollout/ended_fraction": count_metric(rollout.ended.sum(), rows),
    }
