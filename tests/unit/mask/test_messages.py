"""Messages against itertools.groupby, the rewards of units by hand, and packed masks."""

from __future__ import annotations

from itertools import groupby

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_amrlhf.mask.messages import message_counts, message_ids, unit_rewards
from megatron_amrlhf.mask.packing import pack_bits, unpack_bits
from megatron_amrlhf.mask.schmitt import signs


@st.composite
def sign_rows(draw):
    """(signs [B, R], valid [B, R] with any gaps)."""
    num_rows, width = draw(st.integers(0, 4)), draw(st.integers(0, 12))
    size = num_rows * width
    token_signs = draw(st.lists(st.integers(-1, 1), min_size=size, max_size=size))
    valid = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    valid = torch.tensor(valid, dtype=torch.bool).view(num_rows, width)
    token_signs = torch.tensor(token_signs, dtype=torch.int8).view(num_rows, width)
    return token_signs * valid, valid


@settings(max_examples=150, deadline=None)
@given(sign_rows())
def test_message_ids_equal_itertools_groupby(rows):
    token_signs, valid = rows
    ids = message_ids(token_signs, valid)
    assert ids.dtype == torch.int64
    for row in range(valid.shape[0]):
        expected, num_runs, num_messages = [], 0, 0
        pairs = zip(valid[row].tolist(), token_signs[row].tolist(), strict=True)
        for (is_valid, sign), run in groupby(pairs):
            expected += [num_runs if is_valid else -1] * len(list(run))
            num_runs += is_valid
            num_messages += is_valid and sign != 0
        assert ids[row].tolist() == expected
        assert message_counts(ids, token_signs)[row] == num_messages


@given(
    st.lists(st.integers(-4, 4), min_size=0, max_size=30),
    st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.0]),
    st.sampled_from([-0.5, 0.0, 1.0]),
)
def test_hold_never_yields_more_messages_than_drop_or_no_delta(rewards, delta, baseline):
    signal = torch.tensor([rewards], dtype=torch.float64)
    valid, baseline = torch.ones_like(signal, dtype=torch.bool), torch.tensor([[baseline]])

    def count(delta, neutral):
        token_signs = signs(signal, valid, baseline, delta, neutral)
        return message_counts(message_ids(token_signs, valid), token_signs).item()

    assert count(delta, "hold") <= min(count(delta, "drop"), count(0.0, "hold"))


def test_a_tokens_reward_is_its_units_mean_or_last():
    rewards = torch.tensor([[1.0, 3.0, 5.0, float("nan")], [2.0, 4.0, 9.0, 1.0]])
    valid = torch.tensor([[True, True, True, False], [True] * 4])
    ids = torch.tensor([[0, 0, 1, -1], [0, 1, 1, 1]])
    mean = unit_rewards(rewards, ids, valid, "mean")
    torch.testing.assert_close(mean[0], torch.tensor([2.0, 2.0, 5.0, 0.0]), rtol=0, atol=0)
    torch.testing.assert_close(mean[1], torch.tensor([2.0, 14 / 3, 14 / 3, 14 / 3]))
    last = unit_rewards(rewards, ids, valid, "last")
    assert last.tolist() == [[3.0, 3.0, 5.0, 0.0], [2.0, 1.0, 1.0, 1.0]]
    sequence = unit_rewards(rewards, torch.where(valid, 0, -1), valid, "mean")
    assert sequence.tolist() == [[3.0, 3.0, 3.0, 0.0], [4.0] * 4]
    with pytest.raises(ValueError, match="first"):
        unit_rewards(rewards, ids, valid, "first")


@settings(max_examples=100, deadline=None)
@given(sign_rows(), st.sampled_from(["mean", "last"]))
def test_unit_rewards_equal_a_slow_reference(rows, kind):
    token_signs, valid = rows
    torch.manual_seed(0)
    rewards, ids = torch.randn(valid.shape), message_ids(token_signs, valid)
    fast = unit_rewards(rewards, ids, valid, kind)
    for row in range(valid.shape[0]):
        for j in range(valid.shape[1]):
            if not valid[row, j]:
                assert fast[row, j] == 0
                continue
            unit = rewards[row][(ids[row] == ids[row, j]) & valid[row]].double()
            expected = unit.mean() if kind == "mean" else unit[-1]
            assert fast[row, j] == expected.float()


@settings(max_examples=100, deadline=None)
@given(sign_rows())
def test_packed_masks_come_back(rows):
    mask = rows[1]
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8
    assert packed.shape == (mask.shape[0], (mask.shape[1] + 7) // 8)
    assert torch.equal(unpack_bits(packed, mask.shape[1]), mask)


def test_position_j_is_bit_j_of_its_byte():
    mask = torch.zeros(1, 10, dtype=torch.bool)
    mask[0, [0, 7, 9]] = True
    assert pack_bits(mask).tolist() == [[129, 2]]
    assert pack_bits(torch.ones(1, 9, dtype=torch.bool)).tolist() == [[255, 1]]
