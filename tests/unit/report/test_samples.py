"""samples.jsonl: one answer a line, lists of one entry a token."""

import dataclasses

import pytest

from megatron_amrlhf.report.files import read_jsonl
from megatron_amrlhf.report.samples import Message, SampleRecord, write_samples

RECORD = SampleRecord(
    step=3,
    prompt="2 + 2?",
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
    chosen=True,
    ended=False,
    from_reference=False,
)


def test_a_sample_reads_back_with_rounded_rewards(tmp_path):
    path = tmp_path / "samples.jsonl"
    write_samples(path, [RECORD])
    write_samples(path, [dataclasses.replace(RECORD, step=4)])
    first, second = read_jsonl(path)
    assert first["token_rewards"] == [-0.1235, 0.5, 0.3333]
    assert first["signal"] == [-1.2346, 0.7, 0.5]
    assert (first["baseline"], first["delta"]) == (0.1, 0.05)
    assert first["messages"][1] == {"start": 1, "end": 3, "sign": 1, "reward": 0.4167}
    assert first["sequence_reward"] == 0.2366
    assert first["truncated"] and not first["ended"] and first["token_ids"] == [5, 6, 7]
    assert second == first | {"step": 4}


@pytest.mark.parametrize(
    "change",
    [
        {"mask": [1, 1]},
        {"mask": [0, 1, 2]},
        {"token_rewards": [0.0]},
        {"signal": [0.0]},
        {"token_ids": [1]},
        {"messages": [Message(0, 4, 1, 0.0)]},
    ],
)
def test_lists_that_do_not_fit_the_tokens_are_a_bug(change):
    with pytest.raises(AssertionError):
        dataclasses.replace(RECORD, **change)
