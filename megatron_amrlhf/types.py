"""Records that travel through a step, and the legend of shape suffixes.

Legend: ``B`` rows (samples) on this data-parallel rank, ``T`` positions of a padded row, ``R``
response positions (prompt stripped, left-aligned, padded right), ``H`` hidden size, ``V``
vocabulary, ``D`` reward attributes, ``K`` messages. A ``mask`` is bool, a ``weight`` is float.

Alignment of per-response-token tensors ``[B, R]``: index ``j`` is the response token at position
``prompt_length + j``. Its log-prob and its value come from the model output one position earlier
(the state before the token), its reward from the output at its own position (after the token).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Generic, Self, TypeVar

import torch
from torch import Tensor

from megatron_amrlhf.losses.targets import Targets


@dataclass(frozen=True)
class PromptBatch:
    """Prompts of one step on one data-parallel rank.

    Attributes:
        rows: token ids of each prompt, 1-D int64 on CPU.
        group_ids: ``[B]`` int64, global id of each prompt in this step (same on every layout).
        texts: the users' texts, without the template.
        answers: the reference answers, None where there is none.
        earlier: of each prompt what stands before the text: a system message of its own and
            earlier turns, ``{"role", "content"}``; None: nothing before any.
    """

    rows: tuple[Tensor, ...]
    group_ids: Tensor
    texts: tuple[str, ...]
    answers: tuple[str | None, ...]
    earlier: tuple[tuple[dict[str, str], ...], ...] | None = None

    def __post_init__(self):
        assert len(self.rows) == len(self.texts) == self.group_ids.shape[0] == len(self.answers)
        assert self.earlier is None or len(self.earlier) == len(self.rows)

    @property
    def conversations(self) -> tuple[tuple[dict[str, str], ...], ...]:
        """The turns of each prompt, the text last."""
        before = self.earlier or ((),) * len(self.texts)
        asked = ({"role": "user", "content": text} for text in self.texts)
        return tuple((*turns, turn) for turns, turn in zip(before, asked, strict=True))


@dataclass(frozen=True)
class RolloutBatch:
    """Prompts with their sampled answers; equal on every rank of a replica.

    Attributes:
        rows: prompt + response token ids of each sample, 1-D int64 on CPU.
        prompt_lengths: ``[B]`` int64.
        group_ids: ``[B]`` int64, which prompt a sample answers.
        sample_ids: ``[B]`` int64, global id of a sample in this step.
        from_reference: ``[B]`` bool, sampled by the reference instead of the policy.
        ended: ``[B]`` bool, the answer ends on an end token (else it was truncated).
    """

    rows: tuple[Tensor, ...]
    prompt_lengths: Tensor
    group_ids: Tensor
    sample_ids: Tensor
    from_reference: Tensor
    ended: Tensor

    def __post_init__(self):
        for field in (self.prompt_lengths, self.group_ids, self.sample_ids, self.ended):
            assert field.shape == (len(self.rows),), (field.shape, len(self.rows))
        assert self.from_reference.shape == (len(self.rows),)

    @property
    def response_lengths(self) -> Tensor:
        """``[B]`` int64, number of sampled tokens."""
        lengths = torch.tensor([row.numel() for row in self.rows], dtype=torch.int64)
        return lengths - self.prompt_lengths

    @property
    def response_mask(self) -> Tensor:
        """``[B, R]`` bool, True where a response token stands."""
        lengths_B = self.response_lengths
        width = int(lengths_B.max()) if lengths_B.numel() else 0
        return torch.arange(width)[None, :] < lengths_B[:, None]

    def select(self, index: Tensor) -> RolloutBatch:
        """The samples at ``index`` (1-D int64), in that order."""
        return RolloutBatch(
            rows=tuple(self.rows[i] for i in index.tolist()),
            prompt_lengths=self.prompt_lengths[index],
            group_ids=self.group_ids[index],
            sample_ids=self.sample_ids[index],
            from_reference=self.from_reference[index],
            ended=self.ended[index],
        )


@dataclass(frozen=True)
class ScoredBatch:
    """What the models say about the answers. Exists on last pipeline stages only.

    ``[B, R]`` float32 on the compute device but where said; entries past a response's end are 0.

    Attributes:
        token_rewards: scalar reward of each response token (raw reward units).
        sequence_rewards: ``[B]`` reward of each answer (raw units); NaN if it failed.
        logprobs: log-probs of the policy at the start of the step, nats; None where nothing reads
            them (``PolicySection.reads_policy``).
        reference_logprobs: log-probs of the reference, nats.
        values: critic values of the state before each token; zeros without a critic.
        bootstrap_values: ``[B]`` critic value of the state after the last token, for answers that
            were cut off if ``algorithm.bootstrap_truncated`` says so; else 0: they ended there.
        response_mask: ``[B, R]`` bool; all False for an answer whose reward failed.
    """

    token_rewards: Tensor
    sequence_rewards: Tensor
    logprobs: Tensor | None
    reference_logprobs: Tensor
    values: Tensor
    bootstrap_values: Tensor
    response_mask: Tensor

    def __post_init__(self):
        shape = self.response_mask.shape
        assert self.bootstrap_values.shape == shape[:1], (self.bootstrap_values.shape, shape)
        for field in (self.token_rewards, self.logprobs, self.reference_logprobs, self.values):
            assert field is None or field.shape == shape, (field, shape)
        assert self.sequence_rewards.shape == shape[:1]

    @property
    def policy_logprobs(self) -> Tensor:
        """``logprobs`` where ``reads_policy`` has said that they are read."""
        assert self.logprobs is not None, "reads_policy says that nothing reads them"
        return self.logprobs

    @property
    def has_reward(self) -> Tensor:
        """``[B]`` bool, the answers whose reward did not fail."""
        return self.response_mask.any(dim=1)


@dataclass(frozen=True)
class MaskedBatch:
    """A rollout with its adaptive mask; the mask's bits are equal on every rank of a replica.

    Attributes:
        rollout: the samples.
        mask: ``[B, R]`` bool, the tokens that the loss reads (eq. 13).
        chosen: ``[B]`` bool, the preferred answers (Y_c of eq. 13).
        has_reward: ``[B]`` bool, the answers whose reward did not fail; the others are in no mask.
    """

    rollout: RolloutBatch
    mask: Tensor
    chosen: Tensor
    has_reward: Tensor

    def __post_init__(self):
        assert self.mask.dtype == torch.bool and self.mask.shape[0] == len(self.rollout.rows)


T = TypeVar("T", bound=Targets)


@dataclass(frozen=True)
class TrainBatch(Generic[T]):
    """Rows of one optimizer step on one data-parallel rank, the same for every algorithm.

    Attributes:
        rows: token ids of each row, 1-D int64 on CPU, known to every rank of the replica.
        prompt_lengths: ``[B]`` int64.
        targets: what the loss reads, of the same rows; None but on last pipeline stages.
        ids: ``[B]`` int64 that name the rows in messages: sample ids of a rollout, places in the
            step's data of a reward model.
        kept_lengths: ``[B]`` int64, response tokens up to the last one in the mask, known to
            every rank of the replica.
    """

    rows: tuple[Tensor, ...]
    prompt_lengths: Tensor
    targets: T | None
    ids: Tensor
    kept_lengths: Tensor

    @classmethod
    def of(cls, batch: MaskedBatch, targets: T | None) -> TrainBatch[T]:
        """All answers of a masked rollout; the rows of failed ones are empty.

        No loss reads these, and what is not finite in a row would be so in its gradient, 0 or not.
        """
        mask, rollout, has_reward = batch.mask.cpu(), batch.rollout, batch.has_reward.cpu()
        kept = zip(rollout.rows, has_reward.tolist(), strict=True)
        return cls(
            rows=tuple(row if is_kept else row[:0] for row, is_kept in kept),
            prompt_lengths=torch.where(has_reward, rollout.prompt_lengths, 0),
            targets=targets,
            ids=rollout.sample_ids,
            kept_lengths=last_true(mask) + 1,
        )

    @classmethod
    def whole(
        cls, rows: tuple[Tensor, ...], prompt_lengths: Tensor, targets: T | None
    ) -> TrainBatch[T]:
        """Rows without a mask, named by their places."""
        lengths = torch.tensor([row.numel() for row in rows], dtype=torch.int64)
        ids = torch.arange(len(rows))
        return cls(rows, prompt_lengths, targets, ids, lengths - prompt_lengths)

    def trim_to_kept(self) -> TrainBatch[T]:
        """The rows without what follows their last kept token; rows without one are empty.

        Outputs up to there do not depend on what follows, so a loss that reads kept tokens alone
        is the same.
        """
        keeps = self.kept_lengths > 0
        lengths = torch.where(keeps, self.prompt_lengths + self.kept_lengths, 0)
        rows = zip(self.rows, lengths.tolist(), strict=True)
        return replace(
            self,
            rows=tuple(row[:length] for row, length in rows),
            prompt_lengths=torch.where(keeps, self.prompt_lengths, 0),
        )

    def select(self, index: Tensor) -> Self:
        """The rows at ``index`` (1-D int64), in that order."""
        return replace(
            self,
            rows=tuple(self.rows[i] for i in index.tolist()),
            prompt_lengths=self.prompt_lengths[index],
            targets=self.targets and self.targets.select(index),
            ids=self.ids[index],
            kept_lengths=self.kept_lengths[index],
        )


def last_true(mask: Tensor) -> Tensor:
    """``[B]`` int64 column of the last True of ``[B, R]`` bool, -1 where there is none."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, columns, -1).amax(dim=1) if mask.shape[1] else mask.sum(1) - 1
