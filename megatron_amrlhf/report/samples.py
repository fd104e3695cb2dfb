"""What the policy said and what of it was learned from: ``samples.jsonl``."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_amrlhf.errors import UserError
from megatron_amrlhf.reading import Unreadable, parse_json, read_bytes
from megatron_amrlhf.report.files import append_jsonl
from megatron_amrlhf.report.way import SAMPLES_NAME

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
        token_ids: ids of the response tokens.
        tokens: text of each response token; of a character's tokens the first has it.
        token_rewards: dense reward of each token, as the reward model gives it.
        signal: the dense signal that the threshold cut: whitened rewards, TD errors, ...
        baseline: threshold b of this answer, signal units; NaN where there is none.
        delta: Schmitt offset of eq. 17, signal units.
        mask: 1 where the loss reads the token.
        messages: the messages, in order.
        sequence_reward: reward of the whole answer; NaN where it failed, and with it all others.
        chosen: whether it is a preferred answer.
        ended: it ends on an end token; else it was cut at the length limit.
        from_reference: sampled by the reference instead of the policy.
    """

    step: int
    prompt: str
    answer: str
    token_ids: list[int]
    tokens: list[str]
    token_rewards: list[float]
    signal: list[float]
    baseline: float
    delta: float
    mask: list[int]
    messages: list[Message]
    sequence_reward: float
    chosen: bool
    ended: bool
    from_reference: bool

    @property
    def failed(self) -> bool:
        """Its reward failed: nothing is learned from it, and its token rewards mean nothing."""
        return math.isnan(self.sequence_reward)

    def __post_init__(self):
        count = len(self.tokens)
        lists = [self.token_rewards, self.mask, self.signal, self.token_ids]
        lengths = [len(entries) for entries in lists]
        assert set(lengths) <= {count}, f"{count} tokens, but lists of {lengths}"
        assert all(bit in (0, 1) for bit in self.mask), "mask holds more than 0 and 1"
        inside = all(0 <= message.start < message.end <= count for message in self.messages)
        assert inside, f"a message reaches outside the {count} tokens"


def write_samples(path: Path, records: Iterable[SampleRecord]) -> None:
    """Appends samples to a JSON Lines file. Call it on one rank.

    Args:
        path: ``RunFolder.samples``.
        records: the samples; rewards are rounded to 4 digits, ``truncated`` is added.
    """
    append_jsonl(path, [_as_json(record) for record in records])


def _as_json(record: SampleRecord) -> dict[str, Any]:
    fields = asdict(record)
    fields["token_rewards"] = [round(float(r), REWARD_DIGITS) for r in record.token_rewards]
    fields["signal"] = [round(float(x), REWARD_DIGITS) for x in record.signal]
    fields["mask"] = [int(bit) for bit in record.mask]
    for message in fields["messages"]:
        message["reward"] = round(float(message["reward"]), REWARD_DIGITS)
    fields["sequence_reward"] = round(float(record.sequence_reward), REWARD_DIGITS)
    fields["truncated"] = not record.ended
    return fields


def load_samples(path: str | Path) -> list[SampleRecord]:
    """Reads and checks the samples of a run, for the tools that show them.

    Args:
        path: a ``samples.jsonl`` or a run's folder.

    Returns:
        One record a line; null rewards become NaN. A last line that a kill cut short is left out.

    Raises:
        UserError: no such file, nothing in it, or a line that is no sample (with its number).
    """
    file = Path(path) / SAMPLES_NAME if Path(path).is_dir() else Path(path)
    try:
        lines = read_bytes(file, most=None).split(b"\n")
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; give a run's folder or samples.jsonl") from None
    except Unreadable as error:
        raise UserError(f"{file}: {error}") from None
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(_as_record(parse_json(line)))
        except Unreadable as error:
            if number == len(lines):
                break
            raise UserError(f"{file}:{number}: {error}") from None
        except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
            detail = f"{type(error).__name__}: {error}"
            raise UserError(f"{file}:{number}: not a sample of a run ({detail})") from None
    if not records:
        raise UserError(f"{file}: no samples in it yet (run.log_samples answers a step are kept)")
    return records


def _as_record(fields: dict[str, Any]) -> SampleRecord:
    """Undoes ``_as_json``; raises what a wrong type or a missing key raises."""
    return SampleRecord(
        step=int(fields["step"]),
        prompt=_text(fields["prompt"]),
        answer=_text(fields["answer"]),
        token_ids=[int(token) for token in fields["token_ids"]],
        tokens=[_text(token) for token in fields["tokens"]],
        token_rewards=[_number(reward) for reward in fields["token_rewards"]],
        signal=[_number(x) for x in fields["signal"]],
        baseline=_number(fields["baseline"]),
        delta=_number(fields["delta"]),
        mask=[int(bit) for bit in fields["mask"]],
        messages=[
            Message(int(m["start"]), int(m["end"]), int(m["sign"]), _number(m["reward"]))
            for m in fields["messages"]
        ],
        sequence_reward=_number(fields["sequence_reward"]),
        chosen=bool(fields["chosen"]),
        ended=bool(fields["ended"]),
        from_reference=bool(fields["from_reference"]),
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value
