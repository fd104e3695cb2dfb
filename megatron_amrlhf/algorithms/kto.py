"""AKTO: Kahneman-Tversky optimization on the kept tokens of every answer, without pairs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from megatron_amrlhf.algorithms.choices import is_flat
from megatron_amrlhf.algorithms.policy import PolicyAlgorithm, all_rows
from megatron_amrlhf.algorithms.selection import rewards_by_prompt
from megatron_amrlhf.algorithms.update import run_updates, split_units
from megatron_amrlhf.config.algorithms import KtoAlgorithm
from megatron_amrlhf.experience.context import count_metric
from megatron_amrlhf.experience.maker import Experience
from megatron_amrlhf.experience.scoring import read_logprobs, score_tokens
from megatron_amrlhf.losses.kto import KtoTargets, kto_loss, reference_point
from megatron_amrlhf.losses.reduce import Metrics
from megatron_amrlhf.losses.targets import AnswerTargets
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


class Kto(PolicyAlgorithm[KtoAlgorithm]):
    """Learns from every answer; the chosen ones are desirable, the others undesirable."""

    def choose(self, experience: Experience, step: int) -> tuple[Tensor, Tensor]:
        rewards = experience.dense.sequence_rewards
        labels = chosen_labels(
            rewards,
            self.context.config.mask.label,
            experience.rollout.group_ids.to(rewards.device),
            group=self.context.mesh.dp_group,
            has_reward=experience.scored.has_reward,
        )
        return all_rows(experience), labels

    def targets(
        self, batch: MaskedBatch, rows: Tensor, experience: Experience
    ) -> tuple[AnswerTargets, Metrics]:
        """What the loss reads beside the mismatched pairs (last stages)."""
        flat = is_flat(rewards_by_prompt(experience))
        has_label = labelled(batch.has_reward, flat, self.context.config.mask.label)
        targets = AnswerTargets(
            denominator=has_label[:, None],  # one an answer
            mask=batch.mask,
            valid=experience.scored.response_mask,
            reference_logprobs=experience.scored.reference_logprobs,
        )
        return targets, {"kto/flat_groups": count_metric(flat.sum(), flat.numel())}

    def train_batch(
        self, batch: MaskedBatch, rows: Tensor, experience: Experience | None
    ) -> tuple[KtoBatch, Metrics]:
        """The answers, and with each its mismatched pair."""
        train, metrics = super().train_batch(batch, rows, experience)
        samples = self.context.config.rollout.samples_per_prompt
        mismatched, kept, counted = mismatched_pairs(batch, samples, self.context.mesh)
        read = read_logprobs(self.context, self.logprob_temperature())
        reference = score_tokens(self.context, "reference", mismatched, "before", read)
        targets = None
        if reference is not None:
            targets = KtoTargets(
                **vars(train.targets),
                chosen=batch.chosen,
                mismatched_mask=kept.to(batch.mask.device),
                mismatched_reference=reference,
                mismatched_has_reward=counted.to(batch.mask.device),
            )
        return KtoBatch(**{**vars(train), "targets": targets}, mismatched=mismatched), metrics

    def update(self, train: TrainBatch, step: int) -> tuple[Metrics, dict]:
        """All optimizer steps on one rollout. Entered by every rank."""
        assert isinstance(train, KtoBatch), "train_batch() made it"
        minibatches, mesh = self.section.minibatches, self.context.mesh
        split = split_units(len(train.rows), minibatches, None, mesh)
        parts = [train.select(rows) for rows in split]
        roles = {"actor": self.actor_step}
        return run_updates(self.context, parts, roles, passes=2)  # z0 is scored before

    def reference_point(self, part: KtoBatch) -> Tensor | None:
        """z0 of the policy as it is now, None but on last stages. Entered by every rank."""
        read = read_logprobs(self.context, self.logprob_temperature())
        logprobs = score_tokens(self.context, "actor", part.mismatched, "before", read)
        if logprobs is None or part.targets is None:
            return None
        width = logprobs.shape[1]  # the targets are as wide as the whole rollout
        reference = part.targets.mismatched_reference[:, :width]
        mask = part.targets.mismatched_mask[:, :width]
        counted = part.targets.mismatched_has_reward
        return reference_point(logprobs, reference, mask, self.context.mesh.dp_group, counted)

    @property
    def reads_kept_alone(self) -> bool:
        return True

    def actor_step(self, part: KtoBatch):
        """One optimizer step of the policy."""
        algorithm = self.section
        # z0 is of the whole optimizer step, before it: no micro-batch or layout changes it.
        loss = partial(
            kto_loss,
            z0=cast(Tensor, self.reference_point(part)),  # it is, where the loss is called
            beta=algorithm.beta,
            desirable_weight=algorithm.desirable_weight,
            undesirable_weight=algorithm.undesirable_weight,
        )
        return self.policy_step(part, loss)


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
    counted = batch.has_reward.tolist()
    # Pairs cross replicas for the last prompt alone: it needs the next replica's first.
    firsts = gather_objects((answers[:samples], kept[:samples], counted[:samples]), mesh.dp_group)
    next_answers, next_kept, next_counted = firsts[(mesh.dp_rank + 1) % mesh.dp_size]
    answers, kept = answers[samples:] + next_answers, kept[samples:] + next_kept
    has_reward = torch.tensor(counted[samples:] + next_counted)
    parts = zip(rollout.rows, lengths, answers, strict=True)
    rows = tuple(torch.cat([row[:length], answer]) for row, length, answer in parts)
    mismatched = replace(rollout, rows=rows)
    valid = mismatched.response_mask
    # masked_scatter fills row by row, in the order of the answers.
    return mismatched, torch.zeros_like(valid).masked_scatter(valid, torch.cat(kept)), has_reward
