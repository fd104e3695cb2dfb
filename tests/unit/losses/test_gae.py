"""GAE against the recursion written out token by token, on padded and truncated rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_amrlhf.losses.gae import gae, td_errors

# float64 on both sides: only the order of the sums differs
TOLERANCE = 1e-10


def slow_gae(rewards, values, lengths, gamma, lam, bootstrap):
    advantages = torch.zeros_like(rewards)
    for row, length in enumerate(lengths):
        next_value, advantage = bootstrap[row], 0.0
        for j in reversed(range(length)):
            delta = rewards[row, j] + gamma * next_value - values[row, j]
            advantage = delta + gamma * lam * advantage
            advantages[row, j] = advantage
            next_value = values[row, j]
    return advantages


def random_rows(lengths, width, seed):
    generator = torch.Generator().manual_seed(seed)
    valid = torch.arange(width)[None, :] < torch.tensor(lengths).long()[:, None]
    rewards, values = torch.randn(2, len(lengths), width, generator=generator).double()
    bootstrap = torch.randn(len(lengths), generator=generator).double()
    return rewards, values, valid, bootstrap


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(0, 19), max_size=4),
    st.integers(0, 3),
    st.sampled_from([0.0, 0.9, 1.0]),
    st.sampled_from([0.0, 0.95, 1.0]),
    st.sampled_from(["none", "all", "some"]),
    st.integers(0, 1000),
)
def test_gae_equals_the_recursion(lengths, padding, gamma, lam, truncated, seed):
    width = max(lengths, default=0) + padding
    rewards, values, valid, bootstrap = random_rows(lengths, width, seed)
    if truncated != "all":
        ended = bootstrap > 0 if truncated == "some" else torch.ones_like(bootstrap).bool()
        bootstrap = torch.where(ended, 0.0, bootstrap)
    expected = slow_gae(rewards, values, lengths, gamma, lam, bootstrap)
    garbage = [torch.where(valid, x, float("nan")) for x in (rewards, values)]
    after = None if truncated == "none" else bootstrap
    advantages, returns = gae(*garbage, valid, gamma, lam, bootstrap_values=after)
    torch.testing.assert_close(advantages, expected, rtol=TOLERANCE, atol=TOLERANCE)
    expected_returns = torch.where(valid, expected + values, 0.0)
    torch.testing.assert_close(returns, expected_returns, rtol=TOLERANCE, atol=TOLERANCE)
    assert (advantages[~valid] == 0).all() and (returns[~valid] == 0).all()


def test_three_tokens_by_hand():
    rewards, values = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[0.5, 1.0, 1.5]])
    valid = torch.ones(1, 3, dtype=torch.bool)
    errors = td_errors(rewards, values, valid, 0.5)
    assert errors.tolist() == [[1.0, -0.25, 0.5]]
    advantages, returns = gae(rewards, values, valid, 0.5, 0.5)
    assert advantages.tolist() == [[0.96875, -0.125, 0.5]]
    assert returns.tolist() == [[1.46875, 0.875, 2.0]]
    truncated = td_errors(rewards, values, valid, 0.5, torch.tensor([4.0]))
    assert truncated.tolist() == [[1.0, -0.25, 2.5]]


def test_bootstrap_goes_to_the_last_valid_token_of_a_padded_row():
    valid = torch.tensor([[True, True, False]])
    zeros = torch.zeros(1, 3)
    errors = td_errors(zeros, zeros, valid, 1.0, torch.tensor([3.0]))
    assert errors.tolist() == [[0.0, 3.0, 0.0]]


def test_without_discount_and_lambda_returns_are_the_rewards_to_come():
    rewards, values, valid, _ = random_rows([7, 3, 0], 7, seed=0)
    _, returns = gae(rewards, values, valid, 1.0, 1.0)
    to_come = torch.where(valid, rewards, 0.0).flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(returns, torch.where(valid, to_come, 0.0))


def test_long_rows_stay_accurate_in_float32():
    rewards, values, valid, _ = random_rows([4096], 4096, seed=1)
    expected, _ = gae(rewards, values, valid, 1.0, 0.95)
    advantages, _ = gae(rewards.float(), values.float(), valid, 1.0, 0.95)
    assert advantages.dtype == torch.float32
    torch.testing.assert_close(advantages, expected.float(), rtol=1e-4, atol=1e-4)


def test_rows_with_gaps_are_refused():
    with pytest.raises(AssertionError, match="left-aligned"):
        gae(*torch.zeros(2, 1, 3), torch.tensor([[True, False, True]]), 1.0, 1.0)
