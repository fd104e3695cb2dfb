"""Division by global counts: one number and one gradient whatever the layout."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_amrlhf.losses.reduce import (
    denominator_mask,
    finish_metrics,
    global_count,
    global_mean,
    kl_scale,
    masked,
    merge_metrics,
    row_weights,
    scale_for_engine,
)
from tests.unit.losses.plainly import ppo_actor_loss

# float64 on both sides: only the order of the sums differs
TOLERANCE = 1e-12


def pair(total, count):
    return torch.tensor(float(total)), torch.tensor(float(count))


def test_loss_and_gradient_are_invariant_to_the_layout():
    """DP 1, 2 and 4 with micro-batches of 1 to 8 rows, ZeRO's averaging written out."""
    torch.manual_seed(0)
    logprobs, behaviour, advantages = torch.randn(3, 8, 5).double()
    mask = torch.rand(8, 5) < 0.5
    mask[2:4] = False  # a whole rank of DP 4 without a kept token
    results = []
    for dp, micro_batch_size in [(1, 8), (1, 3), (2, 4), (2, 1), (4, 2), (4, 1)]:
        rows = torch.arange(8).chunk(dp)
        count = global_count(mask)
        total, gradient = 0.0, torch.zeros(8, 5).double()
        for rank_rows in rows:
            for index in rank_rows.split(micro_batch_size):
                leaf = logprobs[index].requires_grad_()
                args = (leaf, behaviour[index], advantages[index], mask[index], 0.2)
                loss = scale_for_engine(ppo_actor_loss(*args).terms.sum(), count, dp)
                loss.backward()
                total = total + loss.detach() / dp
                gradient[index] += leaf.grad / dp
        results.append((total, gradient))
    for total, gradient in results[1:]:
        torch.testing.assert_close(total, results[0][0], rtol=TOLERANCE, atol=0)
        torch.testing.assert_close(gradient, results[0][1], rtol=TOLERANCE, atol=0)


def test_global_count_is_at_least_one():
    assert global_count(torch.zeros(2, 3, dtype=torch.bool)) == 1
    assert global_count(torch.zeros(0, 3, dtype=torch.bool)) == 1
    count = global_count(torch.tensor([[True, True, False]]))
    assert count == 2 and count.dtype == torch.float32


def test_scale_divides_by_the_count_and_undoes_the_average_over_ranks():
    assert scale_for_engine(torch.tensor(6.0), torch.tensor(3.0), 4) == 8.0


def test_denominator_names():
    valid, mask = torch.tensor([[True, True]]), torch.tensor([[True, False]])
    assert denominator_mask(valid, mask, "response") is valid
    assert denominator_mask(valid, mask, "kept") is mask
    with pytest.raises(ValueError, match="rows"):
        denominator_mask(valid, mask, "rows")


def test_row_weights_make_sums_of_rows_means():
    counted = torch.tensor([[True, True, False], [False, False, False], [True, False, False]])
    assert row_weights(counted).tolist() == [[0.5], [1.0], [1.0]]
    assert row_weights(counted[:0]).shape == (0, 1)


@pytest.mark.parametrize("kept", ["all", "some", "one", "none"])
@pytest.mark.parametrize("by_row", [False, True])
def test_a_kl_weighs_the_same_whatever_the_mask_keeps(kept, by_row):
    """Divided as the loss is, by kept tokens: still the mean over response tokens."""
    valid = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    counts = {"all": [3, 2], "some": [2, 1], "one": [0, 1], "none": [0, 0]}[kept]
    counted = torch.arange(4) < torch.tensor(counts)[:, None]
    kl = torch.where(valid, torch.tensor([[1.0, 2.0, 6.0, 9.0], [4.0, 8.0, 9.0, 9.0]]), 0.0)
    scaled = kl * kl_scale(counted, valid, by_row)
    if by_row:
        found, expected = (scaled * row_weights(counted)).sum() / 2, (9 / 3 + 12 / 2) / 2
    else:
        found, expected = scale_for_engine(scaled.sum(), global_count(counted), 1), 21 / 5
    assert found.item() == pytest.approx(expected)
    assert kl_scale(valid, valid, by_row).tolist() == [[1.0], [1.0]]  # the same bits as without
    assert kl_scale(counted[:0], valid[:0], by_row).shape == (0, 1)


def test_global_mean_of_all_entries():
    assert global_mean(torch.tensor([1.0, 2.0, 6.0])) == 3.0
    assert global_mean(torch.zeros(0)) == 0.0
    assert global_mean(torch.ones(2).double()).dtype == torch.float64


def test_masked_stops_values_and_gradients():
    x = torch.tensor([1.0, math.nan, math.inf], requires_grad=True)
    kept = masked(x, torch.tensor([True, False, False]))
    assert kept.tolist() == [1.0, 0.0, 0.0]
    kept.exp().sum().backward()
    torch.testing.assert_close(x.grad[0], torch.tensor(math.e))
    assert x.grad[1:].tolist() == [0.0, 0.0]


def test_a_metric_is_the_mean_over_all_micro_batches_not_the_mean_of_means():
    merged = merge_metrics([{"a": pair(3, 1)}, {"a": pair(1, 3), "b": pair(0, 0)}])
    means = finish_metrics(merged)
    assert list(means) == ["a", "b"]
    assert means["a"] == 1.0 and math.isnan(means["b"])


def test_a_rank_without_micro_batches_has_the_keys_it_is_told():
    assert finish_metrics(merge_metrics([])) == {}
    assert math.isnan(finish_metrics({}, keys=["a"])["a"])
    with pytest.raises(AssertionError):
        finish_metrics({"b": pair(1, 1)}, keys=["a"])
