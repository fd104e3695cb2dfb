"""Signs and the adaptive mask against a literal, token-by-token reading of eq. 13, 17 and 18."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_amrlhf.mask.adaptive import adaptive_mask, chosen_labels
from megatron_amrlhf.mask.schmitt import hold_last_sign, signs

# Quarters are exact in float32, so ties with the baseline and the levels are common and exact.
QUARTERS = st.integers(-6, 6).map(lambda n: n / 4)


@st.composite
def batches(draw, max_rows=4, max_width=12):
    """(signal [B, R], valid [B, R] left-aligned, baseline [B, 1], chosen [B]); garbage outside."""
    num_rows, width = draw(st.integers(0, max_rows)), draw(st.integers(0, max_width))
    lengths = draw(st.lists(st.integers(0, width), min_size=num_rows, max_size=num_rows))
    entries = draw(
        st.lists(QUARTERS, min_size=num_rows * width, max_size=num_rows * width).map(torch.tensor)
    )
    signal = entries.float().view(num_rows, width)
    valid = torch.arange(width)[None, :] < torch.tensor(lengths, dtype=torch.long)[:, None]
    signal = torch.where(valid, signal, draw(st.sampled_from([0.0, 9.0, float("nan")])))
    rows = dict(min_size=num_rows, max_size=num_rows)
    baseline = torch.tensor(draw(st.lists(QUARTERS, **rows)), dtype=torch.float32)[:, None]
    chosen = torch.tensor(draw(st.lists(st.booleans(), **rows)), dtype=torch.bool)
    return signal, valid, baseline, chosen


def slow_signs(signal, valid, baseline, delta, neutral):
    """A Schmitt trigger that walks over each row."""
    out = torch.zeros(signal.shape, dtype=torch.int8)
    for row in range(signal.shape[0]):
        b, state = baseline[row, 0].item(), 0
        for j in range(signal.shape[1]):
            if not valid[row, j]:
                continue
            r = signal[row, j].item()
            if delta == 0:
                sign = 1 if r > b else -1
            else:
                sign = 1 if r > b + delta else -1 if r < b - delta else 0
            state = sign if sign != 0 else state
            out[row, j] = state if neutral == "hold" else sign
    return out


@settings(max_examples=150, deadline=None)
@given(batches(), st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.sampled_from(["drop", "hold"]))
def test_signs_equal_a_literal_schmitt_trigger(batch, delta, neutral):
    signal, valid, baseline, _ = batch
    expected = slow_signs(signal, valid, baseline, delta, neutral)
    assert torch.equal(signs(signal, valid, baseline, delta, neutral), expected)
    assert torch.equal(signs(signal, valid, baseline, torch.tensor(delta), neutral), expected)


@settings(max_examples=150, deadline=None)
@given(batches(), st.sampled_from(["drop", "hold"]))
def test_without_delta_the_mask_is_equation_13_ties_included(batch, neutral):
    signal, valid, baseline, chosen = batch
    mask = adaptive_mask(signs(signal, valid, baseline, 0.0, neutral), chosen, valid)
    for row in range(signal.shape[0]):
        for j in range(signal.shape[1]):
            r, b, is_chosen = signal[row, j], baseline[row, 0], bool(chosen[row])
            kept = (is_chosen and r > b) or (not is_chosen and r <= b)
            assert bool(mask[row, j]) == bool(kept and valid[row, j])


@settings(max_examples=50, deadline=None)
@given(batches(), st.sampled_from([0.0, 0.5]), st.sampled_from(["drop", "hold"]))
def test_chosen_and_rejected_never_keep_the_same_token(batch, delta, neutral):
    signal, valid, baseline, chosen = batch
    token_signs = signs(signal, valid, baseline, delta, neutral)
    mask = adaptive_mask(token_signs, chosen, valid)
    opposite = adaptive_mask(token_signs, ~chosen, valid)
    assert not (mask & opposite).any()
    assert torch.equal(mask | opposite, token_signs != 0)
    assert not (mask & ~valid).any()


def test_a_hand_made_row_of_each_kind():
    signal = torch.tensor([[0.0, 0.4, 2.0, 0.5, -0.5, -0.6, 0.5, 7.0]])
    valid = torch.tensor([[True] * 7 + [False]])
    baseline = torch.zeros(1, 1)
    drop = signs(signal, valid, baseline, 0.5, "drop")
    hold = signs(signal, valid, baseline, 0.5, "hold")
    # The levels themselves (0.5, -0.5) are neutral: eq. 17 is strict.
    assert drop.tolist() == [[0, 0, 1, 0, 0, -1, 0, 0]]
    assert hold.tolist() == [[0, 0, 1, 1, 1, -1, -1, 0]]
    assert drop.dtype == hold.dtype == torch.int8


def test_all_zero_and_all_one_masks_are_normal():
    signal, valid = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)
    chosen = torch.tensor([True, False])
    high = adaptive_mask(signs(signal, valid, torch.zeros(2, 1), 0.0, "drop"), chosen, valid)
    assert high.tolist() == [[True] * 3, [False] * 3]
    wide = adaptive_mask(signs(signal, valid, torch.zeros(2, 1), 9.0, "hold"), chosen, valid)
    assert not wide.any()


def test_hold_keeps_rows_apart():
    assert hold_last_sign(torch.tensor([[0, 1, 0], [0, 0, -1]], dtype=torch.int8)).tolist() == [
        [0, 1, 1],
        [0, 0, -1],
    ]


def test_an_unknown_neutral_is_refused():
    with pytest.raises(ValueError, match="keep"):
        signs(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1), 0.0, "keep")


def test_chosen_is_strictly_above_its_baseline():
    rewards = torch.tensor([1.0, 3.0, 2.0, 0.1, 0.1, 0.1])
    group_ids = torch.tensor([7, 7, 7, 2, 2, 2])
    assert chosen_labels(rewards, "group", group_ids=group_ids).tolist() == [
        False,
        True,
        False,  # a tie with its group's mean
        False,  # equal rewards: their mean is exactly theirs
        False,
        False,
    ]
    assert chosen_labels(rewards, "batch").tolist() == [False, True, True, False, False, False]
    values = torch.tensor([0.5, 3.0, 2.5, 0.0, 0.2, 0.1])
    assert chosen_labels(rewards, "value", values=values).tolist() == [
        True,
        False,
        False,
        True,
        False,
        False,
    ]
    with pytest.raises(ValueError, match="median"):
        chosen_labels(rewards, "median")


def test_empty_batches_have_labels_of_every_kind():
    empty = torch.zeros(0)
    assert chosen_labels(empty, "batch").shape == (0,)
    assert chosen_labels(empty, "group", group_ids=empty.long()).shape == (0,)
    assert chosen_labels(empty, "value", values=empty).shape == (0,)


@pytest.mark.parametrize("kind", ["batch", "group"])
def test_answers_without_a_reward_are_in_no_mean_and_rejected(kind):
    nan = float("nan")
    rewards = torch.tensor([nan, nan, -3.0, -2.5, -2.0, -1.0])
    groups, has_reward = torch.tensor([0, 0, 1, 1, 2, 2]), ~rewards.isnan()
    found = chosen_labels(rewards, kind, group_ids=groups, has_reward=has_reward)
    alone = chosen_labels(rewards[has_reward], kind, group_ids=groups[has_reward])
    assert not found[:2].any() and torch.equal(found[has_reward], alone) and alone.any()
