"""Pairs and selected answers against plain Python over every prompt on its own."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_amrlhf.algorithms.choices import best_and_worst, is_flat, pairs_above, top_rows
from megatron_amrlhf.losses.grpo import group_advantages
from megatron_amrlhf.mask.adaptive import chosen_labels

REWARDS = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0], [0.0, -1.0, 0.0]])

rewards_of_prompts = st.integers(2, 5).flatmap(
    lambda n: st.lists(st.lists(st.integers(-3, 3), min_size=n, max_size=n), min_size=1, max_size=4)
)


def test_best_and_worst_by_hand():
    assert best_and_worst(REWARDS).tolist() == [[1, 0], [6, 7]]


def test_pairs_by_hand():
    assert pairs_above(REWARDS, 0.0).tolist() == [[1, 0], [1, 2], [2, 0], [6, 7], [8, 7]]
    assert pairs_above(REWARDS, 1.0).tolist() == [[1, 0]]
    assert pairs_above(REWARDS, 2.0).shape == (0, 2)


def test_top_rows_by_hand():
    assert top_rows(REWARDS, torch.tensor([2, 1, 3])).tolist() == [1, 2, 3, 6, 8, 7]
    assert top_rows(REWARDS, torch.tensor([0, 0, 0])).tolist() == []


@given(rewards_of_prompts, st.integers(0, 4))
def test_pairs_are_all_that_differ_by_more(rewards, margin):
    expected = [
        [g * len(row) + i, g * len(row) + j]
        for g, row in enumerate(rewards)
        for i in range(len(row))
        for j in range(len(row))
        if row[i] - row[j] > margin
    ]
    assert pairs_above(torch.tensor(rewards).float(), float(margin)).tolist() == expected


@given(rewards_of_prompts, st.data())
def test_no_answer_left_out_has_a_higher_score_than_one_taken(rewards, data):
    num_answers = len(rewards[0])
    counts = [data.draw(st.integers(0, num_answers)) for _ in rewards]
    rows = top_rows(torch.tensor(rewards).float(), torch.tensor(counts)).tolist()
    taken = [
        [row % num_answers for row in rows if row // num_answers == g] for g in range(len(rewards))
    ]
    for scores, mine, count in zip(rewards, taken, counts, strict=True):
        left = set(range(num_answers)) - set(mine)
        assert len(set(mine)) == len(mine) == count
        assert all(scores[a] >= scores[b] for a in mine for b in left)


@given(rewards_of_prompts)
def test_one_pair_a_prompt_is_that_of_the_largest_difference(rewards):
    table = torch.tensor(rewards).float()
    differ = [row for row in rewards if max(row) > min(row)]
    assert is_flat(table).tolist() == [row not in differ for row in rewards]
    pairs = table.flatten()[best_and_worst(table)].tolist()
    assert pairs == [[max(row), min(row)] for row in differ]


def test_failed_answers_are_never_picked():
    nan = float("nan")
    rewards = torch.tensor([[nan, 1.0, 1.0], [nan, nan, 5.0], [2.0, nan, 1.0], [nan, nan, nan]])
    assert best_and_worst(rewards).tolist() == [[6, 8]]
    assert pairs_above(rewards, 0.0).tolist() == [[6, 8]]
    assert top_rows(rewards, torch.tensor([1, 2, 3, 1])).tolist() == [1, 5, 6, 8]


def test_rewards_that_differ_by_rounding_are_tied_in_every_choice():
    """Equal answers, scored in micro-batches of other shapes: 0.1 and its neighbours in float32."""
    one = torch.tensor([0.1])
    up = torch.nextafter(one, torch.ones(1))
    rewards = torch.cat([one, up, torch.nextafter(up, torch.ones(1)), one])
    groups = torch.zeros(4, dtype=torch.int64)
    for sign in (1, -1):
        assert pairs_above(sign * rewards[None], 0.0).shape == (0, 2)
        assert best_and_worst(sign * rewards[None]).shape == (0, 2)
        assert not chosen_labels(sign * rewards, "group", groups).any()
        assert not chosen_labels(sign * rewards, "batch").any()
        assert not group_advantages(sign * rewards, groups, scale_rewards=True)[0].any()
    apart = torch.tensor([0.1, 0.1001])
    assert pairs_above(apart[None], 0.0).tolist() == [[1, 0]]
    assert chosen_labels(apart, "group", groups[:2]).tolist() == [False, True]
