"""AKTO: Kahneman-Tversky optimization on the kept tokens of every answer, without pairs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from megatron_amrlhf.algorithms.choices import is_flat
from megatron_amrlhf.algorithms.policy import PolicyAlgorithm, all_rows
from megatron_amrlhf.algorithms.selection import rewards_by_prompt
from megatron_amrlhf.algorithms.update import run_updates, split_units
from megatron_amrlhf.experience.context import count_metric
from megatron_amrlhf.experience.maker import Judged
from megatron_amrlhf.experience.scoring import read_logprobs, score_tokens
from megatron_amrlhf.losses.kto import KtoTargets, kto_loss, reference_point
from megatron_amrlhf.losses.reduce import Metrics
from megatron_amrlhf.mask.adaptive import chosen_labels
from megatron_amrlhf.parallel.collectives import gather_objects
from megatron_amrlhf.parallel.mesh import Mesh
from megatron_amrlhf.types import MaskedBatch, RolloutBatch, TrainBatch


@dataclass(frozen=True)
class KtoBatch(TrainBatch[KtoTargets]):
    """A TrainBatch whose rows have a mismatched pair each, for the reference point z0.

    Attributes:
        mismatched: each row's prompt with an answer to another prompt, known to every rank; on
            last stages ``targets`` says what is kept of it, and what the reference says.
    """

    mismatched: RolloutBatch

    def select(self, index: Tensor) -> KtoBatch:
        """The rows at ``index`` (1-D int64), in that order, with their mismatched pairs."""
        return replace(super().select(index), mismatched=self.mismatched.select(index))


class Kto(PolicyAlgorithm):
    """Learns from every answer; the chosen ones are desirable, the others undesirable."""

    def choose(self, judged: Judged, step: int) -> tuple[Tensor, Tensor]:
        rewards = judged.dense.sequence_rewards
        labels = chosen_labels(
            rewards,
            self.context.config.mask.label,
            judged.rollout.group_ids.to(rewards.device),
            group=self.context.mesh.dp_group,
            judged=judged.scored.judged,
        )
        return all_rows(judged), labels

    def learn(
        self, batch: MaskedBatch, rows: Tensor, judged: Judged, step: int
    ) -> tuple[Metrics, dict]:
        config = self.context.config
        samples = config.rollout.samples_per_prompt
        has_label, metrics = None, {}
        if judged.scored is not None:
            flat = is_flat(rewards_by_prompt(judged))
            has_label = labelled(batch.judged, flat, config.mask.label)
            metrics = {"kto/flat_groups": count_metric(flat.sum(), flat.numel())}
        mismatched, kept, counted = mismatched_pairs(batch, samples, self.context.mesh)
        read = read_logprobs(self.context, self.logprob_temperature())
        reference = score_tokens(self.context, "reference", mismatched, "before", read)
        targets = None
        if judged.scored is not None and has_label is not None and reference is not None:
            targets = KtoTargets(
                denominator=has_label[:, None],  # one an answer
                mask=batch.mask,
                valid=judged.scored.response_mask,
                reference_logprobs=judged.scored.reference_logprobs,
                chosen=batch.chosen,
                mismatched_mask=kept.to(batch.mask.device),
                mismatched_reference=reference,
                mismatched_judged=counted.to(batch.mask.device),
            )
        train = KtoBatch(**vars(TrainBatch.of(batch, targets)), mismatched=mismatched)
        learned, engine = self.update(train)
        return metrics | learned, engine

    def update(self, train: KtoBatch) -> tuple[Metrics, dict]:
        """All optimizer steps on one rollout. Entered by every rank."""
        minibatches, mesh = self.context.config.algorithm.minibatches, self.context.mesh
        split = split_units(len(train.rows), minibatches, None, mesh)
        parts = [train.select(rows) for rows in split]
        roles = {"actor": self.update_actor}
        return run_updates(self.context, parts, roles, passes=2)  # z0 is scored before

    def reference_point(self, part: KtoBatch) -> Tensor | None:
        """z0 of the policy as it is now, None but on last stages. Entered by every rank."""
        read = read_logprobs(self.context, self.logprob_temperature())
        logprobs = score_tokens(self.context, "actor", part.mismatched, "before", read)
        if logprobs is None:
            return None
        width = logprobs.shape[1]  # the targets are as wide as the whole rollout
        reference = part.targets.mismatched_reference[:, :width]
        mask = part.targets.mismatched_mask[:, :width]
        counted = part.targets.mismatched_judged
        return reference_point(logprobs, reference, mask, self.context.mesh.dp_group, counted)

    @property
    def reads_kept_alone(self) -> bool:
        return True

    def update_actor(self, part: KtoBatch):
        """One optimizer step of the policy."""
        algorithm = self.context.config.algorithm
        loss = partial(
            kto_loss,
            z0=self.reference_point(part),
            beta=algorithm.beta,
            desirable_weight=algorithm.desirable_weight,
            undesirable_weight=algorithm.undesirable_weight,
        )
        return self.update_policy(part, loss)


def labelled(has_reward: Tensor, flat: Tensor, label: str) -> Tensor:
    """``[B]`` bool: the answers whose label says something, which are those with a term.

    Args:
        has_reward: ``[B]`` bool, not those whose reward failed; as many answers to each prompt.
        flat: ``[G]`` bool, prompts whose answers all have the same reward: by ``label: group`` no
            one of them is better or worse.
        label: ``mask.label``.
    """
    if label != "group":
        return has_reward
    return has_reward & ~flat.repeat_interleave(len(has_reward) // len(flat))


def mismatched_pairs(
    batch: MaskedBatch, samples: int, mesh: Mesh
) -> tuple[RolloutBatch, Tensor, Tensor]:
    """Each prompt with the answer of the same number to the step's next prompt.

    Prompts go round over all replicas in their global order, so that the pairs do not depend on
    the layout. An answer takes its mask with it, and whether it has a reward. Entered by every
    rank.

    Args:
        batch: this replica's answers, ``samples`` to a prompt one after the other.
        samples: answers a prompt.
        mesh: the mesh.

    Returns:
        The pairs in the batch's order (fields but rows are those of the batch's answers), their
        kept tokens ``[B, R']`` and whether their answer has a reward ``[B]``, bool on the CPU.
    """
    rollout = batch.rollout
    lengths, counts = rollout.prompt_lengths.tolist(), rollout.response_lengths.tolist()
    answers = [row[length:] for row, length in zip(rollout.rows, lengths, strict=True)]
    kept = [mask[:count] for mask, count in zip(batch.mask.cpu(), counts, strict=True)]
    counted = batch.judged.tolist()
    firsts = gather_objects((answers[:samples], kept[:samples], counted[:samples]), mesh.dp_group)
    next_answers, next_kept, next_counted = firsts[(mesh.dp_rank + 1) % mesh.dp_size]
    answers, kept = answers[samples:] + next_answers, kept[samples:] + next_kept
    has_reward = torch.tensor(counted[samples:] + next_counted)
    parts = zip(rollout.rows, lengths, answers, strict=True)
    rows = tuple(torch.cat([row[:length], answer]) for row, length, answer in parts)
    mismatched = replace(rollout, rows=rows)
    valid = mismatched.response_mask
    return mismatched, torch.zeros_like(valid).masked_scatter(valid, torch.cat(kept)), has_reward
