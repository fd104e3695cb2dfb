"""Answers to held-out prompts, before and after a run: same prompts, same random numbers."""

from __future__ import annotations

import torch

from megatron_amrlhf.algorithms.context import count_metric
from megatron_amrlhf.algorithms.experience import ExperienceMaker
from megatron_amrlhf.algorithms.preemption import until_stopped
from megatron_amrlhf.data.order import shard
from megatron_amrlhf.data.prompts import EncodedPrompt
from megatron_amrlhf.rollout.generator import generate
from megatron_amrlhf.types import PromptBatch

EVALUATION_STEP = 0  # training steps count from 1, so these random numbers are never reused


def evaluate_policy(maker: ExperienceMaker, prompts: list[EncodedPrompt]) -> dict[str, float]:
    """Samples one answer of the policy to each held-out prompt. Entered by every rank.

    Returns:
        ``eval/reward_mean``: mean raw sequence reward; ``eval/answer_accuracy``: share of
        reference answers met, by math-verify (prompts that have one); ``eval/response_tokens``;
        ``eval/ended_fraction``. Empty without held-out prompts.
    """
    context = maker.context
    mesh, config = context.mesh, context.config
    count = min(config.evaluation.prompts, len(prompts)) // mesh.dp_size * mesh.dp_size
    if not count:
        return {}
    mine = shard(list(range(count)), mesh.dp_rank, mesh.dp_size)
    chosen = [prompts[i] for i in mine]
    batch = PromptBatch(
        rows=tuple(prompt.row for prompt in chosen),
        group_ids=torch.tensor(mine),
        texts=tuple(prompt.text for prompt in chosen),
        answers=tuple(prompt.answer for prompt in chosen),
    )
    size, seed = config.rollout.micro_batch_size, config.run.seed
    with context.console.track("evaluate", len(mine)) as bar:
        rollout = until_stopped(
            context,
            lambda: generate(
                context.engine,
                batch,
                1,
                0,
                maker.settings(),
                seed,
                EVALUATION_STEP,
                size,
                bar.advance,
                context.stop.seen,
            ),
        )
    rewards = maker.rewarder.score(rollout, batch)
    metrics = {}
    if rewards is not None:
        judged, tokens = ~rewards.failed, int(rollout.response_lengths.sum())
        verdicts, _ = maker.rewarder.verdicts(rollout, batch)
        metrics = {
            "eval/reward_mean": count_metric(rewards.sequences[judged].sum(), judged.sum()),
            "eval/answer_accuracy": count_metric(verdicts.nansum(), (~verdicts.isnan()).sum()),
            "eval/response_tokens": count_metric(tokens, len(mine)),
            "eval/ended_fraction": count_metric(rollout.ended.sum(), len(mine)),
        }
    return context.publish(metrics)
