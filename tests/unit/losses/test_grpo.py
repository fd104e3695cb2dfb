"""AGRPO: advantages and loss by hand, against the papers' formulas, gradients, and the mask."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_amrlhf.losses.grpo import group_advantages
from megatron_amrlhf.losses.reduce import finish_metrics, row_weights
from tests.unit.losses.plainly import grpo_loss

# float32 rounding of short sums
TOLERANCE = 1e-6
VALID = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]]).bool()
MASK = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]).bool()
GROUPS = torch.tensor([0, 0, 7, 7])
CLIP_LOW, CLIP_HIGH, KL_COEF = 0.2, 0.28, 0.04


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


BEHAVIOUR, REFERENCE = randn(1, 4, 4), randn(2, 4, 4)
ADVANTAGES = randn(3, 4)
LOGPROBS = BEHAVIOUR + 0.3 * randn(4, 4, 4)


def loss(x, mask=MASK, kl_coef=KL_COEF, estimator="k3", advantages=ADVANTAGES):
    bounds = (CLIP_LOW, CLIP_HIGH, kl_coef, estimator)
    return grpo_loss(x, BEHAVIOUR, REFERENCE, advantages, mask, VALID, *bounds)


def deepseekmath_objective(logprobs, kept):
    """Eq. 3 of DeepSeekMath with eq. 4 for the KL, written token by token."""
    total = 0.0
    for i, row in enumerate(kept):
        tokens = row.nonzero().flatten().tolist()
        of_answer = 0.0
        for t in tokens:
            ratio = torch.exp(logprobs[i, t]) / torch.exp(BEHAVIOUR[i, t])
            clipped = torch.clamp(ratio, 1 - CLIP_LOW, 1 + CLIP_HIGH)
            surrogate = torch.min(ratio * ADVANTAGES[i], clipped * ADVANTAGES[i])
            quotient = torch.exp(REFERENCE[i, t]) / torch.exp(logprobs[i, t])
            kl = quotient - torch.log(quotient) - 1
            of_answer = of_answer + surrogate - KL_COEF * kl
        total = total + of_answer / len(tokens)
    return total / len(kept)


def test_advantages_by_hand():
    rewards = torch.tensor([1.0, 2.0, 6.0, -4.0, -4.0, 2.0])
    groups = torch.tensor([5, 5, 5, 1, 1, 1])
    advantages, std = group_advantages(rewards, groups, scale_rewards=True)
    # means 3 and -2; squared deviations 4 + 1 + 9 and 4 + 4 + 16, over n - 1 = 2
    first, second = math.sqrt(7), math.sqrt(12)
    torch.testing.assert_close(std, torch.tensor([first] * 3 + [second] * 3))
    expected = [-2 / first, -1 / first, 3 / first, -2 / second, -2 / second, 4 / second]
    torch.testing.assert_close(advantages, torch.tensor(expected), rtol=2e-4, atol=0)
    plain, _ = group_advantages(rewards, groups, scale_rewards=False)
    assert plain.tolist() == [-2.0, -1.0, 3.0, -2.0, -2.0, 4.0]
    torch.testing.assert_close(advantages, plain / (std + 1e-4), rtol=TOLERANCE, atol=0)


def test_advantages_equal_the_papers_formula_on_interleaved_groups():
    rewards = randn(5, 12)
    groups = torch.arange(12) % 3
    advantages, _ = group_advantages(rewards, groups, scale_rewards=True)
    for group in range(3):
        own = rewards[groups == group]
        expected = (own - own.mean()) / (own.std() + 1e-4)
        torch.testing.assert_close(advantages[groups == group], expected, rtol=1e-12, atol=0)


def test_groups_without_spread_have_no_advantage():
    rewards = torch.tensor([0.1, 0.1, 0.1 * (1 + 1e-7), 5.0, 1.0, 2.0])
    groups = torch.tensor([0, 0, 0, 1, 2, 2])  # rounding noise, one answer, two answers
    for scale in (True, False):
        advantages, std = group_advantages(rewards, groups, scale)
        assert advantages[:4].tolist() == [0.0] * 4 and std[:4].tolist() == [0.0] * 4
        assert (advantages[4:] != 0).all() and (std[4:] > 0).all()


def test_loss_by_hand_on_three_tokens():
    ratios = torch.tensor([[1.5, 0.5, 1.1]])
    logprobs = ratios.log().requires_grad_()
    zeros, valid = torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool)
    mask = torch.tensor([[True, True, False]])
    args = (zeros, zeros, torch.tensor([2.0]), mask, valid, 0.2, 0.3, 0.5, "k3")
    output = grpo_loss(logprobs, *args)
    # clipped at 1.3 from above, not clipped from below for a good answer; KL on all three
    kl = [1 / r - 1 + math.log(r) for r in (1.5, 0.5, 1.1)]
    expected = torch.tensor([[-2.6 + 0.5 * kl[0], -1.0 + 0.5 * kl[1], 0.5 * kl[2]]])
    torch.testing.assert_close(output.terms.detach(), expected, rtol=TOLERANCE, atol=TOLERANCE)
    output.terms.sum().backward()
    slope = [0.5 * (1 - 1 / r) for r in (1.5, 0.5, 1.1)]
    expected = torch.tensor([[slope[0], -1.0 + slope[1], slope[2]]])
    torch.testing.assert_close(logprobs.grad, expected, rtol=TOLERANCE, atol=TOLERANCE)
    metrics = finish_metrics(output.metrics)
    assert metrics["policy/clipfrac"] == 1.0 and metrics["policy/ratio"] == pytest.approx(1.0)
    assert metrics["loss/kl"] == pytest.approx(sum(kl) / 3, rel=1e-6)


def test_a_bad_answer_is_clipped_from_below_only():
    ratios = torch.tensor([[1.5, 0.5]])
    logprobs = ratios.log().requires_grad_()
    ones, zeros = torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2)
    args = (zeros, zeros, torch.tensor([-2.0]), ones, ones, 0.2, 0.3, 0.0, "k3")
    output = grpo_loss(logprobs, *args)
    torch.testing.assert_close(output.terms.detach(), torch.tensor([[3.0, 1.6]]))
    output.terms.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([[3.0, 0.0]]))


def test_unmasked_loss_is_the_papers_objective_in_value_and_gradient():
    results = []
    for objective in (
        lambda x: (loss(x, VALID).terms * row_weights(VALID)).sum() / 4,
        lambda x: -deepseekmath_objective(x, VALID),
    ):
        x = LOGPROBS.clone().requires_grad_()
        value = objective(x)
        value.backward()
        results.append((value.detach(), x.grad))
    # row_weights are float32
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_token_normalisation_is_the_mean_over_all_tokens_of_the_batch():
    terms = loss(LOGPROBS, VALID).terms
    tokens = [terms[i, t] for i, t in VALID.nonzero().tolist()]
    assert terms.sum() / VALID.sum() == pytest.approx(float(sum(tokens) / len(tokens)))
    assert row_weights(VALID).flatten().tolist() == pytest.approx([1 / 4, 1 / 2, 1 / 3, 1.0])
    assert row_weights(MASK).flatten().tolist() == pytest.approx([1 / 3, 1.0, 1.0, 1.0])


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("kl_coef", [0.0, KL_COEF])
def test_gradients_equal_finite_differences(estimator, kl_coef):
    x = LOGPROBS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, MASK, kl_coef, estimator).terms, (x,))


@pytest.mark.parametrize("garbage", [math.inf, -math.inf, math.nan, 1e30])
def test_masked_tokens_give_exactly_nothing_without_a_kl(garbage):
    results = []
    for filler in (0.0, garbage):
        x = torch.where(MASK, LOGPROBS, filler).requires_grad_()
        output = loss(x, kl_coef=0.0)
        output.terms.sum().backward()
        results.append((output.terms.detach(), x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    terms, gradient = results[1]
    assert (terms[~MASK] == 0).all() and (gradient[~MASK] == 0).all()
    assert (gradient[MASK] != 0).any()


def test_with_a_kl_dropped_tokens_feel_only_it_and_padding_nothing():
    x = torch.where(VALID, LOGPROBS, math.nan).requires_grad_()
    loss(x).terms.sum().backward()
    assert (x.grad[~VALID] == 0).all()
    dropped = VALID & ~MASK
    expected = KL_COEF * (1 - torch.exp(REFERENCE - LOGPROBS))
    torch.testing.assert_close(x.grad[dropped], expected[dropped])


def test_a_group_without_spread_gives_no_policy_gradient():
    x = LOGPROBS.clone().requires_grad_()
    advantages, _ = group_advantages(torch.full((4,), 0.3), GROUPS, scale_rewards=True)
    loss(x, VALID, kl_coef=0.0, advantages=advantages).terms.sum().backward()
    assert (x.grad == 0).all()


def test_empty_batches_and_unknown_estimators():
    empty, mask = torch.zeros(0, 3, requires_grad=True), torch.zeros(0, 3, dtype=torch.bool)
    none = torch.zeros(0)
    output = grpo_loss(empty, empty, empty, none, mask, mask, 0.2, 0.2, 0.1, "k3")
    output.terms.sum().backward()
    assert output.metrics and all(n == 0 for _, n in output.metrics.values())
    advantages, std = group_advantages(none, none.long(), scale_rewards=True)
    assert advantages.numel() == std.numel() == 0
    with pytest.raises(ValueError, match="k1"):
        loss(LOGPROBS, estimator="k1")


@pytest.mark.parametrize("scale", [True, False])
def test_a_failed_answer_moves_nobody_elses_advantage(scale):
    rewards = torch.tensor([1.0, float("nan"), 0.0, 5.0, float("nan")])
    groups = torch.tensor([0, 0, 0, 1, 1])
    has_reward = ~rewards.isnan()
    advantages, std = group_advantages(rewards, groups, scale, has_reward)
    alone = group_advantages(rewards[has_reward], groups[has_reward], scale)
    assert torch.equal(advantages[has_reward], alone[0]) and torch.equal(std[has_reward], alone[1])
    assert advantages[~has_reward].eq(0).all() and alone[0][0] > 0.4


def test_a_weight_is_of_all_of_an_answers_terms():
    """A mean over answers of their tokens' means: surrogate and KL alike."""
    weight, bounds = row_weights(VALID), (CLIP_LOW, CLIP_HIGH, KL_COEF, "k3")
    args = (LOGPROBS, BEHAVIOUR, REFERENCE, ADVANTAGES, MASK, VALID, *bounds)
    found, plain = grpo_loss(*args, weight), grpo_loss(*args)
    assert torch.equal(found.terms, plain.terms * weight) and found.metrics == plain.metrics
    assert weight.unique().numel() > 1
