"""Answers from a file of pairs instead of a rollout: offline DPO and rejection sampling."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from megatron_amrlhf.data.order import DataPosition
from megatron_amrlhf.data.scored_pairs import ScoredPair
from megatron_amrlhf.experience.context import Context, count_metric
from megatron_amrlhf.experience.heldout import heldout_rows
from megatron_amrlhf.experience.scoring import read_logprobs, score_tokens
from megatron_amrlhf.experience.sources import places_of
from megatron_amrlhf.losses.dpo import logprob_sizes
from megatron_amrlhf.losses.orm import pair_accuracy
from megatron_amrlhf.types import PromptBatch, RolloutBatch


class PairSource:
    """Takes the answers of a step's pairs, chosen, rejected, chosen, rejected ...

    Their dense reward comes from the reward models; without a PRM the file's scores stand for its.
    Where there are neither, nothing reads a reward, and rewards are 0 and not among the metrics.

    Args:
        context: the run.
        data: the pairs.
        position: which of them a step takes.
        reward_models: roles of the run's reward models.
    """

    def __init__(
        self,
        context: Context,
        data: Sequence[ScoredPair],
        position: DataPosition,
        reward_models: Collection[str],
    ):
        self.data, self.position, self._mesh = data, position, context.mesh
        self._has_prm = "prm" in reward_models
        has_rewards = bool(reward_models) or data[0].rewards is not None
        # The policy has not sampled these answers; and nobody may have given a reward.
        self.unknown_metrics: tuple[str, ...] = ("kl/ref_nats",)
        if not has_rewards:
            self.unknown_metrics += ("reward/",)

    def prompts(self, step: int) -> PromptBatch:
        """The prompts of this replica's pairs of a step."""
        places, indices = places_of(self.position, step, self._mesh)
        pairs = [self.data[i].pair for i in indices]
        rows = tuple(pair.chosen[: pair.prompt_length] for pair in pairs)
        texts = tuple(pair.text for pair in pairs)
        return PromptBatch(rows, places, texts, answers=(None,) * len(rows))

    def answers(self, prompts: PromptBatch, step: int) -> RolloutBatch:
        """The answers of this replica's pairs of a step; sample 2 i + 1 is pair i's rejected."""
        places, indices = places_of(self.position, step, self._mesh)
        return pair_answers([self.data[i] for i in indices], places, indices)

    def rewards(self, answers: RolloutBatch) -> Tensor | None:
        """``[B, R]`` rewards by the file's scores, 0 where it has none; None beside a PRM."""
        if self._has_prm:
            return None
        rewards = torch.zeros(answers.response_mask.shape)
        for row, sample in enumerate(answers.sample_ids.tolist()):
            given = self.data[sample // 2].rewards
            if given is not None:
                own = given[sample % 2]
                rewards[row, : own.numel()] = own
        return rewards


def pair_answers(pairs: list[ScoredPair], places: Tensor, indices: list[int]) -> RolloutBatch:
    """Both answers to each pair's prompt.

    Args:
        pairs: this replica's pairs.
        places: ``[P]`` int64, each pair's number in the step.
        indices: each pair's number in the data.
    """
    count = 2 * len(pairs)
    lengths = torch.tensor([pair.pair.prompt_length for pair in pairs], dtype=torch.int64)
    samples = 2 * torch.tensor(indices, dtype=torch.int64)
    return RolloutBatch(
        rows=tuple(row for pair in pairs for row in (pair.pair.chosen, pair.pair.rejected)),
        prompt_lengths=lengths.repeat_interleave(2),
        group_ids=places.repeat_interleave(2),
        sample_ids=torch.stack([samples, samples + 1], dim=1).flatten(),
        from_reference=torch.zeros(count, dtype=torch.bool),
        ended=torch.ones(count, dtype=torch.bool),
    )


def evaluate_pairs(
    context: Context, pairs: Sequence[ScoredPair], temperature: float
) -> dict[str, float]:
    """How far the policy prefers the chosen answers of held-out pairs. Entered by every rank.

    Args:
        context: the run.
        pairs: the held-out pairs.
        temperature: softmax temperature that log-probs are taken at.

    Returns:
        ``eval/pair_margin``: mean of log pi/pi_ref of the chosen answer minus that of the rejected
        one, nats; ``eval/pair_accuracy``: share of margins above 0, a tie counts half;
        ``eval/chosen_nll``: mean over the chosen answers' tokens, nats. Empty without pairs.
    """
    mesh, config = context.mesh, context.config
    count = min(config.evaluation.prompts, len(pairs))
    if not count:
        return {}
    mine, places, is_own = heldout_rows(count, mesh)
    answers = pair_answers([pairs[i] for i in mine], places, mine)
    read = read_logprobs(context, temperature)
    logprobs, reference = (
        score_tokens(context, role, answers, "before", read) for role in ("actor", "reference")
    )
    metrics = {}
    if logprobs is not None and reference is not None:
        own = is_own.repeat_interleave(2)
        valid = answers.response_mask[own].to(logprobs.device)
        logprobs, reference = logprobs[own], reference[own]
        logratio = torch.where(valid, logprobs - reference, 0.0).sum(dim=1)
        margins = logratio[0::2] - logratio[1::2]
        sizes = logprob_sizes(logprobs, reference, valid).unflatten(0, (-1, 2)).sum(dim=1)
        accuracy = pair_accuracy(margins, sizes).sum()
        chosen_nll = -torch.where(valid, logprobs, 0.0)[0::2].sum()
        metrics = {
            "eval/pair_accuracy": count_metric(accuracy, margins.numel()),
            "eval/pair_margin": count_metric(margins.sum(), margins.numel()),
            "eval/chosen_nll": count_metric(chosen_nll, valid[0::2].sum()),
        }
    return context.publish(metrics)
