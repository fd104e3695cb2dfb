"""PPO, DPO, rejection sampling and PRM: values by hand, gradients, and what the mask shuts out."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_amrlhf.losses import ppo
from megatron_amrlhf.losses.reduce import finish_metrics
from tests.unit.losses.plainly import (
    dpo_loss,
    ppo_actor_loss,
    ppo_targets,
    ppo_value_loss,
    prm_loss,
    rejection_sampling_loss,
)

# float32 rounding of short sums
TOLERANCE = 1e-6
MASK = torch.tensor([[True, True, False, True], [False, True, True, False]])
NONE = torch.zeros_like(MASK)


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


OTHER = [randn(seed, 2, 4) for seed in range(1, 5)]


def ppo_actor(x, mask):
    return ppo_actor_loss(x, OTHER[0], OTHER[1], mask, 0.2)


def ppo_value(x, mask):
    return ppo_value_loss(x, OTHER[0], OTHER[1], mask, 0.3)


def dpo_chosen(x, mask, form="inside"):
    valid = mask if form == "inside" else torch.ones_like(mask)
    args = (x, OTHER[0], OTHER[1], OTHER[2], mask, MASK, 0.1, form, valid, torch.ones_like(MASK))
    return dpo_loss(*args)


def dpo_rejected(x, mask):
    return dpo_loss(OTHER[0], x, OTHER[1], OTHER[2], MASK, mask, 0.1, "inside")


def dpo_pair(x, mask):
    return dpo_chosen(x, mask, "pair")


def sampling_k2(x, mask):
    return rejection_sampling_loss(x, OTHER[0], mask, mask, 0.3, "k2")


def sampling_k3(x, mask):
    return rejection_sampling_loss(x, OTHER[0], mask, mask, 0.3, "k3")


def sampling_without_kl(x, mask):
    return rejection_sampling_loss(x, OTHER[0], mask, torch.ones_like(mask), 0.0, "k2")


def prm_bce(x, mask):
    return prm_loss(x[:, :, None], OTHER[0].sigmoid()[:, :, None], mask, "bce")


def prm_mse(x, mask):
    return prm_loss(x[:, :, None], OTHER[0][:, :, None], mask, "mse")


MASKED_LOSSES = [
    ppo_actor,
    ppo_value,
    dpo_chosen,
    dpo_rejected,
    sampling_k2,
    sampling_k3,
    sampling_without_kl,
    prm_bce,
    prm_mse,
]


@pytest.mark.parametrize("loss", [*MASKED_LOSSES, dpo_pair])
def test_gradients_equal_finite_differences(loss):
    x = randn(9, 2, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, MASK).terms, (x,))


@pytest.mark.parametrize("garbage", [math.inf, -math.inf, math.nan, 1e30])
@pytest.mark.parametrize("loss", MASKED_LOSSES)
def test_masked_tokens_give_exactly_nothing_whatever_stands_there(loss, garbage):
    clean = randn(9, 2, 4)
    gradients, terms, metrics = [], [], []
    for filler in (0.0, garbage):
        x = torch.where(MASK, clean, filler).requires_grad_()
        output = loss(x, MASK)
        output.terms.sum().backward()
        gradients.append(x.grad)
        terms.append(output.terms.detach())
        metrics.append(finish_metrics(output.metrics))
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(terms[0], terms[1])
    assert metrics[0] == metrics[1]
    assert (gradients[1][~MASK] == 0).all() and (gradients[1][MASK] != 0).any()
    if terms[1].shape == MASK.shape:
        assert (terms[1][~MASK] == 0).all()


@pytest.mark.parametrize("loss", [*MASKED_LOSSES, dpo_pair])
def test_an_all_zero_mask_gives_finite_terms_and_zero_gradients(loss):
    x = torch.full((2, 4), math.nan, dtype=torch.float64, requires_grad=True)
    if loss in (dpo_chosen, dpo_pair):  # the other answer's mask has to be empty as well
        form = "pair" if loss is dpo_pair else "inside"
        ones = torch.ones_like(MASK)
        args = (*OTHER[:3], NONE, NONE, 0.1, form, ones, ones)
        output = dpo_loss(x, *args)
        expected = 0.0 if form == "pair" else math.log(2)
        torch.testing.assert_close(
            output.terms, torch.full((2, 1), expected, dtype=torch.float64), rtol=0, atol=1e-15
        )
    else:
        output = loss(x, NONE)
        assert output.terms.isfinite().all()
    output.terms.sum().backward()
    assert (x.grad == 0).all()


@pytest.mark.parametrize("loss", [*MASKED_LOSSES, dpo_pair])
def test_metrics_are_detached_scalars_and_terms_keep_float32_of_bfloat16(loss):
    x = randn(9, 2, 4).requires_grad_()
    for total, count in loss(x, MASK).metrics.values():
        assert total.shape == count.shape == () and total.dtype == torch.float64
        assert not total.requires_grad
    half = torch.zeros(1, 2, dtype=torch.bfloat16)
    ones = torch.ones(1, 2, dtype=torch.bool)
    assert ppo_actor_loss(half, half, half, ones, 0.2).terms.dtype == torch.float32


def test_ppo_at_ratio_one_is_minus_the_advantage_with_the_policy_gradient():
    logprobs = randn(1, 2, 4).requires_grad_()
    output = ppo_actor_loss(logprobs, logprobs.detach(), OTHER[1], MASK, 0.2)
    torch.testing.assert_close(output.terms.detach(), -OTHER[1] * MASK)
    output.terms.sum().backward()
    torch.testing.assert_close(logprobs.grad, -OTHER[1] * MASK)
    metrics = finish_metrics(output.metrics)
    assert metrics == {"policy/approx_kl": 0.0, "policy/clipfrac": 0.0, "policy/ratio": 1.0}


def test_ppo_clips_only_where_the_ratio_has_gone_too_far_the_good_way():
    ratios = torch.tensor([[1.5, 1.5, 0.5, 0.5, 1.1]])
    advantages = torch.tensor([[2.0, -2.0, 2.0, -2.0, 3.0]])
    logprobs = ratios.log().requires_grad_()
    mask = torch.ones(1, 5, dtype=torch.bool)
    output = ppo_actor_loss(logprobs, torch.zeros(1, 5), advantages, mask, 0.2)
    expected = torch.tensor([[-2.4, 3.0, -1.0, 1.6, -3.3]])
    torch.testing.assert_close(output.terms.detach(), expected, rtol=TOLERANCE, atol=0)
    output.terms.sum().backward()
    expected = torch.tensor([[0.0, 3.0, -1.0, 0.0, -3.3]])
    torch.testing.assert_close(logprobs.grad, expected, rtol=TOLERANCE, atol=0)
    metrics = finish_metrics(output.metrics)
    assert metrics["policy/clipfrac"] == pytest.approx(0.8)
    assert metrics["policy/ratio"] == pytest.approx(1.02)
    kl = (ratios - 1 - ratios.log()).mean().item()
    assert metrics["policy/approx_kl"] == pytest.approx(kl, rel=1e-5)


def test_ppo_metrics_read_kept_tokens_only():
    logprobs = torch.tensor([[math.log(1.5), math.nan, math.log(0.5)]])
    mask = torch.tensor([[True, False, True]])
    metrics = finish_metrics(ppo_actor_loss(logprobs, logprobs * 0, logprobs, mask, 0.2).metrics)
    assert metrics["policy/ratio"] == pytest.approx(1.0) and metrics["policy/clipfrac"] == 1.0


def test_value_loss_takes_the_larger_of_plain_and_clipped_error():
    values = torch.tensor([[2.0, 1.1, 5.0, 7.0]], requires_grad=True)
    old = torch.tensor([[1.0, 1.0, 1.0, 7.0]])
    returns = torch.tensor([[3.0, 3.0, 1.0, 0.0]])
    valid = torch.tensor([[True, True, True, False]])
    output = ppo_value_loss(values, old, returns, valid, 0.5)
    # 2.0 clips to 1.5: error 2.25 beats 1; 1.1 is inside; 5.0 clips to 1.5: 0.25 loses against 16
    expected = torch.tensor([[1.125, 1.805, 8.0, 0.0]])
    torch.testing.assert_close(output.terms.detach(), expected, rtol=TOLERANCE, atol=0)
    output.terms.sum().backward()
    expected = torch.tensor([[0.0, -1.9, 4.0, 0.0]])
    torch.testing.assert_close(values.grad, expected, rtol=TOLERANCE, atol=0)
    metrics = finish_metrics(output.metrics)
    assert metrics["value/clipfrac"] == pytest.approx(1 / 3)
    assert metrics["value/error"] == pytest.approx((1 + 3.61 + 16) / 3, rel=1e-6)


def test_a_value_inside_the_clip_range_is_not_clipped_whatever_the_rounding():
    # Of some of these the clipped value differs from the value in its last bit.
    old, returns = randn(3, 1, 4096).float() * 0.05, randn(7, 1, 4096).float()
    values = randn(5, 1, 4096).float().clamp(-0.001, 0.001)
    clipped = old + (values - old).clamp(-0.2, 0.2)
    assert (clipped != values).any() and ((clipped - returns) ** 2 > (values - returns) ** 2).any()
    valid = torch.ones(1, 4096, dtype=torch.bool)
    metrics = finish_metrics(ppo_value_loss(values, old, returns, valid, 0.2).metrics)
    assert metrics["value/clipfrac"] == 0


def test_values_outside_the_clip_range_are_counted_as_in_exact_numbers():
    old, steps = randn(3, 1, 4096).float() * 3, randn(5, 1, 4096).float()
    returns, valid = randn(7, 1, 4096).float(), torch.ones(1, 4096, dtype=torch.bool)
    values = old + steps
    metrics = finish_metrics(ppo_value_loss(values, old, returns, valid, 0.2).metrics)
    exact = [x.double() for x in (values, old, returns)]
    moved = exact[0] - exact[1]
    # The value went towards the return and past the range: the clipped one is further away.
    midpoint = exact[1] + (moved + moved.clamp(-0.2, 0.2)) / 2
    is_clipped = (moved.abs() > 0.2) & ((exact[2] - midpoint) * moved > 0)
    assert 0 < metrics["value/clipfrac"] == is_clipped.double().mean()


@pytest.mark.parametrize("form", ["inside", "pair"])
def test_a_pair_that_policy_and_reference_see_alike_counts_half(form):
    reference = -randn(11, 2, 64, 200).float().abs() * 4
    noise = 1 + 1e-7 * randn(13, 2, 64, 200).float()  # the rounding of another micro-batch
    policy, ones = reference * noise, torch.ones(64, 200, dtype=torch.bool)
    args = (*policy, *reference, ones, ones, 0.1, form, ones, ones)
    metrics = finish_metrics(dpo_loss(*args).metrics)
    assert metrics["dpo/margin"] != 0 and metrics["dpo/accuracy"] == 0.5
    policy[0, :16] += 1e-3
    policy[0, 16:24] -= 1e-3
    accuracy = finish_metrics(dpo_loss(*args).metrics)["dpo/accuracy"]
    assert accuracy == (16 + 40 / 2) / 64


@pytest.mark.parametrize("form", ["inside", "pair"])
def test_dpo_is_ln_2_where_policy_and_reference_agree(form):
    ones = torch.ones_like(MASK)
    output = dpo_loss(*OTHER[:2], *OTHER[:2], ones, ones, 0.1, form, ones, ones)
    assert output.terms.shape == (2, 1)
    torch.testing.assert_close(
        output.terms, torch.full((2, 1), math.log(2), dtype=torch.float64), rtol=0, atol=1e-12
    )
    assert finish_metrics(output.metrics)["dpo/margin"] == 0


def test_dpo_forms_by_hand():
    chosen, ref_chosen = torch.tensor([[-1.0, -2.0, -3.0]]), torch.tensor([[-2.0, -2.5, -1.0]])
    rejected, ref_rejected = torch.tensor([[-4.0, -1.0]]), torch.tensor([[-2.0, -2.0]])
    chosen_mask, rejected_mask = torch.tensor([[1, 1, 0]]).bool(), torch.tensor([[1, 0]]).bool()
    ones = [torch.ones_like(mask) for mask in (chosen_mask, rejected_mask)]
    args = (chosen, rejected, ref_chosen, ref_rejected, chosen_mask, rejected_mask, 0.5)
    inside = dpo_loss(*args, "inside")
    # kept log-ratios: 1 + 0.5 and -2, times beta
    assert inside.terms.item() == pytest.approx(math.log(1 + math.exp(-1.75)), rel=TOLERANCE)
    assert finish_metrics(inside.metrics) == {
        "dpo/accuracy": 1.0,
        "dpo/margin": 1.75,
        "reward/implicit_chosen": 0.75,
        "reward/implicit_rejected": -1.0,
    }
    pair = dpo_loss(*args, "pair", *ones)
    # all log-ratios: -0.5 and -1, and 3 of 5 tokens are kept
    assert pair.terms.item() == pytest.approx(0.6 * math.log(1 + math.exp(-0.25)), rel=TOLERANCE)
    assert finish_metrics(pair.metrics)["dpo/margin"] == pytest.approx(0.25)


def test_dpo_gradient_by_hand_on_three_tokens():
    chosen = torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True)
    rejected = torch.tensor([[-4.0, -1.0, -1.0]], requires_grad=True)
    reference = torch.tensor([[-2.0, -2.5, -1.0]]), torch.tensor([[-2.0, -2.0, -1.0]])
    masks = torch.tensor([[1, 1, 0]]).bool(), torch.tensor([[1, 0, 1]]).bool()
    dpo_loss(chosen, rejected, *reference, *masks, 0.5, "inside").terms.sum().backward()
    # kept log-ratios 1.5 and -2, margin 1.75; d(-log sigmoid(m))/dm = -sigmoid(-m)
    slope = 0.5 / (1 + math.exp(1.75))
    expected = torch.tensor([[-slope, -slope, 0.0]])
    torch.testing.assert_close(chosen.grad, expected, rtol=TOLERANCE, atol=0)
    expected = torch.tensor([[slope, 0.0, slope]])
    torch.testing.assert_close(rejected.grad, expected, rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_ppo_with_a_kl_in_the_loss(estimator):
    """The KL holds dropped tokens too, padding feels nothing, and all gradients are right."""
    valid, mask = torch.ones_like(MASK), MASK.clone()
    valid[1, 3] = False

    targets = ppo_targets(
        valid, mask=mask, behaviour=OTHER[0], advantages=OTHER[1], reference=OTHER[2]
    )

    def loss(x):
        return ppo.ppo_actor_loss(x, targets, clip_eps=0.2, kl_coef=0.3, estimator=estimator)

    x = randn(9, 2, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x).terms, (x,))
    loss(x).terms.sum().backward()
    logratio = (x - OTHER[2]).detach()
    slope = 0.3 * (logratio if estimator == "k2" else 1 - torch.exp(-logratio))
    dropped = valid & ~mask
    torch.testing.assert_close(x.grad[dropped], slope[dropped])
    assert (x.grad[~valid] == 0).all() and dropped.any()


def test_both_dpo_forms_without_a_mask_are_plain_dpo():
    ones = torch.ones_like(MASK)
    args = (*OTHER, ones, ones, 0.1)
    inside, pair = dpo_loss(*args, "inside"), dpo_loss(*args, "pair", ones, ones)
    assert torch.equal(inside.terms, pair.terms) and inside.metrics == pair.metrics


def test_the_printed_dpo_form_scales_a_pair_and_leaves_tokens_alone():
    x = randn(9, 2, 4)
    gradients = []
    for mask in (MASK, torch.ones_like(MASK)):
        leaf = x.clone().requires_grad_()
        dpo_pair(leaf, mask).terms.sum().backward()
        gradients.append(leaf.grad)
    scales = gradients[0] / gradients[1]
    # kept shares: (3 + 3) / 8 and (2 + 2) / 8 against (4 + 3) / 8 and (4 + 2) / 8
    expected = torch.tensor([[6 / 7], [4 / 6]], dtype=torch.float64).expand(2, 4)
    torch.testing.assert_close(scales, expected)


def test_rejection_sampling_by_hand():
    logprobs = torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True)
    reference = torch.tensor([[-1.5, -1.0, -9.0]])
    mask, valid = torch.tensor([[1, 0, 0]]).bool(), torch.tensor([[1, 1, 0]]).bool()
    output = rejection_sampling_loss(logprobs, reference, mask, valid, 0.4, "k2")
    expected = torch.tensor([[1.0 + 0.4 * 0.125, 0.4 * 0.5, 0.0]])
    torch.testing.assert_close(output.terms.detach(), expected, rtol=TOLERANCE, atol=0)
    output.terms.sum().backward()
    # the KL pulls on the second token too, though the mask drops it
    expected = torch.tensor([[-1 + 0.4 * 0.5, -0.4, 0.0]])
    torch.testing.assert_close(logprobs.grad, expected, rtol=TOLERANCE, atol=0)
    metrics = finish_metrics(output.metrics)
    assert metrics == {"loss/kl": pytest.approx(0.3125), "loss/nll": pytest.approx(1.0)}


def test_rejection_sampling_without_kl_is_the_masked_likelihood():
    x = randn(9, 2, 4).requires_grad_()
    output = sampling_without_kl(x, MASK)
    assert torch.equal(output.terms, torch.where(MASK, -x, 0.0))


def test_prm_by_hand_over_two_attributes():
    outputs = torch.tensor([[[0.0, 2.0], [5.0, 5.0], [-1.0, 3.0]]])
    targets = torch.tensor([[[1.0, 0.0], [math.nan, math.nan], [0.0, 1.0]]])
    mask = torch.tensor([[True, False, True]])
    bce = prm_loss(outputs, targets, mask, "bce")
    first = (math.log(2) + math.log(1 + math.exp(2))) / 2
    last = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(-3))) / 2
    torch.testing.assert_close(bce.terms, torch.tensor([[first, 0.0, last]]))
    # an output of 0 says no; so: wrong, wrong, right, right
    assert finish_metrics(bce.metrics) == {"prm/accuracy": 0.5}
    mse = prm_loss(outputs, targets, mask, "mse")
    torch.testing.assert_close(mse.terms, torch.tensor([[2.5, 0.0, 2.5]]))
    assert finish_metrics(mse.metrics) == {"prm/absolute_error": 1.5}


def test_a_row_gives_the_same_terms_alone_and_in_a_batch_with_more_padding():
    x = randn(9, 2, 4)
    for loss in (ppo_actor_loss, ppo_value_loss):
        together = loss(x, OTHER[0], OTHER[1], MASK, 0.2).terms
        pieces = [t[1:, :3] for t in (x, OTHER[0], OTHER[1], MASK)]
        alone = loss(*pieces, 0.2).terms
        assert torch.equal(together[1:, :3], alone)
    together = dpo_loss(*OTHER, MASK, MASK, 0.1, "inside").terms
    pieces = [t[1:, :3] for t in (*OTHER, MASK, MASK)]
    torch.testing.assert_close(together[1:], dpo_loss(*pieces, 0.1, "inside").terms)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="outside"):
        dpo_loss(*OTHER, MASK, MASK, 0.1, "outside")
    with pytest.raises(ValueError, match="k1"):
        rejection_sampling_loss(*OTHER[:2], MASK, MASK, 0.1, "k1")
    with pytest.raises(ValueError, match="huber"):
        prm_loss(OTHER[0][..., None], OTHER[1][..., None], MASK, "huber")


def test_a_batch_without_rows_has_all_metrics_at_zero():
    empty, mask = torch.zeros(0, 3, requires_grad=True), torch.zeros(0, 3, dtype=torch.bool)
    outputs = [
        ppo_actor_loss(empty, empty, empty, mask, 0.2),
        ppo_value_loss(empty, empty, empty, mask, 0.2),
        dpo_loss(empty, empty, empty, empty, mask, mask, 0.1, "pair", mask, mask),
        rejection_sampling_loss(empty, empty, mask, mask, 0.1, "k3"),
        prm_loss(empty[..., None], empty[..., None], mask, "bce"),
    ]
    for output in outputs:
        output.terms.sum().backward()
        assert output.metrics
        assert all(total == 0 and count == 0 for total, count in output.metrics.values())
