"""samples.jsonl: one answer a line, lists of one entry a token."""

import dataclasses
import json

import pytest

from megatron_amrlhf.report.files import read_jsonl
from megatron_amrlhf.report.samples import (
    UNKNOWN,
    Message,
    SampleRecord,
    load_samples,
    write_samples,
)

RECORD = SampleRecord(
    step=3,
    sample=17,
    group=2,
    prompt="2 + 2?",
    rendered="<|user|>2 + 2?<|assistant|>",
    answer="it is 4",
    token_ids=[5, 6, 7],
    tokens=["it", " is", " 4"],
    token_rewards=[-0.123456, 0.5, 1 / 3],
    signal=[-1.23456, 0.7, 0.5],
    baseline=0.1,
    delta=0.05,
    mask=[0, 1, 1],
    messages=[Message(0, 1, -1, -0.123456), Message(1, 3, 1, 0.41666)],
    sequence_reward=0.2366271,
    use="chosen",
    ended=False,
    from_reference=False,
)


def test_a_sample_is_written_with_every_digit(tmp_path):
    path = tmp_path / "samples.jsonl"
    write_samples(path, [RECORD])
    write_samples(path, [dataclasses.replace(RECORD, step=4)])
    first, second = read_jsonl(path)
    assert first["token_rewards"] == [-0.123456, 0.5, 1 / 3]
    assert first["signal"] == [-1.23456, 0.7, 0.5]
    assert (first["baseline"], first["delta"]) == (0.1, 0.05)
    assert first["messages"][1] == {"start": 1, "end": 3, "sign": 1, "reward": 0.41666}
    assert first["sequence_reward"] == 0.2366271 and first["chosen"] is True
    assert first["prompt"] != first["rendered"]
    assert first["truncated"] and not first["ended"] and first["token_ids"] == [5, 6, 7]
    assert second == first | {"step": 4}
    assert load_samples(path)[0] == RECORD


OLD = {"sample", "group", "rendered", "use"}  # keys that older files do not have


@pytest.mark.parametrize(
    ("chosen", "reward", "use"),
    [(True, 0.5, "chosen"), (False, 0.5, "rejected"), (False, None, "failed")],
)
def test_older_files_are_still_read(tmp_path, chosen, reward, use):
    path = tmp_path / "samples.jsonl"
    write_samples(path, [RECORD])
    (line,) = read_jsonl(path)
    line = {key: value for key, value in line.items() if key not in OLD}
    path.write_text(json.dumps(line | {"chosen": chosen, "sequence_reward": reward}) + "\n")
    (record,) = load_samples(path)
    assert (record.use, record.sample, record.group) == (use, UNKNOWN, UNKNOWN)
    assert record.rendered is None and record.tokens == RECORD.tokens
    assert record.has_rewards == (use != "failed") and record.chosen == chosen


@pytest.mark.parametrize(
    "change",
    [
        {"mask": [1, 1]},
        {"mask": [0, 1, 2]},
        {"token_rewards": [0.0]},
        {"signal": [0.0]},
        {"token_ids": [1]},
        {"messages": [Message(0, 4, 1, 0.0)]},
        {"use": "perhaps"},
    ],
)
def test_lists_that_do_not_fit_the_tokens_are_a_bug(change):
    with pytest.raises(AssertionError):
        dataclasses.replace(RECORD, **change)
