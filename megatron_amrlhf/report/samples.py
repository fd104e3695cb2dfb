"""What the policy said and what of it was learned from: ``samples.jsonl``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sized
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_amrlhf.errors import UserError
from megatron_amrlhf.reading import Unreadable, parse_json, read_bytes
from megatron_amrlhf.report.files import append_jsonl
from megatron_amrlhf.run.way import SAMPLES_NAME

# What became of an answer: learned from, by its label (with dpo's pairs maybe by both); not picked;
# or in no statistic either, because its reward failed or, by rollout.truncated, it was cut off.
USES = ("chosen", "rejected", "both", "none", "failed", "left_out")
UNKNOWN = -1  # numbers that older files do not have


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
        sample: number of the answer in the step (offline: in the file), on every layout the same.
        group: number of its prompt in the step.
        prompt: the prompt's text, without the template; of a conversation its last turn.
        rendered: the prompt as the model reads it; None in older files.
        answer: the answer's text.
        token_ids: ids of the response tokens.
        tokens: text of each response token; of a character's tokens the first has it.
        token_rewards: dense reward of each token, as the reward model gives it.
        signal: the dense signal that the threshold cut: whitened rewards, TD errors, ...
        baseline: threshold b of this answer, signal units; NaN where there is none.
        delta: Schmitt offset of eq. 17, signal units.
        mask: 1 where a loss reads the token.
        messages: the messages, in order.
        sequence_reward: reward of the whole answer; NaN where it is in no statistic, and then all
            others mean nothing.
        use: what became of it, one of ``USES``.
        ended: it ends on an end token; else it was cut at the length limit.
        from_reference: sampled by the reference instead of the policy.
    """

    step: int
    sample: int
    group: int
    prompt: str
    rendered: str | None
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
    use: str
    ended: bool
    from_reference: bool

    @property
    def chosen(self) -> bool:
        """Whether it is a preferred answer."""
        return self.use in ("chosen", "both")

    @property
    def has_rewards(self) -> bool:
        """Whether its numbers mean something, and are in the statistics of its step."""
        return self.use not in ("failed", "left_out")

    def __post_init__(self):
        count = len(self.tokens)
        lists: list[Sized] = [self.token_rewards, self.mask, self.signal, self.token_ids]
        lengths = [len(entries) for entries in lists]
        assert set(lengths) <= {count}, f"{count} tokens, but lists of {lengths}"
        assert all(bit in (0, 1) for bit in self.mask), "mask holds more than 0 and 1"
        assert self.use in USES, f"{self.use!r} is no use of an answer"
        inside = all(0 <= message.start < message.end <= count for message in self.messages)
        assert inside, f"a message reaches outside the {count} tokens"


def write_samples(path: Path, records: Iterable[SampleRecord]) -> None:
    """Appends samples to a JSON Lines file. Call it on one rank.

    Args:
        path: ``RunFolder.samples``.
        records: the samples, with every digit of their numbers; ``chosen`` and ``truncated`` are
            added.
    """
    append_jsonl(path, [_as_json(record) for record in records])


def _as_json(record: SampleRecord) -> dict[str, Any]:
    return asdict(record) | {"chosen": record.chosen, "truncated": not record.ended}


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
    """Undoes ``_as_json``, or what older versions wrote; raises what a missing key raises."""
    step, rendered, reward = fields["step"], fields.get("rendered"), fields["sequence_reward"]
    label = "chosen" if fields["chosen"] else "rejected"
    return SampleRecord(
        step=int(step),
        sample=int(fields.get("sample", UNKNOWN)),
        group=int(fields.get("group", UNKNOWN)),
        prompt=_text(fields["prompt"]),
        rendered=None if rendered is None else _text(rendered),
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
        sequence_reward=_number(reward),
        use=_text(fields.get("use", "failed" if reward is None else label)),
        ended=bool(fields["ended"]),
        from_reference=bool(fields["from_reference"]),
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value
