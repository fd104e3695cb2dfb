"""What the policy said and what of it was learned from: ``samples.jsonl``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_amrlhf.report.files import append_jsonl, read_jsonl

REWARD_DIGITS = 4


@dataclass(frozen=True)
class Message:
    """A run of response tokens of one sign.

    Attributes:
        start: first token, counted from the response's start.
        end: one past the last token.
        sign: +1, 0 or -1.
        reward: the message's reward r_k.
    """

    start: int
    end: int
    sign: int
    reward: float


@dataclass(frozen=True)
class SampleRecord:
    """One answer with all that the mask made of it; lists have one entry a response token.

    Attributes:
        step: step of the rollout.
        prompt: the prompt's text.
        answer: the answer's text.
        token_ids: ids of the response tokens, or None to leave them out.
        tokens: text of each response token.
        token_rewards: dense reward of each token.
        mask: 1 where the loss reads the token.
        messages: the messages, in order.
        sequence_reward: reward of the whole answer.
        chosen: whether it is a preferred answer.
        ended: it ends on an end token; else it was cut at the length limit.
        from_reference: sampled by the reference instead of the policy.
    """

    step: int
    prompt: str
    answer: str
    token_ids: list[int] | None
    tokens: list[str]
    token_rewards: list[float]
    mask: list[int]
    messages: list[Message]
    sequence_reward: float
    chosen: bool
    ended: bool
    from_reference: bool

    def __post_init__(self):
        count = len(self.tokens)
        assert len(self.token_rewards) == len(self.mask) == count, (
            len(self.token_rewards),
            len(self.mask),
            count,
        )
        assert self.token_ids is None or len(self.token_ids) == count
        assert all(bit in (0, 1) for bit in self.mask)
        assert all(0 <= message.start < message.end <= count for message in self.messages)


def write_samples(path: Path, records: Iterable[SampleRecord]) -> None:
    """Appends samples to a JSON Lines file. Call it on one rank.

    Args:
        path: ``RunFolder.samples``.
        records: the samples; rewards are rounded to 4 digits, ``truncated`` is added.
    """
    append_jsonl(path, [_as_json(record) for record in records])


def read_samples(path: Path) -> list[dict[str, Any]]:
    """Reads the samples back, as plain dicts."""
    return read_jsonl(path)


def _as_json(record: SampleRecord) -> dict[str, Any]:
    fields = asdict(record)
    if record.token_ids is None:
        del fields["token_ids"]
    fields["token_rewards"] = [round(float(r), REWARD_DIGITS) for r in record.token_rewards]
    fields["mask"] = [int(bit) for bit in record.mask]
    for message in fields["messages"]:
        message["reward"] = round(float(message["reward"]), REWARD_DIGITS)
    fields["sequence_reward"] = round(float(record.sequence_reward), REWARD_DIGITS)
    fields["truncated"] = not record.ended
    return fields
