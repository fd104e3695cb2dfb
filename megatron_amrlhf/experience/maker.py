"""The front half of every step on answers: rollout, score, mask. Shared by all algorithms."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_amrlhf.config.schema import RolloutSection
from megatron_amrlhf.data.order import DataPosition, shard
from megatron_amrlhf.data.prompts import EncodedPrompt
from megatron_amrlhf.experience.context import Context, count_metric
from megatron_amrlhf.experience.dense import DenseRewards, make_dense
from megatron_amrlhf.experience.preemption import check_stop, until_stopped
from megatron_amrlhf.experience.rewarding import Rewarder, Rewards, stop_on_failures
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
from megatron_amrlhf.rollout.generator import generate
from megatron_amrlhf.rollout.sampling import SamplingSettings
from megatron_amrlhf.types import PromptBatch, RolloutBatch, ScoredBatch


@dataclass(frozen=True)
class Judged:
    """Answers after scoring and cutting. ``scored`` and ``dense`` are None but on last stages."""

    rollout: RolloutBatch
    scored: ScoredBatch | None
    dense: DenseRewards | None


class ExperienceMaker:
    """Samples answers, scores them and cuts them into messages.

    Args:
        context: the run; its engine has the roles actor, reference and maybe critic.
        data: the training prompts.
        position: which of them a step takes.
        temperature: softmax temperature that log-probs are taken at.
        rewarder: gives the rewards.
        offline: for threshold or normalisation by a scored data set, else None.
    """

    def __init__(
        self,
        context: Context,
        data: Sequence[EncodedPrompt],
        position: DataPosition,
        *,
        temperature: float,
        rewarder: Rewarder,
        offline: OfflineScores | None,
    ):
        self.context, self.data, self.position = context, data, position
        self.temperature = temperature
        self.rewarder, self.offline = rewarder, offline
        self.running = RunningBaseline(decay=context.config.mask.running_decay)
        self.seconds: dict[str, float] = {}

    def indices_of(self, step: int) -> tuple[Tensor, list[int]]:
        """This replica's places in a step's data, and their indices; of seed and step alone."""
        mesh = self.context.mesh
        first = mesh.dp_rank * (self.position.per_step // mesh.dp_size)
        mine = shard(self.position.indices(step), mesh.dp_rank, mesh.dp_size)
        return torch.arange(first, first + len(mine)), mine

    def prompts_of(self, step: int) -> PromptBatch:
        """This replica's prompts of a step."""
        places, indices = self.indices_of(step)
        chosen = [self.data[i] for i in indices]
        return PromptBatch(
            rows=tuple(prompt.row for prompt in chosen),
            group_ids=places,
            texts=tuple(prompt.text for prompt in chosen),
            answers=tuple(prompt.answer for prompt in chosen),
            earlier=tuple(prompt.turns[:-1] for prompt in chosen),
        )

    def settings(self) -> SamplingSettings:
        """Sampling as the config says."""
        rollout = self.context.config.rollout
        return SamplingSettings(
            max_new_tokens=rollout.max_new_tokens,
            max_row_tokens=self.context.config.data.max_row_tokens,
            temperature=rollout.temperature,
            top_k=rollout.top_k,
            top_p=rollout.top_p,
            end_ids=self.context.end_ids,
            usable=self.context.usable,
        )

    def rollout(self, prompts: PromptBatch, step: int) -> RolloutBatch:
        """Answers of policy and reference. Entered by every rank."""
        config, start = self.context.config, time.perf_counter()
        samples = config.rollout.samples_per_prompt
        with self.context.console.track("rollout", len(prompts.rows) * samples):
            answers = until_stopped(
                self.context,
                lambda: generate(
                    self.context.engine,
                    prompts,
                    samples_per_prompt=samples,
                    reference_samples=config.rollout.reference_samples_per_prompt,
                    settings=self.settings(),
                    seed=config.run.seed,
                    step=step,
                    micro_batch_size=config.rollout.micro_batch_size,
                    wants_stop=self.context.stop.seen,
                ),
            )
        self.seconds["rollout"] = time.perf_counter() - start
        return answers

    def score(
        self, rollout: RolloutBatch, prompts: PromptBatch, step: int
    ) -> tuple[ScoredBatch | None, Metrics]:
        """Log-probs, values and token rewards, on last stages. Entered by every rank."""
        context, start = self.context, time.perf_counter()
        roles = context.engine.roles
        with context.console.track("score", len(rollout.rows) * len(roles)):

            def run(role, where, read):
                check_stop(context)
                return score_tokens(context, role, rollout, where, read)

            policy = run("actor", "before", read_logprobs_and_entropy(context, self.temperature))
            reference = run("reference", "before", read_logprobs(context, self.temperature))
            check_stop(context)
            rewards = self.rewards(rollout, prompts)
            states = None
            if "critic" in roles:
                check_stop(context)
                states = self.critic_states(rollout)
        self.seconds["score"] = time.perf_counter() - start
        if rewards is not None:
            rewards = rewards.where_finite(actor=policy, reference=reference, critic=states)
        stop_on_failures(context, rewards, step)
        if rewards is None:
            return None, {}
        metrics = _sampled_metrics(rollout, rewards, policy, reference)
        if context.config.reward.verifiable_weight:
            metrics |= rewards.reasons()
        rewards = treat_truncated(context.config.rollout, rewards, rollout)
        valid = rewards.valid
        if states is None:
            states = F.pad(torch.zeros_like(rewards.tokens), (0, 1))
        after = states.gather(1, valid.sum(dim=1, keepdim=True))[:, 0]
        scored = ScoredBatch(
            token_rewards=rewards.tokens,
            sequence_rewards=rewards.sequences,
            logprobs=policy[..., 0],
            reference_logprobs=reference,
            values=torch.where(valid, states[:, :-1], 0.0),
            bootstrap_values=torch.where(rollout.ended.to(valid.device), 0.0, after),
            response_mask=valid,
        )
        return scored, metrics

    def critic_states(self, rollout: RolloutBatch) -> Tensor | None:
        """``[B, R + 1]`` values on last stages, as ``score_states`` gives them.

        Without bootstrapping values are 0 behind the last token, and are read at the places where
        the update reads them, so that old and new values agree to the last bit.
        """
        context = self.context
        if context.config.algorithm.bootstrap_truncated:
            return score_states(context, rollout)
        values = score_tokens(context, "critic", rollout, "before", read_value())
        return None if values is None else F.pad(values, (0, 1))

    def rewards(self, rollout: RolloutBatch, prompts: PromptBatch) -> Rewards | None:
        """Rewards of the answers, on last stages. Entered by every rank."""
        return self.rewarder.score(rollout, prompts)

    def judge(self, prompts: PromptBatch, step: int) -> tuple[Judged, Metrics]:
        """Rollout, score, cut. Entered by every rank."""
        rollout = self.rollout(prompts, step)
        scored, metrics = self.score(rollout, prompts, step)
        start, dense = time.perf_counter(), None
        if scored is not None:
            dense = make_dense(
                self.context,
                scored,
                rollout,
                running=self.running,
                cut_steps=self.rewarder.cut_steps,
                offline=self.offline,
            )
        self.seconds["mask"] = time.perf_counter() - start
        return Judged(rollout, scored, dense), metrics

    def mask(self, judged: Judged, rows: Tensor, chosen: Tensor) -> tuple[Tensor, Metrics]:
        """Eq. 13 for the answers at ``rows`` with their labels, on a last stage.

        ``mask.kind: none`` keeps every response token of every answer.
        """
        valid, signs = judged.scored.response_mask[rows], judged.dense.signs[rows]
        mask = valid
        if self.context.config.mask.kind == "adaptive":
            mask = adaptive_mask(signs, chosen, valid)
        rewards = judged.dense.sequence_rewards[rows]
        judged_rows = judged.scored.judged[rows]
        messages = message_counts(judged.dense.messages[rows], signs).sum()
        metrics = {
            "mask/num_messages": count_metric(messages, judged_rows.sum()),
            "mask/mean_message_tokens": count_metric((signs != 0).sum(), messages),
            "mask/kept_fraction": count_metric(mask.sum(), valid.sum()),
            "mask/empty_answers": count_metric(
                (judged_rows & ~mask.any(dim=1)).sum(), judged_rows.sum()
            ),
            "reward/chosen": count_metric(rewards[chosen].sum(), chosen.sum()),
        }
        if self.context.config.algorithm.rejects_answers:
            rejected = judged_rows & ~chosen
            metrics["reward/rejected"] = count_metric(rewards[rejected].sum(), rejected.sum())
        return mask, metrics

    def timings(self, rollout: RolloutBatch, update_seconds: float, updated: int) -> dict:
        """The time and throughput metrics of a step: this rank's clock, all replicas' tokens.

        Entered by every rank; ``updated`` is the number of tokens in this replica's rows.
        """
        tokens = self.context.over_replicas(int(rollout.response_lengths.sum()))
        seconds = {**self.seconds, "update": update_seconds}
        named = {f"time/{name}_seconds": value for name, value in seconds.items()}
        if "rollout" in seconds:
            named["throughput/rollout_tokens_per_second"] = tokens / seconds["rollout"]
        updated = self.context.over_replicas(updated)
        named["throughput/update_tokens_per_second"] = updated / max(update_seconds, 1e-9)
        return named


def treat_truncated(section: RolloutSection, rewards: Rewards, rollout: RolloutBatch) -> Rewards:
    """What ``rollout.truncated`` makes of the answers that did not end by themselves."""
    truncated = ~rollout.ended.to(rewards.valid.device)
    if section.truncated == "mask":
        return rewards.without(truncated)
    if section.truncated == "penalise":
        return rewards.less(section.truncated_penalty, truncated)
    return rewards


def _sampled_metrics(
    rollout: RolloutBatch, rewards: Rewards, policy: Tensor, reference: Tensor
) -> Metrics:
    """Of the sampled answers, those that are not learned from too (last stages).

    Args:
        rollout: the answers.
        rewards: before the truncated ones are treated apart.
        policy: ``[B, R, 2]`` log-probs and entropies.
        reference: ``[B, R]`` log-probs.
    """
    failed, rows = rewards.failed, len(rollout.rows)
    by_policy = rewards.valid & ~rollout.from_reference.to(failed.device)[:, None]
    logratio = torch.where(by_policy, policy[..., 0] - reference, 0.0)
    return {
        "kl/ref_nats": count_metric(logratio.sum(), by_policy.sum()),
        "policy/entropy_nats": count_metric(policy[..., 1][by_policy].sum(), by_policy.sum()),
        "reward/failed_fraction": count_metric(failed.sum(), rows),
        "reward/mean": count_metric(rewards.sequences[~failed].sum(), (~failed).sum()),
        "rollout/response_tokens": count_metric(rollout.response_lengths.sum(), rows),
        "rollout/ended_fraction": count_metric(rollout.ended.sum(), rows),
    }
