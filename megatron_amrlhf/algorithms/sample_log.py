"""Writes the first answers of a step to samples.jsonl, from the rank that knows their rewards."""

from __future__ import annotations

from torch import Tensor

from megatron_amrlhf.algorithms.context import Context
from megatron_amrlhf.algorithms.experience import Judged
from megatron_amrlhf.data.token_text import answer_text, token_texts
from megatron_amrlhf.report.samples import Message, SampleRecord, write_samples
from megatron_amrlhf.types import MaskedBatch, PromptBatch


def log_samples(
    context: Context,
    step: int,
    prompts: PromptBatch,
    judged: Judged,
    rows: Tensor,
    batch: MaskedBatch,
) -> None:
    """Logs ``run.log_samples`` of the answers that are learned from (DP rank 0's)."""
    if not context.mesh.is_writer:
        return
    count = min(context.config.run.log_samples, len(batch.rollout.rows))
    first_group = int(prompts.group_ids[0])
    records = []
    for place in range(count):
        source = int(rows[place])
        prompt = prompts.texts[int(batch.rollout.group_ids[place]) - first_group]
        records.append(_record(context, step, prompt, judged, source, batch, place))
    write_samples(context.folder.samples, records)


def _record(
    context: Context,
    step: int,
    prompt: str,
    judged: Judged,
    source: int,
    batch: MaskedBatch,
    place: int,
) -> SampleRecord:
    rollout, tokenizer = batch.rollout, context.tokenizer
    ids = rollout.rows[place][int(rollout.prompt_lengths[place]) :].tolist()
    length = len(ids)
    return SampleRecord(
        step=step,
        prompt=prompt,
        answer=answer_text(tokenizer, ids, bool(rollout.ended[place])),
        token_ids=ids,
        tokens=token_texts(tokenizer, ids),
        token_rewards=judged.scored.token_rewards[source, :length].tolist(),
        signal=judged.dense.signal[source, :length].tolist(),
        baseline=float(judged.dense.baseline[source]),
        delta=float(judged.dense.delta),
        mask=batch.mask[place, :length].int().tolist(),
        messages=_messages(judged, source, length),
        sequence_reward=float(judged.dense.sequence_rewards[source]),
        chosen=bool(batch.chosen[place]),
        ended=bool(rollout.ended[place]),
        from_reference=bool(rollout.from_reference[place]),
    )


def _messages(judged: Judged, source: int, length: int) -> list[Message]:
    """Runs of equal message id of one answer."""
    dense = judged.dense
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
