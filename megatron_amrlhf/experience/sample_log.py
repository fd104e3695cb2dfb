"""Writes the first answers of a step to samples.jsonl, from the rank that knows their rewards."""

from __future__ import annotations

from torch import Tensor

from megatron_amrlhf.data.token_text import answer_text, token_texts
from megatron_amrlhf.experience.context import Context
from megatron_amrlhf.experience.maker import Experience
from megatron_amrlhf.report.samples import Message, SampleRecord, write_samples
from megatron_amrlhf.types import MaskedBatch, PromptBatch


def log_samples(
    context: Context,
    step: int,
    *,
    prompts: PromptBatch,
    experience: Experience | None,
    rows: Tensor,
    batch: MaskedBatch,
) -> None:
    """Logs the first ``run.log_samples`` of the answers (DP rank 0's), learned from or not.

    Args:
        context: the run.
        step: of the rollout.
        prompts: the answers' prompts.
        experience: of all answers; None but on last stages.
        rows: ``[S]`` int64, which of them are in ``batch``.
        batch: those that are learned from; one may be there several times.
    """
    if experience is None or not context.mesh.is_writer:
        return
    count = min(context.config.run.log_samples, len(experience.rollout.rows))
    first_group = int(prompts.group_ids[0])
    records = []
    for source in range(count):
        prompt = prompts.texts[int(experience.rollout.group_ids[source]) - first_group]
        places = (rows == source).nonzero()[:, 0].to(batch.mask.device)
        records.append(
            _record(
                context,
                step,
                prompt,
                experience=experience,
                source=source,
                batch=batch,
                places=places,
            )
        )
    write_samples(context.folder.samples, records)


def _record(
    context: Context,
    step: int,
    prompt: str,
    *,
    experience: Experience,
    source: int,
    batch: MaskedBatch,
    places: Tensor,
) -> SampleRecord:
    rollout, tokenizer = experience.rollout, context.tokenizer
    head, answer = rollout.rows[source].tensor_split([int(rollout.prompt_lengths[source])])
    ids, ended = answer.tolist(), bool(rollout.ended[source])
    length = len(ids)
    is_left_out = context.config.rollout.truncated == "mask" and not ended
    labels = set(batch.chosen[places].tolist())
    return SampleRecord(
        step=step,
        sample=int(rollout.sample_ids[source]),
        group=int(rollout.group_ids[source]),
        prompt=prompt,
        rendered=tokenizer.decode(head),
        answer=answer_text(tokenizer, ids, ended),
        token_ids=ids,
        tokens=token_texts(tokenizer, ids),
        token_rewards=experience.scored.token_rewards[source, :length].tolist(),
        signal=experience.dense.signal[source, :length].tolist(),
        baseline=float(experience.dense.baseline[source]),
        delta=float(experience.dense.delta),
        mask=_any_row(batch.mask[places, :length], length),
        messages=_messages(experience, source, length),
        sequence_reward=float(experience.dense.sequence_rewards[source]),
        use=_use(bool(experience.scored.has_reward[source]), is_left_out, labels),
        ended=ended,
        from_reference=bool(rollout.from_reference[source]),
    )


def _any_row(mask: Tensor, length: int) -> list[int]:
    """Whether any of an answer's rows keeps a token; 0 where there is no row."""
    return mask.any(dim=0).int().tolist() if len(mask) else [0] * length


def _use(has_reward: bool, is_left_out: bool, labels: set[bool]) -> str:
    """One of ``report.samples.USES``, by the labels of an answer's rows."""
    if not has_reward:
        return "left_out" if is_left_out else "failed"
    if len(labels) == 2:
        return "both"
    return {True: "chosen", False: "rejected"}[labels.pop()] if labels else "none"


def _messages(experience: Experience, source: int, length: int) -> list[Message]:
    """Runs of equal message id of one answer."""
    dense = experience.dense
    ids = dense.messages[source, :length].tolist()
    starts = [j for j in range(length) if j == 0 or ids[j] != ids[j - 1]]
    return [
        Message(
            start=start,
            end=end,
            sign=int(dense.signs[source, start]),
            reward=float(dense.message_rewards[source, start]),
        )
        for start, end in zip(starts, [*starts[1:], length], strict=True)
    ]
