"""Answers to held-out prompts, before and after a run: same prompts, same random numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_amrlhf.data.order import PADDING, shard
from megatron_amrlhf.data.prompts import EncodedPrompt
from megatron_amrlhf.experience.context import Context, count_metric
from megatron_amrlhf.experience.preemption import until_stopped
from megatron_amrlhf.experience.rewarding import Rewarder
from megatron_amrlhf.experience.sources import prompt_batch
from megatron_amrlhf.parallel.mesh import Mesh
from megatron_amrlhf.rewards.judge.outcomes import REASONS
from megatron_amrlhf.rollout.generator import Generator

EVALUATION_STEP = 0  # training steps count from 1, so these random numbers are never reused


def evaluate_policy(
    context: Context, generator: Generator, rewarder: Rewarder, prompts: Sequence[EncodedPrompt]
) -> dict[str, float]:
    """Samples one answer of the policy to each held-out prompt. Entered by every rank.

    Args:
        context: the run.
        generator: samples the answers.
        rewarder: gives their rewards.
        prompts: the held-out prompts.

    Returns:
        ``eval/reward_mean``: mean raw sequence reward; ``eval/answer_accuracy``: share of
        reference answers met, by the judge of the verifiable reward (of the answers that it
        judges); ``eval/not_judged``: share of those that it does not (prompts that have one);
        ``eval/response_tokens``; ``eval/ended_fraction``. Empty without held-out prompts.
    """
    count = min(context.config.evaluation.prompts, len(prompts))
    if not count:
        return {}
    mine, group_ids, is_own = heldout_rows(count, context.mesh)
    batch = prompt_batch([prompts[i] for i in mine], group_ids)
    with context.console.track("evaluate", len(mine)):
        rollout = until_stopped(
            context, lambda: generator.generate(batch, EVALUATION_STEP, samples=1)
        )
    rewards = rewarder.score(rollout, batch)
    metrics = {}
    if rewards is not None:
        has_reward = ~rewards.failed & is_own.to(rewards.failed.device)
        verdicts = rewarder.verdicts(rollout, batch)
        met, reasons = verdicts.rewards[is_own], verdicts.not_judged[is_own]
        has_reference = reasons != REASONS.index("no_reference")
        tokens, own = rollout.response_lengths[is_own].sum(), is_own.sum()
        metrics = {
            "eval/reward_mean": count_metric(rewards.sequences[has_reward].sum(), has_reward.sum()),
            "eval/answer_accuracy": count_metric(met.nansum(), (~met.isnan()).sum()),
            "eval/not_judged": count_metric(
                (met.isnan() & has_reference).sum(), has_reference.sum()
            ),
            "eval/response_tokens": count_metric(tokens, own),
            "eval/ended_fraction": count_metric(rollout.ended[is_own].sum(), own),
        }
    return context.publish(metrics)


def heldout_rows(count: int, mesh: Mesh) -> tuple[list[int], Tensor, Tensor]:
    """This replica's share of ``count`` held-out rows, of the same length n on every replica.

    Returns:
        Indices of rows, where the share is shorter row 0 in the place of the missing one; ``[n]``
        int64 ascending numbers of the rows, their indices where they are this replica's own; and
        ``[n]`` bool, whether they are.
    """
    share = shard(list(range(count)), mesh.dp_rank, mesh.dp_size)
    is_own = torch.tensor([index != PADDING for index in share])
    mine = [max(index, 0) for index in share]
    return mine, torch.arange(mine[0], mine[0] + len(mine)), is_own
